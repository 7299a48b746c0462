"""Claims: which parts of a model a transform uses, and which pairs of claims exclude each other.

A plan states its claims (`Plan.claims`), so no transform refers to another by name. `RULES` is the table of all conflicts: the kind of
the earlier step's claim, the kind of the later one's, the condition under which they overlap, and the error message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["weight", "tie", "slot", "grid", "tokens", "drop", "order", "regroup", "noise", "values", "narrow"]


@dataclass(frozen=True)
class Claim:
    """One kind of use that a step makes of parts of the model.

    Attributes:
        paths: module paths; for a tie, the names of the parameters that become one.
        slot: the slot's name.
        by: the option that causes the claim, e.g. 'multiplex.mlp_conv', unless it is the step as a whole.
        instead: how to avoid the claim, for the error message.
    """

    kind: Kind
    paths: tuple[str, ...]
    slot: str = ""
    by: str = ""
    instead: str = ""


def weight(path: str) -> Claim:
    """The weight of the layer at `path` is replaced by several tensors."""
    return Claim("weight", (path,))


def tie(names: Iterable[str], instead: str = "") -> Claim:
    """These parameters become one; for modules, the parameters of the same name below them do."""
    return Claim("tie", tuple(names), instead=instead)


def slot(path: str, name: str) -> Claim:
    """The slot `name` of the module at `path` is filled."""
    return Claim("slot", (path,), slot=name)


def grid(path: str, by: str = "", instead: str = "") -> Claim:
    """The module at `path` needs every token at its place on the grid."""
    return Claim("grid", (path,), by=by, instead=instead)


def adds_tokens(path: str, instead: str = "") -> Claim:
    """The module at `path` sees tokens in addition to the image's."""
    return Claim("tokens", (path,), instead=instead)


def drops(names: Iterable[str], instead: str = "") -> list[Claim]:
    """These parameters disappear from the state dict; weights come first, so that a message names one."""
    return [Claim("drop", (name,), instead=instead) for name in sorted(names, key=lambda n: (n.endswith(".bias"), n))]


def orders(path: str) -> Claim:
    """The neurons and heads of the block at `path` are permuted, so the block must still be as in the teacher."""
    return Claim("order", (path,))


def regroups(path: str, by: str) -> Claim:
    """The step chooses itself which layers below `path` to group; '' for the whole model."""
    return Claim("regroup", (path,), by=by)


def noise(path: str, by: str, instead: str) -> Claim:
    """Values below `path` are initialised at random; '' for the whole model."""
    return Claim("noise", (path,), by=by, instead=instead)


def narrows(path: str) -> Claim:
    """The layer at `path` gets another size than the teacher's."""
    return Claim("narrow", (path,))


def values(path: str, by: str, instead: str) -> Claim:
    """The step is fitted to the values of the layer at `path`."""
    return Claim("values", (path,), by=by, instead=instead)


Meet = Callable[[Claim, Claim], str | None]


def _same(a: Claim, b: Claim) -> str | None:
    return next((path for path in b.paths if path in a.paths and a.slot == b.slot), None)


def _is_below(path: str, above: str) -> bool:
    return not above or path == above or path.startswith(f"{above}.")


def _inside(a: Claim, b: Claim) -> str | None:
    """The first path of either claim that equals a path of the other or is below one."""
    pairs = ((below, above) for x, y in ((b, a), (a, b)) for below in x.paths for above in y.paths)
    return next((below for below, above in pairs if _is_below(below, above)), None)


def _otherwise_tied(a: Claim, b: Claim) -> str | None:
    """A path at which two ties overlap; None if each name of one equals, or is below, a different name of the other."""
    pairs = [(x, y) for x in a.paths for y in b.paths if _is_below(x, y) or _is_below(y, x)]
    alike = all({pair[i] for pair in pairs} == set(claim.paths) for i, claim in enumerate((a, b)))
    return None if alike and len(pairs) == len(a.paths) == len(b.paths) else _inside(a, b)


@dataclass(frozen=True)
class Rule:
    """Why two claims exclude each other.

    Attributes:
        meet: the path at which two claims overlap; None if they do not.
        why: the message, with the placeholders {earlier} and {later} (the steps or their options), {path}, {slot}, and {n_earlier} and
            {n_later} (the number of names of a tie).
        instead: the suggestion if the later claim has none.
        whose: the claims whose `instead` applies here: the later one's, those of both, or neither's.
    """

    meet: Meet
    why: str
    instead: str
    whose: Literal["later", "both", "none"] = "later"


