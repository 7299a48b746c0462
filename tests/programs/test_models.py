"""The programs of `compressvit tool` that open models: what they print, what they write, and what they refuse."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.models import build
from helpers.tools import ran, refused

from compressvit.artifacts import artifact
from compressvit.errors import UserError
from compressvit.model import stored
from compressvit.programs.opened import open_models

CPU = torch.device("cpu")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_cka_of_a_run_is_of_its_student_and_teacher(finished, tmp_path, capsys):
    out = ran(capsys, "cka", finished, "--images", 16, "--batch-size", 8, "--output", tmp_path)
    assert "CKA on 16 images" in out
    found = rows(tmp_path / "cka.csv")
    depth = json.loads((finished / "student" / stored.MANIFEST).read_text())["args"]["depth"]
    assert len(found) == depth**2
    assert {"row", "column", "cka", "plus_minus", "best"} == set(found[0])
    assert all(-0.3 < float(row["cka"]) <= 1 for row in found)
    for suffix in ("png", "svg", "json"):
        assert (tmp_path / f"cka.{suffix}").stat().st_size > 500
    assert list((tmp_path / "tensorboard").iterdir())
    assert len(rows(tmp_path / "cka_layers.csv")) == depth


def test_a_model_is_like_its_copy(finished, tmp_path, capsys):
    copied = tmp_path / "copy"
    shutil.copytree(finished / "student", copied)
    ran(
        capsys,
        "cka",
        finished,
        copied,
        "--images",
        16,
        "--output",
        tmp_path / "out",
        "--first-taps",
        "blocks.0",
        "norm",
    )
    found = rows(tmp_path / "out" / "cka.csv")
    assert {row["row"] for row in found} == {"blocks.0", "norm"}
    same = next(row for row in found if row["row"] == row["column"] == "blocks.0")
    assert float(same["cka"]) == pytest.approx(1, abs=1e-6)


@pytest.mark.wide_unless(lambda names: names == ("a:q", "b[0]"))
@pytest.mark.parametrize("names", [("a_0.3", "a_0.75"), ("a:q", "b[0]")])
def test_models_of_any_name_are_drawn(finished, tmp_path, capsys, names):
    """Names of models are not names of fields: Vega reads a dot or a bracket as a place inside, and Altair a colon as a type."""
    models = [shutil.copytree(finished / "student", tmp_path / name) for name in names]
    ran(capsys, "cka", *models, "data.name=digits", "--images", 16, "--output", tmp_path / "out")
    for name in ("cka", "cka_layers"):
        picture = (tmp_path / "out" / f"{name}.svg").read_text()
        assert "undefined" not in picture
        assert all(f"{tmp_path / model}" in picture for model in names), name
    assert (tmp_path / "out" / "cka.svg").read_text().count('aria-roledescription="rect mark"') == len(
        rows(tmp_path / "out" / "cka.csv")
    )


@pytest.mark.usefixtures("undrawn")
def test_similarity_of_the_teacher_or_of_the_student(finished, tmp_path, capsys):
    out = ran(capsys, "similarity", finished, "--images", 16, "--output", tmp_path / "a")
    assert "teacher: the pairs of each kind that lose least by sharing (relative error of the outputs)" in out
    assert all(f"{kind} " in out for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")), (
        "each kind has its own scale"
    )
    assert rows(tmp_path / "a" / "effective_rank.csv")
    out = ran(capsys, "similarity", finished, "--student", "--weights", "--output", tmp_path / "b")
    assert "student: the pairs of each kind that lose least by sharing (relative error of the weights)" in out
    shared = [
        row
        for row in rows(tmp_path / "b" / "similarity.csv")
        if {row["block"], row["other"]} == {"blocks.0", "blocks.1"}
    ]
    assert all(float(row["loss"]) == 0 for row in shared), "blocks of a share group have one weight"


@pytest.mark.usefixtures("undrawn")
def test_an_artifact_needs_data_and_a_partner(finished, tmp_path, capsys):
    plain = artifact.save(build("vit"), tmp_path / "plain")
    assert "its data is not known; add data.name=digits" in refused(capsys, "cka", plain)
    assert "is an artifact, which does not know its teacher; name a second model" in refused(
        capsys, "cka", plain, "data.name=digits"
    )
    out = ran(capsys, "similarity", plain, "data.name=digits", "--weights", "--output", tmp_path / "out")
    assert "the pairs of each kind that lose least" in out
    assert "2 models were named" in refused(capsys, "similarity", finished, plain), "it would look at one of them"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("NOWHERE",), "there is no NOWHERE; give a run folder, or an artifact"),
        (("RUN", "RUN"), "is named twice"),
        (("RUN", "RUN", "RUN"), "3 models were named"),
        (("RUN", "seed=3"), "takes overrides of the data only, not 'seed=3'"),
        (("RUN", "--first-taps", "blocks.9"), "tap 'blocks.9' is no module"),
        (("RUN", "--images", "3"), "3 images are too few"),
        (("RUN", "--batch-size", "2"), "batches of 2 images are too small"),
        (("EMPTY",), "is not a compressvit artifact: it has no compressvit.json"),
    ],
)
def test_what_cannot_be_looked_at(finished, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    places = {"RUN": finished, "EMPTY": tmp_path / "empty", "NOWHERE": "NOWHERE"}
    assert message in refused(capsys, "cka", *(places.get(word, word) for word in words), "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_of_a_run_see_their_own_images(finished):
    opened = open_models([str(finished)], CPU)
    assert [one.label for one in opened.models] == ["student", "teacher"]
    batches = list(opened.labelled(10))
    assert sum(len(images) for images, _ in batches) == 10
    assert all((labels >= 0).all() for _, labels in batches)
    with pytest.raises(UserError, match="2 models were named"):
        open_models([str(finished), str(finished / "teacher")], CPU, most=1)
