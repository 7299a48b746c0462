"""Two families of backbones that nothing in the package knows: one with attention over a sequence of tokens, one without attention.

Their blocks have other names than timm's, and their models what the contract uses of timm's interface.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models import register_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from compressvit.model.family import FAMILIES, BlockInfo, Branch, Example, Family, family

PATCH, SIDE = 4, 2  # an image of 8 × 8 pixels is 2 × 2 tokens


class ToyAttention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).reshape(batch, tokens, width))


class ToyMlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x).relu())


class ToyBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.before_attn, self.attn = nn.LayerNorm(width), ToyAttention(width, 2)
        self.before_mlp, self.mlp = nn.LayerNorm(width), ToyMlp(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.before_attn(x))
        return x + self.mlp(self.before_mlp(x))


class ToyMixerBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mix, self.before_mlp, self.mlp = nn.Linear(SIDE**2, SIDE**2), nn.LayerNorm(width), ToyMlp(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(x.mT).mT
        return x + self.mlp(self.before_mlp(x))


class Toy(nn.Module):
    block: Any = ToyBlock
    architecture = "toy_net"

    def __init__(self, width: int = 8, depth: int = 2, num_classes: int = 3):
        super().__init__()
        self.num_classes, self.width, self.checkpointing = num_classes, width, False
        self.pretrained_cfg = {"architecture": self.architecture, "input_size": (3, PATCH * SIDE, PATCH * SIDE)}
        self.stem = nn.Conv2d(3, width, PATCH, PATCH)
        self.trunk = nn.Sequential(*(self.block(width) for _ in range(depth)))
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes, self.head = num_classes, nn.Linear(self.width, num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.checkpointing = enable

    def forward_intermediates(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x, found = self.stem(x).flatten(2).mT, []
        for block in self.trunk:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
            found.append(x)
        return x, found

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_intermediates(x)[0]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x.mean(1) if pre_logits else self.head(x.mean(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class ToyMixer(Toy):
    block = ToyMixerBlock
    architecture = "toy_mixer"


class _OfBlocks(Family):
    """`trunk.I`."""

    def blocks(self, model):
        for i, block in enumerate(model.trunk):
            heads = block.attn.num_heads if self.attention else 0
            yield BlockInfo(f"trunk.{i}", i, 0, model.width, heads, (SIDE, SIDE))

    def patch_size(self, model):
        return PATCH, PATCH


def register_families() -> None:
    """Everything that such families need: a file with the first, and one with the second."""

    @family("toy")
    class ToyFamily(_OfBlocks):
        title, supports, models = "Toy", ("Toy (toy_*)",), (Toy,)
        block, attention = ToyBlock, ToyAttention
        prompts = "sequence"
        branches = {"attn.proj": Branch("before_attn", "attn", ""), "mlp.fc2": Branch("before_mlp", "mlp", "")}  # noqa: RUF012
        examples = {"toy": Example("toy_net", {"width": 12})}  # noqa: RUF012

    @family("toy_mixer")
    class ToyMixerFamily(_OfBlocks):
        title, supports, models = "Toy mixer", ("ToyMixer (toy_mixer)",), (ToyMixer,)
        block = ToyMixerBlock
        branches = {"mlp.fc2": Branch("before_mlp", "mlp", "")}  # noqa: RUF012
        examples = {"toy_mixer": Example("toy_mixer", {"width": 12})}  # noqa: RUF012


def install(patch: pytest.MonkeyPatch) -> None:
    """Register the families, and models that timm builds by name; with the patch undone, all are forgotten."""
    tables = timm.models._registry
    for name in ("_model_to_module", "_model_entrypoints", "_module_to_models"):
        patch.setattr(tables, name, getattr(tables, name).copy())

    def toy_net(pretrained: bool = False, **kwargs) -> Toy:
        return Toy(**{k: v for k, v in kwargs.items() if k in ("width", "depth", "num_classes")})

    def toy_mixer(pretrained: bool = False, **kwargs) -> ToyMixer:
        return ToyMixer(**{k: v for k, v in kwargs.items() if k in ("width", "depth", "num_classes")})

    for build in (toy_net, toy_mixer):
        register_model(build)
    len(FAMILIES)  # found, so that what is added below can be taken out again
    for table in ("_entries", "_modules"):
        patch.setattr(FAMILIES, table, dict(getattr(FAMILIES, table)))
    register_families()
