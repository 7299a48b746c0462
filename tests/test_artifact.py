"""Artifacts on disk, weights from files and hubs: what comes back is what went in, and every bad input is told so."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import BACKBONES, SWIN, VIT, build, images_for
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from compressvit import artifact, surgery, ties, weights
from compressvit.errors import UserError
from compressvit.models import build_student, build_teacher, load_teacher
from compressvit.pipeline import compress, compression_of
from compressvit.recipe import Recipe, parse_recipe
from compressvit.transforms import IRPE, Multiplex

WHERE = "teacher.weights"


def student_of(name: str, seed: int = 0) -> nn.Module:
    """Shared blocks and private transforms that do something, iRPE where it fits."""
    torch.manual_seed(0)
    transforms = [Multiplex(share=2, mixing_bias=True, mlp_conv=3, form="reference")]
    return compress(build(name, seed), [*transforms, IRPE()] if name != "swin" else transforms)


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    return model(images_for(model).to(next(model.parameters()).dtype))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------------- there and back


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
    assert all(torch.equal(t, state[n]) and t.dtype == dtype for n, t in again.state_dict().items())
    assert ties.tied_groups(again) == ties.tied_groups(student) != []
    assert compression_of(again).plans == compression_of(student).plans
    assert compression_of(again).ledger == compression_of(student).ledger
    assert not again.training
    assert contents(artifact.save(again, tmp_path / "second")) == contents(path)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "levit_128s"])
def test_a_plain_timm_model_is_an_artifact_too(name, tmp_path):
    model = timm.create_model(name, num_classes=3).eval()
    again = artifact.load(artifact.save(model, tmp_path / "student"))
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert compression_of(again).plans == []


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
    assert artifact.file_bytes(model) == size
    assert artifact.file_bytes(surgery.skeleton(model)) == size


def test_a_new_classifier_is_saved(tmp_path):
    for pool in (None, "avg"):
        for name, classes in (("vit", 7), ("vit", 0), ("swin", 7), ("deit_distilled", 7)):
            if pool and name == "deit_distilled":
                continue
            student = student_of(name)
            student.reset_classifier(classes, pool)
            again = artifact.load(artifact.save(student, tmp_path / "student"))
            assert again.num_classes == classes
            assert torch.equal(outputs(again), outputs(student))


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
    assert manifest["format"] == artifact.FORMAT == 1
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
    stored = artifact.read_tensors(path)
    assert stored.keys() == ties.unique_state(student).keys()
    lost = [n for group in ties.tied_groups(student) for n in group]
    assert lost
    teachers = {tuple(teacher.get_parameter(n).flatten().tolist()) for n in lost}
    assert not any(tuple(t.flatten().tolist()) in teachers for t in stored.values())
    # everything in the folder is the student's numbers, four bytes each, and at most 16 KB of names
    assert sum(map(len, contents(path).values())) < 4 * ties.count_parameters(student) + 16_384
    assert 4 * ties.count_parameters(teacher) > 1.5 * artifact.file_bytes(student)


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
    tensors = artifact.read_tensors(folder)
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
        r"is of format 9; this compressvit \(.*\) reads format 1\. It was written by compressvit 7\.7\.7",
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
        "the plan of 'multiplex' is not valid.*\nshare",
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
    with pytest.raises(UserError, match="is not a compressvit artifact"):
        artifact.load(whole / "nowhere")
    with pytest.raises(UserError, match="is not a compressvit artifact"):
        artifact.load(whole / "compressvit.json")


# ----------------------------------------------------------------------------------------------------- weights in files

FILES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "plain": lambda state: state,
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state},
    "teacher": lambda state: {"teacher": state},
    "nested": lambda state: {"state_dict": {"model": state}},
    "average first": lambda state: {"model": {n: t + 1 for n, t in state.items()}, "model_ema": state},
    "data parallel": lambda state: {"model": {f"module.{n}": t for n, t in state.items()}},
}


@pytest.mark.parametrize("kind", [*FILES, "safetensors", "artifact", "legacy"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_weights_from_a_file(name, kind, tmp_path):
    source, model = build(name), build(name, seed=5)
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        artifact.save_file(source.state_dict(), path)
    elif kind == "artifact":
        artifact.save(source, path)
    else:
        content = FILES.get(kind, FILES["plain"])(source.state_dict())
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    assert not torch.equal(outputs(model), outputs(source))
    weights.load_file(model, path, WHERE)
    assert torch.equal(outputs(model), outputs(source))


class Bomb:
    """A pickle that would write a file when it is read."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_file_is_refused_and_does_not_run(legacy, tmp_path):
    file, ran = tmp_path / "evil.pth", tmp_path / "ran"
    model = build("vit")
    content = {"model": model.state_dict(), "bomb": Bomb(ran)}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        UserError, match=r"evil\.pth is not a file of plain tensors \(it holds code.*convert it to safetensors"
    ):
        weights.load_file(model, file, WHERE)
    disguised = tmp_path / "evil.safetensors"
    disguised.write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        weights.load_file(model, disguised, WHERE)
    assert not ran.exists()
    torch.load(file, weights_only=False)
    assert ran.exists(), "the bomb must be live, or this tests nothing"


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_damaged_file_is_never_a_stack_trace(legacy, tmp_path):
    model, path, chance = build("vit"), tmp_path / "weights.pth", random.Random(0)
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    refused = 0
    for attempt in range(60):
        damaged = bytearray(whole[: chance.randrange(len(whole))] if attempt % 2 else whole)
        for _ in range(attempt % 4 * 5):
            if damaged:
                damaged[chance.randrange(min(len(damaged), 3000))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            weights.load_file(model, path, WHERE)
        except UserError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017
    assert refused >= 30, "every truncated file at least"


NOT_WEIGHTS = {
    "a number": (5, "holds a int, not a state dict of tensors"),
    "a list": ([torch.zeros(1)], "holds a list, not a state dict of tensors"),
    "mixed": ({"head.weight": torch.zeros(1), "epoch": 3}, "holds a dict, not a state dict of tensors"),
    "another model": (
        {"conv1.weight": torch.zeros(1)},
        r"does not fit vit_tiny_patch16_224: \d+ tensors missing.*1 unknown, first conv1",
    ),
    "nothing": ({}, "tensors missing, first"),
}


@pytest.mark.parametrize("what", NOT_WEIGHTS)
def test_a_file_of_something_else(what, tmp_path):
    content, message = NOT_WEIGHTS[what]
    torch.save(content, tmp_path / "weights.pth")
    model = build("vit")
    before = outputs(model)
    with pytest.raises(UserError, match=message):
        weights.load_file(model, tmp_path / "weights.pth", WHERE)
    assert torch.equal(outputs(model), before)


def test_no_file_at_all(tmp_path):
    for path in (tmp_path / "nothing.pth", tmp_path):
        with pytest.raises(
            UserError, match=r"teacher\.weights: there is no file .*Supply them as a file: teacher\.weights=PATH"
        ):
            weights.load_file(build("vit"), path, WHERE)


def test_positions_are_resampled_as_timm_does():
    small, large = build("vit"), timm.create_model("vit_tiny_patch16_224", **{**VIT, "img_size": 64}).eval()
    tensors = weights.resample_positions(small.state_dict(), large)
    expected = resample_abs_pos_embed(small.pos_embed, new_size=(8, 8), old_size=(4, 4), num_prefix_tokens=1)
    assert torch.equal(tensors["pos_embed"], expected)
    assert torch.equal(tensors["pos_embed"][:, :1], small.pos_embed[:, :1]), "the class token's row is not on the grid"


@pytest.mark.parametrize(("name", "args"), [("vit", {"img_size": 64}), ("swin", {"img_size": 64, "window_size": 8})])
def test_weights_of_another_resolution(name, args, tmp_path):
    small = build(name)
    architecture, built_with = BACKBONES[name]
    large = timm.create_model(architecture, **{**built_with, **args}).eval()
    torch.save(small.state_dict(), tmp_path / "weights.pth")
    weights.load_file(large, tmp_path / "weights.pth", WHERE)
    resized = small
    resized.set_input_size(img_size=(64, 64))
    images = images_for(large)
    with torch.no_grad():
        assert (large(images) - resized(images)).abs().max() < 1e-6  # seen 0.0


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "swin"])
def test_another_number_of_classes(name, tmp_path, caplog):
    source = build(name)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    architecture, args = BACKBONES[name]
    model = timm.create_model(architecture, **{**args, "num_classes": 9}).eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(
        UserError, match=r"classifier of 5 classes and the model one of 9; set num_classes=5.*teacher\.finetune"
    ):
        weights.load_file(model, tmp_path / "weights.pth", WHERE)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with caplog.at_level("WARNING", logger="compressvit"):
        weights.load_file(model, tmp_path / "weights.pth", WHERE, new_head=True)
    assert "the classifier starts fresh" in caplog.text
    fresh = 0
    for n, tensor in model.state_dict().items():
        is_head = n.startswith("head")
        assert torch.equal(tensor, before[n] if is_head else source.state_dict()[n]), n
        fresh += is_head
    assert fresh == {"vit": 2, "deit_distilled": 4, "swin": 2}[name]


