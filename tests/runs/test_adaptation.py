"""A pretrained backbone, a new classifier and an adapter, from recipe to merged timm model, and runs side by side."""

from __future__ import annotations

import csv
import json
import os
import shutil

import pytest
import timm
import torch
from helpers.runs import done, run
from safetensors.torch import load_file

from compressvit.artifacts import artifact
from compressvit.artifacts.adapter import load_adapter
from compressvit.artifacts.merge import photograph_like
from compressvit.errors import UserError
from compressvit.recipe.recipe import parse_recipe
from compressvit.report.compare import compare, label
from compressvit.report.trade_off import compare_findings
from compressvit.runs.merge import merge_folder
from compressvit.transforms import Adapters, RepAdapter
from compressvit.transforms.applying import compress

BACKBONE = """
seed: 0
teacher:
  model: vit_tiny_patch16_224
  args: {img_size: 8, patch_size: 2, in_chans: 1, embed_dim: 24, depth: 2, num_heads: 2}
  weights: WEIGHTS
  num_classes: 3
student: {head: new}
data: {name: digits, batch_size: 64, eval_batch_size: 180, limit_train: 128, limit_val: 90}
steps:
  - STEP
  - finetune: {epochs: 1, lr: 1.0e-2}
"""
STEPS = {
    "repadapter": "repadapter: {width: 4, scale: 0.5}",
    "adapters": "adapters: {ratio: 0.25}",
    "head": "freeze: {train: head}",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs by name: three methods, one of them with two seeds. The backbone has a classifier of another task."""
    folder = tmp_path_factory.mktemp("adapt")
    torch.manual_seed(0)
    args = {
        "img_size": 8,
        "patch_size": 2,
        "in_chans": 1,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 3,
    }
    artifact.save(timm.create_model("vit_tiny_patch16_224", **args), folder / "backbone")
    found = {}
    for name, step in STEPS.items():
        recipe = folder / f"{name}.yaml"
        recipe.write_text(BACKBONE.replace("WEIGHTS", str(folder / "backbone")).replace("STEP", step))
        found[name] = folder / name
        done("apply", "--no-report", recipe, "--output", found[name])
    found["repadapter 1"] = folder / "repadapter_1"
    done("apply", "--no-report", folder / "repadapter.yaml", "--output", found["repadapter 1"], "seed=1")
    return {"backbone": folder / "backbone", **found}


def test_only_the_adapter_and_the_new_classifier_were_trained(runs):
    before = load_file(runs["backbone"] / "model.safetensors")
    for name in STEPS:
        after = load_file(runs[name] / "student" / "model.safetensors")
        changed = {n for n in before if n in after and not (n.startswith("head") or torch.equal(before[n], after[n]))}
        assert changed == set()
        assert after["head.weight"].shape == (10, 24)
        assert {n for n in after if n not in before} == set() if name == "head" else len(after) > len(before)


def test_results_say_what_was_trained_and_leave_the_other_task_out(runs):
    results = json.loads((runs["repadapter"] / "results.json").read_text())
    each = 24 * 4 + 4 + 24 * 4 // 2 + 24
    assert results["student"]["trained_adapter"] == 4 * each
    assert results["student"]["trained_head"] == 250
    assert results["teacher"]["top1"] is None
    assert results["student"].get("agreement") is None
    assert results["student"]["adapter_bytes"] == (runs["repadapter"] / "adapter.safetensors").stat().st_size < 10_000
    assert json.loads((runs["head"] / "results.json").read_text())["student"]["trained_adapter"] == 0


def test_the_adapter_of_a_run_goes_onto_its_backbone(runs):
    images = torch.randn(2, 1, 8, 8)
    backbone = artifact.load(runs["backbone"])
    student = artifact.load(runs["adapters"] / "student")
    with torch.inference_mode():
        assert torch.equal(
            load_adapter(backbone, runs["adapters"] / "adapter.safetensors").eval()(images), student(images)
        )


def test_a_merged_run_is_a_timm_model(runs, tmp_path):
    code, out, _ = run("merge", runs["repadapter"], "--output", tmp_path / "merged")
    assert code == 0
    assert "largest difference on the run's own images" in out
    told = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert set(told["differences"]) == {"random", "the run's own", "photograph-like"}
    assert max(told["differences"].values()) < 1e-5  # seen 4e-7
    assert told["read_back"] == 0
    assert told["parameters"]["merged"] == told["parameters"]["backbone"] < told["parameters"]["unmerged"]
    plain = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True).eval()
    assert type(plain.blocks[0].attn).__module__.startswith("timm.")
    images = torch.randn(3, 1, 8, 8)
    with torch.inference_mode():
        expected = artifact.load(runs["repadapter"] / "student")(images)
        assert (plain(images) - expected).abs().max() <= 1e-5 * expected.abs().max()  # seen 4e-7
        base = artifact.load(runs["backbone"])
        base.reset_classifier(10)
        base.head.load_state_dict(plain.head.state_dict())
        assert (base.eval()(images) - expected).abs().max() > 1e-2 * expected.abs().max(), "nothing was merged"
    again = ("merge", runs["repadapter"], "--output", tmp_path / "merged")
    before = {file: file.read_bytes() for file in (tmp_path / "merged").iterdir()}
    code, _, err = run(*again)
    assert (code, "merged holds an earlier merge. Give --overwrite to replace it, or --output for" in err) == (2, True)
    with pytest.raises(UserError, match=r"Give overwrite=True to replace it, or output for another folder"):
        merge_folder(runs["repadapter"], tmp_path / "merged")
    assert {file: file.read_bytes() for file in (tmp_path / "merged").iterdir()} == before
    (tmp_path / "merged" / "model.safetensors").unlink()
    assert run(*again, "--overwrite")[0] == 0
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == before[tmp_path / "merged" / "model.safetensors"]


def test_what_cannot_be_merged_says_why(runs, tmp_path):
    for path, words in (
        (runs["adapters"], "adapters cannot be folded: the activation between the two projections"),
        (runs["backbone"], "there is nothing to merge"),
        (tmp_path / "gone", "there is no"),
        (tmp_path, "is not a compressvit artifact"),
    ):
        code, _, err = run("merge", path, "--output", tmp_path / "never")
        assert code == 2
        assert words in err
        assert "Traceback" not in err
    assert not (tmp_path / "never").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    code, _, err = run("merge", runs["repadapter"], "--output", tmp_path / "mine")
    assert (code, "is not empty, and no earlier merge wrote it" in err) == (2, True)
    assert run("merge", runs["repadapter"], "--output", tmp_path / "merged")[0] == 0
    (tmp_path / "mine" / "thesis.tex").rename(tmp_path / "merged" / "thesis.tex")
    code, _, err = run("merge", runs["repadapter"], "--output", tmp_path / "merged", "--overwrite")
    assert (code, "holds thesis.tex, which is not of an earlier merge" in err) == (2, True)
    assert (tmp_path / "merged" / "thesis.tex").read_text() == "years of work"
    copied = tmp_path / "run"
    shutil.copytree(runs["repadapter"], copied)
    shutil.copytree(runs["backbone"], copied / "teacher")
    before = {f: f.read_bytes() for f in copied.rglob("*") if f.is_file()}
    for target in ("student", "teacher"):  # artifacts are no earlier merges, least of all the one that is merged
        code, _, err = run("merge", copied, "--output", copied / target)
        assert (code, "and no earlier merge wrote it" in err) == (2, True)
    assert {f: f.read_bytes() for f in copied.rglob("*") if f.is_file()} == before


def test_a_merge_that_changes_the_outputs_is_an_error(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "compressvit.artifacts.merge.materialise", lambda model: compress(model, [Adapters(width=2)]).mul_head()
    )
    monkeypatch.setattr(
        torch.nn.Module, "mul_head", lambda self: self.head.weight.data.mul_(1.01) is None or self, raising=False
    )
    with pytest.raises(UserError, match="the merged model differs on random images by"):
        merge_folder(runs["repadapter"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_images_like_photographs_have_a_falling_spectrum():
    from compressvit.data.input import InputConfig

    config = InputConfig(3, 64, 64, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic", 1.0)
    images = photograph_like(8, config)
    assert images.shape == (8, 3, 64, 64)
    assert images.abs().max() <= 2.0
    power = torch.fft.rfft2(images).abs().square().mean((0, 1))
    assert power[1, 1] > 20 * power[16, 16]


# ------------------------------------------------------------------------------------------------------- runs side by side


def test_seeds_of_one_recipe_are_one_row(runs, tmp_path):
    rows = {row["label"]: row for row in compare([runs[n] for n in (*STEPS, "repadapter 1")], output=tmp_path)}
    assert set(rows) == {"repadapter width 4, scale 0.5", "adapters ratio 0.25", "freeze train head"}
    row = rows["repadapter width 4, scale 0.5"]
    scores = [
        json.loads((runs[n] / "results.json").read_text())["student"]["top1"] for n in ("repadapter", "repadapter 1")
    ]
    assert row["top1"] == pytest.approx(sum(scores) / 2)
    assert row["top1_std"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    assert rows["adapters ratio 0.25"]["top1_std"] is None
    text = (tmp_path / "compare.md").read_text()
    names = ", ".join(runs[n].name for n in ("repadapter", "repadapter 1"))
    assert f"| repadapter width 4, scale 0.5 | {names} | 2 |" in text
    assert f"{row['top1']:.2f} ± {row['top1_std']:.2f}" in text
    assert json.loads((tmp_path / "compare.json").read_text()) == list(rows.values())
    assert [r["label"] for r in csv.DictReader((tmp_path / "compare.csv").open())] == list(rows)
    assert (tmp_path / "compare.png").stat().st_size > 5_000
    drawn = {record["student"]: record for record in compare_findings(list(rows.values()))[0].records}
    head, adapted = drawn["freeze train head"], drawn["adapters ratio 0.25"]
    assert head["size"] == rows["freeze train head"]["trained_head"] > 0, "it has a place on a logarithmic axis"
    assert adapted["size"] == rows["adapters ratio 0.25"]["trained_adapter"] + head["size"]


def test_a_folder_of_runs_is_all_of_them(runs):
    code, out, err = run("compare", runs["head"].parent)
    assert (code, err) == (0, "")
    assert "repadapter width 4" in out
    assert "±" in out


def test_recipes_that_only_differ_elsewhere_are_told_apart(runs, tmp_path):
    done(
        "apply",
        "--no-report",
        runs["head"].parent / "head.yaml",
        "--output",
        tmp_path / "slow",
        "steps.1.finetune.lr=0.001",
    )
    labels = [row["label"] for row in compare([runs["head"], tmp_path / "slow"])]
    assert labels == ["freeze train head (lr 0.01)", "freeze train head (lr 0.001)"]
    done("apply", "--no-report", runs["head"].parent / "head.yaml", "--output", tmp_path / "few", "data.limit_val=40")
    tasks = [row["task"] for row in compare([runs["head"], tmp_path / "few"])]
    assert len(set(tasks)) == 2, "they were evaluated on other images"
    assert "(40 images)" in tasks[1]


def test_a_teacher_is_known_by_what_it_is_not_by_its_path(finished, recipe, tmp_path, monkeypatch):
    """A run that trained its teacher and one that was given that teacher stand in one table, however the path is written."""
    monkeypatch.chdir(tmp_path)
    given = os.path.relpath(finished / "teacher")
    words = ("teacher.finetune=null", "teacher.num_classes=10", f"teacher.weights={given}", "steps.1.distill.epochs=1")
    code, _, err = run("apply", "--no-report", recipe, "--output", tmp_path / "given", "seed=3", *words)
    assert code == 0, err
    rows = compare([finished, tmp_path / "given"])
    assert len({row["task"] for row in rows}) == 1
    assert given not in rows[0]["task"]


def test_what_cannot_be_compared_says_why(runs, tmp_path):
    for words, paths in (
        ("is empty: no run has begun in it", [tmp_path]),
        ("is a model, not a run folder", [runs["backbone"]]),
    ):
        code, _, err = run("compare", *paths)
        assert code == 2
        assert words in err
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "resolved.yaml").write_text((runs["head"] / "resolved.yaml").read_text())
    with pytest.raises(UserError, match="there is no finished run to compare"):
        compare([broken])
    table = "it is no table of teacher and student"
    odd = [json.loads((runs["head"] / "results.json").read_text()) for _ in range(2)]
    odd[0]["phases"], odd[1]["student"]["latency_ms"] = [], None
    for content, fault in (("{}", "it has no 'phases'"), ("[]", table), *((json.dumps(one), table) for one in odd)):
        (broken / "results.json").write_text(content)
        with pytest.raises(UserError, match=rf"results.json is not what `apply` writes: {fault}; leave the run out"):
            compare([broken])


# ------------------------------------------------------------------------------------------------------------- the new head


def test_a_new_classifier_cannot_be_distilled_from_another_one(runs, tmp_path):
    text = BACKBONE.replace("WEIGHTS", str(runs["backbone"])).replace("STEP", STEPS["adapters"])
    recipe = tmp_path / "distil.yaml"
    recipe.write_text(text.replace("finetune:", "distill:"))
    code, out, _ = run("plan", recipe)
    assert code == 2
    assert "losses.prediction compares classes, but the student has 10 and the teacher 3" in out
    code, _, err = run("plan", recipe, "--measure", "steps.1.distill.losses.prediction.weight=0")
    assert code == 2
    assert "its new classifier (student.head=new) is random" in err


def test_labels_without_a_classifier_are_found_in_the_plan(tmp_path):
    recipe = tmp_path / "frozen.yaml"
    recipe.write_text(
        BACKBONE.replace("WEIGHTS", "train").replace("STEP", STEPS["adapters"]).replace("num_classes: 3", "num_classes: 0")
        .replace("student: {head: new}\n", "")
    )  # fmt: skip
    code, out, _ = run("plan", recipe)
    assert code == 2
    assert (
        "finetune learns from labels, but the model has no classifier (num_classes=0); give it one with student.head=new"
        in out
    )


def test_masks_and_pruning_are_in_the_label():
    steps = "steps: [adapters: {ratio: 0.5}, sparsify: {density: 0.1, score: snip}, prune: {target: {neurons: 0.25}, epochs: 1}]"
    text = "teacher: {model: vit_tiny_patch16_224}\ndata: {name: digits}\nstudent: {head: new}\n" + steps
    assert (
        label(parse_recipe(text)) == "adapters ratio 0.5 + sparsify density 0.1, score snip + prune target neurons 0.25"
    )


def test_the_plan_says_what_is_trained():
    text = BACKBONE.replace("WEIGHTS", "pretrained").replace("STEP", STEPS["repadapter"])
    from compressvit.runs.plan import plan_recipe

    notes = plan_recipe(parse_recipe(text)).notes
    assert any(
        "the last phase trains 688 parameters and 250 of the classifier; the others are frozen" in note
        for note in notes
    )
    assert type(RepAdapter(width=4)).freezes
