"""Pairing student blocks with teacher blocks, and rejecting pairs that do not match."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from compressvit.errors import UserError
from compressvit.files import write_json
from compressvit.model.backbone import Backbone, BlockInfo, describe, model_name
from compressvit.reading import read_json
from compressvit.transforms.record import compression_of

# CKA (student blocks, teacher blocks) of the outputs of the blocks at these paths
Likeness = Callable[[Sequence[str], Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class LayerPair:
    """A pair of blocks to distil. Its relations exclude prefix tokens if the two models differ in their number."""

    student: BlockInfo
    teacher: BlockInfo
    student_skip: int = 0
    teacher_skip: int = 0

    def __str__(self) -> str:
        return f"{self.student.index}↔{self.teacher.index}"


def match_layers(
    student: nn.Module,
    teacher: nn.Module,
    layers: str | tuple[tuple[int, int], ...],
    likeness: Likeness | None = None,
    asker: str = "distill.layers",
) -> tuple[list[LayerPair], str]:
    """Resolve `distill.layers`.

    Args:
        student, teacher: timm models, possibly on the meta device.
        layers: pairs of block indices, counted from 0 over the whole model; or 'matched': the last block of every share group (of
            every stage without sharing) and the teacher's block of the same index; or 'auto': the last block of every share group
            (every block without sharing) and the most similar teacher block by `likeness`, in order of depth.
        asker: the name of the key in messages.
        likeness: CKA of blocks; None if there are no values yet, in which case 'auto' pairs blocks by depth.

    Returns:
        The pairs, and a sentence on how they were chosen. If the architectures differ, or for 'matched' depths or tokens, there are no
        pairs, and relations are not distilled.

    Raises:
        UserError: a given index does not exist, or a pair differs in stage, resolution, window or shift.
    """
    ours, theirs = _blocks(student), _blocks(teacher)
    if ours is None or theirs is None or ours.family is not theirs.family:
        return [], _no_pairs(student, teacher, layers, asker)
    if layers == "matched":
        depths = [len(s) for s in ours.stages], [len(s) for s in theirs.stages]
        if depths[0] != depths[1]:
            return [], (
                f"the student has stages of {depths[0]} blocks and the teacher of {depths[1]}: "
                "no layer pairs, so relations are not distilled; give distill.layers to pair them yourself"
            )
        indices = tuple((i, i) for i in _group_ends(student, ours))
        unlike = next((i for i, _ in indices if _place(ours.blocks[i]) != _place(theirs.blocks[i])), None)
        if unlike is not None:
            return [], (
                f"block {unlike} has other tokens in the student than in the teacher (stage, resolution or windows): no layer "
                "pairs, so relations are not distilled; build both for images and windows of one size to have them"
            )
        how = "the last block of every share group" if compression_of(student).ties else "the last block of every stage"
    elif isinstance(layers, str):
        indices, how = _most_alike(student, ours, theirs, likeness)
    else:
        indices, how = layers, "as given"
    if ours.num_prefix_tokens != theirs.num_prefix_tokens:
        counts = f"the student has {ours.num_prefix_tokens} and the teacher {theirs.num_prefix_tokens}"
        how += f"; prefix tokens are left out, because {counts}"
    return [_pair(ours, theirs, s, t, asker) for s, t in indices], how


def _no_pairs(student: nn.Module, teacher: nn.Module, layers: str | tuple[tuple[int, int], ...], asker: str) -> str:
    """Why two models have no pairs, if their blocks cannot be paired; a `UserError` if pairs are given."""
    reason = f"{model_name(student)} and {model_name(teacher)} are of different architectures"
    if _blocks(student) is _blocks(teacher) is None:
        names = dict.fromkeys(map(model_name, (student, teacher)))
        reason = f"compressvit knows no blocks with attention of {' and '.join(names)}"
    if isinstance(layers, str):
        return f"{reason}: no layer pairs, so relations are not distilled"
    ways = "; remove it to distil the prediction alone" if asker == "distill.layers" else ", whose blocks have no pairs"
    raise UserError(f"{asker} gives pairs, but {reason}{ways}")


def _pair(ours: Backbone, theirs: Backbone, student: int, teacher: int, asker: str) -> LayerPair:
    """The pair of two blocks by index; a `UserError` if one does not exist or their tokens differ."""
    for index, backbone, whose in ((student, ours, "student"), (teacher, theirs, "teacher")):
        if not 0 <= index < len(backbone.blocks):
            last = len(backbone.blocks) - 1
            near = _nearest_pair(ours, theirs, student, teacher)
            raise UserError(
                f"{asker}: the pair [{student}, {teacher}] names block {index} of the {whose}, which has {last + 1} "
                f"(0 to {last}){'; the nearest pair that fits is ' + near if near else ''}"
            )
    alike = ours.num_prefix_tokens == theirs.num_prefix_tokens
    skip = (0, 0) if alike else (ours.num_prefix_tokens, theirs.num_prefix_tokens)
    pair = LayerPair(ours.blocks[student], theirs.blocks[teacher], *skip)
    _refuse_unlike(pair, ours.blocks, theirs.blocks, asker)
    return pair


def _nearest_pair(ours: Backbone, theirs: Backbone, student: int, teacher: int) -> str | None:
    """The valid pair (with the same tokens) closest to two indices, which need not exist; None if there is none."""
    fitting = [(s.index, t.index) for s in ours.blocks for t in theirs.blocks if _place(s) == _place(t)]
    if not fitting:
        return None
    _, nearest = min((abs(s - student) + abs(t - teacher), [s, t]) for s, t in fitting)
    return str(nearest)


def match_layers_once(
    student: nn.Module,
    teacher: nn.Module,
    layers: str | tuple[tuple[int, int], ...],
    likeness: Likeness,
    kept: Path,
) -> tuple[list[LayerPair], str]:
    """`match_layers` for a phase that may be resumed: the pairs that 'auto' chose at its start are stored in a file and reused.

    Raises:
        UserError: as `match_layers`, or the file is damaged.
    """
    if layers != "auto":
        return match_layers(student, teacher, layers)
    if not kept.is_file():
        pairs, how = match_layers(student, teacher, layers, likeness)
        write_json(kept, [[p.student.index, p.teacher.index] for p in pairs])
        return pairs, how
    try:
        before = tuple((int(s), int(t)) for s, t in read_json(kept))
    except (TypeError, ValueError) as error:
        raise UserError(f"{kept} is damaged: {error}; remove it and its checkpoint to start the phase again") from error
    pairs = match_layers(student, teacher, before)[0] if before else []
    return pairs, "auto: as when the phase began"


def _most_alike(
    student: nn.Module, ours: Backbone, theirs: Backbone, likeness: Likeness | None
) -> tuple[tuple[tuple[int, int], ...], str]:
    """The pairs of 'auto': each candidate block of the student with its most similar teacher block, preserving the order."""
    shared = bool(compression_of(student).ties)
    candidates = [ours.blocks[i] for i in _group_ends(student, ours)] if shared else list(ours.blocks)
    mine = np.array([(b.index + 1) / len(ours.blocks) for b in candidates])
    others = np.array([(b.index + 1) / len(theirs.blocks) for b in theirs.blocks])
    near = 1 - abs(mine[:, None] - others[None, :])  # by relative depth
    if likeness is None:  # so that plan and run have a similar number of pairs
        values = near
        how = "auto: the most similar by CKA, measured when the phase begins; by depth until then"
    else:
        # CKA of neighbouring blocks often differs by less than 0.01, which a few hundred images cannot resolve
        values = likeness([b.path for b in candidates], [b.path for b in theirs.blocks]) + 0.01 * near
        how = "auto: the most similar by CKA"
    return tuple(suggested_pairs(values, candidates, theirs.blocks)), how


def suggested_pairs(
    values: np.ndarray, students: Sequence[BlockInfo], teachers: Sequence[BlockInfo]
) -> list[tuple[int, int]]:
    """Which teacher block each student block should learn from, by the largest sum of CKA over the pairs.

    The blocks of a pair must agree in stage, resolution, window and window shift, and later student blocks learn from later teacher blocks.
    The best such assignment is found by dynamic programming.

    Args:
        values: CKA (student blocks, teacher blocks).
        students, teachers: the blocks, in order.

    Returns:
        Pairs of indices over the whole model; a student block without a matching teacher block has none.
    """
    allowed = np.array([[_place(s) == _place(t) for t in teachers] for s in students])
    # Unbiased CKA of dissimilar blocks may be negative, and a valid pair is still better than none.
    gain = np.where(allowed, values - min(values.min(), 0.0) + 1e-6, -np.inf)
    rows, columns = gain.shape
    # best[i, j]: the largest sum for student blocks i.. and teacher blocks j..
    best = np.zeros((rows + 1, columns + 1))
    for i in range(rows - 1, -1, -1):
        for j in range(columns - 1, -1, -1):
            best[i, j] = max(best[i + 1, j], best[i, j + 1], gain[i, j] + best[i + 1, j + 1])
    pairs, i, j = [], 0, 0
    while i < rows and j < columns:
        if best[i, j] == gain[i, j] + best[i + 1, j + 1]:
            pairs.append((students[i].index, teachers[j].index))
            i, j = i + 1, j + 1
        elif best[i, j] == best[i, j + 1]:
            j += 1
        else:
            i += 1
    return pairs


def _place(block: BlockInfo) -> tuple:
    """The properties in which two blocks of a pair must agree, so that their tokens correspond."""
    return block.stage, block.resolution, block.window, block.shift


def _blocks(model: nn.Module) -> Backbone | None:
    """The blocks of a model; None for an unsupported model, whose prediction can still be distilled."""
    try:
        return describe(model, "attention")
    except UserError:
        return None


def _group_ends(student: nn.Module, backbone: Backbone) -> list[int]:
    """Indices of the last block of every share group or, without sharing, of every stage."""
    ends = {stage[-1].index for stage in backbone.stages}
    for names in compression_of(student).ties:
        ends |= {info.index for info in backbone.blocks if names[-1].startswith(f"{info.path}.")}
    return sorted(ends)


def _refuse_unlike(
    pair: LayerPair, students: tuple[BlockInfo, ...], teachers: tuple[BlockInfo, ...], asker: str
) -> None:
    s, t = pair.student, pair.teacher
    for what, ours, theirs in (
        ("stage", s.stage, t.stage),
        ("resolution", s.resolution, t.resolution),
        ("window", s.window, t.window),
        ("window shift", s.shift, t.shift),
    ):
        if ours != theirs:
            like = [c.index for c in teachers if _place(c) == _place(s)]
            back = [c.index for c in students if _place(c) == _place(t)]
            ways = "no teacher block fits it"
            if like:
                nearest = min(like, key=lambda i: abs(i - t.index))
                ways = f"teacher blocks that fit student block {s.index}: {like}, the nearest is [{s.index}, {nearest}]"
            elif back:
                ways += f"; student blocks that fit teacher block {t.index}: {back}"
            else:
                ways += "; build student and teacher for images and windows of the same size"
            raise UserError(
                f"{asker}: the pair [{s.index}, {t.index}] differs in {what}: {ours} in the student, {theirs} in the teacher, "
                f"so their tokens are not the same; {ways}"
            )
