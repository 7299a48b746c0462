"""`compressvit export`: the student of a run, or an artifact, as a file for other programs, compared with the artifact in their runtime."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from compressvit.artifacts import artifact
from compressvit.artifacts.export import INTEGERS, SEAL, STATIC, conversion_faults, replacing
from compressvit.artifacts.formats.base import Format, Source, find_format
from compressvit.artifacts.merge import in_float32
from compressvit.errors import UserError, option, switch
from compressvit.model import cost, stored
from compressvit.model.header import TENSORS
from compressvit.runs import export_images
from compressvit.runs.evaluate import artifact_in
from compressvit.runs.folder import RESOLVED, RunFolder
from compressvit.runs.own_data import own_input, own_recipe_data
from compressvit.runs.owned import is_scratch, refuse_links
from compressvit.runs.tables import how_measured, megabytes, ratio_text
from compressvit.tasks.base import task_of
from compressvit.tasks.likeness import Likeness

FOLDER = "exported"  # beside the artifact
# Largest difference relative to the largest output: above what rounding was measured to do, and far below what a fault does
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "int8": 0.5, STATIC: 0.5}
_AT_ONCE = 8  # of the images that are compared


def export(
    path: str | Path,
    to: str,
    output: str | Path | None = None,
    *,
    precision: str = "fp32",
    opset: int | None = None,
    dense: bool = False,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
    images: int | None = None,
    device: str = "auto",
    least_agreement: float | None = None,
) -> dict[str, Any]:
    """Write the artifact at `path`, or that of a run, in a format for other programs; open the file in its own runtime and compare it.

    Args:
        path: an artifact or a run folder.
        to: the format: 'onnx', 'pt2', 'timm', 'safetensors', 'openvino', 'peft', or one that a package offers.
        output: the file, of 'timm' the folder; by default in `exported/` beside the artifact.
        precision: 'fp32', 'fp16' or 'bf16': of 'onnx' and 'pt2' of weights and arithmetic, with images and outputs in float32; of 'timm',
            'safetensors' and 'openvino' of the weights alone, which are compared in float32. Of 'onnx' also 'int8': of weights and of
            what meets them, which is rounded in every batch; of 'onnx' and 'openvino' 'int8-static': with ranges measured on images.
        opset: version of ONNX's operators; None: torch's own choice.
        dense, overwrite: write it also where 'timm' makes it larger than it is; replace the files that are there.
        overrides: of the data whose images are used instead of the run's, as ['data.name=images', 'data.root=FOLDER'].
        images: of 'int8-static': how many training images ranges are measured on; None: 256.
        device: 'auto' or 'cpu', where files are compared.
        least_agreement: of int8, keep a file that agrees with the artifact at least so far, from 0 to 1 (`Likeness.agreement`: images of
            the same class, the smallest cosine of an image, or shared detections), in place of what rounding is expected to do.

    Returns:
        What was written, and how it compares: difference, agreement and milliseconds, which are None where weights alone are rounded.

    Raises:
        UserError: there is no artifact, a package is missing, the format cannot express the model, a file is there already, or what was
            written does not compute what the artifact does, or there are too few images to measure ranges on. Nothing is left of it then.
    """
    fmt = _asked_for(to, precision, opset, images, device, least_agreement)
    folder = artifact_in(Path(path).resolve())
    target = _target(folder, fmt, precision) if output is None else _named(Path(output).resolve(), fmt)
    _require_place(target, folder, fmt, overwrite, own=output is None)
    data = export_images.data_of(folder, overrides, precision)
    with RunFolder(folder.parent).owned() if output is None and (folder.parent / RESOLVED).is_file() else nullcontext():
        source = _source(folder, precision, opset, dense)
        fmt.refuse(source)
        compared, what = export_images.compared(folder, source.input, data if overrides else None)
        source, measured = export_images.calibrated(source, data, images, not overrides)
        with replacing(target) as scratch:
            told = _written(fmt, source, scratch / target.name, compared, what, least_agreement)
        for name in set(fmt.beside(target.name)) - set(told["bytes"]):  # of an earlier one, which needed it
            target.with_name(name).unlink(missing_ok=True)
    return {
        "artifact": str(folder),
        "artifact_bytes": (folder / TENSORS).stat().st_size,
        "written": str(target),
        "ranges_of": measured,
        **told,
        "how": fmt.how(target),
    }


def _asked_for(
    to: str, precision: str, opset: int | None, images: int | None, device: str, least: float | None
) -> Format:
    """The format, unless something is asked of it that cannot be."""
    _require_cpu(device)
    fmt = find_format(to)
    export_images.require_count(images, precision)
    fmt.require(precision, opset)
    _require_least(least, precision)
    return fmt


def _source(folder: Path, precision: str, opset: int | None, dense: bool) -> Source:
    """The model of the artifact in `folder`, as it is exported."""
    model = in_float32(artifact.load(folder))
    data = own_recipe_data(folder)
    task = task_of(model, None if data is None else data.usual_task)
    name = folder.name if data is None else f"{folder.parent.name}/{folder.name}"
    exif = data is not None and data.exif
    return Source(model, task, own_input(folder, model), precision, name, opset, dense, exif)


def _written(fmt: Format, source: Source, path: Path, images: Tensor, what: str, least: float | None) -> dict[str, Any]:
    """Write a file, open it again, and compare it with the model; returns what the result says of it."""
    fmt.write(source, path)
    with conversion_faults(f"a file that {fmt.runtime} opens"):
        # who rounds weights alone wants other arithmetic than what is run here
        timed = fmt.computes_in(source.precision)
        likeness, times = _compared(source, fmt.open(path, source), images, timed)
    _require_alike(likeness, source, fmt, what, least)
    parts = [path, *(path.with_name(name) for name in fmt.parts(path.name))]
    others = {file.name: _bytes(file) for file in sorted(path.parent.iterdir()) if file != path}
    return {
        "format": fmt.name,
        "precision": source.precision,
        "task": source.task.name,
        "input_size": list(source.input.size),
        "images": len(images),
        "compared_on": what,
        **fmt.chosen(path),
        "bytes": {path.name: _bytes(path), **others},
        "exported_bytes": sum(_bytes(file) for file in parts if file.exists()),
        "runtime": f"{fmt.runtime} {_version(fmt.runtime)}",
        "difference": likeness.difference,
        "tolerance": TOLERANCES[source.precision],
        "agreement": likeness.agreement,
        "agreement_text": likeness.text,
        "rounded": None if source.precision == "fp32" else "weights and arithmetic" if timed else "weights",
        "latency_ms": times and dict(zip(("artifact", "exported"), times.medians, strict=True)),
        "latency_ratio": times and times.ratio(1),
        "latency_on": times and f"cpu, {cost.threads_text()}",
    }


def _target(folder: Path, fmt: Format, precision: str) -> Path:
    """Where a format is written by default."""
    end = fmt.suffix or f"_{fmt.name}"
    return folder.parent / FOLDER / f"{folder.name}{'' if precision == 'fp32' else f'_{precision}'}{end}"


def _named(target: Path, fmt: Format) -> Path:
    """The file that a user names; readers tell formats by their suffix, so it has that of the format."""
    if target.is_dir() and fmt.suffix:
        raise UserError(
            f"{option('output', target)} is a folder; name a file in it, e.g. {target / ('student' + fmt.suffix)}"
        )
    if fmt.suffix and target.suffix != fmt.suffix:
        raise UserError(
            f"{option('output', target)}: a file of {option('to', fmt.name)} ends in {fmt.suffix}; name it "
            f"{target.with_name(target.name + fmt.suffix).name}"
        )
    return target


def _require_apart(target: Path, folder: Path) -> None:
    """Raise a `UserError` where what is written would be in an artifact, or a file of the one in `folder` by another name."""
    if inside := next((parent for parent in (target, *target.parents) if stored.is_artifact(parent)), None):
        raise UserError(
            f"{option('output', target)} is in the artifact {inside}, whose files are not replaced; give a place outside of it"
        )
    if target.exists() and any(target.samefile(file) for file in folder.iterdir()):
        raise UserError(
            f"{option('output', target)} is a file of the artifact {folder}, which is exported; give another place"
        )


def _require_cpu(device: str) -> None:
    if device not in ("auto", "cpu"):
        raise UserError(
            f"{option('device', device)}: files are written and compared on the CPU, each in its own runtime, and do not depend on that; "
            "leave it out, and run the file on another device with its runtime"
        )


def _require_place(target: Path, folder: Path, fmt: Format, overwrite: bool, *, own: bool) -> None:
    """Raise a `UserError` where nothing may be written at `target`; `own`: in the folder of the artifact's exports."""
    if own and target.parent.exists():
        refuse_links(target.parent)
    _require_apart(target, folder)
    _require_free(target, fmt, overwrite)


