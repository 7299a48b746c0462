"""`shrink`: a pretrained model and a folder of images in, a student and its page out."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from compressvit.cli.common import Verb, add_run, exit_code_of

UNITS = ("parameters", "macs", "bytes", "latency")


def add_shrink(verb: Verb) -> None:
    shrink = verb(
        "shrink", run_shrink, "make a pretrained ViT smaller, without training: model and images in, student out"
    )
    shrink.usage = "%(prog)s MODEL_OR_FILE IMAGES [--to SIZE …] [options]"  # --to and --args take all words that follow
    shrink.add_argument(
        "source",
        metavar="MODEL_OR_FILE",
        help="timm's name of a pretrained model, a weights file (with --model), a folder of timm, of transformers or with an artifact "
        "(RUN/teacher), or hf-hub:ORG/NAME",
    )
    shrink.add_argument(
        "folder",
        metavar="IMAGES",
        help="a folder of images; with train/ and val/ and a folder per class in each, accuracy is measured too",
    )
    _add_sizes(shrink)
    shrink.add_argument("--model", metavar="NAME", help="timm's name of the architecture of a weights file")
    shrink.add_argument("--img-size", metavar="N", type=_count, help="build the model for images of N×N pixels")
    shrink.add_argument(
        "--args",
        metavar="KEY=VALUE",
        nargs="+",
        default=[],
        help="what else the model was built with: arguments of timm.create_model, e.g. --args patch_size=8 num_classes=10",
    )
    shrink.add_argument(
        "--images",
        metavar="N",
        type=_count,
        dest="calibration",
        help="fit to N of the images, without labels (default: 1024)",
    )
    shrink.add_argument(
        "--val-fraction",
        metavar="F",
        type=_fraction,
        help="take the folders directly in IMAGES for classes, and hold out so much of each to judge on, e.g. 0.1",
    )
    add_run(shrink, "shrink_NAME")
    shrink.add_argument(
        "--json", action="store_true", help="print the results as JSON; everything else to standard error"
    )


def _add_sizes(shrink: argparse.ArgumentParser) -> None:
    """How small the student becomes."""
    shrink.add_argument(
        "--to",
        metavar="SIZE",
        nargs="+",
        help="size of the student: up to 1 a fraction of the teacher's, above 1 a number; or several limits that all hold: "
        "--to parameters=0.5 macs=0.5 (default: 0.5)",
    )
    shrink.add_argument(
        "--keep",
        metavar="WHAT",
        nargs="+",
        help="instead of --to: the smallest student that keeps so much on held-out images: cosine=0.98, top1_drop=1.0, "
        "worst_class_drop=5 or worst_domain_drop=5, in points of accuracy",
    )
    shrink.add_argument(
        "--unit", choices=UNITS, help="unit of a SIZE without one, or of what --keep makes small (default: parameters)"
    )
    shrink.add_argument(
        "--batch", metavar="N", type=_count, help="images at once for which latency counts (default: 1)"
    )
    shrink.add_argument(
        "--quantise",
        action="store_true",
        help="round the student's weights in the end: to 4 bits, or where bytes have a limit to 3 to 8 bits each, and structure and bits "
        "are chosen together",
    )


def _count(word: str) -> int:
    if not word.isdecimal() or not int(word):
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number above 0")
    return int(word)


def _fraction(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number; give e.g. 0.1 for a tenth") from None


def run_shrink(arguments: argparse.Namespace) -> int:
    from compressvit.recipe.yaml import dumped
    from compressvit.report.write import FILE, report_after_run
    from compressvit.runs.shrink import CALIBRATION, apply_recipe, default_output, shrink_recipe
    from compressvit.runs.shrink_words import arguments_of, kept, limits
    from compressvit.terminal import Terminal

    console = Terminal(stderr=arguments.json)
    show = partial(console.print, highlight=False, soft_wrap=True)
    recipe = shrink_recipe(
        arguments.source,
        arguments.folder,
        None if arguments.to is None and arguments.keep else limits(arguments.to or ["0.5"], arguments.unit),
        keep=kept(arguments.keep) if arguments.keep else None,
        unit=arguments.unit if arguments.keep else None,
        model=arguments.model,
        img_size=arguments.img_size,
        args=arguments_of(arguments.args),
        batch=arguments.batch,
        calibration=CALIBRATION if arguments.calibration is None else arguments.calibration,
        val_fraction=arguments.val_fraction,
        quantise=arguments.quantise,
    )
    show(dumped(recipe))
    arguments.output = output = Path(arguments.output or default_output(recipe))

    def run() -> None:
        results = apply_recipe(
            recipe,
            output,
            command=["compressvit", *sys.argv[1:]],
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            device=arguments.device,
            console=console,
            report=None if arguments.no_report else report_after_run,
            log_to=arguments.log_to,
        ).results
        student, page = output / "student", output / FILE
        if page.is_file():
            show(f"report: {page}")
        show(f'student: {student}; compressvit.load("{student}") in Python; compressvit evaluate {output}')
        if arguments.json:
            places = {"run": str(output), "artifact": str(student), "report": str(page) if page.is_file() else None}
            figures = results.model_dump(mode="json", exclude_unset=True, exclude={"ledger", "phases"})
            print(json.dumps({**places, **figures}, indent=2))

    return exit_code_of(run)
