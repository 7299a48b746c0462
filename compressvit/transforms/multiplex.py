"""MiniViT weight multiplexing: consecutive blocks share attention and MLP, with small private transforms.

Paper: MiniViT: Compressing Vision Transformers with Weight Multiplexing, CVPR 2022, https://arxiv.org/abs/2204.07154

Shared inside a group of k consecutive blocks of one stage: every attention and MLP tensor, Swin's position table included.
Private to each block: both LayerNorms, LayerScale, drop path, Swin's shift and mask, and
- two H×H mixes of the attention maps across heads, one on the logits and one on the probabilities (eq. 5–6);
- a depth-wise K×K convolution on the token grid before the MLP, after its own LayerNorm (eq. 7).

Sharing cuts parameters and disk. It does not cut MACs: every block still runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, cast

import torch
from einops import rearrange
from pydantic import Field, field_validator
from torch import nn
from torch.fx import wrap

from compressvit.errors import UserError
from compressvit.fitting.lowrank import TINY
from compressvit.fitting.reference import Reference
from compressvit.model import surgery, ties
from compressvit.model.backbone import Backbone, class_in_timm, describe, share_groups
from compressvit.model.family import BlockInfo, Need
from compressvit.model.mixing import eager_on_cpu
from compressvit.model.modules import as_timm, module_at
from compressvit.transforms.base import LedgerEntry, Plan, Transform, transform
from compressvit.transforms.claims import Claim, grid, noise, slot, tie
from compressvit.transforms.record import compression_of

wrap("rearrange")  # torch.fx records the call: einops does not take its proxies


_WORTH_A_LOOK = 2**14  # elements of maps


class HeadMixing(nn.Module):
    """Mix attention maps across heads: `out[g] = Σ_h weight[g, h] · maps[h] (+ bias[g])`. Private to a layer (MiniViT, eq. 5–6).

    Args:
        num_heads: H.
        bias: add one bias per head; the reference code has it for Swin, not for DeiT.
    """

    def __init__(self, num_heads: int, bias: bool = False, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, num_heads, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype)) if bias else None
        self.reset_identity()

    @torch.no_grad()
    def reset_identity(self) -> None:
        """Initialise to the identity, so that attention is unchanged."""
        if self.weight.is_meta:
            return  # without values there is nothing to set, and torch would spend longer on it than on the values
        nn.init.eye_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def reset_noise(self, std: float = 0.02) -> None:
        """Initialise from a truncated normal distribution, as in the paper's code."""
        nn.init.trunc_normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def is_identity(self) -> bool:
        """Whether it changes nothing, by its present values."""
        unbiased = self.bias is None or not self.bias.any()
        return unbiased and torch.equal(self.weight, torch.eye(len(self.weight), dtype=self.weight.dtype))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:  # (B, H, N, N) -> (B, H, N, N)
        # a look at the weights costs as much as a mix of small maps, and on a GPU it would make every layer wait
        if not torch.is_grad_enabled() and eager_on_cpu(maps) and maps.numel() >= _WORTH_A_LOOK and self.is_identity():
            return maps
        heads = maps.transpose(0, 1)
        flat = heads.flatten(1)  # (H, B·N·N), no copy where heads are first in memory, as in `open_attention`
        mixed = self.weight @ flat if self.bias is None else torch.addmm(self.bias[:, None], self.weight, flat)
        return mixed.view_as(heads).transpose(0, 1)


@wrap  # torch.fx does not trace its conditions
def grid_height(tokens: int, grid: tuple[int, int]) -> int:
    """Height of the grid of a sequence: that of the configured one or, for another input size, of one of the same aspect ratio.

    Raises:
        UserError: there is no such grid.
    """
    height, width = grid
    if height * width == tokens:
        return height
    height = max(1, round((tokens * height / width) ** 0.5))
    if tokens % height:
        raise UserError(
            f"the MLP convolution cannot fold {tokens} tokens into a grid shaped like {grid}; "
            "build the model with the input size you use (img_size=…)"
        )
    return height


