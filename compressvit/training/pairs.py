"""Pairing student blocks with teacher blocks, and rejecting pairs that do not match."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compressvit.errors import UserError
from compressvit.files import write_json
from compressvit.model.backbone import Backbone, BlockInfo, describe, model_name
from compressvit.reading import read_json
from compressvit.training.tokens import CLASS, DISTILLATION, Layout, aligned, in_sequence
from compressvit.transforms.record import compression_of

# CKA (student blocks, teacher blocks) of the outputs of the blocks at these paths
Likeness = Callable[[Sequence[str], Sequence[str]], np.ndarray]

NO_PAIRS = "no layer pairs, so relations are not distilled"
TO_HAVE_THEM = "; give distill.layers, pairs or auto, to have them"
Seen = Mapping[str, Mapping[str, Any]]  # what `Taps` recorded


@dataclass(frozen=True)
class LayerPair:
    """A pair of blocks to distil.

    Attributes:
        student, teacher: the blocks.
        layouts: how the tokens that each passes on are arranged.
    """

    student: BlockInfo
    teacher: BlockInfo
    layouts: tuple[Layout, Layout]

    def __str__(self) -> str:
        return f"{self.student.index}↔{self.teacher.index}"

    @property
    def same_tokens(self) -> bool:
        """Whether the two have the same tokens in the same places, so that nothing need be resized or left out."""
        ours, theirs = self.layouts
        return ours == replace(theirs, width=ours.width, prompted=ours.prompted)

    @property
    def attends_alike(self) -> bool:
        """Whether the attention of both goes over the same tokens: of whole images, or of the same windows, to keys as far apart."""
        s, t = self.student, self.teacher
        prompted = [layout.prompted for layout in self.layouts]
        if any(prompted) and not (all(prompted) and self.same_tokens):
            return False
        return bool(s.heads and t.heads and s.key_stride == t.key_stride) and (
            (s.window is None and t.window is None) or (self.same_tokens and (s.window, s.shift) == (t.window, t.shift))
        )

    def beside(self, student: torch.Tensor, teacher: torch.Tensor, asker: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, N, ·) of both blocks, or of their attention, so that those in one place mean the same: see `aligned`."""
        windows = self.student.window is not None and self.teacher.window is not None
        if self.same_tokens and (windows or student.shape[:-1] == teacher.shape[:-1]):
            return student, teacher
        return aligned(student, teacher, *self.layouts, asker)

    def tokens(self, student_taps: Seen, teacher_taps: Seen, asker: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What both blocks pass on, (B, N, C) each, side by side.

        Args:
            student_taps, teacher_taps: what was recorded of each model, by path: {'output': tensor}.
            asker: the key that compares them, for messages.
        """
        student, teacher = student_taps[self.student.path]["output"], teacher_taps[self.teacher.path]["output"]
        ours, theirs = self.layouts
        if self.same_tokens:
            found = in_sequence(student, ours), in_sequence(teacher, theirs)
            if found[0].shape[:2] == found[1].shape[:2]:  # else images are not of the size that a model was built for
                return found
        return aligned(student, teacher, ours, theirs, asker)


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
        The pairs, and a sentence on how they were chosen and what of their tokens is compared. Where blocks are not known, or for 'matched'
        where architectures or depths differ, there are no pairs, and relations are not distilled.

    Raises:
        UserError: a given index does not exist, a pair of one architecture differs in stage or in whether its windows are shifted, or
            blocks are not known.
    """
    ours, theirs = _blocks(student), _blocks(teacher)
    if reason := _unpaired(student, teacher, ours, theirs, layers):
        if isinstance(layers, str):
            paired = ours is not None and theirs is not None and ours.family.in_rows and theirs.family.in_rows
            return [], f"{reason}: {NO_PAIRS}{TO_HAVE_THEM * (layers == 'matched' and paired)}"
        ways = (
            "; remove it to distil the prediction alone"
            if asker == "distill.layers"
            else ", whose blocks have no pairs"
        )
        raise UserError(f"{asker} gives pairs, but {reason}{ways}")
    assert ours is not None, "else there is a reason"
    assert theirs is not None, "else there is a reason"
    if layers == "matched":
        depths = [len(s) for s in ours.stages], [len(s) for s in theirs.stages]
        if depths[0] != depths[1]:
            return [], (
                f"the student has stages of {depths[0]} blocks and the teacher of {depths[1]}: {NO_PAIRS}{TO_HAVE_THEM}"
            )
        indices = tuple((i, i) for i in _group_ends(student, ours))
        unlike = next((i for i, _ in indices if _unlike(ours, theirs, ours.blocks[i], theirs.blocks[i])), None)
        if unlike is not None:
            return [], (
                f"block {unlike} has other tokens in the student than in the teacher (stage or shift of its windows): {NO_PAIRS}; build "
                "both for images and windows of one size to have them"
            )
        how = "the last block of every share group" if compression_of(student).ties else "the last block of every stage"
    elif isinstance(layers, str):
        indices, how = _most_alike(student, ours, theirs, likeness)
    else:
        indices, how = layers, "as given"
    pairs = [_pair(student, teacher, ours, theirs, indices_of_one, asker) for indices_of_one in indices]
    return pairs, "; ".join([how, *_what_is_compared(pairs)])


def _unpaired(
    student: nn.Module,
    teacher: nn.Module,
    ours: Backbone | None,
    theirs: Backbone | None,
    layers: str | tuple[tuple[int, int], ...],
) -> str:
    """Why the blocks of two models have no pairs; empty if they have."""
    if ours is None or theirs is None:
        names = dict.fromkeys(
            model_name(model) for model, known in ((student, ours), (teacher, theirs)) if known is None
        )
        return f"compressvit knows no blocks of {' and '.join(names)}"
    if ours.family is theirs.family:
        without = layers == "matched" and ours.family.attention is None
        return f"compressvit knows no attention of {model_name(student)}" * without
    for model, backbone in ((student, ours), (teacher, theirs)):
        if not backbone.family.in_rows:
            return f"the tokens of {model_name(model)} come in an order of its own, which those of another architecture have not"
    if layers == "matched":
        return f"{model_name(student)} and {model_name(teacher)} are of different architectures"
    return ""


def _what_is_compared(pairs: Sequence[LayerPair]) -> list[str]:
    """In words, what is done so that the tokens of pairs can be compared, and what is not compared."""
    found = []
    layouts = [pair.layouts for pair in pairs]
    unlike = next(((ours, theirs) for ours, theirs in layouts if ours.prefix != theirs.prefix), None)
    if unlike is not None:
        ours, theirs = unlike
        names = [name for name in (CLASS, DISTILLATION) if name in ours.prefix and name in theirs.prefix]
        counts = f"the student has {len(ours.prefix)} and the teacher {len(theirs.prefix)}"
        left = f"but for {' and '.join(names)} tokens, prefix" if names else "prefix"
        found.append(f"{left} tokens are left out, because {counts}")
    if any(ours.grid != theirs.grid for ours, theirs in layouts):
        found.append("where the two have other grids of patches, these are compared on the smaller one")
    apart = [str(pair) for pair in pairs if not pair.attends_alike]
    if apart:
        which = "all pairs" if len(apart) == len(pairs) else ", ".join(apart)
        found.append(f"attention relations of {which} are left out, whose attention is not over the same tokens")
    return found


def _pair(
    student: nn.Module,
    teacher: nn.Module,
    ours: Backbone,
    theirs: Backbone,
    indices: tuple[int, int],
    asker: str,
) -> LayerPair:
    """The pair of two blocks by index; a `UserError` if one does not exist or they do not fit."""
    s, t = indices
    for index, backbone, whose in ((s, ours, "student"), (t, theirs, "teacher")):
        if not 0 <= index < len(backbone.blocks):
            last = len(backbone.blocks) - 1
            near = _nearest_pair(ours, theirs, s, t)
            raise UserError(
                f"{asker}: the pair [{s}, {t}] names block {index} of the {whose}, which has {last + 1} "
                f"(0 to {last}){'; the nearest pair that fits is ' + near if near else ''}"
            )
    mine, other = ours.blocks[s], theirs.blocks[t]
    _refuse_unlike(ours, theirs, mine, other, asker)
    return LayerPair(mine, other, (Layout.of_block(student, ours, mine), Layout.of_block(teacher, theirs, other)))


def _nearest_pair(ours: Backbone, theirs: Backbone, student: int, teacher: int) -> str | None:
    """The valid pair closest to two indices, which need not exist; None if there is none."""
    fitting = [(s.index, t.index) for s in ours.blocks for t in theirs.blocks if not _unlike(ours, theirs, s, t)]
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
        raise UserError(
            f"{kept} is damaged: {error}; remove it and the phase's checkpoints to start the phase again"
        ) from error
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
    fits = np.array([[not _unlike(ours, theirs, s, t) for t in theirs.blocks] for s in candidates])
    return tuple(suggested_pairs(values, candidates, theirs.blocks, fits)), how


def suggested_pairs(
    values: np.ndarray, students: Sequence[BlockInfo], teachers: Sequence[BlockInfo], allowed: np.ndarray
) -> list[tuple[int, int]]:
    """Which teacher block each student block should learn from, by the largest sum of CKA over the pairs.

    Later student blocks learn from later teacher blocks. The best such assignment is found by dynamic programming.

    Args:
        values: CKA (student blocks, teacher blocks).
        students, teachers: the blocks, in order.
        allowed: which of them may be pairs, the same shape.

    Returns:
        Pairs of indices over the whole model; a student block without a matching teacher block has none.
    """
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


def _unlike(ours: Backbone, theirs: Backbone, s: BlockInfo, t: BlockInfo) -> tuple[str, Any, Any] | None:
    """In what two blocks differ, with both values, that must agree where student and teacher are of one architecture: what differs then was
    hardly meant. None where nothing does."""
    family = ours.family
    if family is not theirs.family:
        return None
    things: list[tuple[str, Any, Any]] = [("stage", s.stage, t.stage)]
    whole = s.window == s.resolution or t.window == t.resolution  # where one window is the whole grid, none is shifted
    if any(s.shift) != any(t.shift) and not whole:
        things.append(("window shift", s.shift, t.shift))
    if not family.in_rows:
        things += [("resolution", s.resolution, t.resolution), ("window", s.window, t.window)]
    return next((thing for thing in things if thing[1] != thing[2]), None)


def _blocks(model: nn.Module) -> Backbone | None:
    """The blocks of a model; None for an unsupported model, whose prediction can still be distilled."""
    try:
        return describe(model, "blocks")
    except UserError:
        return None


def _group_ends(student: nn.Module, backbone: Backbone) -> list[int]:
    """Indices of the last block of every share group or, without sharing, of every stage."""
    ends = {stage[-1].index for stage in backbone.stages}
    for names in compression_of(student).ties:
        ends |= {info.index for info in backbone.blocks if names[-1].startswith(f"{info.path}.")}
    return sorted(ends)


def _refuse_unlike(ours: Backbone, theirs: Backbone, s: BlockInfo, t: BlockInfo, asker: str) -> None:
    unlike = _unlike(ours, theirs, s, t)
    if unlike is None:
        return
    like = [c.index for c in theirs.blocks if not _unlike(ours, theirs, s, c)]
    back = [c.index for c in ours.blocks if not _unlike(ours, theirs, c, t)]
    ways = "no teacher block fits it"
    if like:
        nearest = min(like, key=lambda i: abs(i - t.index))
        ways = f"teacher blocks that fit student block {s.index}: {like}, the nearest is [{s.index}, {nearest}]"
    elif back:
        ways += f"; student blocks that fit teacher block {t.index}: {back}"
    else:
        ways += "; build student and teacher for images and windows of the same size"
    what, mine, other = unlike
    raise UserError(
        f"{asker}: the pair [{s.index}, {t.index}] differs in {what}: {mine} in the student, {other} in the teacher, "
        f"so their tokens are not the same; {ways}"
    )
