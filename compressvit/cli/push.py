"""`push`: a student to the Hugging Face Hub."""

from __future__ import annotations

import argparse
import json

from compressvit.cli.common import Verb


def add_push(verb: Verb) -> None:
    push = verb("push", run_push, "publish a student on the Hugging Face Hub, with a model card made from its run")
    push.add_argument("path", metavar="RUN|ARTIFACT", help="a run folder, or a folder with compressvit.json")
    push.add_argument("repository", metavar="ORG/NAME", help="the repository, which is created if it is not there")
    push.add_argument(
        "--licence",
        metavar="ID",
        help="of the student, in the Hub's words, e.g. apache-2.0 (default: the teacher's, where timm or the Hub records it)",
    )
    push.add_argument("--private", action="store_true", help="create a private repository")
    push.add_argument(
        "--overwrite",
        action="store_true",
        help="also where the repository has a model or a card; its earlier commits keep them",
    )
    push.add_argument("--dry-run", action="store_true", help="publish nothing, and print the card")
    push.add_argument("--json", action="store_true", help="print JSON")


def run_push(arguments: argparse.Namespace) -> int:
    from compressvit.report.push import push
    from compressvit.runs.tables import megabytes
    from compressvit.text import printable

    told = push(
        arguments.path,
        arguments.repository,
        licence=arguments.licence,
        private=arguments.private,
        overwrite=arguments.overwrite,
        dry_run=arguments.dry_run,
    )
    if arguments.json:
        print(json.dumps(told, indent=2))
    elif arguments.dry_run:
        print(printable(told["card"]), end="")
    else:
        sizes = ", ".join(f"{name} ({megabytes(size)})" for name, size in told["bytes"].items())
        print(printable(f"published {told['url']}: {sizes}; licence {told['licence']}"))
        print(f'compressvit.load("hf-hub:{told["repository"]}")')
    return 0
