"""The command line. Heavy imports are deferred until a command needs them, so that `--help` is fast."""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from compressvit import __version__
from compressvit.cli.cache import add_cache
from compressvit.cli.common import Verb, add_device, add_overrides, add_recipe, add_run, exit_code_of, short
from compressvit.cli.export import add_export
from compressvit.cli.push import add_push
from compressvit.cli.recipes import add_recipes, add_schema
from compressvit.cli.shrink import UNITS, add_shrink, run_shrink
from compressvit.cli.sweep import add_sweep
from compressvit.cli.tool import add_tool
from compressvit.errors import UserError, command_line, did_you_mean
from compressvit.exits import answered
from compressvit.text import complain, printable
from compressvit.training.stopping import Signals

_EPILOG = """\
examples:
  compressvit apply quickstart                            compress a digits ViT
  compressvit shrink vit_small_patch16_224 IMAGES         halve a pretrained one
  compressvit plan mini_swin_b                            print steps and costs
  compressvit apply mini_swin_b data.root=IMAGENET        compress a Swin-B
  compressvit apply repadapter_vit_b_vtab data.root=TASK  adapt it to a task
  compressvit apply quickstart steps.0.multiplex.share=3  override a value
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 `evaluate --require` was not met, 2 something asked for cannot be done, 70 a fault of ours,
    128 + N stopped by signal N."""
    parser, verbs = _parser()
    _require_known_verb(sys.argv[1:] if argv is None else argv, parser, verbs)
    # argparse stops collecting key=value arguments at the first option and returns later ones as unknown.
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(arguments, "overrides")):
        hint = _as_override(rest) if hasattr(arguments, "overrides") else ""
        arguments.parser.error(
            f"unrecognized arguments: {' '.join(rest)}{hint or _option_meant(rest, arguments.parser)}"
        )
    if rest:
        arguments.overrides += rest
    with command_line(), Signals():  # verbs that keep what they have done catch them themselves
        return answered("compressvit", lambda: arguments.run(arguments), lambda: _run_folder(arguments))


def program() -> int:
    """`main`, at whose end the process ends: the garbage collector does not look at what torch has once more, half a second."""
    try:
        return main()
    finally:
        gc.freeze()


def _require_known_verb(words: Sequence[str], parser: argparse.ArgumentParser, verbs: Iterable[str]) -> None:
    """End the program if the first word is no verb, and name the one that it is like."""
    word = next(iter(words), "-")
    if not (word.startswith("-") or word in verbs):
        run = f"to run a recipe: compressvit apply {printable(shlex.quote(word))}"
        meant = run if word.endswith((".yaml", ".yml")) else did_you_mean(word, verbs, list_at_most=20)
        parser.error(f"there is no verb {word!r}; {meant}")


def _as_override(rest: Sequence[str]) -> str:
    """How a setting that was written as an option is written, if that is what it is."""
    from compressvit.recipe.recipe import Recipe

    word = next(word for word in rest if word.startswith("-"))
    key, _, value = word.lstrip("-").replace("-", "_").partition("=")
    if key.partition(".")[0] not in Recipe.model_fields:
        return ""
    return f"; settings of the recipe are written without dashes: {key}={value or 'VALUE'}"