def test_a_model_without_a_classifier_leaves_the_files_aside(tmp_path):
    for name in ("vit", "swin"):
        source, (architecture, args) = build(name), BACKBONES[name]
        torch.save(source.state_dict(), tmp_path / "weights.pth")
        model = timm.create_model(architecture, **{**args, "num_classes": 0})
        weights.load_file(model, tmp_path / "weights.pth", WHERE)
        assert all(torch.equal(t, source.state_dict()[n]) for n, t in model.state_dict().items())


# ----------------------------------------------------------------------------------------------------- weights of a hub


def refuse(*args: Any, **kwargs: Any) -> None:
    raise OSError("Name or service not known")


def test_pretrained_without_a_network_says_how_to_supply(monkeypatch):
    model = weights.build("vit_tiny_patch16_224.augreg_in21k_ft_in1k", device="meta")
    for module, name in ((weights, "_require_reachable"), (timm, "create_model")):
        with monkeypatch.context() as patch:
            patch.setattr(weights, "_require_reachable", lambda config: None)
            patch.setattr(module, name, refuse)
            with pytest.raises(UserError) as refusal:
                weights.load_pretrained(model, WHERE)
        for part in (
            "teacher.weights: pretrained: the weights of vit_tiny_patch16_224.augreg_in21k_ft_in1k are not in the local cache",
            "could not be downloaded (OSError: Name or service not known)",
            "model.safetensors of the repository timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k of the Hugging Face Hub",
            "Supply them as a file: teacher.weights=PATH",
        ):
            assert part in str(refusal.value)


