"""`sweep`: a recipe and some values in, a run for every combination of them out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from compressvit.cli.common import Verb, add_device, add_log_to, exit_code_of
from compressvit.exits import REFUSED


def add_sweep(verb: Verb) -> None:
    sweep = verb("sweep", run_sweep, "apply a recipe with every combination of some values, and compare the runs")
    sweep.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name, or the path of a YAML file")
    sweep.add_argument(
        "overrides",
        metavar="key=a,b,c",
        nargs="*",
        default=[],
        help="overrides as of `apply`, with commas between the values to try, e.g. steps.0.multiplex.share=2,3 seed=0,1,2; commas in "
        "brackets and quotes belong to a value",
    )
    sweep.add_argument("--jobs", metavar="N", type=int, default=1, help="runs at once, each in a process (default: 1)")
    sweep.add_argument("--output", metavar="FOLDER", help="the folder of the runs (default: runs/RECIPE_sweep)")
    sweep.add_argument(
        "--resume",
        action="store_true",
        help="go on with the sweep in the folder: pass finished runs over, continue interrupted ones, add others",
    )
    sweep.add_argument("--dry-run", action="store_true", help="plan every run, and begin none")
    sweep.add_argument("--no-report", action="store_true", help="write no report.html of the runs")
    sweep.add_argument("--json", action="store_true", help="print JSON; everything else to standard error")
    add_log_to(sweep)
    add_device(sweep)


def run_sweep(arguments: argparse.Namespace) -> int:
    from compressvit.recipe.shipped import find_recipe
    from compressvit.report.sweep import sweep
    from compressvit.report.write import report_after_run
    from compressvit.terminal import Terminal

    failed: list[str] = []

    def run() -> None:
        result = sweep(
            arguments.recipe,
            arguments.overrides,
            Path(arguments.output or f"runs/{find_recipe(arguments.recipe).stem}_sweep"),
            jobs=arguments.jobs,
            device=arguments.device,
            resume=arguments.resume,
            dry_run=arguments.dry_run,
            console=Terminal(stderr=arguments.json),
            report=None if arguments.no_report else report_after_run,
            log_to=arguments.log_to,
            command=["compressvit", *sys.argv[1:]],
        )
        failed.extend(result.get("failed", ()))
        if arguments.json:
            print(json.dumps(result, indent=2))

    return exit_code_of(run) or (REFUSED if failed else 0)
