"""What a run says of its data, and a run that is resumed with the same data at another place."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.images import CPU, GRAY, class_folders
from helpers.models import build, images_for
from helpers.runs import TINY, done, refused
from PIL import ExifTags, Image
from safetensors.torch import load_file

import compressvit
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
from compressvit.runs.resources import resource_faults
from compressvit.training.phases.distill import Distill


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


def test_a_run_is_resumed_where_only_the_way_to_the_same_files_differs(begun, folders, tmp_path):
    resumed(begun, tmp_path, f"data.root={folders}/", "data.num_workers=1")


def test_a_run_is_resumed_with_data_that_has_moved(begun, folders, tmp_path):
    subprocess.run(["cp", "-r", folders, tmp_path / "moved"], check=True)
    out = resumed(begun, tmp_path, f"data.root={tmp_path / 'moved'}")
    assert f"resumed with data.root={tmp_path / 'moved'}, before {folders}" in out


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


def test_what_was_taken_off_the_names_of_weights_is_in_plan_and_log(begun, tmp_path):
    recipe, run, _ = begun
    weights = compressvit.load(run / "teacher").state_dict()
    torch.save({"net": {f"module.{name}": tensor for name, tensor in weights.items()}}, tmp_path / "weights.pt")
    words = [f"teacher.weights={tmp_path / 'weights.pt'}", "teacher.finetune=null", "teacher.num_classes=10"]
    steps = "steps=[finetune: {epochs: 1, max_steps: 1}]"
    done("apply", recipe, "--output", tmp_path / "run", "--no-report", "data.name=digits", *words, steps)
    for file in ("plan.json", "run.log"):
        text = (tmp_path / "run" / file).read_text()
        assert "the weights are those under 'net'" in text
        assert "the prefix 'module.' was taken off" in text


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


# ---- what a machine lacks


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            "smaller data.batch_size \\(now 7\\)",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "memory ran out"),
        (MemoryError(), "memory ran out: MemoryError"),
        (
            ConnectionResetError("Connection reset by peer"),
            "a process that loads images has ended: Connection reset by peer",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "is killed by signal: Killed. Most often memory ran out: give fewer data.num_workers \\(now 3\\)",
        ),
    ],
)
def test_a_lack_of_memory_is_a_sentence(error, words):
    with pytest.raises(UserError, match=words), resource_faults(Data(name="digits", batch_size=7, num_workers=3)):
        raise error


def test_other_faults_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), resource_faults(Data(name="digits")):
        raise RuntimeError("shapes do not fit")


KILLED = """
import os, signal, sys
from compressvit.data import samples
import compressvit
from compressvit.data.loaders import eval_loader
import compressvit
from compressvit.data.loaders import eval_loader
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.runs.recorder import evaluation_images
from compressvit.runs.resources import resource_faults
from compressvit.training.phases.distill import Distill
sys.path.insert(0, {helpers!r})
from helpers.images import COLOUR, CPU

read = samples.Samples.read
def dies(self, position):
    if position == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, position)
samples.Samples.read = dies
data = Data(name="folder", root={root!r}, batch_size=2, num_workers=1)
with resource_faults(data):
    for _ in eval_loader(open_data(data), data, COLOUR, CPU):
        pass
"""


def test_a_worker_that_is_killed_is_a_sentence(tmp_path):
    root = class_folders(tmp_path)
    helpers = os.path.dirname(os.path.dirname(__file__))
    found = subprocess.run(
        [sys.executable, "-c", KILLED.format(root=str(root), helpers=helpers)],
        capture_output=True,
        text=True,
        check=False,
    )
    last = found.stderr.strip().splitlines()[-1]
    assert "UserError: a process that loads images has ended: DataLoader worker (pid" in last
    assert "give fewer data.num_workers (now 1), 0 to load them in the training process" in last


def test_batches_of_ones_own_have_sentences_of_their_own():
    with (
        pytest.raises(UserError, match=r"memory ran out: MemoryError\. Give smaller batches, or precision='bf16'$"),
        resource_faults(),
    ):
        raise MemoryError
    with pytest.raises(UserError, match="give the DataLoader fewer num_workers"), resource_faults():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(EOFError, match="of a data set"), resource_faults():  # no worker of torch has ended
        raise EOFError("of a data set")


def test_distill_says_that_memory_ran_out(monkeypatch):
    def run(*_):
        raise MemoryError

    monkeypatch.setattr(Distill, "run", run)
    teacher = build("vit")
    student = compressvit.compress(teacher, [compressvit.Multiplex(share=2)])
    with pytest.raises(UserError, match="memory ran out"):
        compressvit.distill(student, teacher, [images_for(teacher)], layers=(), device="cpu")


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
