"""CvT: stages of tokens that convolutions make, and attention whose queries, keys and values depth-wise convolutions read from the grid.

Paper: CvT: Introducing Convolutions to Vision Transformers, ICCV 2021, https://arxiv.org/abs/2103.15808
Code: https://github.com/microsoft/CvT, whose names modules and tensors have, so that its files of weights fit.

timm does not have it. Here it has timm's methods and, once `register_cvts` was called, is in timm's registry, without pretrained weights:

    timm.create_model("cvt_13", img_size=384)

Keys and values are on a grid of half the height and width. The class token, which only the last stage has, skips the convolutions. As in
the released code logits are divided by √C of the whole width, whatever the number of heads, and MLPs have QuickGELU.

Shapes: B images, N tokens, C width, h and w of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from einops import rearrange
from timm.layers import get_act_layer, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn
from torch.fx import wrap

from compressvit.model.cvt import CVTS
from compressvit.model.cvt.blocks import ConvEmbed, CvTBlock, CvTStage, Size

wrap("rearrange")  # torch.fx records the call: einops does not take its proxies


class CvT(nn.Module):
    """A CvT with timm's methods.

    Args:
        img_size: of the images that costs are counted for, in pixels, one side or height and width; it takes others, too.
        depths, embed_dims, num_heads: of every stage.
        mlp_ratio, qkv_bias, kv_strides: of all stages, or of each; the last of the convolutions before keys and values.
        patch_sizes, patch_strides, patch_paddings: of the convolution that makes the tokens of a stage; by default 7, 4 and 2 in the first
            stage, and 3, 2 and 1 in the others.
        class_token: whether the last stage has one, which the classifier reads; else it reads the mean of the tokens.
        drop_path_rate: stochastic depth of the last block; it rises over the blocks of the last stage from 0, others have none.
        act_layer: timm's name of the activation of MLPs; `gelu` is what Hugging Face's transformers computes.

    Raises:
        ValueError: the arguments are not of as many stages, or heads do not divide a width.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (1, 2, 10),
        embed_dims: Sequence[int] = (64, 192, 384),
        num_heads: Sequence[int] = (1, 3, 6),
        mlp_ratio: float | Sequence[float] = 4.0,
        qkv_bias: bool | Sequence[bool] = True,
        patch_sizes: Sequence[int] | None = None,
        patch_strides: Sequence[int] | None = None,
        patch_paddings: Sequence[int] | None = None,
        kv_strides: int | Sequence[int] = 2,
        class_token: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: str = "quick_gelu",
    ):
        super().__init__()
        count = len(depths)
        patch_sizes, patch_strides, patch_paddings = (
            [first, *[other] * (count - 1)] if given is None else given
            for given, first, other in ((patch_sizes, 7, 3), (patch_strides, 4, 2), (patch_paddings, 2, 1))
        )
        ratios, biases, kv_strides = (_of_each(given, count) for given in (mlp_ratio, qkv_bias, kv_strides))
        each: dict[str, Sequence[Any]] = {"embed_dims": embed_dims, "num_heads": num_heads, "patch_sizes": patch_sizes}
        each |= {"patch_strides": patch_strides, "patch_paddings": patch_paddings, "kv_strides": kv_strides}
        _require_stages(depths, {**each, "mlp_ratio": ratios, "qkv_bias": biases})
        self.img_size, self.in_chans, self.num_classes = _pair(img_size), in_chans, num_classes
        self.depths, self.num_prefix_tokens = tuple(depths), int(class_token)
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dims[-1]
        self.feature_info: list[dict[str, Any]] = []
        grid, before, reduction, channels = self.img_size, None, 1, in_chans
        for i in range(count):
            embed = ConvEmbed(channels, embed_dims[i], patch_sizes[i], patch_strides[i], patch_paddings[i])
            channels, last = embed_dims[i], i == count - 1
            prefix = int(class_token and last)
            rates = torch.linspace(0, drop_path_rate if last else 0.0, depths[i], device="cpu").tolist()
            others = biases[i], get_act_layer(act_layer), attn_drop_rate, proj_drop_rate
            blocks = [CvTBlock(channels, num_heads[i], ratios[i], kv_strides[i], prefix, *others, r) for r in rates]
            self.add_module(f"stage{i}", CvTStage(embed, blocks, before, bool(prefix)))
            grid = before = embed.grid(grid)
            reduction *= patch_strides[i]
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"stage{i}"})
        self.norm = nn.LayerNorm(channels)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    @property
    def stages(self) -> list[CvTStage]:
        """In the order in which they run."""
        return [cast(CvTStage, self.get_submodule(f"stage{i}")) for i in range(len(self.depths))]

    @property
    def cls_token(self) -> nn.Parameter | None:
        """That of the last stage."""
        return self.stages[-1].cls_token

    @property
    def grids(self) -> list[Size]:
        """Of every stage, for images of `img_size`."""
        found, grid = [], self.img_size
        for stage in self.stages:
            grid = stage.patch_embed.grid(grid)
            found.append(grid)
        return found

    def init_weights(self, mode: str = "") -> None:
        """Initialise all parameters at random, as the released code does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)):
                module.reset_parameters()
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay (timm's convention)."""
        return {f"stage{len(self.depths) - 1}.cls_token"} if self.num_prefix_tokens else set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers by name, for timm's decay of learning rates."""
        of_stages = [(r"^stage(\d+)\.(?:patch_embed|cls_token)", (0,)), (r"^norm", (99999,))]
        blocks = r"^stage(\d+)" if coarse else [(r"^stage(\d+)\.blocks\.(\d+)", None), *of_stages]
        return {"stem": r"^stage0\.patch_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass instead of keeping what they compute."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A newly initialised classifier; 0 classes removes it."""
        self.num_classes = num_classes
        like = self.norm.weight
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, height, width) to tokens (B, N, C) after the final norm, the class token first."""
        size = None
        for stage in self.stages:
            x, size = stage(x, size)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens (B, N, C) to logits (B, classes), or with `pre_logits` to the class token, or the mean, (B, C)."""
        pooled = self.head_drop(x[:, 0] if self.num_prefix_tokens else x.mean(dim=1))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps (B, C, h, w) of stages, without the class token, and the features (timm's convention)."""
        if output_fmt != "NCHW":
            raise ValueError(f"CvT gives maps with channels first (output_fmt='NCHW'), not {output_fmt!r}")
        taken, last = feature_take_indices(len(self.depths), indices)
        stages, found, size = self.stages, [], None
        for i, stage in enumerate(stages[: last + 1] if stop_early else stages):
            x, size = stage(x, size)
            if i in taken:
                tokens = self.norm(x) if norm and i == len(stages) - 1 else x
                patches = tokens[:, self.num_prefix_tokens :] if stage.cls_token is not None else tokens
                found.append(rearrange(patches, "b (h w) c -> b c h w", h=size[0], w=size[1]))
        return found if intermediates_only else (self.norm(x), found)


def _of_each(value: Any, count: int) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value] * count


