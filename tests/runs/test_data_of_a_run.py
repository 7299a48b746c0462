"""What a run says of its data, and a run that is resumed with the same data at another place."""

from __future__ import annotations

import html
import json
import subprocess

import numpy as np
import pytest
import torch
from helpers.images import CPU, GRAY
from helpers.runs import TINY, done, refused
from PIL import ExifTags, Image
from safetensors.torch import load_file

import compressvit
from compressvit.data.classes import other_classes
from compressvit.data.files import PictureFiles
from compressvit.data.loaders import eval_loader
from compressvit.data.opening import open_data
from compressvit.data.samples import Samples
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.model.stored import name_classes
from compressvit.recipe.recipe import parse_recipe
from compressvit.runs.folder import RunFolder
from compressvit.runs.merge import merge_folder
from compressvit.runs.recorder import evaluation_images


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Digits of 16 bits in class folders, with some of what is passed over."""
    root = tmp_path_factory.mktemp("data") / "set"
    digits = open_data(Data(name="digits")).train.source
    for split, start in (("train", 0), ("val", 100)):
        for i in range(start, start + 40):
            file = root / split / f"{int(digits.targets[i])}x" / "left" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.data[i].numpy().astype(np.uint16) * 257).save(file)
    (root / "train" / "notes.txt").touch()
    return root


@pytest.fixture(scope="module")
def begun(folders, tmp_path_factory):
    recipe = tmp_path_factory.mktemp("run") / "tiny.yaml"
    text = TINY.replace(
        "name: digits, batch_size: 32, limit_train: 64, limit_val: 32", f"name: folder, root: {folders}, batch_size: 20"
    )
    recipe.write_text(text.replace("finetune: {epochs: 1}", "finetune: {epochs: 1, lr: 1e-4}"))
    out = done("apply", recipe, "--output", recipe.parent / "run", "--no-report")
    return recipe, recipe.parent / "run", out


def test_what_was_passed_over_or_guessed_is_in_plan_log_and_results(begun):
    _, run, out = begun
    expected = {"classes": 10, "other_types": 1, "deeper": 40, "sixteen_bits": 80}
    results = json.loads((run / "results.json").read_text())
    assert {note["what"]: note["count"] for note in results["data_notes"]} == expected
    plan = json.loads((run / "plan.json").read_text())["data"]
    assert (plan["train"], plan["validation"], plan["classes"], len(plan["fingerprint"])) == (40, 40, 10, 64)
    for text in ((run / "run.log").read_text(), out):
        assert "data: 40 images to train on, 40 held out" in text
        assert "data: 10 classes: the folders directly in train/, in natural order" in text
        assert "data: train: 1 file of types that are not read, passed over: 1 .txt" in text
        assert "data: 80 images of 16 bits scaled to 8 (value / 257)" in text


def test_class_names_are_kept_in_artifacts_and_in_what_timm_reads(begun, tmp_path):
    names = [f"{digit}x" for digit in range(10)]
    for model in ("teacher", "student"):
        assert json.loads((begun[1] / model / "compressvit.json").read_text())["label_names"] == names
    loaded = compressvit.load(begun[1] / "student")
    assert loaded.pretrained_cfg["label_names"] == names
    compressvit.save(loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "compressvit.json").read_text())["label_names"] == names
    loaded.reset_classifier(3)
    name_classes(loaded, names[:4])  # of other classes than those of its head
    assert loaded.pretrained_cfg["label_names"] == names
    compressvit.save(loaded, tmp_path / "other")
    assert json.loads((tmp_path / "other" / "compressvit.json").read_text())["label_names"] is None
    plain = compressvit.compress(compressvit.load(begun[1] / "teacher"), [compressvit.LoRA(rank=2)])
    compressvit.save(plain, tmp_path / "adapted")
    merge_folder(tmp_path / "adapted", device="cpu")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["label_names"] == names


def test_a_teacher_that_was_trained_in_another_order_of_the_classes(begun, folders, tmp_path):
    recipe, run, _ = begun
    order = tmp_path / "names.txt"
    order.write_text("\n".join(f"{digit}x" for digit in (1, 0, 2, 3, 4, 5, 6, 7, 8, 9)))
    text = (
        "2 of 10 classes have another number in the teacher than in the data: class 0 is '1x' in the data and '0x' in the teacher. Its "
        "accuracy is meaningless until data.classes=FILE gives the data that order"
    )
    words = [recipe, f"teacher.weights={run / 'teacher'}", f"data.classes={order}"]
    given = [*words, "teacher.finetune=null"]
    assert f"data: {text}" in done("plan", *given)
    out = done("apply", *given, "--output", tmp_path / "run", "--no-report")
    assert out.count(f"data: {text}") == 1
    for file, notes in (("plan.json", lambda c: c["data"]["notes"]), ("results.json", lambda c: c["data_notes"])):
        found = notes(json.loads((tmp_path / "run" / file).read_text()))
        assert [(n["count"], n["text"]) for n in found if n["what"] == "model_class_order"] == [(2, text)]
    for same in (
        [*given[:2], "teacher.finetune=null"],
        words,
        [*given, "student.head=new"],
    ):  # trained here, or not asked
        assert "in the teacher" not in done("plan", *same)
    evaluated = done("evaluate", run / "student", f"data.classes={order}")
    assert "2 of 10 classes have another number in the model than in the data" in evaluated
    (note,) = other_classes(["cat", "dog", "cow"], ["cat", "cow", "dogs"], "the teacher")
    assert (note.what, note.count) == ("model_class_names", 2)
    assert "class 1 is 'dog' in the data and 'cow' in the teacher" in note.text
    assert (
        other_classes(["a\u0308", "b"], ["\u00e4", "b"], "x") == other_classes(["a", "b"], ["b", "a", "c"], "x") == []
    )


def test_class_names_of_a_folder_that_timm_reads(begun, folders, tmp_path):
    adapted = compressvit.compress(compressvit.load(begun[1] / "teacher"), [compressvit.LoRA(rank=2)])
    compressvit.save(adapted, tmp_path / "adapted")
    merge_folder(tmp_path / "adapted", device="cpu")
    order = tmp_path / "names.txt"
    order.write_text("\n".join(f"{digit}x" for digit in (1, 0, 2, 3, 4, 5, 6, 7, 8, 9)))
    words = [f"teacher.weights={tmp_path / 'merged'}", "teacher.finetune=null", f"data.classes={order}"]
    assert "2 of 10 classes have another number in the teacher" in done("plan", begun[0], *words)


def test_a_student_of_a_teacher_that_is_not_trained_has_the_names_of_its_data(begun, tmp_path):
    recipe, run, _ = begun
    text = recipe.read_text().replace("weights: train", f"weights: {tmp_path / 'teacher.safetensors'}, num_classes: 10")
    text = (
        text.replace("num_classes", "\n  num_classes")
        .replace(", \n", "\n")
        .replace("  finetune: {epochs: 1, lr: 1e-4}\n", "")
    )
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "teacher.safetensors").write_bytes((run / "teacher" / "model.safetensors").read_bytes())
    done("apply", tmp_path / "recipe.yaml", "--output", tmp_path / "run", "--no-report")
    written = json.loads((tmp_path / "run" / "student" / "compressvit.json").read_text())
    assert written["label_names"] == [f"{digit}x" for digit in range(10)]


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def resumed(begun, tmp_path, *words) -> str:
    """The run again from its last checkpoint, which is that of its teacher."""
    recipe, run, _ = begun
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", run, copy], check=True)
    (copy / "checkpoints" / "1_distill.pt").unlink()
    out = done("apply", recipe, "--output", copy, "--no-report", "--resume", *words)
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(copy).items())
    return out


@pytest.mark.wide
def test_a_run_is_resumed_where_only_the_way_to_the_same_files_differs(begun, folders, tmp_path):
    resumed(begun, tmp_path, f"data.root={folders}/", "data.num_workers=1")


def test_a_run_is_resumed_with_data_that_has_moved(begun, folders, tmp_path):
    moved = tmp_path / "moved"
    subprocess.run(["cp", "-r", folders, moved], check=True)
    out = resumed(begun, tmp_path, f"data.root={moved}")
    texts = [f"resumed with data.root={moved}, before {folders}"]
    assert out.count(texts[0]) == 1

    def recorded() -> tuple[list, list]:
        plan, results = (json.loads((tmp_path / "copy" / file).read_text()) for file in ("plan.json", "results.json"))
        notes = (plan["data"]["notes"], results["data_notes"])
        return tuple([(n["count"], n["text"]) for n in found if n["what"] == "moved"] for found in notes)

    assert recorded() == ([(80, text) for text in texts],) * 2
    # what reads the run's settings finds the data where it is now, and a second move is told beside the first
    again = tmp_path / "again"
    moved.rename(again)
    assert f"data.root={moved}" in refused("evaluate", tmp_path / "copy")
    done("apply", tmp_path / "copy", "--no-report", "--resume", f"data.root={again}")
    texts.append(f"resumed with data.root={again}, before {moved}")
    assert recorded() == ([(80, text) for text in texts],) * 2
    assert json.loads(done("evaluate", tmp_path / "copy", "--json"))["images"] == 40
    done("apply", tmp_path / "copy", "--no-report", "--resume")
    assert recorded() == ([(80, text) for text in texts],) * 2


def test_other_data_is_refused(begun, folders, tmp_path):
    recipe, run, _ = begun
    subprocess.run(["cp", "-r", folders, tmp_path / "moved"], check=True)
    file = next((tmp_path / "moved" / "train" / "3x" / "left").iterdir())
    file.rename(tmp_path / "moved" / "train" / "4x" / "left" / "a.png")
    message = refused("apply", recipe, "--output", run, "--no-report", "--resume", f"data.root={tmp_path / 'moved'}")
    assert "the data is not what" in message
    assert "40 images to train on and 40 held out now" in message


def test_a_moved_folder_of_a_run_that_did_not_note_its_data_is_refused(begun, folders, tmp_path):
    recipe, run, _ = begun
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", run, copy], check=True)
    plan = json.loads((copy / "plan.json").read_text())
    del plan["data"]
    (copy / "plan.json").write_text(json.dumps(plan))
    subprocess.run(["cp", "-r", folders, tmp_path / "moved"], check=True)
    message = refused("apply", recipe, "--output", copy, "--resume", f"data.root={tmp_path / 'moved'}")
    assert "the recipe is not the one" in message
    assert f"data.root: '{folders}' in the run, '{tmp_path / 'moved'}' now" in message
    done("apply", recipe, "--output", copy, "--no-report", "--resume", f"data.root={folders}/./")


# ---- weights


@pytest.mark.wide
def test_what_was_taken_off_a_weights_file_is_in_plan_log_report_and_results(begun, tmp_path):
    state = load_file(begun[1] / "teacher" / "model.safetensors")
    teacher, student = tmp_path / "teacher.pth", tmp_path / "student.pth"
    torch.save({"net": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}, teacher)
    torch.save({"model": state, "model_ema": state}, student)
    expected = [
        ("wrapper", len(state), f"teacher.weights: {teacher}: the weights are those under 'net'"),
        ("prefix", len(state), f"teacher.weights: {teacher}: the prefix 'module.' was taken off {len(state)} tensors"),
        (
            "other_weights",
            1,
            f"student.weights: {student}: the weights are those under 'model_ema', not those under 'model'",
        ),
    ]
    recipe, run = begun[0], tmp_path / "run"
    words = [recipe, f"teacher.weights={teacher}", f"student.weights={student}", "teacher.num_classes=10"]
    words.append('steps=[{"low_rank":{"rank":3}},{"distill":{"epochs":1,"lr":1e-4}}]')
    done("apply", *words, "--output", run)
    (run / "checkpoints" / "1_distill.pt").unlink()
    (run / "results.json").unlink()
    out = done("apply", *words, "--output", run, "--resume")  # the teacher's file is not read again
    for name, key in (("plan.json", "weights"), ("results.json", "weights_notes")):
        found = json.loads((run / name).read_text())[key]
        assert sorted((note["what"], note["count"], note["text"]) for note in found) == sorted(expected)
    log, out, page = (
        "".join(text.split()) for text in ((run / "run.log").read_text(), out, (run / "report.html").read_text())
    )
    for *_, text in expected:
        words_alone = "".join(text.split())
        assert f"weights:{words_alone}" in log  # tables and long lines are broken
        assert f"weights:{words_alone}" in out
        assert f"Weights:{html.escape(words_alone, quote=False)}." in page.replace("&#39;", "'").replace("&#x27;", "'")
    words[1:3] = [f"teacher.weights={teacher}", "teacher.finetune=null"]
    measured = json.loads(done("plan", *words, "--measure", "--json"))["measured"]
    assert [note["what"] for note in measured["weights_notes"]] == ["wrapper", "prefix"]
    assert "".join(expected[1][2].split()) in "".join(done("plan", *words, "--measure").split())


@pytest.mark.parametrize(("name", "changed"), [("digits", ""), ("wds/x", "data.num_workers: 0 in the run, 3 now")])
def test_another_number_of_workers_is_another_order_of_a_stream(tmp_path, name, changed):
    text = TINY.replace("name: digits", f"name: {name}, num_classes: 10")
    (tmp_path / "resolved.yaml").write_text(parse_recipe(text).to_yaml())
    folder = RunFolder(tmp_path)
    folder.refuse_or_clear(parse_recipe(text, overrides=["data.download=true"]), resume=True, overwrite=False)
    now = parse_recipe(text, overrides=["data.num_workers=3", "data.download=true"])
    if not changed:
        folder.refuse_or_clear(now, resume=True, overwrite=False)
        return
    with pytest.raises(UserError, match=changed) as error:
        folder.refuse_or_clear(now, resume=True, overwrite=False)
    assert "data.download" not in str(error.value)


@pytest.mark.parametrize("before", ["  group_by: null\n", ""], ids=["null", "absent"])
def test_a_run_from_before_photographs_were_told_apart_is_resumed_with_its_images(tmp_path, before):
    recipe = parse_recipe(TINY)
    resolved = recipe.to_yaml()
    assert resolved.count("  group_by: auto\n") == 1
    (tmp_path / "resolved.yaml").write_text(resolved.replace("  group_by: auto\n", before))
    folder = RunFolder(tmp_path)
    same = folder.as_begun(recipe)
    assert same.data == recipe.data.model_copy(update={"group_by": None})
    folder.refuse_or_clear(same, resume=True, overwrite=False)
    other = folder.as_begun(parse_recipe(TINY, overrides=["data.group_by=folder"]))
    with pytest.raises(UserError, match=r"data.group_by: None in the run, 'folder' now"):
        folder.refuse_or_clear(other, resume=True, overwrite=False)
    (tmp_path / "resolved.yaml").write_text(resolved)
    assert folder.as_begun(recipe) == recipe


def test_what_identifies_data():
    """Names below the folder that all have in common, labels, and which of them are used."""

    def identity(*samples, indices=None):
        return Samples(PictureFiles(samples, None), indices).identity()

    first, second = ("/set/a/1.png", 0), ("/set/b/1.png", 1)
    same = identity(first, second)
    assert identity(("/moved/a/1.png", 0), ("/moved/b/1.png", 1)) == same
    others = [
        identity(first, ("/set/b/2.png", 1)),
        identity(first, ("/set/b/1.png", 0)),
        identity(first, second, ("/set/b/2.png", 1)),
        identity(first, second, indices=[0]),
        identity(first, second, indices=[1]),
        identity(first),
        identity(("/set/a/2.png", 0)),
    ]
    assert len({same, *others}) == 8
    assert identity(("/set/a/1.png", 0)) == identity(("/moved/1.png", 0))


# ---- the images of diagnostics


def test_diagnostics_see_images_as_the_evaluation_does(tmp_path):
    """Also those of 16 bits, whose EXIF block is gone after they were read."""
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            values = np.zeros((8, 8), np.uint16)
            values[:2] = 60_000
            image = Image.fromarray(values)
            exif = image.getexif()
            exif[ExifTags.Base.Orientation] = 3  # upside down
            image.save(tmp_path / split / name / "0.png", exif=exif)
    data = Data(name="folder", root=str(tmp_path), exif=True)
    datasets = open_data(data)
    ((expected, _),) = eval_loader(datasets, data, GRAY, CPU)
    ((found, _),) = evaluation_images(datasets, data, GRAY, CPU, 2)
    assert torch.equal(found, expected)
    assert found[0, 0, 0, 0] < found[0, 0, -1, 0]