def _require_free(target: Path, fmt: Format, overwrite: bool) -> None:
    """Raise a `UserError` where a file would be replaced that is not to be, or a folder that no export wrote."""
    if not fmt.suffix and target.is_dir():
        there = {entry.name for entry in target.iterdir() if not is_scratch(entry)}
        if there and SEAL not in there:
            raise UserError(
                f"{target} is not empty, and no export wrote it (it has no {SEAL}), so nothing in it is replaced; give another "
                f"{option('output')}"
            )
        if others := sorted(there - {SEAL, *fmt.inside}):
            raise UserError(
                f"{target} holds {others[0]}, which no export wrote, so nothing in it is replaced; give another "
                f"{option('output')}"
            )
        taken = [target] if there else []
    elif not fmt.suffix and target.exists():
        raise UserError(
            f"{target} is a file, and {option('to', fmt.name)} writes a folder; give another {option('output')}"
        )
    else:
        names = (target.name, *fmt.beside(target.name))
        taken = [file for name in names if (file := target.with_name(name)).exists() or file.is_symlink()]
    if taken and not overwrite:
        raise UserError(
            f"{taken[0]} is there already. Give {switch('overwrite')} to replace it, or another {option('output')}"
        )


@torch.inference_mode()
def _compared(source: Source, opened: nn.Module, images: Tensor, timed: bool) -> tuple[Likeness, cost.Latencies | None]:
    """How alike the outputs of the artifact and of a file are, and, where it is `timed`, how long one image takes each, in turns."""
    reference = source.reference[0].eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # runtimes' of their own use of torch and numpy
        expected, found = (
            [
                torch.cat(parts)
                for parts in zip(*(_tensors(model(part)) for part in images.split(_AT_ONCE)), strict=True)
            ]
            for model in (reference, opened)
        )
        if [part.shape for part in expected] != [part.shape for part in found]:
            raise ValueError(f"outputs of shapes {[tuple(part.shape) for part in found]}")
        sizes = [source.input.size] * 2
        times = cost.latencies([reference, opened], sizes, device=torch.device("cpu")) if timed else None
    return source.task.likeness(expected, found, TOLERANCES[source.precision]), times


