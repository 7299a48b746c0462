"""`recipes` and `schema`: what recipes there are, and what may stand in one."""

from __future__ import annotations

import argparse
import json

from compressvit.cli.common import Verb, add_recipe, short
from compressvit.errors import UserError
from compressvit.text import printable


def add_recipes(verb: Verb) -> None:
    recipes = verb("recipes", lambda _: recipes_help(), "list the shipped recipes, or show one")
    what = recipes.add_subparsers(title="what", metavar="list|show")

    def recipes_help() -> int:
        recipes.print_help()
        return 2

    listing = what.add_parser("list", help="names and descriptions")
    listing.set_defaults(run=_recipes_list)
    show = what.add_parser("show", help="print a recipe")
    add_recipe(show)
    show.add_argument("--resolved", action="store_true", help="with every default and override written out")
    show.set_defaults(run=_recipes_show)


def add_schema(verb: Verb) -> None:
    schema = verb("schema", _schema, "print the JSON schema of recipes, for editors, or explain a key")
    schema.add_argument(
        "key", metavar="KEY", nargs="?", help="teacher, data, multiplex, distill, distill.losses, …: explain its keys"
    )


@short
def _recipes_list(arguments: argparse.Namespace) -> int:
    from rich.table import Table

    from compressvit.recipe.shipped import described
    from compressvit.terminal import Terminal

    table = Table(box=None, pad_edge=False)
    table.add_column("name")
    table.add_column("description")
    for name, description in described().items():
        table.add_row(name, description)
    Terminal().print(table)
    return 0


@short
def _recipes_show(arguments: argparse.Namespace) -> int:
    from compressvit.recipe.recipe import load_recipe, read_recipe

    if arguments.resolved:
        print(load_recipe(arguments.recipe, arguments.overrides).to_yaml(), end="")
    elif arguments.overrides:
        raise UserError("overrides are shown only with --resolved; without it the recipe's file is printed unchanged")
    else:
        print(printable(read_recipe(arguments.recipe)), end="")
    return 0


@short
def _schema(arguments: argparse.Namespace) -> int:
    from compressvit.recipe.schema import documentation, json_schema

    if arguments.key is None:
        print(json.dumps(json_schema(), indent=2))
        return 0
    from rich.table import Table

    from compressvit.terminal import Terminal

    table = Table(box=None, pad_edge=False)
    for column in (arguments.key, "default", "meaning"):
        table.add_column(column)
    for row in (rows := documentation(arguments.key)):
        table.add_row(*row)
    Terminal().print(table if rows else f"{arguments.key} has no options")
    return 0
