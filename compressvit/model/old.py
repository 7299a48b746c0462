"""What earlier versions wrote, in the words of this one: the one place that knows them.

| version 0.1.0, manifest format 1 | now |
|---|---|
| the step `lors: {share: 1, …}` | `low_rank: {…}` |
| the option `groups` of `lors` | `terms` |
| the option `keep` of `sparsify`, a share | `density` |
| a plan of `lors` in which no layer shares | a plan of `low_rank` |
| `score: gradient` of `prune` in a resolved recipe, without `milestones` | `score: taylor` |
| `adaptformer` and `fact` in a resolved recipe, without `dropout` | `dropout: 0.0` |
| `data` in a resolved recipe, without `group_by` | `group_by: null`, every image by itself |
| `val_fraction` of other sets than `images` in a resolved recipe, without `test_fraction` | none: it meant nothing |
| `low_rank` in a resolved recipe, without `pivoted` | `pivoted: false` |
| tensors `P.low_rank.down`, `P.low_rank.up`, `P.bias` where layer P is low rank alone | `P.down.weight`, `P.up.weight`, `P.up.bias` |

Only files written by a run or by `save` are translated. In a recipe from a user, steps refuse an old word and name the new one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

RESOLVED = "resolved.yaml"  # of a run folder
T = TypeVar("T")
Options = dict[str, Any]


# --------------------------------------------------------------------------------------------------------------- recipes


def is_of_a_run(file: Path) -> bool:
    """Whether a recipe's file is one that a run keeps."""
    return file.name == RESOLVED or (file.name == "recipe.yaml" and (file.parent / RESOLVED).is_file())


def lacks_what_is_new(file: Path) -> bool:
    """Whether an option that a run's recipe lacks did not exist yet: it is resolved, or was given to an earlier version."""
    return file.name == RESOLVED or _NEWEST not in (file.parent / RESOLVED).read_text(
        encoding="utf-8", errors="replace"
    )


def current_recipe(content: Any, *, complete: bool = True) -> Any:
    """A recipe of a run folder, as it is read from YAML, in the current words; content that is not a recipe is returned unchanged.

    Args:
        complete: an option that it lacks did not exist yet (`lacks_what_is_new`).
    """
    if not isinstance(content, dict) or not isinstance(content.get("steps"), list):
        return content
    found = {**content, "steps": [_step(entry, complete) for entry in content["steps"]]}
    if complete and isinstance(content.get("data"), dict):
        found["data"] = _data(content["data"])
    return found


_NEWEST = "milestones"  # an option of every phase, so every resolved recipe of a later version has it
_ADDED_TO_DATA: Options = {"group_by": None}
# By step, options that were added since and the values that a run without them had.
_ADDED: dict[str, Options] = {
    "adaptformer": {"dropout": 0.0},
    "fact": {"dropout": 0.0},
    "low_rank": {"pivoted": False},
}


def _data(options: Options) -> Options:
    found = {**_ADDED_TO_DATA, **options}
    if "test_fraction" not in options and options.get("name") != "images":
        found.pop("val_fraction", None)
    return found


def _step(entry: Any, complete: bool) -> Any:
    if not isinstance(entry, dict):
        return entry
    translate = {"lors": _lors, "sparsify": _sparsify}
    steps = {}
    for word, options in entry.items():
        if word in translate:
            word, options = translate[word](options)
        if complete and isinstance(options, dict):
            options = {**_ADDED.get(word, {}), **options}
            if word == "prune" and options.get("score") == "gradient" and _NEWEST not in options:
                options["score"] = "taylor"  # `gradient` is another score since
        steps[word] = options
    return steps


def _sparsify(options: Any) -> tuple[str, Any]:
    if not isinstance(options, dict) or not isinstance(options.get("keep"), float | int):
        return "sparsify", options
    return "sparsify", {"density" if key == "keep" else key: value for key, value in options.items()}


def _lors(options: Any) -> tuple[str, Any]:
    if not isinstance(options, dict):
        return "lors", options
    if not _shares_nothing(options.get("share")):
        return "lors", {"terms" if key == "groups" else key: value for key, value in options.items()}
    kept = {k: v for k, v in options.items() if k not in ("share", "group_by", "rounds", "groups")}
    if "rank" in kept:
        kept["rank"] = _times(kept["rank"], options.get("groups", 1))
    if kept.get("metric") == "auto":
        kept["metric"] = "outputs"
    if kept.get("init") == "first":
        kept["init"] = "fit"
    return "low_rank", kept


def _shares_nothing(share: Any) -> bool:
    return share == 1 or (isinstance(share, list) and bool(share) and all(number == 1 for number in share))