def _option_meant(rest: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """The option of a verb that is most like the first word that is none."""
    word = next((word.partition("=")[0] for word in rest if word.startswith("-")), "")
    meant = did_you_mean(word, parser._option_string_actions, list_at_most=0) if word else ""
    return f"; {meant}" if meant else ""


def _run_folder(arguments: argparse.Namespace) -> Path | None:
    """The folder of the run that is applied, as far as it is known."""
    return Path(arguments.output) if arguments.run in (_apply, run_shrink) and arguments.output else None


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser, and the names of its verbs."""
    parser = argparse.ArgumentParser(
        prog="compressvit",
        description="Compress and distil a pretrained vision transformer, or adapt it to a task,\nand report the result.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"compressvit {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        added.set_defaults(run=run, parser=added)
        return added

    # In the order shown by `--help`.
    for add in (
        add_shrink,
        _add_apply,
        _add_plan,
        _add_frontier,
        add_sweep,
        _add_validate,
        _add_evaluate,
        _add_merge,
        add_export,
        add_push,
        _add_compare,
        _add_report,
        add_tool,
        add_cache,
        add_recipes,
        add_schema,
    ):
        add(verb)
    return parser, list(verbs.choices)


def _add_apply(verb: Verb) -> None:
    apply = verb("apply", _apply, "run a recipe: compress, distil, evaluate, and write a run folder")
    add_recipe(apply)
    add_run(apply, "RECIPE")


def _add_plan(verb: Verb) -> None:
    plan = verb("plan", _plan, "print what a recipe will do and cost; without weights or data unless --measure")
    add_recipe(plan)
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument(
        "--measure",
        action="store_true",
        help="also make the student from weights and data, and print the error of every layer and its quality before any training",
    )
    add_device(plan, "for --measure: cpu, cuda, … (default: the best available)")


def _add_frontier(verb: Verb) -> None:
    frontier = verb("frontier", _frontier, "show quality before any training against size, for several budgets")
    add_recipe(frontier)
    frontier.add_argument(
        "--budgets",
        metavar="B",
        nargs="+",
        type=_budget,
        default=[0.75, 0.6, 0.5, 0.4, 0.3, 0.2],
        help="budgets: up to 1 a fraction of the teacher's, above 1 a number, of latency milliseconds (default: 0.75 0.6 0.5 0.4 0.3 0.2)",
    )
    frontier.add_argument(
        "--unit",
        choices=UNITS,
        default="parameters",
        help="unit of the budgets (default: parameters); only shrink has budgets of latency, on this device",
    )
    frontier.add_argument(
        "--methods",
        metavar="METHOD",
        nargs="+",
        choices=("shrink", "narrow", "low_rank", "lors", "quantise"),
        default=[],
        help="compare shrink, narrow, low_rank, lors and (in bytes) quantise at every budget (default: the step of the recipe)",
    )
    frontier.add_argument(
        "--output", metavar="FOLDER", help="folder for the table and the plot (default: runs/RECIPE_frontier)"
    )
    add_device(frontier)


def _add_validate(verb: Verb) -> None:
    validate = verb(
        "validate",
        _validate,
        "check recipes against the schema, their model names against timm, and heads against class folders that are here; `plan` also "
        "builds the models",
    )
    validate.add_argument(
        "recipes", metavar="RECIPE", nargs="+", help="a shipped recipe's name, or the path of a YAML file"
    )


def _add_evaluate(verb: Verb) -> None:
    evaluate = verb(
        "evaluate", _evaluate, "evaluate the student of a run, an artifact, or what `export` or `merge` wrote"
    )
    evaluate.add_argument(
        "path",
        metavar="PATH",
        help="a run folder, an artifact (a folder with compressvit.json), or what `export` or `merge` wrote: FILE.onnx, FILE.pt2, "
        "FILE.xml, FILE.safetensors, or a folder of timm",
    )
    add_overrides(evaluate, "overrides of the data, e.g. data.name=digits data.root=FOLDER")
    add_device(evaluate)
    evaluate.add_argument(
        "--require",
        metavar="FIGURE>=N",
        action="append",
        default=[],
        help="exit with code 1 unless a figure of --json is so high (or low: FIGURE<=N), e.g. 'top1>=85'; of a figure in percent 0.85 "
        "is the same; may be repeated",
    )
    evaluate.add_argument(
        "--trust",
        action="store_true",
        help="also read a .pt2 without the checksum that `export` writes beside it; such a file can run code",
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON")


def _add_merge(verb: Verb) -> None:
    merge = verb("merge", _merge, "fold adapters and low rank into plain timm layers, and check the result")
    merge.add_argument("path", metavar="RUN|ARTIFACT", help="a run folder, or a folder with compressvit.json")
    merge.add_argument("--output", metavar="FOLDER", help="where to write it (default: merged/ next to the artifact)")
    merge.add_argument("--overwrite", action="store_true", help="replace an earlier merge in the folder")
    merge.add_argument("--dense", action="store_true", help="also where the merged model is larger than the student")
    add_device(merge, "for the latencies: cpu, cuda, … (default: the best available)")


def _add_compare(verb: Verb) -> None:
    compare = verb("compare", _compare, "tabulate several runs, with the seeds of one recipe in one row")
    compare.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or folders of run folders")
    compare.add_argument("--output", metavar="FOLDER", help="also write the table (.md, .csv, .json) and a plot there")


def _add_report(verb: Verb) -> None:
    report = verb("report", _report, "write one self-contained HTML page about a run or several")
    report.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or folders of run folders")
    report.add_argument("--output", metavar="FILE", help="where to write it (default: report.html in the given folder)")
    report.add_argument(
        "--no-images",
        action="store_true",
        help="show no picture of the data, for data that is private; names of classes stay",
    )


def _budget(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        hint = "; key=value goes before --budgets" if "=" in word else ""
        raise argparse.ArgumentTypeError(f"{word!r} is not a number{hint}") from None


def _apply(arguments: argparse.Namespace) -> int:
    from compressvit.recipe.shipped import find_recipe
    from compressvit.report.write import report_after_run
    from compressvit.runs.apply import apply
    from compressvit.runs.folder import RESOLVED

    run = Path(arguments.recipe)
    if arguments.resume and (run / RESOLVED).is_file():  # a run prints its own summary
        arguments.recipe, arguments.output = str(run / RESOLVED), arguments.output or str(run)
    elif arguments.resume and run.is_dir():
        raise UserError(f"--resume: there is no run in {run} (no {RESOLVED}); start one without --resume")
    elif arguments.resume and len(run.parts) > 1 and run.parent != Path("recipes") and not run.exists():
        raise UserError(
            f"--resume: there is no run folder {run}; give one that `compressvit apply` wrote, or the recipe and --output"
        )
    arguments.output = arguments.output or Path("runs") / find_recipe(arguments.recipe).stem
    return exit_code_of(
        lambda: apply(
            arguments.recipe,
            arguments.output,
            overrides=arguments.overrides,
            command=["compressvit", *sys.argv[1:]],
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            device=arguments.device,
            report=None if arguments.no_report else report_after_run,
            log_to=arguments.log_to,
        )
    )


def _plan(arguments: argparse.Namespace) -> int:
    from compressvit.recipe.recipe import load_recipe
    from compressvit.runs.plan import plan_recipe
    from compressvit.runs.tables import print_plan
    from compressvit.terminal import Terminal

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    plan = plan_recipe(recipe, arguments.recipe)
    content = plan.model_dump(mode="json")
    if not arguments.json:
        print_plan(plan, Terminal())
    if arguments.measure and not plan.conflicts:
        from compressvit.runs.one_shot import measure, print_measured

        measured = measure(recipe, arguments.device)
        content["measured"] = asdict(measured)
        if not arguments.json:
            print_measured(measured, Terminal())
    if arguments.json:
        print(json.dumps(content, indent=2))
    return 2 if plan.conflicts else 0


def _frontier(arguments: argparse.Namespace) -> int:
    from compressvit.recipe.recipe import load_recipe
    from compressvit.recipe.shipped import find_recipe
    from compressvit.runs.frontier import frontier
    from compressvit.terminal import Terminal

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    wrong = [budget for budget in arguments.budgets if not 0 < budget < float("inf")]
    if wrong:
        raise UserError(f"--budgets {wrong[0]:g}: a budget is above 0, e.g. 0.5 for half of the teacher")
    frontier(
        recipe,
        budgets=arguments.budgets,
        unit=arguments.unit,
        output=Path(arguments.output or f"runs/{find_recipe(arguments.recipe).stem}_frontier"),
        device=arguments.device,
        console=Terminal(),
        methods=list(dict.fromkeys(arguments.methods)),
    )
    return 0


@short
def _validate(arguments: argparse.Namespace) -> int:
    from compressvit.recipe.recipe import load_recipe, require_known_models
    from compressvit.runs.heads import require_enough_outputs
    from compressvit.runs.models import missing_data, missing_yet

    faulty = 0
    for name in arguments.recipes:
        try:
            recipe = load_recipe(name)
            require_known_models(recipe, name)
            if any(getattr(entry.spec, "rounded", False) for entry in recipe.steps):  # it counts on a later one
                recipe.parts()
            told = [require_enough_outputs(recipe, name), *missing_yet(recipe), missing_data(recipe)]
            print(printable("; ".join([f"{name}: valid", *filter(None, told)])))
        except UserError as error:
            faulty += 1
            print(printable(str(error)), file=sys.stderr)
    return 2 if faulty else 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from compressvit.runs.evaluate import evaluate_path

    return evaluate_path(
        arguments.path,
        arguments.overrides,
        device=arguments.device,
        as_json=arguments.json,
        require=arguments.require,
        trust=arguments.trust,
    )


def _merge(arguments: argparse.Namespace) -> int:
    from compressvit.runs.merge import merge_folder, print_merge
    from compressvit.terminal import Terminal

    result = merge_folder(
        arguments.path,
        arguments.output,
        overwrite=arguments.overwrite,
        dense=arguments.dense,
        device=arguments.device,
    )
    print_merge(result, Terminal())
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from compressvit.report.compare import compare

    compare(arguments.runs, output=Path(arguments.output) if arguments.output else None)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from compressvit.report.write import report

    file, runs = report(arguments.runs, arguments.output, images=not arguments.no_images)
    for run in runs:
        for note in run.notes:
            complain("compressvit", f"{run.path}: {note}")
    print(printable(str(file)))
    return 0
