"""`compressvit merge`: merge the student of a run, or an artifact, into a new folder, with comparison and latencies."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from compressvit.artifacts import artifact
from compressvit.artifacts.merge import (
    GROWN,
    differences,
    in_float32,
    left_by_merge,
    made_up_images,
    merged_copy,
    refuse_growth,
    save_for_timm,
)
from compressvit.data.input import InputConfig
from compressvit.data.opening import Datasets
from compressvit.errors import UserError, option, switch
from compressvit.files import disk_faults, put, write_json
from compressvit.model import cost, stored, surgery, ties
from compressvit.model.backbone import body_of
from compressvit.model.stored import Manifest
from compressvit.reading import read_json
from compressvit.runs.evaluate import artifact_in
from compressvit.runs.folder import RESOLVED, RunFolder
from compressvit.runs.job import pick_device
from compressvit.runs.own_data import own_images, own_input
from compressvit.runs.owned import is_scratch, refuse_links
from compressvit.runs.tables import how_measured, ratio_text
from compressvit.transforms.record import compression_of

_SEAL = "merge.json"  # marks a folder written by `merge`
T = TypeVar("T")
_WRITTEN = ("config.json", stored.MANIFEST, stored.TENSORS)


def merge_folder(
    path: str | Path,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    dense: bool = False,
    device: str = "auto",
    datasets: Datasets | None = None,
    owned: bool = False,
) -> dict[str, Any]:
    """Merge the artifact at `path`, or that of a run, and write a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`.
    If adapters are left (dense ones, from Kronecker products), and of a detector or segmenter, an artifact is written instead.

    Args:
        path: an artifact or a run folder.
        output: the folder to write; by default `merged` beside the artifact.
        overwrite: replace an earlier merge in that folder; nothing else in it is ever replaced.
        dense: merge also what then has more parameters than before, as low rank has.
        device: device for measuring latencies; the comparison runs on the CPU.
        datasets: the data of the run, if it is already open.
        owned: the caller has locked the run folder (`RunFolder.owned`).

    Returns:
        The content of `merge.json`: differences relative to the largest output, and latencies in milliseconds.

    Raises:
        UserError: there is no artifact at `path`, a transform cannot be folded, the merged model would be larger (unless `dense` is given),
            its outputs differ, the output folder is not empty (unless it is an earlier merge and `overwrite` is given), or another run is
            writing to it.
    """
    where = pick_device(device)
    folder = artifact_in(Path(path).resolve())
    if output is not None:
        return _merge(folder, Path(output).resolve(), overwrite, dense, where, datasets)
    refuse_links(folder.parent / "merged")
    in_a_run = (folder.parent / RESOLVED).is_file()
    with RunFolder(folder.parent).owned() if in_a_run and not owned else nullcontext():
        return _merge(folder, folder.parent / "merged", overwrite, dense, where, datasets)


def _merge(
    folder: Path, target: Path, overwrite: bool, dense: bool, where: torch.device, datasets: Datasets | None
) -> dict[str, Any]:
    """Merge the artifact in `folder` into `target`; the other arguments and the result are those of `merge_folder`."""
    _require_free(target, overwrite)
    model = artifact.load(folder)
    dtype = next(model.parameters()).dtype
    model = in_float32(model)  # compared in float32, regardless of the stored dtype
    config = own_input(folder, model)
    merged = merged_copy(model)
    if not dense:
        refuse_growth(model, merged)
    left = [plan.transform for plan in compression_of(merged).plans]
    tests = {**made_up_images(config), **_real_images(folder, config, datasets)}
    result: dict[str, Any] = {
        "artifact": str(folder),
        "merged": str(target),
        "transforms": [p.transform for p in compression_of(model).plans],
        "left": left,
        "differences": differences(model, merged, tests),
    }
    written = surgery.deep_copy(merged).to(dtype)
    if dtype != torch.float32:  # read back in float32, so compare with the rounded values that were stored
        merged = merged.to(dtype).float()
    random = {"random": tests["random"]}
    plain = not left and body_of(merged) is None  # timm alone knows no detector, and no segmenter
    found = _replace(target, written, plain, lambda again: differences(merged, again, random, "what is read back"))
    result |= {"read_back": found["random"], "plain": plain}
    result |= _measured(stored.read_manifest(folder), model, merged, config, where)
    # the folder is meant to be shared, so it must not contain paths of this machine
    shipped = {**result, "artifact": os.path.relpath(folder, target), "merged": "."}
    write_json(target / _SEAL, shipped)
    return result


def read_merge(folder: Path, run: Path) -> dict[str, Any]:
    """The result of `merge_folder` for a run that was merged before into `folder`.

    Raises:
        UserError: the merge is missing or incomplete.
    """
    content = read_json(folder / _SEAL)
    if not isinstance(content, dict) or "read_back" not in content or not (folder / stored.TENSORS).is_file():
        raise UserError(f"{folder} holds no complete merge")
    return {**content, "artifact": str(run.resolve() / "student"), "merged": str(folder.resolve())}


def _require_free(target: Path, overwrite: bool) -> None:
    """Raise a `UserError` unless the folder is empty or missing or, with `overwrite`, contains only an earlier merge."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give another {option('output')}")
    there = {path.name for path in target.iterdir() if not is_scratch(path)} if target.is_dir() else set()
    if not there:
        return
    if _SEAL not in there:
        raise UserError(
            f"{target} is not empty, and no earlier merge wrote it (it has no {_SEAL}), so nothing in it is replaced; "
            f"give another {option('output')}"
        )
    if others := sorted(there - {_SEAL, *_WRITTEN}):
        raise UserError(
            f"{target} holds {others[0]}, which is not of an earlier merge; give another {option('output')}"
        )
    if not overwrite and not _unfinished(target):
        raise UserError(
            f"{target} holds an earlier merge. Give {switch('overwrite')} to replace it, or {option('output')} for another folder"
        )


def _unfinished(target: Path) -> bool:
    """Whether the merge that wrote a folder was killed, so that it is made again."""
    try:
        return read_json(target / _SEAL) == {}
    except UserError:
        return False


def print_merge(result: dict[str, Any], console: Console) -> None:
    """Print the result of `merge_folder`."""
    whole_model = not result.get("plain", True) and not result["left"]
    whole = "model" if whole_model else "backbone"
    table = Table(title=f"{result['artifact']} → {result['merged']}", title_justify="left")
    for column in ("", "parameters", "latency", f"latency / {whole}"):
        table.add_column(column, justify="left" if not column else "right")
    times = result["latency_ms"]
    for name, label in (("backbone", f"{whole} alone"), ("unmerged", "unmerged"), ("merged", "merged")):
        ratio = ratio_text(result["latency_ratio"][name]) if name != "backbone" else "1.00"
        table.add_row(label, f"{result['parameters'][name]:,}", f"{times[name]:.2f} ms", ratio)
    console.print(table)
    sizes = [
        (unit, result[unit]) for unit in ("parameters", "bytes") if unit in result
    ]  # earlier versions counted no bytes
    larger = [
        f"{found['merged'] / found['unmerged']:.1f} times the {unit}" for unit, found in sizes if _has_grown(found)
    ]
    if larger:
        readers = "plain layers" if whole_model else "plain timm models"
        console.print(
            f"the merged model has {larger[0]} of the unmerged one: merging undoes what low rank, or rounding, saves. "
            f"It is for software that reads {readers} only; elsewhere keep the student as it is",
            highlight=False,
            soft_wrap=True,
        )
    for name, difference in result["differences"].items():
        console.print(f"largest difference on {name} images: {difference:.1e} of the largest output", highlight=False)
    reader, call = "timm alone", f"timm.create_model('local-dir:{result['merged']}', pretrained=True)"
    if whole_model or result["left"]:
        reader, call = "compressvit", f"compressvit.load('{result['merged']}')"
    console.print(f"read back by {reader}: {result['read_back']:.1e}", highlight=False)
    console.print(
        f"latency: {how_measured(result['latency_on'])}\n{call}",
        highlight=False,
        soft_wrap=True,
    )
    if result["left"]:
        console.print(left_by_merge(result["left"]), highlight=False, soft_wrap=True)
    if whole_model:
        console.print("this is an artifact: timm alone has no such model; its layers are plain", highlight=False)


def _has_grown(found: dict[str, int]) -> bool:
    return found["merged"] > GROWN * found["unmerged"]


def _replace(target: Path, model: nn.Module, plain: bool, check: Callable[[nn.Module], T]) -> T:
    """Write a model beside `target`, check it after reading it back, and then replace an earlier merge by it."""
    with disk_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".merge.{target.name}."
        for left in target.parent.glob(f"{glob.escape(prefix)}*"):  # by a merge into this folder that was killed
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        try:
            checked = check(_write(model, scratch, plain=plain))
            target.mkdir(exist_ok=True)
            write_json(target / _SEAL, {})  # first: one that is interrupted here can be made again
            for name in _WRITTEN:
                (target / name).unlink(missing_ok=True)
            for file in scratch.iterdir():
                put(file, target / file.name)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return checked


def _measured(
    manifest: Manifest, model: nn.Module, merged: nn.Module, config: InputConfig, device: torch.device
) -> dict[str, Any]:
    """Parameters and latencies (measured alternately) of the backbone alone, the unmerged and the merged model."""
    base = timm.create_model(manifest.architecture, pretrained=False, **manifest.args).eval()
    models = {"backbone": base, "unmerged": model, "merged": merged}
    times = cost.latencies([m.to(device) for m in models.values()], [config.size] * 3, device=device)
    return {
        "latency_ms": dict(zip(models, times.medians, strict=True)),
        "latency_ratio": {name: times.ratio(i) for i, name in enumerate(models) if i},
        "latency_on": f"{device}, {cost.threads_text()}",
        "parameters": {name: ties.count_parameters(m) for name, m in models.items()},
        "bytes": {name: cost.file_bytes(m) for name, m in models.items()},
    }


def _write(model: nn.Module, folder: Path, *, plain: bool) -> nn.Module:
    """Write a model to an empty folder, in timm's format or as an artifact, and read it back in float32."""
    if plain:
        save_for_timm(model, folder)
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return artifact.load(artifact.save(model, folder)).float()


def _real_images(folder: Path, config: InputConfig, datasets: Datasets | None) -> dict[str, torch.Tensor]:
    images = own_images(folder, config, 8, datasets)
    return {} if images is None else {"the run's own": images}
