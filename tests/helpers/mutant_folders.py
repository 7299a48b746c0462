"""What `helpers.mutants` damages: lists and folders of images, and run folders."""

from __future__ import annotations

import os
import shutil
import signal
import tarfile
from pathlib import Path

import pytest

from compressvit.data.opening import Datasets, open_data
from compressvit.data.spec import Data
from compressvit.training import step
from helpers.hostile import ESC
from helpers.images import class_folders, jpeg, picture
from helpers.mutant_models import Mutant, Subject
from helpers.mutate import Chance, clear, damage_file, replace_file, shown, with_odd_bytes
from helpers.runs import EPOCH, RECIPE, answered, done, run

LAYOUTS = {"lists": "lists", "folder": "folder", "images": "images", "tars": "folder"}  # with the set that reads it
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
_LINKS = ["x.png", ".x.png", f"x{ESC}.png", "caf\udce9.png", "x", "train", "val", "x.txt", ".hidden", "e\u0301"]
_OPTIONS = [
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


class Lists(Subject):
    """A folder of images of each layout; of some the options of `data` are damaged."""

    def __init__(self, folder: Path):
        self._folder = folder
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
            datasets = open_data(Data(name=LAYOUTS[name], root=str(folder / name)))
            _read_all(datasets, folder / name)
            assert datasets.broken.count == 0

    def mutant(self, chance: Chance, folder: Path) -> Mutant:
        name = chance.choice(["lists", "lists", *LAYOUTS])
        precious = folder / "precious.jpg"
        precious.write_bytes(jpeg(9))
        root = shutil.copytree(self._folder / name, folder / name)
        options = {
            "name": LAYOUTS[name],
            "root": str(root),
            "outside": chance.choice([None, None, True, False]),
            "exif": chance.random() < 0.3,
        }
        what = _damage_images(root, options, chance, precious)

        def read() -> None:
            try:
                data = Data(**options)
            except ValueError:  # of pydantic, as when a recipe is read
                return
            _read_all(open_data(data), Path(data.root))

        return Mutant(chance.did, f"{options}: {what}", read)


_ODD_PATHS = [
    "/etc/hostname",
    "/dev/zero",
    "images",
    "",
    ".",
    "\x00",
    "x" * 5000,
    "caf\udce9",
    ESC,
    "pipe.png",
    "loop.png",
]
_ODD_LABELS = [
    "-1", "1.5", "x", "", "10" * 12, "9" * 5000, "3000000000", "999999", "1000000", "٣", "²", "1e3", "0x1", "00001", "7", "nan", "True",
    "0 1", "0,1", '"0"',
]  # fmt: skip


def _damage_list(text: str, chance: Chance, elsewhere: Path) -> bytes:
    """A list of `PATH LABEL` lines with one of them changed, or its bytes; some lead to the picture `elsewhere`."""
    lines = text.splitlines()
    at = chance.randrange(len(lines))
    path, _, label = lines[at].rpartition(" ")
    kind = chance.kind(
        *["an odd path"] * 2, "a way out", "another spelling", *["an odd label"] * 2, "quotes and separators", "all lines", "names twice",
        *["bytes"] * 2,
    )  # fmt: skip
    if kind == "an odd path":
        lines[at] = f"{chance.choice(_ODD_PATHS)} {label}"
    elif kind == "a way out":
        ways = [
            f"../{elsewhere.name}",
            f"images/../../{elsewhere.name}",
            str(elsewhere),
            "out.jpg",
            "../" * 50 + "etc/hostname",
        ]
        lines[at] = f"{chance.choice(ways)} {label}"
    elif kind == "another spelling":
        forms = [
            path.upper(),
            f"{path}/x",
            path + chr(0x301),
            f"./{path}",
            path.replace("/", "//"),
            path.replace("/", "\\"),
        ]
        lines[at] = f"{chance.choice(forms)} {label}"
    elif kind == "an odd label":
        lines[at] = f"{path}{chance.choice([' ', '  ', chr(9), ',', '', ', '])}{chance.choice(_ODD_LABELS)}"
    elif kind == "quotes and separators":
        between, quote = (
            chance.choice([",", "\t", ";", "|", ", ", " ,", "\u00a0"]),
            chance.choice(["", '"', "'", '""', "`"]),
        )
        lines = [f"{quote}{line.rpartition(' ')[0]}{quote}{between}{line.rpartition(' ')[2]}" for line in lines]
        lines = chance.choice(
            [lines, ["path,label", *lines], lines[:1] + text.splitlines()[1:], ['"' + line for line in lines]]
        )
    elif kind == "all lines":
        lines = chance.choice([[], [""], ["#"], lines[:1], [f"{path} 0"] * len(lines), [f" {line} " for line in lines]])
    elif kind == "names twice":
        lines = chance.choice(
            [lines * 2, lines * 300, [*lines, f"{path} 0", f"{path} 1"], [path.upper() + " 0", *lines]]
        )
    else:
        return with_odd_bytes(text.encode(), chance)
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def _damage_images(root: Path, data: dict, chance: Chance, precious: Path) -> str:
    """Damage a folder of images, or the options with which it is read; returns what was done."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    lists = [file for file in files if file.suffix == ".txt"]
    number = chance.randrange(10)
    if lists and number < 6:
        file = chance.choice(lists)
        file.write_bytes(_damage_list(file.read_text(), chance, precious))
        (root / "pipe.png").unlink(missing_ok=True)
        os.mkfifo(root / "pipe.png")
        (root / "loop.png").symlink_to("loop.png")
        (root / "out.jpg").symlink_to(precious)
        return f"{file.name}: {file.read_bytes()[:600]!r}"
    if number < 7:
        file = chance.choice(files)
        damage_file(file, chance, precious)
        return f"{file.relative_to(root)} damaged"
    if number == 7:
        where, name = chance.choice([path.parent for path in files]), chance.choice(_LINKS)
        there = [where, root, root.parent, precious, Path("/proc/self"), Path("/dev"), Path("x.png"), Path("nowhere")]
        chance.did, target = "a link", chance.choice(there)
        if not (where / name).exists():
            (where / name).symlink_to(target)
        return f"{where.relative_to(root)}/{name} is a link to {target}"
    if number == 8:
        names = root / "names"
        names.write_bytes(_damage_list("cat\ndog\nowl", chance, precious))
        data["classes"] = chance.choice([str(names), str(root), "natural", "plain", "\x00", ESC, "/dev/zero"])
        chance.did = "names of classes"
        return f"classes={data['classes']!r}: {names.read_bytes()[:300]!r}"
    chance.did, key = "an odd option", chance.choice(["train_split", "val_split", "group_by", "root"])
    data[key] = chance.choice(_OPTIONS)
    return f"{key}={data[key][:100]!r}"


def _read_all(datasets: Datasets, root: Path) -> None:
    """Read every image once; those outside the root must have been counted, and every label must be that of a class."""
    outside, inside = 0, os.path.realpath(root)
    for part in (datasets.train, datasets.validation):
        for i in range(len(part)):
            image, target = part[i]
            assert image.mode in _MODES
            assert target < (datasets.num_classes or 1)
            outside += not Path(os.path.realpath(part.name(i).partition(": ")[0])).is_relative_to(inside)
    # a link out of the root can lead back into it
    assert outside <= sum(note.count for note in datasets.notes() if note.what == "from_outside")
    datasets.fingerprint()
    datasets.broken.report()


class Runs(Subject):
    """A finished run, one with diagnostics, and one that was stopped between two steps of its distillation."""

    MEASURED = "diagnostics=[cka, gradients, spectra]"

    def __init__(self, folder: Path):
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(RECIPE)
        self.finished, self.measured, self.stopped = (folder / name for name in ("finished", "measured", "stopped"))

    def begin(self) -> None:
        """What draws charts reserves more addresses than it uses, once."""
        import vl_convert

        vl_convert.vegalite_to_svg({"data": {"values": [{"x": 1}]}, "mark": "bar", "encoding": {"x": {"field": "x"}}})

    def make(self) -> None:
        done("apply", "--no-report", self.recipe, "--output", self.finished, "seed=3")
        done("apply", "--no-report", self.recipe, "--output", self.measured, "seed=3", self.MEASURED)
        batches, total = [], step.total_of

        def counted(*arguments, **options):
            batches.append(1)
            if len(batches) == 2 * EPOCH + 2:  # within the second epoch of the distillation
                os.kill(os.getpid(), signal.SIGTERM)
            return total(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step, "total_of", counted)
            words = ("apply", "--no-report", self.recipe, "--output", self.stopped, "seed=3")
            assert run(*words)[0] == 128 + signal.SIGTERM

    @property
    def originals(self) -> list[Path]:
        return [self.finished, self.stopped, self.measured]

    def verbs(self, original: Path, folder: Path) -> list[list[object]]:
        """What is run on a copy of a run."""
        again = ["apply", self.recipe, "--output", folder, "--resume", "--no-report", "seed=3"]
        if original == self.measured:
            again.append(self.MEASURED)
        if original == self.stopped:
            return [["report", folder], again]
        return [
            ["report", folder],
            ["compare", folder],
            ["compare", folder, self.finished, "--output", folder / "compared"],
            ["evaluate", folder],
            ["evaluate", folder / "teacher", "data.name=digits", "data.limit_val=16"],
            again,
            again,
            ["merge", folder, "--dense"],
            ["plan", self.recipe, f"teacher.weights={folder / 'teacher'}"],
        ]

    def mutant(self, chance: Chance, folder: Path) -> Mutant:
        original = chance.choice(self.originals)
        copied = shutil.copytree(original, folder / "run")
        precious = folder.parent / "precious"
        if not precious.exists():
            precious.write_text("a file of the user's")
        what = _damage_run(copied, chance, precious, self.finished)
        words = chance.choice(self.verbs(original, copied))

        def read() -> None:
            answered(*words)

        return Mutant(chance.did, f"{original.name} {' '.join(map(str, words))}: {what}", read)


_ADDED = [
    ".report.html.part", ".results.json.part", ".lock", ".student.0a1b2c3d", "diagnostics/x.json", "diagnostics/.x.json.part", "x",
    "checkpoints/x.json", "checkpoints/1_distill.json", "tensorboard/x", "predictions/99.png", "tools", "merged", f"x{ESC}",
    "caf\udce9", "compared", "exported", "teacher/x", "student/x", "checkpoints/teacher.pt.part",
]  # fmt: skip


def _damage_run(folder: Path, chance: Chance, precious: Path, other: Path) -> str:
    """Damage a file of a run folder, or put a file beside those of the run; returns what was done."""
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".html", ".png", ".jpg")
    )
    drawn = chance.random()
    if drawn < 0.6:
        texts = [path for path in files if path.suffix in (".json", ".jsonl", ".yaml")]
        file = chance.choice(texts if chance.random() < 0.6 else files)
        damage_file(file, chance, precious)
        return f"{file.relative_to(folder)}: {shown(file)}"
    if drawn < 0.8:
        return _damage_several(folder, files, chance, other)
    name = chance.choice(_ADDED)
    file = folder / name
    if file.exists():
        chance.did = "nothing"
        return f"{name} stays"
    file.parent.mkdir(exist_ok=True)
    file.write_text(chance.choice(["", "{}", "[]", "null", "{", '{"name": 1}', '{"a": ' * 9000, "\x00"]))
    number = chance.random()
    if number < 0.4:
        file.unlink()
        file.symlink_to(precious)
    elif number < 0.7:
        replace_file(file, chance, precious)
    chance.did = "a file is added"
    return f"{name} added"


def _damage_several(folder: Path, files: list[Path], chance: Chance, other: Path) -> str:
    kind = chance.kind("files change places", "a folder is gone", "several files are gone", "a file of another run")
    one, two = chance.choice(files), chance.choice(files)
    if kind == "files change places":
        contents = one.read_bytes(), two.read_bytes()
        for file, content in zip((two, one), contents, strict=True):
            file.write_bytes(content)
        return f"{one.relative_to(folder)} and {two.relative_to(folder)}"
    if kind == "a folder is gone":
        clear(gone := chance.choice([path for path in sorted(folder.iterdir()) if path.is_dir()]))
        return gone.name
    if kind == "several files are gone":
        gone = chance.sample(files, min(len(files), chance.choice([2, 5, 20])))
        for file in gone:
            file.unlink()
        return ", ".join(str(file.relative_to(folder)) for file in gone)
    there = sorted(path for path in other.rglob("*") if path.is_file() and path.suffix == one.suffix)
    taken = chance.choice(there or [one])
    one.write_bytes(taken.read_bytes())
    return f"{one.relative_to(folder)} is {taken.name} of another run"
