"""Lists and folders of images, and run folders, with random damage: each is read, or refused in a sentence; no trace, no hang, no memory,
nothing outside written, and what is read from outside counted."""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import signal
import sys
import tarfile
from pathlib import Path

import pytest
from helpers.bounds import SEEDS, Faults
from helpers.hostile import ESC
from helpers.images import class_folders, jpeg, picture
from helpers.mutate import (
    clear,
    damage_file,
    damage_list,
    replace_file,
    shown,
)
from helpers.runs import done, run

from compressvit.data.opening import Datasets, open_data
from compressvit.data.spec import Data
from compressvit.training import step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="bounds of a process are Linux's"),
]
IMAGES, RUNS = 80, 50  # of each seed
LAYOUTS = {"lists": "lists", "folder": "folder", "images": "images", "tars": "folder"}  # with the set that reads it
PRECIOUS = "a file of the user's"
MEASURED = "diagnostics=[cka, gradients, spectra]"


# ------------------------------------------------------------------------------------------------------------------ images


@pytest.fixture(scope="module")
def image_folders(tmp_path_factory):
    """A folder of each layout, by the name of its set, and a file of class names."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "lists" / "images").mkdir(parents=True)
    for i in range(6):
        (folder / "lists" / "images" / f"{i}.jpg").write_bytes(jpeg(i))
    lines = [f"images/{i}.jpg {i % 3}" for i in range(6)]
    (folder / "lists" / "train.txt").write_text("\n".join(lines))
    (folder / "lists" / "validation.txt").write_text("\n".join(lines[::-1]))
    class_folders(folder / "folder", each=3)
    class_folders(folder / "images", splits=("a", "b"), each=3)
    grey = picture(1).convert("L")
    for name, image in {
        "sixteen.png": grey.convert("I;16"),
        "clear.png": picture(1).convert("RGBA"),
        "float.tif": grey.point(lambda value: value / 255, "F"),
        "key.jpg": picture(1).convert("CMYK"),
        "palette.gif": picture(1).convert("P"),
    }.items():
        image.save(folder / "images" / "a" / name)
    (folder / "tars").mkdir()
    for split in ("train", "val"):
        with tarfile.open(folder / "tars" / f"{split}.tar", "w") as tar:
            tar.add(folder / "folder" / split, arcname=split)
    for name in LAYOUTS:  # all of them can be read
        data = Data(name=LAYOUTS[name], root=str(folder / name))
        datasets = open_data(data)
        _read_all(datasets, folder / name)
        assert datasets.broken.count == 0
    return folder


def _damage_images(root: Path, data: dict, chance: random.Random, precious: Path) -> str:
    """Damage a folder of images, or the options with which it is read; returns what was done."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    lists = [file for file in files if file.suffix == ".txt"]
    kind = chance.randrange(10)
    if lists and kind < 6:
        file = chance.choice(lists)
        file.write_bytes(damage_list(file.read_text(), chance, precious))
        (root / "pipe.png").unlink(missing_ok=True)
        os.mkfifo(root / "pipe.png")
        (root / "loop.png").symlink_to("loop.png")
        (root / "out.jpg").symlink_to(precious)
        return f"{file.name}: {file.read_bytes()[:600]!r}"
    if kind < 7:
        file = chance.choice(files)
        damage_file(file, chance, precious)
        return f"{file.relative_to(root)} damaged"
    if kind == 7:
        where = chance.choice([path.parent for path in files])
        name = chance.choice(
            ["x.png", ".x.png", f"x{ESC}.png", "caf\udce9.png", "x", "train", "val", "x.txt", ".hidden", "e\u0301"]
        )
        target = chance.choice(
            [where, root, root.parent, precious, Path("/proc/self"), Path("/dev"), Path("x.png"), Path("nowhere")]
        )
        if not (where / name).exists():
            (where / name).symlink_to(target)
        return f"{where.relative_to(root)}/{name} is a link to {target}"
    if kind == 8:
        names = root / "names"
        names.write_bytes(damage_list("cat\ndog\nowl", chance, precious))
        data["classes"] = chance.choice([str(names), str(root), "natural", "plain", "\x00", ESC, "/dev/zero"])
        return f"classes={data['classes']!r}: {names.read_bytes()[:300]!r}"
    key = chance.choice(["train_split", "val_split", "group_by", "root"])
    odd = [
        "",
        ".",
        "..",
        "/",
        "x" * 5000,
        "\x00",
        "caf\udce9",
        "*",
        "[",
        "(a+)+$",
        "train",
        "val",
        "/dev/zero",
        "~nobody/x",
        ESC,
    ]
    data[key] = chance.choice(odd)
    return f"{key}={data[key][:100]!r}"


def _read_all(datasets: Datasets, root: Path) -> None:
    """Read every image once; those outside the root must have been counted, and every label must be that of a class."""
    outside = 0
    for part in (datasets.train, datasets.validation):
        for i in range(len(part)):
            image, target = part[i]
            assert image.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
            assert target < (datasets.num_classes or 1)
            outside += not Path(os.path.realpath(part.name(i).partition(": ")[0])).is_relative_to(
                os.path.realpath(root)
            )
    # a link out of the root can lead back into it
    assert outside <= sum(note.count for note in datasets.notes() if note.what == "from_outside")
    datasets.fingerprint()
    datasets.broken.report()


