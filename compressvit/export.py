"""`merge`: fold what the transforms added into timm's own layers, prove that nothing changed, and write a plain timm model."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.models import save_for_hf
from torch import nn

from compressvit import artifact, cost, ties
from compressvit.data import Data, InputConfig, eval_loader, input_config, open_data
from compressvit.errors import UserError
from compressvit.files import disk_faults, write_text
from compressvit.pipeline import compression_of, materialise
from compressvit.preflight import pick_device
from compressvit.recipe import parse_recipe
from compressvit.runfolder import RESOLVED
from compressvit.standalone import artifact_in

TOLERANCE = 1e-5  # of the largest output, in float32
_SEAL = "merge.json"  # of a folder that `merge` wrote
_WRITTEN = ("config.json", artifact.MANIFEST, artifact.TENSORS)
DENSE_ADAPTERS = (
    "the Kronecker products became dense matrices; the adapters keep their activation, so this is an artifact with dense `adapters`, "
    "not a plain timm model"
)


def merge(model: nn.Module) -> nn.Module:
    """A plain timm model that computes what a compressed one does, compared with it on random images and on some like photographs.

    Args:
        model: of `compress` or `load`, or with an adapter; it is not changed.

    Returns:
        A model of the same class, with the keys of the untouched backbone. Adapters of Kronecker products leave dense ones: then it
        is no plain timm model, but one with `adapters`, which `save` takes.

    Raises:
        UserError: a transform cannot be folded, or the merged model computes something else.

    Example:
        >>> import timm, compressvit
        >>> backbone = timm.create_model("vit_tiny_patch16_224", num_classes=10)
        >>> adapted = compressvit.compress(backbone, [compressvit.LoRA(rank=4)])  # and trained
        >>> compressvit.merge(adapted).state_dict().keys() == backbone.state_dict().keys()
        True
    """
    like = next(model.parameters())
    exact = _in_float32(model)
    merged = merged_copy(exact)
    _differences(exact, merged, _made_up_images(input_config(exact, Data(name="images"))))
    return merged.to(device=like.device, dtype=like.dtype)


def merge_folder(path: str | Path, output: str | Path | None = None, *, device: str = "auto") -> dict[str, Any]:
    """Merge the artifact at `path`, or that of a run, and write a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)`
    reads; where adapters are left (of Kronecker products, now dense), an artifact instead.

    Args:
        path: an artifact or a run folder.
        output: the folder to write, `merged` beside the artifact by default; it must not exist, or be an earlier merge.
        device: where latencies are taken; the comparison is on the CPU.

    Returns:
        The content of `merge.json`: differences relative to the largest output, and latencies in milliseconds.

    Raises:
        UserError: nothing there, or a transform that cannot be folded.
        UserError: also where the merged model computes something else.
    """
    where = pick_device(device)
    folder = artifact_in(Path(path).resolve())
    target = Path(output).resolve() if output is not None else folder.parent / "merged"
    _require_free(target)
    model = artifact.load(folder)
    dtype = next(model.parameters()).dtype
    model = _in_float32(model)  # the proof is in float32, whatever the model is stored in
    config = _input_of(folder, model)
    merged = merged_copy(model)
    left = [plan.transform for plan in compression_of(merged).plans]
    tests = {**_made_up_images(config), **_real_images(folder, config)}
    result: dict[str, Any] = {
        "artifact": str(folder),
        "merged": str(target),
        "transforms": [p.transform for p in compression_of(model).plans],
        "left": left,
        "differences": _differences(model, merged, tests),
    }
    with disk_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".merge.", dir=target.parent))
        try:
            again = _write(copy.deepcopy(merged).to(dtype), scratch, plain=not left)
            if dtype != torch.float32:  # it is read into float32: compare with what was rounded on the way
                merged = merged.to(dtype).float()
            result["read_back"] = _differences(merged, again, {"random": tests["random"]}, "what is read back")[
                "random"
            ]
            target.mkdir(exist_ok=True)
            write_text(target / _SEAL, "{}\n")  # first: one that is interrupted here can be made again
            for name in _WRITTEN:
                (target / name).unlink(missing_ok=True)
            for file in scratch.iterdir():
                os.replace(file, target / file.name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    manifest = artifact.read_manifest(folder)
    base = timm.create_model(manifest.architecture, pretrained=False, **manifest.args).eval()
    models = {"backbone": base, "unmerged": model, "merged": merged}
    size = (config.channels, config.height, config.width)
    times = cost.latency([m.to(where) for m in models.values()], [size] * 3, device=where)
    result["latency_ms"] = dict(zip(models, times, strict=True))
    result["latency_on"] = f"{where}, {torch.get_num_threads()} threads"
    result["parameters"] = {name: ties.count_parameters(m) for name, m in models.items()}
    # the folder is there to be shipped: nothing in it names this machine's folders
    shipped = {**result, "artifact": os.path.relpath(folder, target), "merged": "."}
    write_text(target / _SEAL, json.dumps(shipped, indent=2) + "\n")
    return result


def _require_free(target: Path) -> None:
    """Raise a `UserError` unless nothing is there, or an earlier merge and nothing else."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give another --output")
    there = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if not there:
        return
    if _SEAL not in there:
        raise UserError(
            f"{target} is not empty, and no earlier merge wrote it (it has no {_SEAL}), so nothing in it is replaced; "
            "give another --output"
        )
    if others := sorted(there - {_SEAL, *_WRITTEN}):
        raise UserError(f"{target} holds {others[0]}, which is not of an earlier merge; give another --output")


def merged_copy(model: nn.Module) -> nn.Module:
    """What `merge` returns, without the comparison; on the meta device it finds what cannot be merged.

    Raises:
        UserError: a transform cannot be folded; the text says which, why, and what to do instead.
    """
    plans = [plan for plan in compression_of(model).plans if not plan.loads_values]
    if not plans:
        raise UserError("there is nothing to merge: no transform has changed the model")
    for plan in plans:
        if not plan.foldable:
            plan.fold(copy.deepcopy(model))  # raises, and says why
    return materialise(model).eval()


def print_merge(result: dict[str, Any], console: Console) -> None:
    """What `merge_folder` returns, for a person."""
    table = Table(title=f"{result['artifact']} → {result['merged']}", title_justify="left")
    for column in ("", "parameters", "latency", "latency / backbone"):
        table.add_column(column, justify="left" if not column else "right")
    times = result["latency_ms"]
    for name, label in (("backbone", "backbone alone"), ("unmerged", "unmerged"), ("merged", "merged")):
        table.add_row(
            label, f"{result['parameters'][name]:,}", f"{times[name]:.2f} ms", f"{times[name] / times['backbone']:.2f}"
        )
    console.print(table)
    for name, difference in result["differences"].items():
        console.print(f"largest difference on {name} images: {difference:.1e} of the largest output", highlight=False)
    reader, call = "timm alone", f"timm.create_model('local-dir:{result['merged']}', pretrained=True)"
    if result["left"]:
        reader, call = "compressvit", f"compressvit.load('{result['merged']}')"
    console.print(f"read back by {reader}: {result['read_back']:.1e}", highlight=False)
    console.print(
        f"latency: batch 1 on {result['latency_on']}, median of up to 30 in turns\n{call}",
        highlight=False,
        soft_wrap=True,
    )
    if result["left"]:
        console.print(DENSE_ADAPTERS, highlight=False, soft_wrap=True)


def photograph_like(count: int, config: InputConfig, seed: int = 0) -> torch.Tensor:
    """Normalised images whose spectrum falls as 1/f, as that of photographs does: (count, C, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.fft.rfft2(torch.randn(count, config.channels, config.height, config.width, generator=generator))
    rows, columns = torch.fft.fftfreq(config.height), torch.fft.rfftfreq(config.width)
    frequency = (rows[:, None] ** 2 + columns**2).sqrt().clamp(min=1 / max(config.height, config.width))
    pink = torch.fft.irfft2(white / frequency, s=(config.height, config.width))
    pink = (pink - pink.mean((2, 3), keepdim=True)) / pink.std((2, 3), keepdim=True)
    images = (0.45 + 0.25 * pink).clamp(0, 1)
    mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in (config.mean, config.std))
    return (images - mean) / std


@torch.inference_mode()
def relative_difference(model: nn.Module, other: nn.Module, images: torch.Tensor) -> float:
    """Largest difference of the outputs, relative to the largest output."""
    ours, theirs = model(images), other(images)
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


def _in_float32(model: nn.Module) -> nn.Module:
    """A copy on the CPU in eval mode, for comparisons."""
    return copy.deepcopy(model).cpu().float().eval()


def _made_up_images(config: InputConfig) -> dict[str, torch.Tensor]:
    size = (config.channels, config.height, config.width)
    random = torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
    return {"random": random, "photograph-like": photograph_like(4, config)}


def _differences(
    model: nn.Module, other: nn.Module, tests: dict[str, torch.Tensor], what: str = "the merged model"
) -> dict[str, float]:
    """By name of the images, the largest difference of the outputs relative to the largest; a `UserError` where it is too large."""
    found = {name: relative_difference(model, other, images) for name, images in tests.items()}
    for name, difference in found.items():
        if not difference <= TOLERANCE:  # NaN is not
            raise UserError(
                f"{what} differs on {name} images by {difference:.1e} of the largest output, more than {TOLERANCE:g}, so none is made. "
                "Sums of float32 in a deep model, or after a large scale, can need more digits: ship the unmerged artifact"
            )
    return found


def _write(model: nn.Module, folder: Path, *, plain: bool) -> nn.Module:
    """Write a model into an empty folder, in timm's form or as an artifact, and read it back into float32."""
    if plain:
        save_for_hf(model, str(folder), safe_serialization=True)
        for file in folder.iterdir():
            if file.name not in _WRITTEN:
                file.unlink()
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return artifact.load(artifact.save(model, folder)).float()


def _input_of(folder: Path, model: nn.Module) -> InputConfig:
    resolved = folder.parent / RESOLVED
    if resolved.is_file():
        return input_config(model, parse_recipe(resolved.read_text(encoding="utf-8"), str(resolved)).data)
    return input_config(model, Data(name="images"))


def _real_images(folder: Path, config: InputConfig) -> dict[str, torch.Tensor]:
    """The first evaluation images of the run that the artifact lies in, where its data is still there."""
    resolved = folder.parent / RESOLVED
    if not resolved.is_file():
        return {}
    recipe = parse_recipe(resolved.read_text(encoding="utf-8"), str(resolved))
    data = recipe.data.model_copy(update={"download": False})
    try:
        images, _ = next(iter(eval_loader(open_data(data), data, config, torch.device("cpu"))))
    except UserError:  # the data has gone since
        return {}
    return {"the run's own": images[:8]}
