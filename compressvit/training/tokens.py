"""How the tokens of a model are arranged, and how those of a student and of a teacher come to stand beside each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from compressvit.errors import UserError
from compressvit.model.backbone import Backbone, family_of
from compressvit.model.family import BlockInfo

CLASS, DISTILLATION, REGISTER = "class", "distillation", "register"


@dataclass(frozen=True)
class Layout:
    """The arrangement of features, or of what a block passes on.

    Attributes:
        width: of a token.
        prefix: what the tokens before the patches are, in their order.
        grid: height and width of the patches; None where they come as a map (B, height, width, width of a token), or where the model does
            not say, in which case they are taken for a square.
        channels_first: whether a map is (B, width of a token, height, width).
        prompts: whether prompts (`vpt` that is not deep) stand among the tokens.
        prompted: whether attention has prompts among its tokens.
    """

    width: int
    prefix: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None
    channels_first: bool = False
    prompts: bool = False
    prompted: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Layout | None:
        """That of a timm model of image classification; None where it is not known."""
        width, count = getattr(model, "num_features", None), getattr(model, "num_prefix_tokens", 0)
        if not isinstance(width, int):
            return None
        names = [CLASS] * (getattr(model, "cls_token", None) is not None)
        names += [DISTILLATION] * (getattr(model, "dist_token", None) is not None)
        prefix = (*names, *[REGISTER] * (count - len(names)))
        if len(prefix) != count:
            return None
        family, grid = family_of(model), getattr(getattr(model, "patch_embed", None), "grid_size", None)
        if family is not None and family.layout != "sequence":  # that of its first stage
            grid = None
        elif family is not None and grid is None:  # of stages that make tokens of tokens
            grid = [*family.blocks(model)][-1].resolution
        return cls(width, prefix, None if grid is None else (int(grid[0]), int(grid[1])))

    @classmethod
    def of_block(cls, model: nn.Module, backbone: Backbone, block: BlockInfo) -> Layout:
        """That of what a block passes on."""
        whole, count = cls.of(model), block.prefix_tokens
        known = whole.prefix if whole is not None and len(whole.prefix) == count else (REGISTER,) * count
        first = backbone.family.layout == "channels_first"
        prompted = any(path.rpartition(".")[2].startswith("vpt_") for path, _ in model.named_modules())
        return cls(block.width, known, block.resolution, first, hasattr(model, "vpt_drop"), prompted)

    def patches(self, tokens: torch.Tensor, asker: str = "losses.feature") -> torch.Tensor:
        """Of tokens (B, N, C), or of a map, the map (B, h, w, C) of the patches.

        Args:
            asker: the key that compares them, for messages.

        Raises:
            UserError: their number is not that of a grid of the model's shape, or prompts stand among them.
        """
        way = f"set {asker}.weight=0" if asker.startswith("losses.") else f"leave {asker} out"
        if self.prompts:
            raise UserError(
                f"{asker}: prompts (vpt) stand among the tokens of a model, and those of the other have other places; {way}, or give the "
                "prompts deep: true, so that they leave every block"
            )
        if tokens.ndim == 4:
            return tokens.movedim(1, -1) if self.channels_first else tokens
        count = tokens.shape[1] - len(self.prefix)
        height, width = self.grid or (1, 1)
        if height * width != count:  # of another image size: a grid of the same shape
            height = round((count * height / width) ** 0.5)
            width = count // max(height, 1)
        if height * width != count:
            shape = _by(self.grid) if self.grid else "of a square"
            raise UserError(
                f"{asker}: {count} patches are no grid of the shape {shape}, and the model does not say how else they lie; {way}"
            )
        return tokens[:, len(self.prefix) :].unflatten(1, (height, width))

    def image(self, tokens: torch.Tensor) -> torch.Tensor:
        """What stands for the whole image, (B, C): the class token, or where there is none the mean of the patches."""
        if CLASS in self.prefix:
            return tokens[:, self.prefix.index(CLASS)]
        return self.patches(tokens).mean(dim=(1, 2))

    def before(self, tokens: torch.Tensor, other: Layout) -> torch.Tensor | None:
        """The tokens that are compared with those of another model besides the patches, (B, n, C): all that stand before them, where the
        other has the same; else what stands for the image; None where neither has a class token."""
        if self.prefix == other.prefix:
            return tokens[:, : len(self.prefix)] if self.prefix else None
        return self.image(tokens)[:, None] if CLASS in (*self.prefix, *other.prefix) else None

    def shared_prefix(self, other: Layout) -> tuple[list[int], list[int]]:
        """The places, here and in another model, of the tokens before the patches that mean the same in both: all of them where both have
        the same; else class and distillation tokens, since registers mean nothing by themselves."""
        if self.prefix == other.prefix:
            places = list(range(len(self.prefix)))
            return places, places
        names = [name for name in (CLASS, DISTILLATION) if name in self.prefix and name in other.prefix]
        return [self.prefix.index(name) for name in names], [other.prefix.index(name) for name in names]


def aligned(
    student: torch.Tensor, teacher: torch.Tensor, ours: Layout, theirs: Layout, asker: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, N, ·) of student and teacher, of which those in one place mean the same: first the tokens before the patches that both
    have, then the patches, on the smaller of the two grids along each side.

    Args:
        student, teacher: tokens (B, N, C) or maps, as `ours` and `theirs` say; widths may differ.
        asker: the key that compares them, for messages.

    Raises:
        UserError: see `Layout.patches`.
    """
    maps = ours.patches(student, asker), theirs.patches(teacher, asker)
    size = min(maps[0].shape[1], maps[1].shape[1]), min(maps[0].shape[2], maps[1].shape[2])
    found = []
    for whole, patches, places in zip((student, teacher), maps, ours.shared_prefix(theirs), strict=True):
        flat = resized(patches, size).flatten(1, 2)
        found.append(torch.cat([whole[:, places], flat], dim=1) if places else flat)
    return found[0], found[1]


def in_sequence(tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Tokens (B, N, C) as they are, or those of a map row by row."""
    if tokens.ndim == 3:
        return tokens
    return (tokens.movedim(1, -1) if layout.channels_first else tokens).flatten(1, 2)


def resized(patches: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A map (B, h, w, C) at another size, bilinear with antialiasing, as images are made smaller."""
    if tuple(patches.shape[1:3]) == size:
        return patches
    whole = patches.movedim(-1, 1).float()
    return F.interpolate(whole, size, mode="bilinear", antialias=True).movedim(1, -1).to(patches.dtype)


def differences(student: Layout, teacher: Layout) -> str:
    """In words, what is done so that the two can be compared; empty where they are alike."""
    found = []
    if student.width != teacher.width:
        found.append(
            f"a projection {student.width} → {teacher.width} is trained with the student and dropped at the end"
        )
    if not (student.grid and teacher.grid):
        found.append("where its map of patches has another size, the teacher's is resized to the student's")
    elif student.grid != teacher.grid:
        found.append(f"the teacher's {_by(teacher.grid)} patches are resized to {_by(student.grid)}")
    if student.prefix != teacher.prefix:
        if (CLASS in student.prefix) != (CLASS in teacher.prefix):
            found.append("the mean of the patches stands for the class token that one of them lacks")
        if left := sorted({*student.prefix, *teacher.prefix} - {CLASS}):
            found.append(f"{' and '.join(left)} tokens are left out, because the two have others")
    return "; ".join(found)


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]}×{grid[1]}"
