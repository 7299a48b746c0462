"""The cells of `lors_detection.py`: detectors and transforms that are compared, as in the tables 2 to 8 of the paper of LORS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A row of a table.

    Attributes:
        table: what its rows differ in.
        text: what the row says.
        steps: transforms before training.
        args: changes to the detector; it is compared with the dense one that has the same.
        trained: it starts from the trained dense detector of its seed, not from the random one, and trains as the last step of the recipe.
        short: trained for as many epochs as the last step of the recipe, but otherwise as a dense detector.
    """

    table: str
    text: str
    steps: tuple[dict[str, Any], ...] = ()
    args: Mapping[str, Any] = field(default_factory=dict)
    trained: bool = False
    short: bool = False

    @property
    def dense(self) -> bool:
        """Whether others with the same arguments are compared with it."""
        return not (self.steps or self.trained or self.short)


def adaptive(**options: Any) -> dict[str, Any]:
    """A-LORS: the generators of the mixing matrices, from the paper's start."""
    return {"adaptive_lors": {"rank": 4, "terms": [1, 1, 2], "init": "scratch", **options}}


def static(**options: Any) -> dict[str, Any]:
    """S-LORS: the projections after the mixing, from the paper's start."""
    own = {"of": "decoder", "targets": ["mixing.projection"], "share": 3, "rank": 4, "init": "scratch"}
    return {"lors": {**own, "shared_init": "kaiming", **options}}


LORS = (adaptive(), static())
LOW_RANK = {"low_rank": {"of": "decoder", "targets": ["mixing.projection"], "rank": 4, "init": "scratch"}}
FITTED = (adaptive(init="fit"), static(init="fit", shared_init="released"))
MAIN, START, PARTS, SHARING = "LORS", "start", "A-LORS and S-LORS", "shared and private"
RANKS, TERMS, GROUPS, STAGES, QUERIES = "rank", "terms", "groups", "stages", "queries"
FIRST = ("dense", "lors", "fit")  # with every seed before any other


def resized(table: str, text: str, name: str, terms: Any, share: int, **args: int) -> dict[str, Cell]:
    """A dense detector with other arguments, and LORS on it."""
    steps = (adaptive(terms=terms), static(share=share))
    return {
        f"dense_{name}": Cell(table, f"dense, {text}", args=args),
        f"lors_{name}": Cell(table, f"LORS, {text}", steps, args),
    }


CELLS = {
    "dense": Cell(MAIN, "dense"),
    "lors": Cell(MAIN, "LORS", LORS),
    "fit": Cell(START, "LORS fitted to the trained dense one", FITTED, trained=True),
    "lors_short": Cell(START, "LORS from noise, as long", LORS, short=True),
    "dense_longer": Cell(START, "the trained dense one, as long", trained=True),
    "released": Cell(
        START,
        "LORS from noise as in the code, full schedule",
        (adaptive(generator="zero"), static(shared_init="released")),
    ),
    "adaptive": Cell(PARTS, "A-LORS alone (mixing)", (adaptive(),)),
    "static": Cell(PARTS, "S-LORS alone (projection)", (static(),)),
    "shared": Cell(SHARING, "shared alone", (adaptive(terms=0), static(rank=0))),
    "private": Cell(SHARING, "private alone", (adaptive(shared=False), LOW_RANK)),
    "rank_2": Cell(RANKS, "2", (adaptive(rank=2), static(rank=2))),
    "rank_8": Cell(RANKS, "8", (adaptive(rank=8), static(rank=8))),
    "terms_1": Cell(TERMS, "K = 1, 1, 1", (adaptive(terms=1), static())),
    "terms_3": Cell(TERMS, "K = 3, 3, 3", (adaptive(terms=3), static())),
    "terms_falling": Cell(TERMS, "K = 2, 1, 1", (adaptive(terms=[2, 1, 1]), static())),
    **resized(STAGES, "2 stages", "stages_2", [1, 2], 2, stages=2),
    **resized(STAGES, "4 stages", "stages_4", [1, 1, 2, 2], 4, stages=4),
    **resized(GROUPS, "1 group", "groups_1", [1, 1, 2], 3, groups=1),
    **resized(GROUPS, "4 groups", "groups_4", [1, 1, 2], 3, groups=4),
    **resized(QUERIES, "40 queries", "queries_40", [1, 1, 2], 3, queries=40),
}


def compared_with(name: str) -> str:
    """The cell of the dense detector with the same arguments."""
    return next(other for other, cell in CELLS.items() if cell.dense and cell.args == CELLS[name].args)


def order(names: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """Cells and seeds in the order in which they are run; what another one starts from comes before it."""
    first = [(name, seed) for name in FIRST if name in names for seed in seeds]
    return first + [(name, seed) for seed in seeds for name in names if name not in FIRST]
