"""How far a student has drifted from its teacher, block by block: outputs, attention maps, and the relations that MiniViT distils."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import nn

from compressvit.charts.findings import Finding
from compressvit.data.input import Side
from compressvit.diagnostics.base import Context, MeasuredOnImages, diagnostic
from compressvit.diagnostics.features import Batches, block_paths, regrouped, require_finite
from compressvit.errors import UserError
from compressvit.model.family import BlockInfo
from compressvit.model.modes import evaluating
from compressvit.model.taps import Tap, Taps, qkv_taps, tapped_qkv
from compressvit.training import losses
from compressvit.training.pairs import LayerPair, Seen, match_layers
from compressvit.training.spec import Training

MEASURES = {
    "cosine": "1 − cosine of the tokens",
    "error": "error of the tokens, relative",
    "attention_kl": "KL of the attention maps (nats)",
    "attention_relation_kl": "KL of the q, k, v relations (nats)",
    "hidden_relation": "hidden relation",
}


@torch.no_grad()
def drift(
    student: Side,
    teacher: Side,
    pairs: Sequence[LayerPair],
    batches: Batches,
    device: torch.device,
    *,
    images: int = 256,
    batch_size: int = 32,
) -> list[dict[str, float]]:
    """Measure every pair of blocks on the same images.

    Args:
        pairs: from `compressvit.training.pairs.match_layers`, e.g. every block with the teacher's block of the same index.
        batches: returns batches of images (B, C, H, W), normalised for the student.

    Returns:
        For every pair, the means over images of the keys of `MEASURES`, over the tokens that both have (`LayerPair.tokens`). Measures that
        are undefined for a pair are omitted: cosine and error for different widths, those of attention if it is not over the same tokens,
        and comparisons of tokens if one of the blocks has prompts among them.
        `attention_kl` is KL(teacher ‖ student) of the rows of attention maps, mean over rows and heads (of the mean map if the numbers of
        heads differ); mixed probabilities can be negative, and are clamped to 0 and renormalised. `hidden_relation` includes the loss's
        factor of 49.

    Raises:
        UserError: there are no images, or features are not finite; the message names the first such block.
    """
    sums: list[dict[str, float]] = [{} for _ in pairs]
    norms = [[0.0, 0.0] for _ in pairs]
    convert = teacher.converter(student.input)
    seen = 0
    with (
        _tapped(student.model, [p.student for p in pairs], device) as ours,
        _tapped(teacher.model, [p.teacher for p in pairs], device) as theirs,
    ):
        for batch in regrouped(batches(), images, batch_size):
            batch = batch.to(device)
            student.model(batch)
            teacher.model(convert(batch))
            mine, other = ours.pop(), theirs.pop()
            for pair, total, norm in zip(pairs, sums, norms, strict=True):
                for name, value in _measure(pair, mine, other, norm).items():
                    total[name] = total.get(name, 0.0) + value * len(batch)
            seen += len(batch)
    if not seen:
        raise UserError("drift needs images, and none were given")
    found = []
    for total, (difference, size) in zip(sums, norms, strict=True):
        means = {name: value / seen for name, value in total.items()}
        if size:
            means["error"] = (difference / size) ** 0.5
        found.append(means)
    if not any(found):
        raise UserError(
            "drift has nothing to compare: the blocks of the two models differ in the number of tokens and in width"
        )
    return found


def _measure(pair: LayerPair, mine: Seen, other: Seen, norm: list[float]) -> dict[str, float]:
    """The measures of a pair in one forward pass, but for the error, of which the squares are added to `norm`."""
    values: dict[str, float] = {}
    for seen, block in ((mine, pair.student), (other, pair.teacher)):
        require_finite(block.path, seen[block.path]["output"])
    if any(layout.prompts for layout in pair.layouts):
        return values
    if pair.attends_alike:
        projections = zip(tapped_qkv(mine, pair.student), tapped_qkv(other, pair.teacher), strict=True)
        both = [pair.beside(s.float(), t.float(), "drift") for s, t in projections]
        if both[0][0].shape[:2] == both[0][1].shape[:2]:  # prompts lengthen sequences
            relation = losses.attention_relation([s for s, _ in both], [t for _, t in both], with_kl=True)
            values["attention_relation_kl"] = relation[1].item()
            if (maps := _maps(pair, mine, other)) is not None:
                values["attention_kl"] = _kl(*maps)
    s, t = (x.float() for x in pair.tokens(mine, other, "drift"))
    if s.shape[:2] == t.shape[:2]:
        values["hidden_relation"] = losses.hidden_relation(s, t).item()
    if s.shape == t.shape:
        values["cosine"] = losses.feature(s, t).item()
        norm[0] += (s - t).square().sum().item()
        norm[1] += t.square().sum().item()
    return values


def _maps(pair: LayerPair, mine: Seen, other: Seen) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The attention maps (B, H, N, N) of a pair over the tokens that both have; None where their patches are others, or of attention
    without dropout, where they cannot be seen."""
    ours, theirs = pair.layouts
    if ours.grid != theirs.grid:
        return None
    found = []
    for seen, block, own, other_layout in ((mine, pair.student, ours, theirs), (other, pair.teacher, theirs, ours)):
        given = seen.get(f"{block.path}.attn.attn_drop")
        if given is None:
            return None
        whole: torch.Tensor = given["input"][0] if isinstance(given["input"], tuple) else given["input"]
        if not pair.same_tokens:
            places = torch.tensor([*own.shared_prefix(other_layout)[0], *range(len(own.prefix), whole.shape[-1])])
            whole = whole[..., places, :][..., places]
        positive = whole.float().clamp(min=0)
        found.append(positive / positive.sum(-1, keepdim=True).clamp(min=1e-12))
    return found[0], found[1]