def _times(rank: Any, terms: Any) -> Any:
    """The product of two options that are a number or a list of numbers, one per block."""
    if isinstance(rank, list) or isinstance(terms, list):
        count = len(rank if isinstance(rank, list) else terms)
        ranks, factors = (v if isinstance(v, list) else [v] * count for v in (rank, terms))
        return [r * k if isinstance(r, int) and isinstance(k, int) else r for r, k in zip(ranks, factors, strict=False)]
    return rank * terms if isinstance(rank, int) and isinstance(terms, int) else rank


def current_text(text: str, recipe: Any) -> str:
    """The text of a JSON file of a run folder, where it names the steps of the run's recipe.

    Args:
        text: of plan.json, results.json or metrics.jsonl.
        recipe: what the run's resolved.yaml holds, as it stands there.
    """
    before = [next(iter(entry), "") if isinstance(entry, dict) else entry for entry in _steps(recipe)]
    after = [next(iter(entry), "") if isinstance(entry, dict) else entry for entry in _steps(current_recipe(recipe))]
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        if old != new:
            text = text.replace(f"steps[{index}].{old}", f"steps[{index}].{new}").replace(
                f'"{index}_{old}"', f'"{index}_{new}"'
            )
    if "lors" in before and "lors" not in after:
        text = re.sub(r'("step":\s*)"lors"', r'\1"low_rank"', text)
    return text


def _steps(recipe: Any) -> list[Any]:
    steps = recipe.get("steps") if isinstance(recipe, dict) else None
    return steps if isinstance(steps, list) else []


def current_word(word: str, transforms: Collection[str]) -> str:
    """The word of a step in a ledger, where the model was made by these transforms."""
    return "low_rank" if word == "lors" and word not in transforms and "low_rank" in transforms else word


def stored_step(folder: Path, name: str) -> str:
    """What a run calls the model that it kept after a step, e.g. `0_low_rank`; a run of an earlier version may call it otherwise."""
    index, _, word = name.partition("_")
    earlier = f"{index}_lors"
    return earlier if word == "low_rank" and not (folder / name).exists() and (folder / earlier).exists() else name


# ------------------------------------------------------------------------------------------------------ models and tensors


def current_plans(transforms: list[tuple[str, Options]]) -> list[tuple[str, Options]]:
    """The transforms of a manifest of format 1, each its word and its plan, as this version has them."""
    renames = renamed_tensors(transforms)
    return [_plan(word, {key: _renamed(value, renames) for key, value in plan.items()}) for word, plan in transforms]


def _plan(word: str, plan: Options) -> tuple[str, Options]:
    groups = _groups(word, plan)
    if not groups or any(len(group) != 1 for group in groups):
        return word, plan
    new = {k: v for k, v in plan.items() if k not in ("groups", "rounds")}
    return "low_rank", {**new, "init": "fit" if plan.get("init") == "first" else plan.get("init")}


def _groups(word: str, plan: Options) -> list[list[str]]:
    """The share groups of a `lors` plan; empty for other plans, and for damaged ones, which validation reports later."""
    groups = plan.get("groups") if word == "lors" else None
    valid = isinstance(groups, list) and all(isinstance(group, list) for group in groups)
    return groups if valid and groups is not None else []


def renamed_tensors(transforms: list[tuple[str, Options]]) -> dict[str, str]:
    """Old names and new names of tensors of an artifact with these transforms, of format 1."""
    alone = [group[0] for word, plan in transforms for group in _groups(word, plan) if len(group) == 1]
    return {old: new for path in alone for old, new in _of_layer(path).items()}


def _of_layer(path: str) -> dict[str, str]:
    return {
        f"{path}.low_rank.down": f"{path}.down.weight",
        f"{path}.low_rank.up": f"{path}.up.weight",
        f"{path}.bias": f"{path}.up.bias",
    }


def _renamed(value: Any, renames: Mapping[str, str]) -> Any:
    """A value in which every text that is an old name is the new one."""
    if isinstance(value, str):
        return renames.get(value, value)
    return [_renamed(item, renames) for item in value] if isinstance(value, list) else value


def rename(tensors: Mapping[str, T], renames: Mapping[str, str]) -> dict[str, T]:
    """A mapping from tensor names with its keys renamed."""
    return {renames.get(name, name): tensor for name, tensor in tensors.items()}


def current_checkpoint(saved: Any, names: Collection[str]) -> Any:
    """What a checkpoint of a phase holds, under the names that the model's tensors have now.

    The optimiser's state refers to parameters by position, which does not change: timm puts weights and biases into two groups.
    """
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        return saved
    end = ".low_rank.down"
    paths = [n.removesuffix(end) for n in saved["model"] if n.endswith(end) and n not in names]
    renames = {old: new for path in paths for old, new in _of_layer(path).items() if new in names}
    if not renames:
        return saved
    best = saved.get("best")
    if isinstance(best, dict) and isinstance(best.get("model"), dict):
        saved = {**saved, "best": {**best, "model": rename(best["model"], renames)}}
    return {
        key: rename(value, renames) if key in ("model", "average", "moments") else value for key, value in saved.items()
    }
