"""A compressed model on disk: a folder with its structure (`compressvit.json`) and its values (`model.safetensors`).

Each shared tensor is stored once, under its canonical name; the ties are restored from the manifest. Loading applies the recorded plans
and loads the tensors strictly: it needs no teacher and no images, and unpickles nothing.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from compressvit import __version__
from compressvit.errors import UserError
from compressvit.files import put, usual_mode
from compressvit.model import surgery, ties
from compressvit.model.backbone import input_size, model_name
from compressvit.model.bounded import on_meta
from compressvit.model.checksums import content_checksum, tensor_checksums
from compressvit.model.cost import header_word
from compressvit.model.hub import weights_path
from compressvit.model.outputs import in_one
from compressvit.model.stored import (
    FORMAT,
    MANIFEST,
    TENSORS,
    Manifest,
    build_plain,
    class_names,
    expect_images,
    name_classes,
    read_manifest,
    read_slots,
    read_tensors,
    require_as_written,
    require_complete,
)
from compressvit.text import printable_in
from compressvit.transforms.applying import apply_plans
from compressvit.transforms.applying import materialise as fold_low_rank
from compressvit.transforms.record import compression_of
from compressvit.transforms.stored import read_plans, record_of


def save(
    model: nn.Module,
    path: str | Path,
    *,
    input_config: dict[str, Any] | None = None,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Write a compressed (or plain) timm model as an artifact. An artifact at `path` is replaced once the new one is complete.

    Args:
        model: built by `timm.create_model`, then possibly by `compressvit.compress`.
        path: the artifact's folder; created.
        input_config: size and normalisation of the model's images; by default timm's configuration of the model.
        check: called with the new artifact's folder before it replaces an earlier one, which is kept if `check` raises.

    Raises:
        UserError: a tensor has no values, a tie is broken, the model was not built by timm or is quantised, or `path` holds something
            that is not an artifact.
    """
    state = model.state_dict()
    _require_plain(state)
    if empty := next((name for name, tensor in state.items() if tensor.is_meta), None):
        raise UserError(f"{empty} is on the meta device and has no values to save; load or initialise the model first")
    path = Path(path)
    if path.is_symlink():  # the target of a link is replaced, not the link
        path = path.resolve()
    manifest = _manifest(model, input_config)
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or (path / MANIFEST).is_file())):
        raise UserError(f"{path} exists and is not a compressvit artifact; choose another folder")
    tensors = {k: v.detach().contiguous().cpu() for k, v in ties.unique_state(model).items()}
    scratch = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    scratch.mkdir(parents=True)
    try:
        save_file(tensors, scratch / TENSORS)
        usual_mode(scratch / TENSORS)
        content = printable_in(
            {**manifest.model_dump(mode="json"), "tensors": tensor_checksums(tensors)}
        )  # as it is read
        content["checksum"] = content_checksum(content)
        (scratch / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if check is not None:
            check(scratch)
        if path.exists():
            old = path.parent / f".{path.name}.old.{uuid.uuid4().hex[:8]}"
            os.replace(path, old)
            put(scratch, path)
            for file in old.iterdir():  # what somebody put beside the two files stays
                if file.name not in (MANIFEST, TENSORS):
                    os.replace(file, path / file.name)
            shutil.rmtree(old)
        else:
            put(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def _require_plain(state: dict[str, Any]) -> None:
    """Raise a `UserError` where the state of a model has more than plain tensors, as that of a quantised one."""
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.is_quantized or hasattr(value, "__tensor_flatten__"):
            raise UserError(
                f"{name} of the model is a {type(value).__name__}, and an artifact holds plain tensors only; save the model before it is "
                "quantised, and quantise what compressvit.load returns"
            )


def require_storable(model: nn.Module) -> None:
    """Raise the `UserError` that `save` would raise for the model, before a long training rather than after it."""
    _manifest(model, None)


def load(path: str | Path, *, materialise: bool = False) -> nn.Module:
    """Rebuild a model from its artifact, on the CPU, in eval mode, in the precision it was saved in.

    Args:
        path: the artifact's folder, the file of one that was exported to safetensors, or `hf-hub:ORG/NAME`, a repository of the Hugging
            Face Hub, as `compressvit push` writes it.
        materialise: turn low-rank layers into plain linear layers with their effective weights: the teacher's latency, at the cost of
            the memory that sharing saved. False keeps them factored.

    Raises:
        UserError: there is no artifact at `path`, its format is unknown, a file is damaged, or tensors do not fit the structure.
    """
    path = weights_path(path, "compressvit.load")
    if path.suffix == ".safetensors" and path.is_file():
        with _unpacked(path) as folder:
            return load(folder, materialise=materialise)
    manifest = read_manifest(path)
    _require_fit(path, manifest)
    model = build_plain(path, manifest)
    _transform(model, path, manifest)
    model.to(getattr(torch, manifest.dtype))
    tensors = read_tensors(path)
    model.load_state_dict(tensors, strict=False)
    ties.check(model, manifest.ties)
    require_as_written(path, tensors)
    expect_images(model, manifest.input)
    name_classes(model, manifest.label_names)
    return (fold_low_rank(model) if materialise else model).eval()


@contextmanager
def _unpacked(file: Path) -> Iterator[Path]:
    """The artifact in one file of safetensors, whose header has the manifest, as a folder that lasts as long as the block."""
    require_complete(file)
    with safe_open(file, framework="pt", device="cpu") as opened:
        manifest = (opened.metadata() or {}).get(MANIFEST)
    if manifest is None:
        raise UserError(
            f"{file} has no {MANIFEST} in its header: it holds tensors, and not how they are put together; give the folder of an "
            "artifact, or a file that `compressvit export --to safetensors` wrote"
        )
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / MANIFEST).write_text(manifest, encoding="utf-8")
        (folder / TENSORS).symlink_to(file.resolve())
        try:
            yield folder
        except UserError as error:  # which speaks of a folder that nobody knows
            within = {str(folder / TENSORS): str(file), str(folder / MANIFEST): f"{MANIFEST} in {file}"}
            text = str(error)
            for ours, theirs in within.items():
                text = text.replace(ours, theirs)
            raise UserError(text) from error


def read_back_difference(path: Path, student: nn.Module, size: tuple[int, int, int]) -> float:
    """Largest absolute difference between the outputs of the student and of its artifact on random images of `size` (C, H, W).

    Raises:
        UserError: the student's outputs are not finite.
        RuntimeError: the outputs differ.
    """
    student = student.cpu().eval()
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = in_one(student(images)), in_one(load(path)(images))
    difference = (ours - theirs).abs().max().item()
    if not math.isfinite(difference):
        raise UserError(
            f"the student computes numbers that are not finite ({ours.isnan().sum().item()} of {ours.numel()} outputs are NaN); "
            "check the teacher's weights, and lower the learning rate if they are sound"
        )
    if difference > 1e-5 * max(1.0, ours.abs().max().item()):
        raise RuntimeError(
            f"the artifact at {path} does not compute what the student does: outputs differ by {difference}"
        )
    return difference


def _skeleton(path: Path, manifest: Manifest) -> tuple[nn.Module, nn.Module]:
    """The model of a manifest before and after its transforms, both on the meta device."""
    with on_meta():
        model = build_plain(path, manifest)
        plain = surgery.deep_copy(model)
        _transform(model, path, manifest)
    return plain, model


def _require_fit(path: Path, manifest: Manifest) -> None:
    """Compare what a manifest describes with the header of its tensors, before memory is taken for either."""
    with on_meta():
        model = build_plain(path, manifest)
        _transform(model, path, manifest)
    model.to(getattr(torch, manifest.dtype))
    declared = sorted(sorted(group) for group in manifest.ties)
    if sorted(sorted(group) for group in ties.tied_groups(model)) != declared:
        raise UserError(
            f"{path / MANIFEST}: its ties are not those of its transforms; the manifest was edited or is of another version"
        )
    expected, there = ties.unique_state(model), read_slots(path)
    missing, unknown = sorted(expected.keys() - there.keys()), sorted(there.keys() - expected.keys())
    both = sorted(expected.keys() & there.keys())
    misfit = [name for name in both if tuple(expected[name].shape) != there[name].shape]
    retyped = [name for name in both if header_word(expected[name].dtype) != there[name].dtype]
    if missing or unknown or misfit or retyped:
        raise UserError(
            f"{path / TENSORS} does not fit its manifest: "
            f"{len(missing)} tensors missing{_first(missing)}, {len(unknown)} unknown{_first(unknown)}, "
            f"{len(misfit)} of another shape{_first(misfit)}"
            + (f", {len(retyped)} of another type{_first(retyped)}" if retyped else "")
        )


def _transform(model: nn.Module, path: Path, manifest: Manifest) -> None:
    try:
        apply_plans(model, read_plans(path))
    except UserError:
        raise
    except Exception as error:  # a plan is checked where a recipe is planned; one that was edited can do anything
        raise UserError(
            f"{path / MANIFEST}: its transforms do not fit {manifest.architecture} with {manifest.args}: "
            f"{error or type(error).__name__}"
        ) from error


def is_plain(path: Path) -> bool:
    """Whether the artifact at `path` has the structure of timm's own model: no transforms, or only ones that change values."""
    manifest = read_manifest(path)
    if not manifest.transforms:
        return True
    if manifest.ties:
        return False
    before, after = _skeleton(path, manifest)
    kinds = [{name: type(module) for name, module in model.named_modules()} for model in (before, after)]
    return kinds[0] == kinds[1]


def _manifest(model: nn.Module, input_config: dict[str, Any] | None) -> Manifest:
    compression = compression_of(model)
    if compression.materialised:
        raise UserError(
            "a materialised model shares less than its transforms say, so it cannot be rebuilt from them; save the model it was made "
            "from, and materialise it again after loading"
        )
    ties.check(model, compression.ties)
    config = getattr(model, "pretrained_cfg", None) or {}
    if not timm.is_model(config.get("architecture", "")):
        raise UserError(
            f"a {type(model).__name__} that was not built by timm.create_model has no name to rebuild it by; build it with "
            "timm.create_model(NAME, …) (timm.models.register_model gives your own architecture a name)"
        )
    args = dict(getattr(model, "_model_args", {}))
    args["num_classes"] = model.num_classes
    if isinstance(getattr(model, "global_pool", None), str):  # a module in timm's convolutional networks
        args["global_pool"] = model.global_pool
    try:
        args = json.loads(json.dumps(args))
    except TypeError as error:
        raise UserError(
            f"{model_name(model)} was built with an argument that cannot be written to JSON ({error}); "
            "give timm the name of a layer instead of its class, e.g. act_layer='gelu'"
        ) from error
    data = input_config or _input_of(model)
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    if len(dtypes) != 1:
        raise UserError(
            f"the model mixes precisions {sorted(dtypes)}; convert it to one with model.to(dtype) before saving"
        )
    return Manifest(
        format=FORMAT,
        compressvit=__version__,
        architecture=config["architecture"],
        args=args,
        num_classes=model.num_classes,
        dtype=dtypes.pop(),
        parameters=ties.count_parameters(model),
        transforms=[record_of(plan) for plan in compression.plans],
        ties=compression.ties,
        input=json.loads(json.dumps(data)),
        label_names=class_names(model),
    )


def _input_of(model: nn.Module) -> dict[str, Any]:
    """timm's input configuration of the model, with the model's current image size (timm keeps the pretrained one)."""
    return {**timm.data.resolve_model_data_config(model), "input_size": list(input_size(model))}


def _first(names: list[str]) -> str:
    return f" (first {names[0]})" if names else ""
