"""Position embeddings and tables of a checkpoint, as the model that takes it needs them."""

from __future__ import annotations

import math

import torch
from torch import nn

from compressvit.errors import UserError
from compressvit.model.backbone import family_of, model_name
from compressvit.notes import Note


def resample_positions(tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """timm's own conversion of a checkpoint for this model: position tables to its grid, original names to timm's."""
    family = family_of(model)
    if family is None:
        return tensors
    try:
        return family.convert(dict(tensors), model)
    except Exception as error:  # timm looks shapes up as it goes: a file of another architecture fails in any way
        raise UserError(
            f"the weights do not fit {model_name(model)}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. "
            "Check model and args against what the file was made with"
        ) from error


def resampled_note(given: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], model: nn.Module) -> list[Note]:
    """A note where position tables of a file, which are for images of another size, became those of the model's token grid."""
    own = model.state_dict()
    names = [
        name
        for name, tensor in given.items()
        if name in own and name in tensors and tensor.shape != tensors[name].shape == own[name].shape and "pos" in name
    ]
    if not names:
        return []
    what = "a position table was" if len(names) == 1 else f"{len(names)} position tables were"
    text = (
        f"{what} resampled to the model's token grid, first {names[0]}{shapes_text(names[0], given, own)}, because the file's model is for "
        f"images of another size; {_size_of(given[names[0]], model) or 'img_size'} in its arguments (`--img-size` of shrink) keeps that"
    )
    return [Note("positions", len(names), text)]


def _size_of(table: torch.Tensor, model: nn.Module) -> str:
    """For square images of a ViT with this position embedding (1, tokens, channels), the argument that sets their size; else empty."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if table.ndim != 3 or patch is None or len(set(patch)) != 1:
        return ""
    tokens = table.shape[1] - (0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 0))
    side = math.isqrt(max(0, tokens))
    return f"img_size={side * patch[0]}" if side**2 == tokens else ""


def shapes_text(
    name: str,
    given: dict[str, torch.Tensor],
    own: dict[str, torch.Tensor],
    whose: tuple[str, str] = ("file", "model"),
) -> str:
    """The shapes of a tensor in both, as ' (file (1, 257, 384), model (1, 1370, 384))'."""
    shapes = [f"{what} {tuple(t[name].shape)}" for what, t in zip(whose, (given, own), strict=True) if name in t]
    return f" ({', '.join(shapes)})"