def test_a_model_that_timm_has_no_weights_for():
    model = build("vit")
    model.pretrained_cfg = {"architecture": "vit_tiny_patch16_224"}
    with pytest.raises(
        UserError,
        match=r"student\.weights: pretrained: timm has no .* weights for vit_tiny_.*student\.weights=PATH",
    ):
        weights.load_pretrained(model, "student.weights")


def test_pretrained_values_are_copied(monkeypatch):
    source, model = build("swin", seed=5), build("swin")
    asked = {}
    monkeypatch.setattr(weights, "_require_reachable", lambda config: None)
    monkeypatch.setattr(timm, "create_model", lambda name, **args: (asked.update(args, name=name), source)[1])
    with pytest.raises(UserError, match=r"1000 classes apart and the model has a head of 5.*teacher\.finetune"):
        weights.load_pretrained(model, WHERE)
    assert not asked
    weights.load_pretrained(model, WHERE, new_head=True)
    assert torch.equal(outputs(model), outputs(source))
    assert asked == {**SWIN, "name": "swin_tiny_patch4_window7_224.ms_in1k", "pretrained": True}


def test_the_cache_is_asked_before_the_network(monkeypatch):
    import huggingface_hub

    config = {"hf_hub_id": "timm/a_model"}
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, name: None)
    with pytest.raises(OSError, match="Name or service"):
        weights._require_reachable(config)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, name: f"/cache/{name}")
    weights._require_reachable(config)
    weights._require_reachable({"url": "https://somewhere"})


# ------------------------------------------------------------------------------------------------------------- building


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (
            "vit_tiny_patch16_242",
            {},
            r"timm .* has no model 'vit_tiny_patch16_242'; did you mean 'vit_tiny_patch16_224'\?",
        ),
        ("quux", {}, r"has no model 'quux'; timm\.list_models\(\) lists them"),
        ("", {}, "has no model ''"),
        (
            "vit_tiny_patch16_224.augreg_in1k",
            {},
            r"no pretrained weights 'vit_tiny_.*augreg_in1k'.*\(known: augreg_in21k",
        ),
        ("vit_tiny_patch16_224", {"depht": 3}, r"timm cannot build vit_tiny_patch16_224 with depht=3: .*depht"),
        ("vit_tiny_patch16_224", {"num_heads": 5}, "with num_heads=5: .*divisible"),
        ("vit_tiny_patch16_224", {"embed_dim": -3}, "timm cannot build .* with embed_dim=-3"),
        ("vit_tiny_patch16_224", {"patch_size": 0}, "timm cannot build .* with patch_size=0"),
        ("vit_tiny_patch16_224", {"img_size": "big"}, "timm cannot build .* with img_size='big'"),
    ],
)
@pytest.mark.parametrize("device", [None, "meta"])
def test_models_that_cannot_be_built(name, args, message, device):
    with pytest.raises(UserError, match=message):
        weights.build(name, device=device, **args)


def test_models_that_can():
    assert {p.device.type for p in weights.build("vit_tiny_patch16_224", device="meta").parameters()} == {"meta"}
    model = weights.build("swin_tiny_patch4_window7_224.ms_in1k", **SWIN)
    assert model.num_classes == 5
    assert model.pretrained_cfg["tag"] == "ms_in1k"


# -------------------------------------------------------------------------------------------------- values from a model


def without(model: nn.Module, *words: str) -> dict[str, torch.Tensor]:
    return {n: t for n, t in model.state_dict().items() if not n.startswith(words)}