class TokenConv(nn.Module):
    """A depth-wise K×K convolution over the token grid, after its own LayerNorm (MiniViT's MLP transformation, eq. 7).

    Class, distillation and register tokens are not on the grid and skip the convolution.

    Args:
        width: C.
        kernel_size: K, odd.
        grid: height and width of the token grid, used to fold a sequence.
        num_prefix_tokens: how many tokens at the front of a sequence are not on the grid.
        sequence: whether tokens come as a sequence (B, N, C), or as a grid (B, height, width, C).
        grids: of how many grids, one below the other, `grid` consists, across whose borders the convolution does not look.
        replace: False computes `x + conv(LN x)`; True computes `LN x + conv(LN x)`, as the paper's code does to the residual stream,
            which does not preserve a pretrained function.
    """

    def __init__(
        self,
        width: int,
        kernel_size: int,
        grid: tuple[int, int],
        num_prefix_tokens: int = 0,
        sequence: bool = True,
        replace: bool = False,
        grids: int = 1,
        eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps, device=device, dtype=dtype)
        self.conv = nn.Conv2d(
            width, width, kernel_size, padding=kernel_size // 2, groups=width, bias=True, device=device, dtype=dtype
        )
        self.grid = (grid[0], grid[1])
        self.num_prefix_tokens = num_prefix_tokens
        self.sequence = sequence
        self.replace = replace
        self.grids = grids

    @torch.no_grad()
    def reset_identity(self) -> None:
        """Initialise the convolution to zero: `x + conv(LN x)` is then x."""
        self.norm.reset_parameters()
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)

    @torch.no_grad()
    def reset_noise(self) -> None:
        """Start as PyTorch starts a convolution, as the paper's code does: weight and bias uniform within ±1/K."""
        self.norm.reset_parameters()
        self.conv.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # same shape in and out
        normed = self.norm(x)
        base = normed if self.replace else x
        if not self.sequence:
            return base + rearrange(self.conv(rearrange(normed, "b h w c -> b c h w")), "b c h w -> b h w c")
        prefix, normed = normed.tensor_split([self.num_prefix_tokens], dim=1)
        height = grid_height(normed.shape[1], self.grid)
        normed = rearrange(normed, "b (g h w) c -> (b g) c h w", g=self.grids, h=height // self.grids)
        normed = self.conv(normed.contiguous(memory_format=torch.channels_last))  # as tokens lie, but for the prefix
        convolved = rearrange(normed, "(b g) c h w -> b (g h w) c", g=self.grids)
        return base + torch.cat([torch.zeros_like(prefix), convolved], dim=1)


class MultiplexPlan(Plan):
    """A resolved `Multiplex`: the share groups by block path, and the private transforms of every block in them."""

    starts: ClassVar[tuple[str, ...]] = ("init",)

    groups: tuple[tuple[str, ...], ...]
    head_mixing: bool
    mixing_bias: bool
    mlp_conv: int
    form: Literal["identity", "reference"]
    init: Literal["mean", "first", "scratch"]

    def claims(self, model: nn.Module) -> list[Claim]:
        same = "give both steps the same share, or merge two `multiplex` into one"
        shared = [group for group in self.groups if len(group) > 1]
        found = [tie([f"{path}.{part}" for path in group], same) for group in shared for part in ("attn", "mlp")]
        for path in (path for group in self.groups for path in group):
            if self.head_mixing:
                found.append(slot(f"{path}.attn", "logit_mix"))
            if self.mlp_conv:
                found += [slot(path, "mlp_conv"), grid(f"{path}.mlp", "multiplex.mlp_conv", "multiplex.mlp_conv=0")]
        if self.init == "scratch":
            found.append(noise("", "multiplex.init=scratch", "multiplex.init=mean"))
        return found

    def apply(self, model: nn.Module) -> list[LedgerEntry]:
        backbone = describe(model, "attention")
        infos = {info.path: info for info in backbone.blocks}
        paths = [path for group in self.groups for path in group]
        before = ties.count_at_paths(model, paths)
        added = surgery.added_parameters(model)
        ties.tie(model, [names for group in self.groups for names in _shared_names(model, group, added)])
        what = {}
        for group in self.groups:
            for path in group:
                changes = [f"shares attention and MLP with {group[0]}"] if path != group[0] else []
                if path == group[0] and len(group) > 1:
                    changes.append(f"owns attention and MLP of {len(group)} blocks")
                changes += self._add_private(model, infos[path], backbone)
                what[path] = "; ".join(changes) or "unchanged"
        after = ties.count_at_paths(model, paths)
        return [LedgerEntry(path, what[path], before[path], after[path]) for path in paths]

    def _add_private(self, model: nn.Module, info: BlockInfo, backbone: Backbone) -> list[str]:
        changes = []
        first = next(model.get_submodule(info.path).parameters())
        like = {"device": first.device, "dtype": first.dtype}
        if self.head_mixing:
            path = f"{info.path}.attn"
            surgery.specialise(model, path, backbone.slotted_attention(model.get_submodule(path)))
            for slot in ("logit_mix", "prob_mix"):
                surgery.fill_slot(model, path, slot, HeadMixing(info.heads, self.mixing_bias, **like))
            changes.append(f"+ 2 head mixes {info.heads}×{info.heads}")
        if self.mlp_conv:
            surgery.specialise(model, info.path, backbone.slotted_block)
            conv = TokenConv(
                info.width,
                self.mlp_conv,
                info.resolution,
                info.prefix_tokens,
                sequence=backbone.family.layout == "sequence",
                replace=self.form == "reference",
                grids=info.grids,
                eps=cast(nn.LayerNorm, model.get_submodule(f"{info.path}.norm2")).eps,  # in every norm of timm
                **like,
            )
            surgery.fill_slot(model, info.path, "mlp_conv", conv)
            changes.append(f"+ {self.mlp_conv}×{self.mlp_conv} convolution")
        return changes

    @torch.no_grad()
    def initialise(self, student: nn.Module, reference: Reference) -> None:
        if self.init == "scratch":
            as_timm(student).init_weights()
        elif self.init == "mean":
            fitted = {name for plan in compression_of(student).plans for name in plan.fitted()}
            before = surgery.added_parameters(reference.model)
            for group in self.groups:
                # A group of one keeps its current values; an earlier step may have changed them, so `reference` would be wrong.
                for names in _shared_names(reference.model, group, before) if len(group) > 1 else ():
                    if not fitted.isdisjoint(names):
                        continue  # an earlier low-rank step fitted this weight together with its private terms
                    # in float64 the mean of equal tensors equals them bit for bit
                    mean = torch.stack([reference.model.get_parameter(n).double() for n in names]).mean(dim=0)
                    student.get_parameter(names[0]).copy_(mean)
        for path in (path for group in self.groups for path in group):
            mixes = [f"{path}.attn.logit_mix", f"{path}.attn.prob_mix"] if self.head_mixing else []
            added: list[HeadMixing | TokenConv] = [module_at(student, mix, HeadMixing) for mix in mixes]
            added += [module_at(student, f"{path}.mlp_conv", TokenConv)] if self.mlp_conv else []
            for module in added:
                module.reset_identity() if self.form == "identity" else module.reset_noise()

    @torch.no_grad()
    def errors(self, student: nn.Module, reference: Reference) -> dict[str, tuple[float | None, float | None]]:
        """For every block that shares: the error over all its shared tensors, without those that a low-rank step fitted."""
        fitted = {name for plan in compression_of(student).plans for name in plan.fitted()}
        before = surgery.added_parameters(reference.model)
        found: dict[str, tuple[float | None, float | None]] = {}
        for group in self.groups if self.init != "scratch" else ():
            shared = [names for names in _shared_names(reference.model, group, before) if fitted.isdisjoint(names)]
            for path, *names in zip(group, *shared, strict=True) if shared and len(group) > 1 else ():
                ours, theirs = (
                    torch.cat([model.get_parameter(name).cpu().double().flatten() for name in names])
                    for model in (student, reference.model)
                )
                found[path] = ((ours - theirs).norm() / theirs.norm().clamp(min=TINY)).item(), None
        return found

    def fold(self, model: nn.Module) -> None:
        raise UserError(
            "multiplex cannot be folded: a head mix sits between two products of the attention and the convolution between two "
            "layers, and untying would give back every parameter that sharing saved. Ship the artifact as it is"
        )


@transform("multiplex", MultiplexPlan)
class Multiplex(Transform):
    """Share attention and MLP between consecutive blocks, with private transforms (MiniViT)."""

    needs: ClassVar[tuple[Need, ...]] = ("attention", "alike_blocks")
    changes_at_start = True
    blind_at_start: ClassVar[dict[str, str]] = {
        "mlp_conv.norm.weight": "the convolution after it starts at zero",
        "mlp_conv.norm.bias": "the convolution after it starts at zero",
    }
    blind: ClassVar[dict[str, str]] = {"logit_mix.bias": "the softmax does not see a constant added to a row"}

    share: int | tuple[int, ...] = Field(
        description="Blocks in a share group: one number for every stage, or one per stage (Swin has 4). "
        "Must divide the stage's depth. 1 shares nothing and only adds the transforms."
    )
    head_mixing: bool = Field(
        True, description="Mix attention logits and probabilities across heads, two H×H matrices per block."
    )
    mixing_bias: bool = Field(
        False, description="Add a bias per head to both mixings. The paper's code: true for Swin, false for DeiT."
    )
    mlp_conv: int = Field(
        0,
        ge=0,
        description="Kernel of the depth-wise convolution before the MLP, in tokens, odd; 0 for none. Mini-Swin: 7.",
    )
    form: Literal["identity", "reference"] = Field(
        "identity",
        description="identity: transforms start as the identity, x + conv(LN x), so a pretrained function is preserved. "
        "reference: as in the paper's code, LN x + conv(LN x), with transforms initialised at random (mixings: truncated normal of std "
        "0.02, their biases 0; convolution: uniform within ±1/mlp_conv, weight and bias). In Swin "
        "the paper's code also applies the mask of shifted windows in repeats that are not shifted; here each block has its own shift and "
        "mask, so its released checkpoints would compute something else.",
    )
    init: Literal["mean", "first", "scratch"] = Field(
        "mean",
        description="mean, first: shared weights from the mean of the group's layers or from the first of them; "
        "scratch: the whole student at random, as in the paper.",
    )

    @field_validator("share")
    @classmethod
    def _positive(cls, share):
        for count in (share,) if isinstance(share, int) else share:
            if count < 1:
                raise ValueError(f"share counts blocks in a group and is at least 1, not {count}")
        return share

    @field_validator("mlp_conv")
    @classmethod
    def _odd(cls, kernel):
        if kernel and kernel % 2 == 0:
            raise ValueError(
                f"mlp_conv is the width of a centred kernel and must be odd, not {kernel}; try {kernel + 1}"
            )
        return kernel

    @classmethod
    def examples(cls) -> Sequence[Transform]:
        return (
            Multiplex(share=2, mixing_bias=True, mlp_conv=3),
            Multiplex(share=2, mlp_conv=3, form="reference", init="first"),
            Multiplex(share=1, head_mixing=False, mlp_conv=5),
        )

    def needed(self) -> tuple[Need, ...]:
        asked: dict[Need, bool] = {"slotted_attention": self.head_mixing, "slotted_block": self.mlp_conv > 0}
        return (*self.needs, *(need for need, wanted in asked.items() if wanted))

    def plan(self, model: nn.Module, reference: Reference | None = None) -> MultiplexPlan:
        self.backbone(model)
        groups = share_groups(model, self.share, "multiplex.share")
        if self.mlp_conv and getattr(getattr(model, "patch_drop", None), "prob", 0):
            raise UserError(
                "multiplex.mlp_conv needs every token at its place on the grid, but the model drops patches in training; "
                "build it with patch_drop_rate=0"
            )
        if self.init == "scratch" and not hasattr(model, "init_weights"):
            raise UserError(
                f"multiplex.init=scratch has the model start itself anew, which timm's {class_in_timm(model).__name__} cannot (it has no "
                "`init_weights`); use multiplex.init=mean"
            )
        return MultiplexPlan(groups=tuple(groups), **self.model_dump(exclude={"share"}))


def _shared_names(model: nn.Module, group: tuple[str, ...], added: set[str]) -> list[list[str]]:
    """For a group of blocks, the names that become one parameter: all of `attn` and `mlp` except what transforms `added`."""
    tails = [
        f"{part}.{name}"
        for part in ("attn", "mlp")
        for name, _ in model.get_submodule(f"{group[0]}.{part}").named_parameters()
        if f"{group[0]}.{part}.{name}" not in added
    ]
    return [[f"{path}.{tail}" for path in group] for tail in tails]
