"""Artifacts on disk: what comes back is what went in, what is overwritten, and what a damaged one is told."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.models import BACKBONES, VIT, build, images_for, outputs
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from compressvit.artifacts import artifact
from compressvit.errors import UserError
from compressvit.model import cost, stored, surgery, ties
from compressvit.testing.cases import lacking
from compressvit.transforms import IRPE, Multiplex
from compressvit.transforms.applying import compress
from compressvit.transforms.record import compression_of


def student_of(name: str, seed: int = 0) -> nn.Module:
    """Shared blocks and private transforms that do something, iRPE where it fits."""
    torch.manual_seed(0)
    transforms = [Multiplex(share=2, mixing_bias=True, mlp_conv=3, form="reference")]
    return compress(build(name, seed), [*transforms, IRPE()] if lacking(IRPE(), name) is None else transforms)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------------- there and back


@pytest.mark.wide_unless(lambda name, dtype: name == "vit" and dtype != torch.float16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BACKBONES)
def test_what_is_loaded_is_what_was_saved(name, dtype, tmp_path):
    student = student_of(name).to(dtype)
    path = artifact.save(student, tmp_path / "deep" / "student")
    assert path == tmp_path / "deep" / "student"
    assert sorted(p.name for p in path.iterdir()) == ["compressvit.json", "model.safetensors"]
    again = artifact.load(str(path))
    assert torch.equal(outputs(again), outputs(student))
    state = student.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) and t.dtype == state[n].dtype for n, t in again.state_dict().items())
    assert {t.dtype for t in state.values()} - {torch.int64} == {dtype}  # batch norms count batches
    assert ties.tied_groups(again) == ties.tied_groups(student) != []
    assert compression_of(again).plans == compression_of(student).plans
    unmeasured = [replace(e, weight_error=None, output_error=None) for e in compression_of(student).ledger]
    assert compression_of(again).ledger == unmeasured  # errors are the run's, which keeps them in results.json
    assert not again.training
    assert contents(artifact.save(again, tmp_path / "second")) == contents(path)


@pytest.mark.wide_unless(lambda name: name == "mobilenetv3_small_050")
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "levit_128s"])
def test_a_plain_timm_model_is_an_artifact_too(name, tmp_path):
    model = timm.create_model(name, num_classes=3).eval()
    again = artifact.load(artifact.save(model, tmp_path / "student"))
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert compression_of(again).plans == []


@pytest.mark.wide_unless(lambda name: name in ("vit", "half", "plain"))
@pytest.mark.parametrize("name", [*BACKBONES, "resnet18", "half", "plain"])
def test_file_bytes_is_the_size_of_the_file(name, tmp_path):
    special = {
        "resnet18": lambda: timm.create_model("resnet18"),  # integers among its buffers
        "half": lambda: student_of("vit").bfloat16(),
        "plain": lambda: build("swin"),
    }
    model = special[name]() if name in special else student_of(name)
    path = artifact.save(model, tmp_path / "student")
    size = os.path.getsize(path / "model.safetensors")
    assert cost.file_bytes(model) == size
    assert cost.file_bytes(surgery.skeleton(model)) == size


@pytest.mark.wide_unless(lambda name, pool: name == "vit" and pool)
@pytest.mark.parametrize("pool", [None, "avg"])
@pytest.mark.parametrize(("name", "classes"), [("vit", 7), ("vit", 0), ("swin", 7), ("deit_distilled", 7)])
def test_a_new_classifier_is_saved(name, classes, pool, tmp_path):
    student = student_of(name)
    student.reset_classifier(classes, None if name == "deit_distilled" else pool)
    again = artifact.load(artifact.save(student, tmp_path / "student"))
    assert again.num_classes == classes
    assert torch.equal(outputs(again), outputs(student))


@pytest.mark.wide_unless(lambda name: name == "vit")
@pytest.mark.parametrize("name", ["vit", "dinov2_registers", "swin"])
def test_another_input_size_is_saved(name, tmp_path):
    torch.manual_seed(0)
    student = compress(build(name), [Multiplex(share=2, mlp_conv=3, form="reference")])
    student.set_input_size(img_size=(64, 64))
    ties.retie(student)
    path = artifact.save(student, tmp_path / "student")
    assert json.loads((path / "compressvit.json").read_text())["input"]["input_size"] == [3, 64, 64]
    again = artifact.load(path)
    assert images_for(again).shape[-1] == 64
    assert torch.equal(outputs(again), outputs(student))


def test_the_manifest_is_plain_json(tmp_path):
    student = student_of("vit")
    manifest = json.loads((artifact.save(student, tmp_path / "student") / "compressvit.json").read_text("utf-8"))

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        return all(map(plain, value)) if isinstance(value, list) else isinstance(value, str | int | float | None)

    assert plain(manifest)
    assert manifest["format"] == stored.FORMAT == 2
    assert manifest["architecture"] == "vit_tiny_patch16_224"
    assert manifest["args"] == {**VIT, "global_pool": "token"}
    assert manifest["parameters"] == ties.count_parameters(student)
    assert [step["transform"] for step in manifest["transforms"]] == ["multiplex", "irpe"]
    assert manifest["ties"] == ties.tied_groups(student)
    assert manifest["dtype"] == "float32"


def test_the_manifest_says_what_images_look_like(tmp_path):
    student = student_of("vit")
    path = artifact.save(student, tmp_path / "student")
    assert json.loads((path / "compressvit.json").read_text())["input"]["input_size"] == [3, 32, 32]
    given = {
        "input_size": [3, 32, 32],
        "mean": [0.1, 0.2, 0.3],
        "std": [1.0, 2.0, 3.0],
        "interpolation": "bilinear",
        "crop_pct": 0.5,
    }
    again = artifact.load(artifact.save(student, path, input_config=given))
    config = timm.data.resolve_model_data_config(again)
    assert {k: list(config[k]) if isinstance(config[k], tuple) else config[k] for k in given} == given


def test_the_teacher_is_not_in_the_file(tmp_path):
    teacher, student = build("vit"), student_of("vit")
    path = artifact.save(student, tmp_path / "student")
    tensors = stored.read_tensors(path)
    assert tensors.keys() == ties.unique_state(student).keys()
    lost = [n for group in ties.tied_groups(student) for n in group]
    assert lost
    teachers = {tuple(teacher.get_parameter(n).flatten().tolist()) for n in lost}
    assert not any(tuple(t.flatten().tolist()) in teachers for t in tensors.values())
    # everything in the folder is the student's numbers, four bytes each, and at most 16 KB of names
    assert sum(map(len, contents(path).values())) < 4 * ties.count_parameters(student) + 16_384
    assert 4 * ties.count_parameters(teacher) > 1.5 * cost.file_bytes(student)


# --------------------------------------------------------------------------------------------------- saving over things


def test_an_older_artifact_is_replaced(tmp_path):
    path = artifact.save(student_of("vit"), tmp_path / "student")
    newer = student_of("swin")
    artifact.save(newer, path)
    assert torch.equal(outputs(artifact.load(path)), outputs(newer))
    (tmp_path / "empty").mkdir()
    artifact.save(newer, tmp_path / "empty")
    (tmp_path / "link").symlink_to(path)
    artifact.save(student_of("vit"), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert "vit_tiny" in (path / "compressvit.json").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "link", "student"]


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_not_an_artifact_is_left_alone(what, tmp_path):
    path = tmp_path / "thesis"
    if what == "folder":
        path.mkdir()
    (path / "chapter.txt" if what == "folder" else path).write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"thesis exists and is not a compressvit artifact; choose another folder"):
        artifact.save(student_of("vit"), path)
    assert contents(tmp_path) == before != {}


@pytest.mark.parametrize("culprit", ["save_file", "write_text"])
def test_a_full_disk_leaves_the_older_artifact_whole(culprit, tmp_path, monkeypatch):
    path = artifact.save(student_of("vit"), tmp_path / "student")
    before = contents(tmp_path)

    def full(target: Any, *args: Any, **kwargs: Any) -> None:
        if culprit == "save_file":
            Path(args[0]).write_bytes(b"the first few bytes")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*(artifact, "save_file", full) if culprit == "save_file" else (Path, "write_text", full))
        with pytest.raises(OSError, match="No space left"):
            artifact.save(student_of("swin"), path)
        with pytest.raises(OSError, match="No space left"):
            artifact.save(student_of("swin"), tmp_path / "another")
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
    artifact.load(path)


def test_models_that_cannot_be_rebuilt_are_not_saved(tmp_path):
    foreign = {
        "not built by timm.create_model": [
            nn.Linear(2, 2),
            VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=2),
        ],
        r"cannot be written to JSON.*act_layer='gelu'": [
            timm.create_model("vit_tiny_patch16_224", **VIT, act_layer=nn.ReLU)
        ],
        r"mixes precisions \['bfloat16', 'float32'\]": [build("vit")],
    }
    foreign[r"mixes precisions \['bfloat16', 'float32'\]"][0].head.bfloat16()
    for message, models in foreign.items():
        for model in models:
            with pytest.raises(UserError, match=message):
                artifact.save(model, tmp_path / "student")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- damaged artifacts


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "compressvit.json"
        manifest = json.loads(file.read_text())
        change(manifest)
        file.write_text(json.dumps(manifest))

    return damage


def drop_tensor(folder: Path) -> None:
    tensors = stored.read_tensors(folder)
    del tensors["norm.weight"]
    tensors["surprise"] = torch.zeros(1)
    tensors["head.bias"] = torch.zeros(9)
    artifact.save_file(tensors, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (
        lambda f: (f / "compressvit.json").unlink(),
        r"is not a compressvit artifact: it has no compressvit\.json",
    ),
    "no tensors": (
        lambda f: (f / "model.safetensors").unlink(),
        r"has no model\.safetensors: the artifact is incomplete",
    ),
    "truncated": (truncate, r"model\.safetensors is not a complete safetensors file \(truncated"),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"hello"),
        "is not a complete safetensors file",
    ),
    "other tensors": (
        drop_tensor,
        r"1 tensors missing \(first norm\.weight\), 1 unknown \(first surprise\), 1 of another shape \(first head\.bias\)",
    ),
    "not JSON": (lambda f: (f / "compressvit.json").write_text("{,"), r"compressvit\.json is not a readable manifest"),
    "not UTF-8": (lambda f: (f / "compressvit.json").write_bytes(b"\xff\xfe"), "is not a readable manifest"),
    "a list": (lambda f: (f / "compressvit.json").write_text("[]"), "is not a readable manifest"),
    "another format": (
        edit(lambda m: m.update(format=9, compressvit="7.7.7")),
        r"is of format 9; this compressvit \(.*\) reads formats 1 to 2\. It was written by compressvit 7\.7\.7",
    ),
    "a key gone": (edit(lambda m: m.pop("ties")), "is not a readable manifest"),
    "a key more": (edit(lambda m: m.update(surprise=1)), "is not a readable manifest"),
    "no such dtype": (edit(lambda m: m.update(dtype="int64")), "is not a readable manifest"),
    "edited ties": (
        edit(lambda m: m["ties"].pop()),
        "its ties are not those of its transforms; the manifest was edited",
    ),
    "invented ties": (edit(lambda m: m["ties"][0].append("head.weight")), "its ties are not those of its transforms"),
    "unknown transform": (
        edit(lambda m: m["transforms"][0].update(transform="multiplexer")),
        r"uses the transform 'multiplexer', which this compressvit \(.*\) does not have; did you mean 'multiplex'\?",
    ),
    "invalid plan": (
        edit(lambda m: m["transforms"][0]["plan"].update(share=2)),
        r"the plan of 'multiplex' is not valid: share: extra inputs are not permitted; it was changed, or written by another version",
    ),
    "plan of another model": (
        edit(lambda m: m["args"].update(depth=2)),
        "its transforms do not fit vit_tiny_patch16_224",
    ),
    "unknown argument": (edit(lambda m: m["args"].update(colour="red")), r"timm .* cannot build vit_tiny_.*colour"),
    "unknown architecture": (
        edit(lambda m: m.update(architecture="vit_huge_tiny")),
        r"timm .* cannot build vit_huge_tiny",
    ),
    "another width": (edit(lambda m: m["args"].update(embed_dim=96)), "does not fit its manifest.*of another shape"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return artifact.save(student_of("vit"), tmp_path_factory.mktemp("whole") / "student")


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_artifact_says_what_is_wrong(what, whole, tmp_path):
    damage, message = DAMAGE[what]
    folder = tmp_path / "student"
    folder.mkdir()
    for name, content in contents(whole).items():
        (folder / name).write_bytes(content)
    artifact.load(folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as refusal:
        artifact.load(folder)
    assert str(folder) in str(refusal.value)


def test_a_run_folder_is_not_an_artifact_but_holds_one(whole):
    with pytest.raises(UserError, match=r"is not a compressvit artifact.*did you mean .*student\?"):
        artifact.load(whole.parent)
    with pytest.raises(UserError, match=r"there is no .*nowhere; give a folder with compressvit\.json"):
        artifact.load(whole / "nowhere")
    with pytest.raises(UserError, match="is not a compressvit artifact"):
        artifact.load(whole / "compressvit.json")


@pytest.mark.parametrize("steps", [[], [Multiplex(share=2)]])
def test_a_model_without_values_is_not_saved(tmp_path, steps):
    model = compress(build("vit"), steps)
    model.to("meta")
    with pytest.raises(UserError, match="cls_token is on the meta device and has no values to save"):
        artifact.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