_TOO_LATE = Rule(
    _inside,
    "{later} comes before the steps that share or add, and the earlier {earlier} changed {path}",
    "put `{later}` first",
)
_AT_RANDOM = Rule(
    _inside,
    "{later} fits the teacher's weights, but the earlier {earlier} initialises the student at random",
    "leave one of the two steps out",
    "both",
)
_NARROWER = Rule(
    _inside,
    "{later} works on layers of the teacher's size, and the earlier {earlier} made {path} narrower",
    "leave one of the two steps out, or let `shrink` choose neurons, heads and ranks together",
)
_OFF_GRID = "needs every token at its place on the grid, and"
_FEWER = "leave out one of `{earlier}` and `{later}`, or adapt with lora, adapters or ssf, which add no tokens"

# (kind of the earlier claim, kind of the later one)
RULES: dict[tuple[Kind, Kind], Rule] = {
    ("weight", "weight"): Rule(
        _same,
        "{later} comes after {earlier}: {path} has a low-rank term already",
        "give the two steps different targets, or merge them into one with a larger rank",
    ),
    ("tie", "tie"): Rule(
        _otherwise_tied,
        "{later} wants to share {path} among {n_later} layers, but the earlier {earlier} shares it among {n_earlier}",
        "give both steps the same share",
    ),
    ("tie", "drop"): Rule(
        _inside,
        "{later} would replace {path}, which the earlier {earlier} shares among {n_earlier} layers",
        "leave one of the two steps out",
    ),
    ("drop", "tie"): Rule(
        _inside,
        "{later} wants to share {path}, which the earlier {earlier} replaced",
        "leave one of the two steps out",
        whose="none",
    ),
    ("slot", "slot"): Rule(
        _same,
        "{later} wants to add {path}.{slot}, which is already there: the earlier {earlier} added it",
        "apply only one of the two, with everything it should do",
    ),
    ("grid", "tokens"): Rule(_same, "{earlier} " + _OFF_GRID + " those of {later} have none", _FEWER, "both"),
    ("tokens", "grid"): Rule(_same, "{later} " + _OFF_GRID + " those of {earlier} have none", _FEWER, "both"),
    ("tokens", "tokens"): Rule(
        _same,
        "{later} wants to add tokens in {path}, where the earlier {earlier} did",
        "apply one, with as many as you want",
    ),
    ("tie", "order"): _TOO_LATE,
    ("slot", "order"): _TOO_LATE,
    ("weight", "order"): _TOO_LATE,
    ("drop", "order"): _TOO_LATE,
    ("order", "regroup"): Rule(
        _inside,
        "{later} would choose its own groups, but the earlier {earlier} has matched the blocks of different groups",
        "leave {earlier} out, or give both steps the same share",
    ),
    ("noise", "values"): _AT_RANDOM,
    ("narrow", "weight"): _NARROWER,
    ("narrow", "tie"): _NARROWER,
    ("narrow", "narrow"): Rule(
        _same,
        "{later} comes after {earlier}: {path} is narrower already",
        "use one of the two, with all that it should do",
    ),
    ("narrow", "order"): Rule(
        _inside,
        "{later} matches the neurons of blocks of the teacher's size, and the earlier {earlier} changed {path}",
        "leave one of the two steps out",
    ),
    ("narrow", "regroup"): _NARROWER,
    ("noise", "narrow"): _AT_RANDOM,
    ("narrow", "noise"): _NARROWER,
    ("weight", "noise"): Rule(
        _inside,
        "{later} would randomise the weights below the low-rank terms of the earlier {earlier}",
        "put `{later}` first",
    ),
}


def conflict(taken: Iterable[tuple[str, Claim]], step: str, wanted: Iterable[Claim]) -> str | None:
    """Why the claims of a step conflict with those of earlier steps, with a suggestion; None if they do not.

    Args:
        taken: the claims of earlier steps, each with the step's key.
        step: the key of the step that makes the new claims.
    """
    by_kind: dict[Kind, list[tuple[str, Claim]]] = {}
    for earlier, claim in taken:
        by_kind.setdefault(claim.kind, []).append((earlier, claim))
    for later in wanted:
        for (first, second), rule in RULES.items():
            for word, claim in by_kind.get(first, ()) if second == later.kind else ():
                path = rule.meet(claim, later)
                if path is not None:
                    return _sentence(rule, word, claim, step, later, path)
    return None


def _sentence(rule: Rule, word: str, earlier: Claim, step: str, later: Claim, path: str) -> str:
    names = {
        "earlier": earlier.by or word,
        "later": later.by or step,
        "path": path,
        "slot": later.slot,
        "n_earlier": len(earlier.paths),
        "n_later": len(later.paths),
    }
    offered = {"later": (later.instead,), "both": (earlier.instead, later.instead), "none": ()}[rule.whose]
    ways = ", or ".join(way for way in offered if way) or rule.instead.format(**names)
    if word == step and (earlier.kind, later.kind) in {("weight", "weight"), ("slot", "slot")}:
        return (
            f"{step} is applied twice: {rule.why.format(**names).removeprefix(f'{step} comes after {step}: ')}; {ways}"
        )
    return f"{rule.why.format(**names)}; {ways}"