def test_the_class_token_may_go():
    teacher = build("vit")
    args = {**VIT, "class_token": False, "global_pool": "avg", "fc_norm": False}
    student = timm.create_model("vit_tiny_patch16_224", **args)
    assert weights.copy_matching(student, teacher) == ["cls_token"]
    assert torch.equal(student.pos_embed, teacher.pos_embed[:, 1:])
    rest = without(teacher, "cls_token", "pos_embed")
    assert without(student, "pos_embed").keys() == rest.keys()
    assert all(torch.equal(t, rest[n]) for n, t in without(student, "pos_embed").items())


def test_the_distillation_token_may_go_and_the_class_token_keeps_its_row():
    teacher, student = build("deit_distilled"), build("vit", seed=5)
    assert sorted(weights.copy_matching(student, teacher)) == ["dist_token", "head_dist.bias", "head_dist.weight"]
    assert torch.equal(student.pos_embed[:, :1], teacher.pos_embed[:, :1])
    assert torch.equal(student.pos_embed[:, 1:], teacher.pos_embed[:, 2:])


def test_an_equal_model_is_copied_whole():
    teacher, student = build("swin"), build("swin", seed=5)
    assert weights.copy_matching(student, teacher) == []
    assert torch.equal(outputs(student), outputs(teacher))


@pytest.mark.parametrize(
    "args", [{"embed_dim": 96}, {"img_size": 64}, {"depth": 5}, {"class_token": False, "global_pool": "avg"}], ids=str
)
def test_a_student_that_does_not_match(args):
    student = timm.create_model("vit_tiny_patch16_224", **{**VIT, **args})
    before = {n: t.clone() for n, t in student.state_dict().items()}
    with pytest.raises(
        UserError,
        match=r"no counterpart in the teacher, first \S+ \(.*model \(.*\)\)\. Use `student",
    ):
        weights.copy_matching(student, build("vit"))
    assert all(torch.equal(t, before[n]) for n, t in student.state_dict().items())


# ----------------------------------------------------------------------------------------------- what a recipe asks for


ARGS = "{img_size: 8, patch_size: 2, in_chans: 1, embed_dim: 48, depth: 2, num_heads: 4}"


def recipe_of(teacher: str, student: str = "") -> Recipe:
    return parse_recipe(
        f"teacher: {{model: vit_tiny_patch16_224, args: {ARGS}, {teacher}}}\n"
        f"student: {{{student}}}\ndata: {{name: digits}}\nsteps: [{{multiplex: {{share: 2}}}}]"
    )


def test_a_student_is_a_copy_of_its_teacher():
    recipe = recipe_of("weights: train")
    teacher = build_teacher(recipe)
    assert teacher.num_classes == 10, "the data's classes, because the teacher is trained"
    student = build_student(recipe, teacher)
    assert student is not teacher
    assert all(torch.equal(t, teacher.state_dict()[n]) for n, t in student.state_dict().items())
    meta = build_student(recipe, build_teacher(recipe, device="meta"), meta=True)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert {n: t.shape for n, t in meta.state_dict().items()} == {n: t.shape for n, t in student.state_dict().items()}


def test_a_student_with_arguments_of_its_own():
    arguments = "args: {class_token: false, global_pool: avg, fc_norm: false}, weights: WEIGHTS"
    recipe = recipe_of("weights: train", arguments.replace("WEIGHTS", "teacher"))
    teacher = build_teacher(recipe)
    student = build_student(recipe, teacher)
    assert student.cls_token is None
    assert torch.equal(student.blocks[1].mlp.fc1.weight, teacher.blocks[1].mlp.fc1.weight)
    fresh = build_student(recipe_of("weights: train", arguments.replace("WEIGHTS", "random")), teacher)
    assert fresh.cls_token is None
    assert not torch.equal(fresh.blocks[1].mlp.fc1.weight, teacher.blocks[1].mlp.fc1.weight)


def test_a_teacher_and_a_student_from_files(tmp_path):
    file = tmp_path / "w.pth"
    student = f"model: vit_tiny_patch16_224, weights: {file}, args: {ARGS}"
    recipe = recipe_of(f"weights: {file}, num_classes: 10", student)
    source = build_teacher(recipe)
    torch.save(source.state_dict(), file)
    teacher = build_teacher(recipe)
    load_teacher(recipe, teacher)
    student = build_student(recipe, teacher)
    for model in (teacher, student):
        assert all(torch.equal(t, source.state_dict()[n]) for n, t in model.state_dict().items())
    wrong = recipe_of(f"weights: {file}, num_classes: 3")
    with pytest.raises(UserError, match=r"teacher\.weights: .* classifier of 10 classes and the model one of 3"):
        load_teacher(wrong, build_teacher(wrong))
    retrained = recipe_of(f"weights: {file}, num_classes: 3, finetune: {{}}")
    load_teacher(retrained, build_teacher(retrained))
