"""`export`: an artifact in, a file for other programs out."""

from __future__ import annotations

import argparse
import json

from compressvit.cli.common import Verb, add_device, add_overrides


def add_export(verb: Verb) -> None:
    export = verb(
        "export",
        run_export,
        "write a student for other programs (ONNX, torch.export, …), and compare it in their runtime",
    )
    export.add_argument("path", metavar="RUN|ARTIFACT", help="a run folder, or a folder with compressvit.json")
    add_overrides(
        export, "of the data whose images are used, instead of the run's, e.g. data.name=images data.root=FOLDER"
    )
    export.add_argument(
        "--to", metavar="FORMAT", required=True, help="onnx, pt2 (torch.export), timm, safetensors, openvino or peft"
    )
    export.add_argument(
        "--output",
        metavar="FILE",
        help="where to write it (default: in exported/ next to the artifact); of timm a folder",
    )
    export.add_argument(
        "--precision",
        metavar="P",
        default="fp32",
        help="fp32, fp16, bf16, of onnx int8, of onnx and openvino int8-static: of onnx and pt2 of weights and arithmetic, with images and "
        "outputs in float32; of the others of weights, except int8-static (default: fp32)",
    )
    export.add_argument(
        "--images",
        metavar="N",
        type=int,
        help="of int8-static: measure the ranges of activations on N of the training images, without labels (default: 256)",
    )
    export.add_argument(
        "--least-agreement",
        metavar="X",
        type=float,
        help="of int8: keep a file that agrees with the artifact at least so far, from 0 to 1: images of the same class, the smallest "
        "cosine of an image, or detections in both",
    )
    export.add_argument(
        "--opset", metavar="N", type=int, help="of onnx: the version of its operators (default: torch's choice)"
    )
    export.add_argument(
        "--dense", action="store_true", help="of timm: also where plain layers are larger than those of the student"
    )
    add_device(
        export,
        "cpu, where files are written and compared, also of a machine with a GPU; they run wherever their runtime does",
    )
    export.add_argument("--overwrite", action="store_true", help="replace files that are there")
    export.add_argument("--json", action="store_true", help="print JSON")


def run_export(arguments: argparse.Namespace) -> int:
    from compressvit.runs.export import export, print_export
    from compressvit.terminal import Terminal

    result = export(
        arguments.path,
        arguments.to,
        arguments.output,
        precision=arguments.precision,
        opset=arguments.opset,
        dense=arguments.dense,
        overwrite=arguments.overwrite,
        overrides=arguments.overrides,
        images=arguments.images,
        device=arguments.device,
        least_agreement=arguments.least_agreement,
    )
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print_export(result, Terminal())
    return 0
