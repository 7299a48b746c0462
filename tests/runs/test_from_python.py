"""What the command line can do, from Python: `compressvit.apply` and `compressvit.distill`."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.runs import TINY, done, refused, student_bytes
from helpers.training import random_batches, tiny_vit, values
from rich.console import Console
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import compressvit
from compressvit import Multiplex, UserError
from compressvit.errors import command_line
from compressvit.recipe.recipe import parse_recipe
from compressvit.training.loop import Interrupted

QUIET = Console(file=io.StringIO())
ROOT = Path(__file__).parents[2]


# ----------------------------------------------------------------------------------------------------------------- apply


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """The run of the command line, to compare with, and its recipe."""
    folder = tmp_path_factory.mktemp("typed")
    (folder / "tiny.yaml").write_text(TINY)
    done("apply", folder / "tiny.yaml", "--output", folder / "run", "seed=3")
    return folder


@pytest.mark.wide_unless(lambda kind: kind == "dictionary")
@pytest.mark.parametrize("kind", ["path", "dictionary", "recipe"])
def test_apply_does_what_the_command_line_does(typed, tmp_path, kind):
    given, words = {
        "path": (typed / "tiny.yaml", ["seed=3"]),
        "dictionary": (yaml.safe_load(TINY), ["seed=3"]),
        "recipe": (parse_recipe(TINY, overrides=["seed=3"]), []),
    }[kind]
    run = compressvit.apply(given, tmp_path / "run", overrides=words, console=QUIET)
    assert student_bytes(run.folder) == student_bytes(typed / "run")
    written = json.loads((run.folder / "results.json").read_text())
    assert run.results.model_dump(mode="json", exclude_unset=True) == written
    assert run.results.student.top1 == written["student"]["top1"] >= 0
    assert not run.student.training
    again = compressvit.load(run.folder / "student")
    images = torch.randn(2, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(again(images), run.student.cpu()(images))
        assert run.teacher.cpu()(images).shape == (2, 10)
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["command"], "what was typed, whoever typed it"
    assert parse_recipe((run.folder / "recipe.yaml").read_text(), overrides=words).seed == 3


@pytest.mark.wide
def test_a_shipped_recipe_has_a_name(tmp_path):
    words = ["data.limit_train=24", "data.limit_val=16", "teacher.finetune.epochs=1", "steps.1.distill.epochs=1"]
    run = compressvit.apply("quickstart", tmp_path / "run", overrides=words, console=QUIET)
    with pytest.raises(UserError, match="is not empty"):
        compressvit.apply("quickstart", tmp_path / "run", overrides=words, console=QUIET)
    again = compressvit.apply("quickstart", tmp_path / "run", overrides=words, resume=True, console=QUIET)
    assert values(again.student).keys() == values(run.student).keys()


@pytest.mark.parametrize(
    ("given", "words", "message"),
    [
        (7, [], r"takes a Recipe, a dictionary, or the path or name of a recipe, not a int"),
        ("quickstrat", [], r"no recipe 'quickstrat'.*did you mean 'quickstart'"),
        ({"teacher": {"model": "vit_tiny_patch16_224"}}, [], r"recipe: 2 errors"),
        (parse_recipe(TINY), ["seed=1"], r"this one is a Recipe already: seed=1"),
    ],
)
def test_apply_refuses(given, words, message, tmp_path):
    with pytest.raises(UserError, match=re.compile(message, re.DOTALL)):
        compressvit.apply(given, tmp_path / "run", overrides=words, console=QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "typed_words", "called_words"),
    [
        ((), "Give --resume to continue the run in it, --overwrite to delete it and start again, or --output for another",
         "Give resume=True to continue the run in it, overwrite=True to delete it and start again, or output for another"),
        (("resume", "overwrite"), "--resume and --overwrite contradict", "resume=True and overwrite=True contradict"),
        (("resume",), "--resume: there is no run in", "resume=True: there is no run in"),
        (("overwrite",), "--overwrite: ", "overwrite=True: "),
        (("file",), "--output file is a file", "output='file' is a file"),
    ],
)  # fmt: skip
def test_a_refusal_names_options_as_the_caller_writes_them(tmp_path, monkeypatch, words, typed_words, called_words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    output, switches = ("file", ()) if words == ("file",) else ("other", words)
    message = refused("apply", "quickstart", "--output", output, *(f"--{name}" for name in switches))
    assert typed_words in message
    assert "=True" not in message
    with pytest.raises(UserError) as caught:
        compressvit.apply("quickstart", output, console=QUIET, **dict.fromkeys(switches, True))
    assert called_words in str(caught.value)
    assert "--" not in str(caught.value)


def test_a_stopped_run_says_how_its_caller_continues_it(tmp_path):
    given = 15, tmp_path / "run", "1_distill.pt was written"
    with command_line():
        assert str(Interrupted(*given)).endswith(f"Continue with: compressvit apply {tmp_path / 'run'} --resume")
    called = str(Interrupted(*given))
    assert called.endswith(f"compressvit.apply(the same recipe, {str(tmp_path / 'run')!r}, resume=True)")


# --------------------------------------------------------------------------------------------------------------- distill


def pair():
    """A teacher of 4 classes, and a student that shares blocks."""
    teacher = tiny_vit()
    return compressvit.compress(teacher, [Multiplex(share=2)]), teacher


def test_a_student_learns_from_batches_of_ones_own(tmp_path):
    student, teacher = pair()
    before, taught = values(student), values(teacher)
    batches, held_out = random_batches(6, 8), random_batches(2, 8, seed=1)
    first = compressvit.distill(*pair(), batches, validation=held_out, epochs=1, lr=1e-6, console=QUIET).figures
    result = compressvit.distill(
        student, teacher, batches, validation=held_out, epochs=4, lr=1e-2, output=tmp_path / "out", console=QUIET
    )
    assert result.student is student
    assert not student.training
    assert result.figures["images"] == 16
    assert result.figures["cosine"] > first["cosine"] + 0.005
    assert {"top1", "agreement", "teacher_top1"} <= result.figures.keys()
    assert result.kept_epoch == 4
    assert any(not torch.equal(v, before[n]) for n, v in values(student).items())
    assert all(torch.equal(v, taught[n]) for n, v in values(teacher).items()), "the teacher is as it was"
    stored = compressvit.load(tmp_path / "out" / "student")
    assert all(torch.equal(v, values(stored)[n]) for n, v in values(student).items())
    assert (tmp_path / "out" / "metrics.jsonl").is_file()


def test_images_alone_are_enough():
    student, teacher = pair()
    images = DataLoader(torch.randn(20, 1, 8, 8), batch_size=8)
    result = compressvit.distill(student, teacher, images, validation=images, epochs=2, keep="best", console=QUIET)
    assert result.figures["top1"] is None
    assert 0 <= result.figures["agreement"] <= 100
    nothing = compressvit.distill(student, teacher, images, epochs=1, max_steps=1, console=QUIET)
    assert nothing.figures == {}


def test_a_teacher_may_take_other_images():
    student, _ = pair()
    teacher = tiny_vit(in_chans=3, img_size=16)
    seen = []
    teacher.register_forward_pre_hook(lambda _, images: seen.append(tuple(images[0].shape[1:])))
    options = {"epochs": 1, "max_steps": 2, "console": QUIET}
    compressvit.distill(student, teacher, random_batches(2, 4), layers=(), **options)
    assert set(seen) >= {(3, 16, 16)}
    calls = []

    def mine(images):
        calls.append(len(images))
        return images.repeat(1, 3, 2, 2)

    compressvit.distill(student, teacher, random_batches(2, 4), layers=(), teacher_input=mine, **options)
    assert len(calls) >= 2


def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    import os
    import signal

    from compressvit.training import step

    batches = random_batches(4, 8)
    options = {"epochs": 2, "console": QUIET, "seed": 5}
    whole, teacher = pair()
    compressvit.distill(whole, teacher, batches, output=tmp_path / "whole", **options)
    stopped, _ = pair()
    original, calls = step.total_of, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(step, "total_of", counted)
        with pytest.raises(Interrupted, match="resume=True"):
            compressvit.distill(stopped, teacher, batches, output=tmp_path / "out", **options)
    with pytest.raises(UserError, match="is not empty; give resume=True"):
        compressvit.distill(stopped, teacher, batches, output=tmp_path / "out", **options)
    fresh, _ = pair()
    with pytest.raises(UserError, match=r"other options: epochs was 2 and is 3; lr was 0\.001 and is 0\.5"):
        compressvit.distill(
            fresh, teacher, batches, output=tmp_path / "out", resume=True, **{**options, "epochs": 3, "lr": 0.5}
        )
    compressvit.distill(fresh, teacher, batches, output=tmp_path / "out", resume=True, **options)
    assert all(torch.equal(v, values(whole)[n]) for n, v in values(fresh).items())


@pytest.mark.wide_unless(lambda where, number: (where, number) == ("save_student", "SIGTERM"))
@pytest.mark.parametrize("where", ["evaluate", "save_student"])
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_outside_of_the_training_is_told_and_what_is_trained_is_kept(where, number, tmp_path, monkeypatch):
    import os
    import signal

    from compressvit.runs import distill

    real = getattr(distill, where)

    def stopping(*given, **options):
        if where == "evaluate" and not (tmp_path / "out" / "student").exists():
            return real(*given, **options)  # in the training, which waits for it
        os.kill(os.getpid(), signal.Signals[number])
        raise AssertionError("the signal came later")

    batches = random_batches(2, 4)
    options = {"epochs": 1, "console": QUIET, "validation": batches, "output": tmp_path / "out", "keep": "last"}
    options["evaluate_every"] = 5
    student, teacher = pair()
    before = [signal.getsignal(signal.Signals[name]) for name in ("SIGTERM", "SIGINT")]
    with monkeypatch.context() as patch:
        patch.setattr(distill, where, stopping)
        with pytest.raises(Interrupted, match=r"^the training was stopped; go on with resume=True$"):
            compressvit.distill(student, teacher, batches, **options)
    assert [signal.getsignal(signal.Signals[name]) for name in ("SIGTERM", "SIGINT")] == before
    again, _ = pair()
    done = compressvit.distill(again, teacher, batches, resume=True, **options)
    assert done.figures["images"] == 8


class Stream(IterableDataset):
    def __iter__(self):
        return iter([torch.randn(1, 8, 8)])


def labels(*shape, high=4):
    return TensorDataset(torch.randn(8, 1, 8, 8), torch.randint(high, (8, *shape)))


GOOD = random_batches(1, 4)


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        (DataLoader(Stream(), batch_size=1), {}, r"train_loader has no length, .*map-style data set, or a list"),
        ((b for b in GOOD), {}, r"train_loader has no length"),
        ([], {}, r"train_loader has no batches"),
        (DataLoader(labels(), batch_size=16, drop_last=True), {}, r"at least one whole batch"),
        ([torch.randn(1, 8, 8)], {}, r"gives a tensor of shape \(1, 8, 8\) and torch\.float32; a batch is images \(B, C"),
        ([torch.zeros(2, 1, 8, 8, dtype=torch.uint8)], {}, r"torch\.uint8; a batch is .*floating point"),
        ([{"image": 1}], {}, r"gives a dict; a batch is images"),
        (DataLoader(labels(3), batch_size=4), {}, r"targets of a tensor of shape \(4, 3\).* class indices"),
        (
            [(torch.randn(4, 1, 8, 8), torch.full((4,), 9))],
            {"losses": {"labels": {"weight": 1}}},
            r"label 9, but the student has only 4 classes",
        ),
        ([torch.randn(4, 1, 8, 8)], {"losses": {"labels": {"weight": 1}}}, r"batches of train_loader have none"),
        ([torch.randn(4, 3, 8, 8)], {}, r"the student does not take images of shape \(3, 8, 8\)"),
        (GOOD, {"epoch": 3}, r"Distill: epoch: unknown key; did you mean 'epochs'\?"),
        (GOOD, {"epochs": 0}, r"epochs: should be greater than or equal to 1"),
        (GOOD, {"losses": {"prediction": {"weight": 0}, "attention_relation": {"weight": 0}, "hidden_relation": {"weight": 0}}},
         r"nothing to learn"),
        (GOOD, {"optimizer": "adamv"}, r"optimizer 'adamv' is unknown to timm; did you mean"),
        (GOOD, {"keep": "best"}, r"there are no validation batches"),
        (GOOD, {"validation": [torch.randn(2, 1, 16, 16)]}, r"those of validation \(1, 16, 16\)"),
        (GOOD, {"resume": True}, r"give output=FOLDER"),
        (GOOD, {"device": "hpu"}, r"hpu"),
        (GOOD, {"teacher_input": lambda x: x[:, :, :4]}, r"the teacher does not take images of shape \(1, 4, 8\)"),
        (GOOD, {"layers": ((0, 7),)}, r"block 7 of the teacher"),
    ],
)  # fmt: skip
def test_distill_refuses(batches, options, message):
    student, teacher = pair()
    before = values(student)
    with pytest.raises(UserError, match=message):
        compressvit.distill(student, teacher, batches, console=QUIET, **options)
    assert all(torch.equal(v, before[n]) for n, v in values(student).items())


def test_models_that_do_not_go_together(tmp_path):
    student, teacher = pair()
    with pytest.raises(UserError, match="the same model"):
        compressvit.distill(teacher, teacher, GOOD)
    with pytest.raises(UserError, match="the teacher is a str, not a model"):
        compressvit.distill(student, "teacher", GOOD)
    other = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 8), torch.nn.Flatten())
    other.num_classes = 4
    with pytest.raises(UserError, match=r"Sequential that was not built by timm\.create_model"):
        compressvit.distill(other, teacher, GOOD, layers="matched", output=tmp_path / "out", console=QUIET)
    assert not (tmp_path / "out").exists(), "before the training, not after it"
    with pytest.raises(UserError, match=r"the student has 4 and the teacher 7; set losses\.prediction\.weight=0"):
        compressvit.distill(student, tiny_vit(num_classes=7), GOOD)


# --------------------------------------------------------------------------------------------------------- docs/python.md


@pytest.mark.wide  # it trains for some seconds
def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    section = (ROOT / "docs" / "python.md").read_text(encoding="utf-8").partition("\n## ")[0]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(code) >= 2
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in code:
        exec(compile(block, "python.md", "exec"), names)
    assert (tmp_path / "runs" / "first" / "results.json").is_file()
    assert names["done"].figures["agreement"] > 25  # measured 40.0, by chance at most 15


def test_models_in_half_precision_are_refused():
    half, teacher = pair()
    with pytest.raises(
        UserError, match=r"the student has parameters of bfloat16.*student\.float\(\), with precision='bf16'"
    ):
        compressvit.distill(half.bfloat16(), teacher, GOOD)


def test_a_folder_of_a_training_that_failed_at_once_can_be_continued(tmp_path):
    student, teacher = pair()
    spoilt = [(torch.full((4, 1, 8, 8), float("nan")), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(UserError, match="loss is nan"):
        compressvit.distill(student, teacher, spoilt, output=tmp_path / "out", epochs=1, console=QUIET)
    student, _ = pair()
    done = compressvit.distill(student, teacher, GOOD, output=tmp_path / "out", epochs=1, resume=True, console=QUIET)
    assert done.folder == tmp_path / "out"
    with pytest.raises(UserError, match=r"there is no training in .* \(no distill\.json\)"):
        compressvit.distill(student, teacher, GOOD, output=tmp_path / "none", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        compressvit.distill(student, teacher, GOOD, output=tmp_path / "file")


def test_a_later_batch_of_another_size_is_refused():
    student, teacher = pair()
    with pytest.raises(UserError, match=r"images of shape \(1, 4, 4\) after some of \(1, 8, 8\)"):
        compressvit.distill(student, teacher, [*GOOD, torch.randn(2, 1, 4, 4)], console=QUIET)


def test_images_alone_in_any_float(tmp_path):
    """As `DataLoader(TensorDataset(images))` gives them."""
    student, teacher = pair()
    loader = DataLoader(TensorDataset(torch.randn(8, 1, 8, 8, dtype=torch.float64)), batch_size=4)
    done = compressvit.distill(student, teacher, loader, validation=loader, epochs=1, console=QUIET)
    assert done.figures["top1"] is None
    assert done.figures["agreement"] is not None


def test_a_dictionary_holds_what_python_holds(tmp_path):
    content = {**yaml.safe_load(TINY), "seed": np.int64(3)}
    content["teacher"] = {**content["teacher"], "weights": tmp_path / "nothing"}
    with pytest.raises(UserError, match="there is no file"):
        compressvit.apply(content, tmp_path / "run", console=QUIET)
    with pytest.raises(
        UserError, match=r"steps\[0\] of the dictionary is a Multiplex, which a recipe cannot hold; a step is written"
    ):
        compressvit.apply({**content, "steps": [compressvit.Multiplex(share=2)]}, tmp_path / "run", console=QUIET)
    with pytest.raises(UserError, match="overrides is a list"):
        compressvit.apply("quickstart", tmp_path / "run", overrides="seed=1", console=QUIET)
    assert not (tmp_path / "run").exists()