def _tensors(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _require_least(least: float | None, precision: str) -> None:
    """Raise a `UserError` for an agreement that cannot be asked for."""
    if least is None:
        return
    if precision not in INTEGERS:
        raise UserError(
            f"{option('least_agreement', f'{least:g}')} is for {' and '.join(INTEGERS)}; a file in {precision} computes what the artifact "
            "does, or is refused"
        )
    if not 0 < least <= 1:
        raise UserError(f"{option('least_agreement', f'{least:g}')}: an agreement is above 0 and at most 1, e.g. 0.95")


def _require_alike(likeness: Likeness, source: Source, fmt: Format, images: str, least: float | None) -> None:
    if likeness.alike if least is None else math.isfinite(likeness.difference) and likeness.agreement >= least:
        return
    ways = {
        "fp16": "numbers above 65,504 do not fit into fp16; try fp32, or bf16 where the format has it",
        **dict.fromkeys(
            INTEGERS,
            "int8 is too few bits for the numbers between its layers; try fp16, or the step `quantise`, which rounds weights alone, or "
            f"keep it all the same: {option('least_agreement', f'{math.floor(likeness.agreement * 100) / 100:g}')}",
        ),
        "bf16": "bf16 has 8 bits of precision, which can be too few; try fp32",
        "fp32": "this is a fault of the exporter or the runtime; try another format or opset",
    }
    asked = (
        f"at most {TOLERANCES[source.precision]:g}, and {likeness.asked}"
        if least is None
        else f"an agreement of {least:g}"
    )
    raise UserError(
        f"what {fmt.runtime} computes of the {fmt.title} file is not what the artifact does: on {images} outputs differ by "
        f"{likeness.difference:.1e} of the largest ({likeness.text}), and {asked} is asked for. Nothing was written: "
        f"{ways[source.precision]}"
    )


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _why_slower(result: dict[str, Any]) -> str:
    """What is known of why a file is slower than its artifact, as a clause."""
    known = {
        "fp16": "few processors compute in fp16, and others convert every number",
        "bf16": "few processors compute in bf16, and others convert every number",
        **dict.fromkeys(
            INTEGERS, "rounding what meets the weights takes longer than products of integers save in small layers"
        ),
    }
    reason = known.get(result["precision"])
    return f", likely because {reason}" if reason else ""


def print_export(result: dict[str, Any], console: Console) -> None:
    """Print the result of `export`."""

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    line(f"{result['artifact']} → {result['written']}")
    size = "×".join(map(str, result["input_size"]))
    chosen = f", opset {result['opset']}" if "opset" in result else ""
    table = Table(
        title=f"{result['format']}{chosen}, {result['precision']}, any number of images {size}", title_justify="left"
    )
    times = result["latency_ms"]
    sizes = (("artifact", result["artifact_bytes"]), (result["runtime"], result["exported_bytes"]))
    rows = [[name, megabytes(size)] for name, size in sizes]
    if times:
        rows[0] += [f"{times['artifact']:.2f} ms", "1.00"]
        rows[1] += [f"{times['exported']:.2f} ms", ratio_text(result["latency_ratio"])]
    for column in ("", "bytes on disk", "latency", "latency / artifact")[: len(rows[0])]:
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if result["ranges_of"]:
        line(f"ranges measured on {result['ranges_of']}")
    line(f"compared on {result['compared_on']}: {result['agreement_text']}")
    line(
        f"largest difference: {result['difference']:.1e} of the largest output (up to {result['tolerance']:g} is rounding)"
    )
    if times:
        line(f"latency: {how_measured(result['latency_on'])}")
        if result["latency_ratio"][0] > 1:
            line(f"it is slower than the artifact is in PyTorch{_why_slower(result)}")
    else:
        line("weights alone are rounded, and compared in float32; so there is no latency")
    for name in list(result["bytes"])[1:]:
        line(f"beside it: {name}")
    line(result["how"])
