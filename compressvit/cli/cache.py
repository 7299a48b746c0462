"""`cache`: look at what phases have kept, a teacher's answers or features, or remove it."""

from __future__ import annotations

import argparse
from pathlib import Path

from compressvit.cli.common import Verb, short
from compressvit.errors import UserError
from compressvit.text import printable


def add_cache(verb: Verb) -> None:
    cache = verb(
        "cache", lambda _: cache_help(), "verify or clear what phases have kept: answers of a teacher, or features"
    )
    what = cache.add_subparsers(title="what", metavar="verify|clear")

    def cache_help() -> int:
        cache.print_help()
        return 2

    for name, run, text in (
        (
            "verify",
            _verify,
            "compare every row with its checksum; damaged ones are told, and computed again by the next run",
        ),
        ("clear", _clear, "remove what is kept"),
    ):
        word = what.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        word.add_argument(
            "folder",
            metavar="FOLDER",
            help="cache.folder of a recipe, or the folder teacher_cache or feature_cache beside the run folders",
        )
        word.set_defaults(run=run)


@short
def _verify(arguments: argparse.Namespace) -> int:
    from compressvit.data.notes import counted
    from compressvit.training.cache.store import Store, caches_in, read_index

    faults = []
    for folder in caches_in(Path(arguments.folder)):
        store = Store(folder, index := read_index(folder))
        found = store.verify()
        answers, views = sum(view.answers for view in found), len(found)
        what = next((word for word in ("features", "teacher") if word in index.identity), "")
        kept, of = "features" if what == "features" else "answers", index.identity.get(what)
        model = of.get("model", "a model") if isinstance(of, dict) else "a model"  # a file of anybody's
        print(
            printable(f"{folder}: {answers:,} {kept} of {model}: {counted(views, 'view')} of {index.images:,} images")
        )
        faults += [f"{view.file}: {_fault(view.damaged, view.cut)}" for view in found if view.damaged or view.cut]
    if faults:
        raise UserError("\n  ".join(["damaged rows, which the next run computes again:", *faults]))
    return 0


def _fault(damaged: list[int], cut: bool) -> str:
    places = ", ".join(map(str, damaged[:5])) + (f" and {len(damaged) - 5} more" if len(damaged) > 5 else "")
    return "; ".join([f"of images {places}"] * bool(damaged) + ["its size is another one than its rows have"] * cut)


@short
def _clear(arguments: argparse.Namespace) -> int:
    from compressvit.data.notes import counted
    from compressvit.training.cache.store import caches_in, clear

    for folder in caches_in(Path(arguments.folder)):
        print(printable(f"{folder}: {counted(clear(folder), 'byte')} removed"))
    return 0