def _pair(size: int | Sequence[int]) -> Size:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _require_stages(depths: Sequence[int], each: dict[str, Sequence[Any]]) -> None:
    for name, values in each.items():
        if len(values) != len(depths):
            raise ValueError(
                f"{name}={list(values)} is for {len(values)} stages, and depths={list(depths)} for {len(depths)}"
            )
    for width, heads in zip(each["embed_dims"], each["num_heads"], strict=True):
        if heads < 1 or width % heads:
            raise ValueError(f"num_heads={list(each['num_heads'])}: {heads} heads do not divide a width of {width}")


def _configuration(side: int = 224) -> dict[str, Any]:
    """timm's description: images as the released code prepares them for its test, cropped at 224 and squashed at 384."""
    return {
        "license": "mit",
        "num_classes": 1000,
        "input_size": (3, side, side),
        "crop_pct": 0.875 if side < 384 else 1.0,
        "crop_mode": "center" if side < 384 else "squash",
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stage0.patch_embed.proj",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs(
    {name: _configuration(384 if name == "cvt_w24" else 224) for name in CVTS}
)  # timm reads these from the module of a model's function


def _create(name: str, pretrained: bool, options: dict[str, Any], **sizes: Any) -> nn.Module:
    return build_model_with_cfg(CvT, name, pretrained, **{**sizes, **options})


@register_model
def cvt_13(pretrained: bool = False, **options: Any) -> nn.Module:
    """CvT-13."""
    return _create("cvt_13", pretrained, options)


@register_model
def cvt_21(pretrained: bool = False, **options: Any) -> nn.Module:
    """CvT-21."""
    return _create("cvt_21", pretrained, options, depths=(1, 4, 16))


@register_model
def cvt_w24(pretrained: bool = False, **options: Any) -> nn.Module:
    """CvT-W24, for images of 384²."""
    wide = {"depths": (2, 2, 20), "embed_dims": (192, 768, 1024), "num_heads": (3, 12, 16), "img_size": 384}
    return _create("cvt_w24", pretrained, options, **wide)
