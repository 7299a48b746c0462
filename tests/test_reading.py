"""Files that somebody else made: read within bounds, or refused in one sentence that names them, at once."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
from helpers.hostile import BOMBS, NAMES
from helpers.runs import TINY, refused

from compressvit.errors import UserError
from compressvit.files import write_atomically, write_json
from compressvit.reading import Unreadable, parse_json, parse_yaml, read_json, read_text
from compressvit.rows import MetricsRow, append_row, read_rows
from compressvit.text import printable, printable_in


@pytest.mark.wide_unless(lambda what: what not in ("many values", "a number in base 60"))
@pytest.mark.parametrize("what", BOMBS)
def test_a_yaml_bomb_is_a_sentence_within_seconds(what):
    began = time.process_time()
    with pytest.raises(UserError, match=r"^bomb\.yaml (is nested|holds|has|is not YAML)") as error:
        parse_yaml(BOMBS[what], "bomb.yaml")
    assert time.process_time() - began < 3
    assert len(str(error.value)) < 400


@pytest.mark.wide_unless(lambda what: what != "deep flow")
@pytest.mark.parametrize("what", ["nested aliases", "50 MB", "deep flow", "a date that is none"])
def test_a_bomb_as_a_recipe_and_as_an_override(what, tmp_path):
    recipe = tmp_path / "bomb.yaml"
    recipe.write_text(BOMBS[what])
    assert str(recipe) in refused("plan", recipe)
    if what != "50 MB":  # which no command line takes
        recipe.write_text(TINY)
        assert "override 'description=" in refused("plan", recipe, f"description={BOMBS[what][:20_000]}")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[" * 65 + "]" * 65, "is nested too deeply, more than 64 levels"),
        (f"a: &a x\nb: [{'*a, ' * 1001}]", "holds more than 1,000 aliases"),
        ("a: &a [1, *a]", "is nested too deeply, or holds an alias of something around it"),
        (f"a: !!bool {'x' * 5000}", "holds a value that YAML cannot build"),
        (f"a: '{'x' * 5000}", "is not YAML"),
    ],
)
def test_yaml_that_is_refused(text, fault):
    with pytest.raises(UserError, match=rf"^x\.yaml {fault}") as error:
        parse_yaml(text, "x.yaml")
    assert len(str(error.value)) < 500


def test_yaml_that_is_read():
    assert parse_yaml("[" * 64 + "]" * 64, "x") is not None
    assert parse_yaml(f"a: &a x\nb: [{'*a, ' * 1000}]", "x")["b"] == ["x"] * 1000
    assert parse_yaml("[1e3, 1e+3, 1E-3, .1e4, 1.e3, -1.5e0, +1e3]", "x") == [1e3, 1e3, 1e-3, 1e3, 1e3, -1.5, 1e3]
    assert parse_yaml("[e3, 1e, 1e+, .e1, x1e3]", "x") == ["e3", "1e", "1e+", ".e1", "x1e3"]


@pytest.mark.parametrize("long", ["[" * 100_000, "a " * 50_000, "a\\n" * 50_000])
def test_a_message_does_not_repeat_all_that_it_refuses(long, tmp_path):
    (tmp_path / "recipe.yaml").write_text(TINY.replace("name: digits", f'name: "first{long}last"'))
    message = refused("plan", tmp_path / "recipe.yaml")
    assert len(message) < (20_000 if "\\n" in long else 4_000)
    assert "there is no data set 'first" in message
    assert "…" in message
    assert "last'" in message
    assert "(known: " in message
    assert str(UserError("a\n" * 1000)) == "a\n" * 1000
    two = UserError(f"a{'x' * 5000}b: there is no c{'x' * 5000}d")
    assert re.fullmatch("ax{249}…x{248}b: there is no cx{249}…x{249}d", str(two))


def test_a_recipe_may_use_aliases():
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 1e-3}", "r") == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": {"x": 1, "y": 0.001},
    }


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[" * 100_000, "nested more than 64 deep"),
        ("[" * 70 + "]" * 70, "nested more than 64 deep"),
        ('{"a": ' * 100_000, "nested more than 64 deep"),
        ("1" * 5000, "a number in it has 5,000 digits"),
        ("{", "it is not JSON"),
    ],
)
def test_json_that_is_refused(text, fault, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(Unreadable, match=rf"x\.json cannot be read: .*{fault}"):
        read_json(tmp_path / "x.json")


def test_json_that_is_read():
    assert parse_json("[" * 60 + "]" * 60, "x") is not None
    assert parse_json(r'{"caf\udce9": "\u00e9"}', "x") == {r"caf\xe9": "é"}
    assert parse_json(r'{"caf\uDCE9": 1}', "x") == {r"caf\xe9": 1}


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name, fault in (
        ("pipe", "it is a named pipe, not a file"),
        ("folder", "it is a folder, not a file"),
        ("loop", "Too many levels of symbolic links"),
        ("nothing", "there is no such file"),
        ("latin", "'utf-8' codec can't decode byte 0xe9"),
    ):
        with pytest.raises(Unreadable, match=rf"{name} cannot be read: {fault}"):
            read_text(tmp_path / name)
    with pytest.raises(UserError, match="named pipe"):
        read_rows(tmp_path / "pipe", MetricsRow)
    with pytest.raises(Unreadable, match="cannot be read: embedded null byte"):
        read_text(tmp_path / "a\0b")


def test_a_file_is_read_whole_or_not_at_all(tmp_path):
    (tmp_path / "x").write_bytes(b"a\r\nb\rc\n")
    assert read_text(tmp_path / "x", most=7) == "a\nb\nc\n"
    with pytest.raises(Unreadable, match="are read"):
        read_text(tmp_path / "x", most=6)


@pytest.mark.skipif(not os.path.isfile("/proc/self/maps"), reason="there is no /proc")
def test_a_file_that_hides_its_size_is_read_whole_or_not_at_all():
    assert os.stat("/proc/self/maps").st_size == 0
    assert len(read_text(Path("/proc/self/maps"))) > 1000
    with pytest.raises(Unreadable, match="are read"):
        read_text(Path("/proc/self/maps"), most=1000)


def test_links_are_followed_but_inside_a_run_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_text("x")
    (tmp_path / "run").symlink_to(tmp_path / "real")
    assert read_text(tmp_path / "run" / "x") == read_text(tmp_path / "run" / "x", root=tmp_path / "run") == "x"
    with pytest.raises(Unreadable, match=r"run is a link, and links inside a run folder are not followed"):
        read_text(tmp_path / "run" / "x", root=tmp_path)


def test_a_scratch_file_is_no_way_out(tmp_path):
    """`.report.html.part` as a link to a file of the user's."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / ".x.part").symlink_to(precious)
    write_atomically(tmp_path / "x", lambda scratch: scratch.write_text("ours"))
    assert (precious.read_text(), (tmp_path / "x").read_text()) == ("mine", "ours")
    assert not (tmp_path / "x").is_symlink()


