"""The cells of `shrink_dinov2.py`: how students of one teacher are made, and in which tables they stand."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

from compressvit import LowRank, Narrow, Shrink
from compressvit.transforms import Transform

HALF = {"parameters": 0.5}
USUAL = 1024  # crops, as `compressvit shrink` takes where nothing else is said
SOME = 640  # of the tables that compare methods
TOKENS = 48  # of each crop that are summed up, as `compressvit shrink` does
TOGETHER = "Everything together"
METHODS = "One method, and pairs"
PEERS = "Peers"
TABLES = {
    TOGETHER: "Everything together, within a share of the parameters and the same share of the MACs",
    METHODS: "Each method alone, and in pairs, within half of the parameters",
    PEERS: "Others, within half of the parameters, none of them trained afterwards",
}


@dataclass(frozen=True)
class Cell:
    """A row of a table.

    Attributes:
        table: in which it stands.
        text: what the row says.
        step: the transform; None for a peer.
        peer: the name of its function in `shrink_peers.PEERS`.
        crops: for the fit; None for all there are.
        seed: which crops are drawn, and in which order they are seen.
        tokens: of each crop that are summed up besides its prefix tokens; None for all.
        smallest: the smallest student of a method that does not reach the budget.
        also: a further table in which it stands.
    """

    table: str
    text: str
    step: Transform | None = None
    peer: str | None = None
    crops: int | None = SOME
    seed: int = 0
    tokens: int | None = TOKENS
    smallest: Transform | None = None
    also: str | None = None


def _together(share: float, text: str, **options: Any) -> Cell:
    step = Shrink(budget={"parameters": share, "macs": share})
    return Cell(TOGETHER, f"{share:.0%}{text}", step, **{"crops": USUAL, **options})


def _fast(batch: int) -> Cell:
    """Half of the parameters and MACs, and as good as half of the time of so many images."""
    step = Shrink(budget={"parameters": 0.5, "macs": 0.5, "latency": 0.55}, batch=batch)
    return Cell(TOGETHER, f"50%, and 55% of the latency, {batch} image{'s' * (batch > 1)}", step, crops=USUAL)


def _of_methods(*methods: str, **options: Any) -> Cell:
    """One or two methods of `shrink` at half of the parameters."""
    text = " and ".join("rank, pivoted" if name == "rank" else name for name in methods)
    return Cell(METHODS, text, Shrink(budget=HALF, methods=methods), smallest=SMALLEST.get(methods), **options)


# The least that `shrink` offers of heads, with which a ViT keeps more than half of its parameters: an eighth of their dimensions, or
# a third of six of them.
SMALLEST: dict[tuple[str, ...], Transform] = {
    ("head_dim",): Narrow(head_dim=1 / 8),
    ("heads",): Narrow(heads=1 / 3),
    ("head_dim", "heads"): Narrow(head_dim=1 / 8),
}
WORDS = ("neurons", "head_dim", "heads", "rank")

CELLS: dict[str, Cell] = {
    "all_75": _together(0.75, ""),
    "all_50": _together(0.5, ""),
    "all_30": _together(0.3, ""),
    "all_50_seed_1": _together(0.5, ", other crops (seed 1)", seed=1),
    "all_50_seed_2": _together(0.5, ", other crops (seed 2)", seed=2),
    "all_50_160": _together(0.5, "", crops=160),
    "all_50_640": _together(0.5, "", crops=SOME),
    "all_50_whole": _together(0.5, "", crops=None),
    **{f"all_50_fast_{batch}": _fast(batch) for batch in (1, 16)},
    "half_640": Cell(METHODS, "everything together", Shrink(budget=HALF), also=PEERS),
    **{name: _of_methods(name) for name in WORDS},
    "rank_two_factors": Cell(METHODS, "rank, two factors", Shrink(budget=HALF, methods=("rank",), pivoted=False)),
    **{"_".join(pair): _of_methods(*pair) for pair in combinations(WORDS, 2)},
    "plain_svd": Cell(
        PEERS,
        "SVD of the weights",
        LowRank(budget=HALF, metric="weights", pivoted=False, sequential=False),
        tokens=None,
    ),
    "whitened_svd": Cell(
        PEERS,
        "whitened SVD, layer by layer",
        LowRank(budget=HALF, metric="inputs", pivoted=False, sequential=False),
        tokens=None,
    ),
    "low_rank": Cell(
        PEERS, "`low_rank`, two factors, fitted in order", LowRank(budget=HALF, pivoted=False), tokens=None
    ),
    "variance": Cell(PEERS, "neurons by variance, their mean folded into the bias (VBP)", peer="variance"),
    "magnitude": Cell(PEERS, "neurons by magnitude, no compensation", peer="magnitude"),
    "torch_pruning_magnitude": Cell(PEERS, "Torch-Pruning, magnitude", peer="torch_pruning_magnitude"),
    "torch_pruning_taylor": Cell(PEERS, "Torch-Pruning, Taylor", peer="torch_pruning_taylor"),
}


def in_table(name: str) -> list[str]:
    """The cells of a table, in its order."""
    return [key for key, cell in CELLS.items() if name in (cell.table, cell.also)]