def _kl(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.shape != theirs.shape:
        ours, theirs = ours.mean(1), theirs.mean(1)
    tiny = 1e-8  # a student probability of 0 would make the KL infinite
    row = theirs * ((theirs + tiny).log() - (ours + tiny).log())
    return row.sum(-1).mean().item()


@contextmanager
def _tapped(model: nn.Module, blocks: Sequence[BlockInfo], device: torch.device) -> Iterator[Taps]:
    """Tap the blocks, their projections and their attention maps; timm's fused attention is disabled meanwhile."""
    fused = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    wanted: list[Tap] = []
    for block in dict.fromkeys(blocks):
        wanted.append((block.path, "output"))
        if not block.heads:
            continue
        wanted += qkv_taps(block)
        if hasattr(model.get_submodule(f"{block.path}.attn"), "attn_drop"):
            wanted.append((f"{block.path}.attn.attn_drop", "input"))
    taps = Taps(model.to(device), wanted)
    for module in fused:
        vars(module)["fused_attn"] = False
    try:
        with evaluating(model):
            yield taps
    finally:
        taps.close()
        for module in fused:
            vars(module)["fused_attn"] = True


def drift_finding(found: Sequence[dict[str, float]], pairs: Sequence[LayerPair], when: str = "") -> Finding:
    """A chart with one panel per measure, one point per block, and one line per `when`."""
    records = [
        {
            "when": when,
            "block": pair.student.index,
            "teacher_block": pair.teacher.index,
            "measure": MEASURES[name],
            "value": means[name],
        }
        for name in MEASURES
        for pair, means in zip(pairs, found, strict=True)
        if name in means
    ]
    return Finding(
        "drift",
        "Drift from the teacher, block by block",
        "Difference between every block of the student and the teacher's: 0 is identical. Errors that grow with depth accumulate from "
        "block to block; a jump marks the block that lost most. Attention maps are compared row by row.",
        "lines",
        records,
        {
            "x": "block",
            "y": "value",
            "colour": "when",
            "facet": "measure",
            "titles": {"block": "block of the student", "value": "", "when": ""},
        },
    )


@diagnostic("drift")
class Drift(MeasuredOnImages):
    """How far every block of the student is from the teacher's: tokens, attention maps, relations."""

    needs_teacher = True

    images: int = Field(256, ge=1, description="Evaluation images, evenly spaced over the set.")
    batch_size: int = Field(32, ge=1, description="Images whose features are in memory at once.")
    layers: tuple[tuple[int, int], ...] | None = Field(
        None,
        description="Pairs [student block, teacher block]; null pairs every block with the one of the same index, which "
        "needs models of the same depth.",
    )

    def refuse(self, phase: Training, student: Side, teacher: Side | None) -> None:
        if teacher is not None:
            self._pairs(student.model, teacher.model)

    def _pairs(self, student: nn.Module, teacher: nn.Module) -> list[LayerPair]:
        layers = self.layers or tuple((i, i) for i in range(len(block_paths(student))))
        return match_layers(student, teacher, layers, asker="drift.layers")[0]

    def measure(self, context: Context) -> list[Finding]:
        assert context.teacher is not None, "needs_teacher"
        pairs = self._pairs(context.student.model, context.teacher.model)
        found = drift(
            context.student,
            context.teacher,
            pairs,
            lambda: context.images(self.images),
            context.device,
            images=self.images,
            batch_size=self.batch_size,
        )
        return [drift_finding(found, pairs, context.when)]