def test_a_scratch_file_that_appears_at_once_is_no_way_out(tmp_path, monkeypatch):
    """A link that somebody puts there between the look and the writing."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    unlink = Path.unlink

    def too_late(path, missing_ok=False):
        unlink(path, missing_ok=missing_ok)
        path.symlink_to(precious)

    monkeypatch.setattr(Path, "unlink", too_late)
    with pytest.raises(UserError, match="x could not be written: File exists"):
        write_atomically(tmp_path / "x", lambda scratch: scratch.write_text("ours"))
    assert precious.read_text() == "mine"


def test_text_is_made_printable():
    assert {what: printable(name) for what, name in NAMES.items()} == {
        "escape": r"cat\x1b[31mred\x1b[0m",
        "bell": r"cat\x07",
        "markup": "[/x] [red]cat",
        "reversed": r"cat\u202etac",
        "byte": r"caf\xe9",
    }
    assert printable("tab\tline\né 猫 ×") == "tab\tline\né 猫 ×"
    every = [*range(9), *range(0xB, 0x20), *range(0x7F, 0xA0), 0x61C, 0x200B, 0x200E, 0x200F, *range(0x2028, 0x202F)]
    every += [*range(0x2060, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFC), 0xFFFE, 0xFFFF, 0xD800, 0xDBFF, 0xDFFF]
    for code in every:
        assert printable(chr(code)) == (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
        assert printable(f"a{chr(code)}", "?") == "a?"
    for code in (9, 0xA, 0x20, 0x7E, 0xA0, 0x200C, 0x200D, 0x2027, 0x202F, 0xFFFD):
        assert printable(chr(code)) == chr(code)
    assert printable_in({"\x00": ["\x00", 1, ("\x00",)]}) == {r"\x00": [r"\x00", 1, (r"\x00",)]}


def test_json_is_valid_for_every_reader(tmp_path):
    write_json(tmp_path / "x.json", {"caf\udce9": [float("nan"), float("inf"), 1.5, "\x1b"]})
    assert read_json(tmp_path / "x.json") == {r"caf\xe9": [None, None, 1.5, r"\x1b"]}
    json.loads((tmp_path / "x.json").read_bytes().decode("utf-8"))
    append_row(tmp_path / "rows", MetricsRow(phase="caf\udce9", kind="train", step=1))
    assert read_rows(tmp_path / "rows", MetricsRow)[0].phase == r"caf\xe9"


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    done, replace = [], os.replace
    names = lambda handle: os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(("sync", names(handle))))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("rename", a.name, b.name)), replace(a, b)))
    write_atomically(tmp_path / "x", lambda scratch: scratch.write_text("1"), keep=tmp_path / "old")
    write_atomically(tmp_path / "x", lambda scratch: scratch.write_text("2"), keep=tmp_path / "old")
    whole = [("sync", ".x.part"), ("rename", ".x.part", "x"), ("sync", tmp_path.name)]
    assert done == [*whole, whole[0], ("rename", "x", "old"), *whole[1:]]
    assert [(tmp_path / name).read_text() for name in ("old", "x")] == ["1", "2"]