@pytest.fixture
def _no_log():
    """Names of damaged images are not all text that pytest's workers can pass on."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("_no_log")
@pytest.mark.parametrize("seed", SEEDS)
def test_lists_and_folders_of_images(seed, image_folders, tmp_path):
    chance, faults = random.Random(seed), Faults()
    precious = tmp_path / "precious.jpg"
    precious.write_bytes(jpeg(9))
    for number in range(IMAGES):
        name = chance.choice(["lists", *LAYOUTS])
        root = shutil.copytree(image_folders / name, tmp_path / name)
        options = {
            "name": LAYOUTS[name],
            "root": str(root),
            "outside": chance.choice([None, None, True, False]),
            "exif": chance.random() < 0.3,
        }
        what = _damage_images(root, options, chance, precious)

        def read(options=options):
            try:
                data = Data(**options)
            except ValueError:  # of pydantic, as when a recipe is read
                return
            _read_all(open_data(data), Path(data.root))

        faults.attempt(read, f"{seed}/{number} {options}: {what}")
        clear(root)
    faults.none_of(IMAGES)


# ------------------------------------------------------------------------------------------------------------------ run folders


@pytest.fixture(scope="module")
def stopped(recipe):
    """A run that was stopped between two steps of its distillation."""
    folder, batches, total = recipe.parent / "stopped", [], step.total_of

    def counted(*arguments, **options):
        batches.append(1)
        if len(batches) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return total(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "total_of", counted)
        assert run("apply", recipe, "--output", folder, "seed=3")[0] == 128 + signal.SIGTERM
    return folder


@pytest.fixture(scope="module")
def measured(recipe):
    """A finished run with diagnostics."""
    done(
        "apply",
        recipe,
        "--output",
        recipe.parent / "measured",
        "seed=3",
        MEASURED,
        "--no-report",
    )
    return recipe.parent / "measured"


def _damage_run(folder: Path, chance: random.Random, precious: Path) -> str:
    """Damage a file of a run folder, or put a file beside those of the run; returns what was done."""
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".html", ".png", ".jpg")
    )
    if chance.random() < 0.75:
        texts = [path for path in files if path.suffix in (".json", ".jsonl", ".yaml")]
        file = chance.choice(texts if chance.random() < 0.6 else files)
        damage_file(file, chance, precious)
        return f"{file.relative_to(folder)}: {shown(file)}"
    name = chance.choice(
        [".report.html.part", ".results.json.part", ".lock", ".student.0a1b2c3d", "diagnostics/x.json", "diagnostics/.x.json.part", "x",
         "checkpoints/x.json", "checkpoints/1_distill.json", "tensorboard/x", "predictions/99.png", "tools", "merged", f"x{ESC}",
         "caf\udce9"]
    )  # fmt: skip
    file = folder / name
    if file.exists():
        return f"{name} stays"
    file.parent.mkdir(exist_ok=True)
    file.write_text(chance.choice(["", "{}", "[]", "null", "{", '{"name": 1}', '{"a": ' * 9000, "\x00"]))
    kind = chance.random()
    if kind < 0.4:
        file.unlink()
        file.symlink_to(precious)
    elif kind < 0.7:
        replace_file(file, chance, precious)
    return f"{name} added"


def _verbs(recipe: Path, folder: Path, original: Path) -> list[list[object]]:
    """What is run on a folder."""
    again = ["apply", recipe, "--output", folder, "--resume", "--no-report", "seed=3"]
    if original.name == "measured":
        again.append(MEASURED)
    if original.name == "stopped":
        return [["report", folder], again]
    return [
        ["report", folder],
        ["compare", folder],
        ["evaluate", folder],
        ["evaluate", folder / "teacher", "data.name=digits", "data.limit_val=16"],
        again,
        ["plan", recipe, f"teacher.weights={folder / 'teacher'}"],
    ]


def test_what_is_damaged_is_sound_before(recipe, finished, stopped, measured, tmp_path):
    for original in (finished, stopped, measured):
        for words in _verbs(recipe, tmp_path / original.name, original):
            shutil.copytree(original, tmp_path / original.name)
            done(*words)
            clear(tmp_path / original.name)


@pytest.mark.parametrize("seed", SEEDS)
def test_run_folders(seed, recipe, finished, stopped, measured, tmp_path):
    chance, faults = random.Random(seed), Faults()
    precious = tmp_path / "precious"
    precious.write_text(PRECIOUS)
    for number in range(RUNS):
        original = chance.choice([finished, stopped, measured])
        folder = shutil.copytree(original, tmp_path / "run")
        what = _damage_run(folder, chance, precious)
        words = chance.choice(_verbs(recipe, folder, original))

        def read(words=words):
            code, out, err = run(*words)
            if code not in (0, 2) or "Traceback" in out + err or ESC in out + err or "allocate" in err:
                log = re.search(r"trace is (?:in|at the end of) (.+?);", err)
                trace = Path(log.group(1)).read_text(errors="replace")[-1500:] if log else ""
                raise AssertionError(f"{code} {err}\n{trace}")

        faults.attempt(read, f"{seed}/{number} {original.name} {' '.join(map(str, words))}: {what}")
        assert precious.read_text() == PRECIOUS, what
        clear(folder)
    faults.none_of(RUNS)
