"""The first convolution of a checkpoint, for images with another number of channels."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import nn

from compressvit.model.modules import as_timm
from compressvit.notes import Note


def adapted_channels(tensors: dict[str, torch.Tensor], model: nn.Module) -> tuple[dict[str, torch.Tensor], list[Note]]:
    """Weights of three channels for a model of another number, as timm's own `pretrained` makes them, and a note on it.

    For one channel the three are summed; for more they are repeated in turn, and scaled by three in their number (gray pictures then give
    what they gave where it is a multiple of three, and nearly so elsewhere).
    """
    from timm.models import adapt_input_conv  # reading a recipe does not need timm

    own = model.state_dict()
    said = (getattr(as_timm(model), "pretrained_cfg", None) or {}).get("first_conv") or ()
    for path in (said,) if isinstance(said, str) else said:
        name = f"{path}.weight"
        if name not in tensors or name not in own or tensors[name].ndim != 4 or tensors[name].shape[1] != 3:
            continue
        channels = own[name].shape[1]
        with suppress(NotImplementedError):  # then its shape is refused
            made = adapt_input_conv(channels, tensors[name])
            if made.shape != tensors[name].shape and made.shape == own[name].shape:
                how = "summed to 1" if channels == 1 else f"repeated in turn to {channels}, and scaled by 3/{channels}"
                text = f"the 3 channels of {name} were {how}, as timm does for in_chans={channels}"
                return {**tensors, name: made}, [Note("channels", 1, text)]
    return tensors, []
