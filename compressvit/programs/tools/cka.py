"""CKA of every layer of one model with every layer of another: similarity of their features for the same images.

For one run, student and teacher are compared; two runs or artifacts are compared with each other. The data is that of the run, unless
overridden by key=value (data.name=digits).

example:
  compressvit apply quickstart --output runs/quickstart
  compressvit tool cka runs/quickstart --images 256
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from compressvit.diagnostics.cka_layers import cka_finding, cka_layers_finding, cka_matrix
from compressvit.diagnostics.features import subject
from compressvit.programs.opened import OpenedModels
from compressvit.programs.program import Findings, above_zero, program_of_models, table_of, whole


def look(opened: OpenedModels, arguments: argparse.Namespace) -> Findings:
    """The CKA matrix, and its diagonal if both models have the same number of layers."""
    first, second = opened.pair()
    result = cka_matrix(
        subject(first, arguments.first_taps),
        subject(second, arguments.second_taps),
        lambda: opened.images(arguments.images),
        opened.device,
        images=arguments.images,
        batch_size=arguments.batch_size,
        kernel=arguments.kernel,
        bandwidth=arguments.bandwidth,
    )
    layers = cka_layers_finding(result, f"{first.label} / {second.label}", first.label, second.label)
    findings = [cka_finding(result, first.label, second.label), *([layers] if layers else [])]
    best = result.values.argmax(dim=1).tolist()
    spread = result.half_width
    rows = [
        {
            first.label: layer,
            f"most similar of {second.label}": result.columns[best[i]],
            "CKA": result.values[i, best[i]].item(),
            "±": None if spread is None else spread[i, best[i]].item(),
            "with the layer of the same place": result.values[i, i].item() if i < len(result.columns) else None,
        }
        for i, layer in enumerate(result.rows)
    ]
    return [table_of(f"CKA on {result.images} images", rows)], findings


def options(parser: argparse.ArgumentParser) -> None:
    """Options of this program."""
    parser.add_argument("--images", type=whole, default=512, help="evaluation images (default: 512)")
    parser.add_argument("--kernel", choices=("linear", "rbf"), default="linear")
    parser.add_argument("--bandwidth", type=above_zero, default=1.0, help="σ of rbf in medians of the distances")
    parser.add_argument("--batch-size", type=whole, default=64, help="images whose features are in memory together")
    for side in ("first", "second"):
        parser.add_argument(
            f"--{side}-taps", metavar="PATH", nargs="+", help=f"modules of the {side} model (default: its blocks)"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return program_of_models("cka", __doc__, look, argv, options=options)
