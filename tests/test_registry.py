"""A registry finds the files of its room and installed packages' entry points, and says what is wrong with those that it cannot use."""

from __future__ import annotations

import itertools
import sys
import types
from pathlib import Path

import pytest
from helpers import process

from compressvit.registry import Registry

_COUNT = itertools.count()


@pytest.fixture
def room(tmp_path, monkeypatch) -> Registry[type]:
    """An empty registry over a room that is a folder under `tmp_path`, which is on the path."""
    name = f"house{next(_COUNT)}"
    registry: Registry[type] = Registry("thing", f"{name}.things")
    folder = tmp_path / name / "things"
    folder.mkdir(parents=True)
    (tmp_path / name / "__init__.py").touch()
    (folder / "__init__.py").touch()
    holder = types.ModuleType(f"{name}_registry")
    holder.things = registry  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, holder.__name__, holder)
    monkeypatch.syspath_prepend(tmp_path)
    return registry


def defines(registry: Registry[type], word: str, module: str = "compressvit.x") -> str:
    """The text of a module that registers a class."""
    holder = f"{registry.room.partition('.')[0]}_registry"
    return (
        f"from {holder} import things\nclass {word.title()}: pass\nthings.add({word!r}, {word.title()}, {module!r})\n"
    )


def write(tmp_path: Path, registry: Registry[type], file: str, text: str) -> None:
    path = tmp_path / registry.room.replace(".", "/") / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def install(folder: Path, package: str, registry: Registry[type], word: str, text: str) -> None:
    """A distribution of one module with an entry point."""
    module = f"{package.replace('-', '_')}_{registry.room.partition('.')[0]}"
    (folder / f"{module}.py").write_text(text)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.group}]\n{word} = {module}\n")


def test_every_file_and_folder_of_the_room_is_found(room, tmp_path):
    write(tmp_path, room, "zebra.py", defines(room, "zebra"))
    write(tmp_path, room, "folder/__init__.py", "")
    write(tmp_path, room, "folder/spec.py", defines(room, "apple"))
    assert list(room) == ["apple", "zebra"]
    assert len(room) == 2
    assert room["zebra"].__name__ == "Zebra"
    assert room.class_called("Apple") is room["apple"]
    assert room.class_called("apple") is None
    assert "pear" not in room
    assert room.is_own("apple")
    assert room.package_of("apple") is None


def test_an_installed_package_adds_its_word_after_our_own(room, tmp_path):
    write(tmp_path, room, "zebra.py", defines(room, "zebra"))
    install(tmp_path, "some-apples", room, "apple", defines(room, "apple", "some_apples"))
    assert list(room) == ["zebra", "apple"]
    assert room.package_of("apple") == "some-apples"
    assert not room.is_own("apple")
    assert room.class_called("Apple") is None, "names of our own package are ours"
    assert room.fault("apple") is None


@pytest.mark.parametrize(
    ("text", "word", "sentence"),
    [
        ("raise RuntimeError('no GPU')", "apple", "RuntimeError: no GPU"),
        ("raise SystemExit('bye')", "apple", "SystemExit: bye"),
        ("", "apple", "registers no thing of that name"),
        ("import nothing_of_that_name", "apple", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("", "zebra", "compressvit has a thing of that name"),
    ],
)
def test_a_broken_package_stops_nothing_but_its_own_word(room, tmp_path, text, word, sentence):
    write(tmp_path, room, "zebra.py", defines(room, "zebra"))
    install(tmp_path, "some-fruit", room, word, text)
    assert list(room) == ["zebra"]
    assert room.package_of("zebra") is None
    fault = room.fault(word)
    assert fault is not None
    assert fault.startswith(f"the thing {word!r} of the package some-fruit cannot be used: ")
    assert sentence in fault


def test_two_packages_of_one_word(room, tmp_path):
    for package in ("one", "two"):
        install(tmp_path, package, room, "apple", defines(room, "apple", package))
    assert list(room) == ["apple"]
    other = {"one": "two", "two": "one"}[room.package_of("apple") or ""]
    fault = room.fault("apple") or ""
    assert f"of the package {other} cannot be used: the package {room.package_of('apple')} has a thing of that" in fault


def test_two_entries_of_one_word_are_refused(room):
    room.add("apple", int, "compressvit.one")
    with pytest.raises(TypeError, match=r"two things are called 'apple': compressvit\.one and elsewhere"):
        room.add("apple", float, "elsewhere")
    assert room["apple"] is int


def test_a_file_of_ours_that_cannot_be_imported_is_not_passed_over(room, tmp_path):
    write(tmp_path, room, "broken.py", "raise RuntimeError('a mistake of ours')")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a mistake of ours"):
            list(room)


def test_public_names_are_looked_up_late():
    program = (
        "import sys, compressvit\n"
        "rooms = lambda: [n for n in sys.modules if n.startswith('compressvit.')]\n"
        "assert not hasattr(compressvit, 'transfroms') and not rooms(), rooms()\n"
        "names = dir(compressvit)\n"
        "assert {'LoRA', 'VPT', 'LoadWeights', 'compress', 'Recipe'} <= set(names), names\n"
        "assert all(hasattr(compressvit, name) for name in names)\n"
        "from compressvit import *\n"
        "assert LoRA.name == 'lora' and compressvit.LoRA is LoRA\n"
        "try:\n    compressvit.LoRa\n"
        "except AttributeError as error:\n    print(error)\n"
    )
    done = process.python("-c", program)
    assert done.code == 0, done.err
    assert done.out.strip() == "module 'compressvit' has no attribute 'LoRa'; did you mean 'LoRA'?"


@pytest.mark.wide_unless(lambda program: "losses" in program or "import LORS" in program)
@pytest.mark.parametrize(
    "program",
    [
        "from compressvit.losses import hidden_relation as f; from compressvit.training.losses import hidden_relation as g",
        "import compressvit.ties as f; from compressvit.model import ties as g",
        "from compressvit.ties import count_parameters as f; from compressvit import count_parameters as g",
        "import compressvit.diagnostics as f; from compressvit import diagnostics as g",
        "from compressvit.transforms.lors import LORS as f; from compressvit import LORS as g",
        "from compressvit.transforms.low_rank import LowRank as f; from compressvit import LowRank as g",
        "from compressvit.transforms.vpt import VPT as f; from compressvit.transforms import VPT as g",
    ],
)
def test_every_way_to_import_a_public_name_gives_the_same_object(program):
    """Each in a process of its own, where nothing of compressvit has been imported before."""
    done = process.python("-c", f"{program}; assert f is g")
    assert done.code == 0, done.err
