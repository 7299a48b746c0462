"""The recipes that ship with the package: their paths and descriptions. Nothing is validated here, which keeps it fast."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from compressvit.errors import UserError, did_you_mean, switch
from compressvit.model.old import RESOLVED
from compressvit.reading import read_yaml


def recipes_folder() -> Path:
    """The folder of the shipped recipes: inside an installed package, or beside the package in a checkout."""
    inside = Path(__file__).parents[1] / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """The recipes that ship with the package, by name."""
    return {p.stem: p for p in sorted(recipes_folder().glob("*.yaml"))}


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a recipe given by path or by shipped name; a `UserError` with similar names if there is none."""
    path, beside = Path(name_or_path), list[str]()
    with suppress(OSError):  # a name too long for the system cannot be a file
        if path.is_file():
            return path
        if (path / RESOLVED).is_file():
            raise UserError(f"{path} is a run folder, not a recipe; {switch('resume')} goes on with the run in it")
        beside = [file.name for file in path.parent.glob("*.y*ml")]
    shipped = shipped_recipes()
    if path.parent in (Path("."), Path("recipes")) and path.suffix in ("", ".yaml", ".yml") and path.stem in shipped:
        return shipped[path.stem]
    hint = (
        did_you_mean(path.stem, shipped, list_at_most=0)
        or did_you_mean(path.name, beside, list_at_most=0)
        or "`compressvit recipes list` lists those"
    )
    raise UserError(f"there is no recipe {str(name_or_path)!r}, neither as a file nor among those included; {hint}")


def described() -> dict[str, str]:
    """What each shipped recipe is for, by name."""
    content = {name: read_yaml(path) for name, path in shipped_recipes().items()}
    return {name: recipe.get("description", "") for name, recipe in content.items()}
