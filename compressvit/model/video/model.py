"""A video model: a ViT of timm on tubelets, and a classifier. timm knows it as `video`.

    timm.create_model("video", backbone="vit_base_patch16_224", frames=16, num_classes=400)
    timm.create_model("video", backbone="vit_small_patch14_dinov2", frames=8, img_size=112, num_classes=174)

Its layout is that of VideoMAE's fine-tuned models, NeurIPS 2022, https://arxiv.org/abs/2203.12602, for which AdaptFormer and RepAdapter
were made, on the blocks of timm. Image weights begin it: `teacher.backbone` in a recipe.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from compressvit.errors import UserError, did_you_mean
from compressvit.model.detectors.backbone import built_backbone
from compressvit.model.modules import as_timm
from compressvit.model.video.tubelets import Positions, of_tubelets

CHANNELS = 3  # of a frame
# Measured once, by hand, over 16 pictures: the cosine of DINOv2-S's tokens of a picture to those of a clip of it is 0.93 without
# positions in time, 0.91 with 0.05, 0.79 with 0.1, and 0.34 with 1.
TEMPORAL_SCALE = 0.05
Pool = Literal["avg", "token", "map"]

default_cfgs = {
    "video": {
        "url": "",
        "num_classes": 400,
        "input_size": (CHANNELS, 224, 224),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "",
        "classifier": "head",
    }
}


class Video(nn.Module):
    """Classes of clips.

    A clip is given as an image with the channels of all its frames, the first frame's first: (B, T · 3, H, W). Images of several clips
    beside one another, V · T · 3 channels, have the mean of their logits: views of one video. (B, T, 3, H, W) is taken, too.

    Args:
        backbone: timm's name of a ViT. Its own classifier is left out.
        backbone_args: further arguments of `timm.create_model` for it.
        frames: T.
        tubelet: frames of a token.
        img_size: height and width of frames in pixels, or one number for both.
        num_classes: of clips; 0: it gives features.
        in_chans: of a frame, which are 3; the attribute of that name is of all frames.
        pool: avg (the mean of all tubelets, as VideoMAE), token (the class token), or map (the backbone's own attention).
        positions: space_time (the image model's table at every time, with sines and cosines in time) or sincos (of all tubelets, as
            VideoMAE).
        temporal_scale: of the positions in time of `space_time`, beside which image weights know none.

    Raises:
        UserError: the backbone is no ViT on patches, or lacks what `pool` reads, or the tubelets do not divide the clip.
    """

    def __init__(
        self,
        backbone: str = "vit_base_patch16_224",
        backbone_args: dict[str, Any] | None = None,
        frames: int = 16,
        tubelet: int = 2,
        img_size: int | tuple[int, int] = 224,
        num_classes: int = 400,
        in_chans: int = CHANNELS,
        pool: Pool = "avg",
        positions: Positions = "space_time",
        temporal_scale: float = TEMPORAL_SCALE,
    ):
        super().__init__()
        if in_chans != CHANNELS:
            raise UserError(f"video: in_chans={in_chans}: a frame has {CHANNELS} channels; leave it out")
        self.num_classes, self.frames, self.in_chans = num_classes, frames, CHANNELS * frames
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size = (height, width)
        args = {**(backbone_args or {}), **({"pos_embed": "none"} if positions == "sincos" else {})}
        built = built_backbone(backbone, args, self.img_size, CHANNELS)
        self.backbone = of_tubelets(built, backbone, frames, tubelet, positions, temporal_scale)
        _require_pool(self.backbone, backbone, pool)
        self.backbone.global_pool = pool
        self.head = self._new_head(num_classes)

    def _new_head(self, classes: int) -> nn.Module:
        if not classes:
            return nn.Identity()
        head = nn.Linear(self.backbone.num_features, classes)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def forward(self, clips: Tensor) -> Tensor:
        """Logits (B, classes) of clips (B, V · T · 3, H, W) or (B, T, 3, H, W), whose frames are normalised as the backbone's images."""
        clips = clips.flatten(1, 2) if clips.ndim == 5 else clips
        views = clips.shape[1] // self.in_chans
        if views * self.in_chans != clips.shape[1] or not views:
            raise UserError(
                f"video: the model takes {self.frames} frames of {CHANNELS} channels, {self.in_chans} in all, or several such clips, and "
                f"got {clips.shape[1]} channels"
            )
        frames = clips.reshape(-1, self.frames, CHANNELS, *clips.shape[2:]).transpose(1, 2)  # (B · V, 3, T, H, W)
        logits = self.head(self.backbone.forward_head(self.backbone.forward_features(frames), pre_logits=True))
        return logits if views == 1 else logits.unflatten(0, (-1, views)).mean(dim=1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass, as timm does."""
        self.backbone.set_grad_checkpointing(enable)

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Give it a new classifier for that many classes."""
        like = next(self.backbone.parameters())
        self.num_classes = num_classes
        self.head = self._new_head(num_classes).to(like.device, like.dtype)


def _require_pool(backbone: nn.Module, name: str, pool: str) -> None:
    """Raise a `UserError` where the backbone does not have what the pooling reads, or has one that would be left out."""
    if pool not in get_args(Pool):
        raise UserError(f"video: pool={pool!r} is none that it has; {did_you_mean(pool, get_args(Pool))}")
    model: Any = backbone
    if (model.attn_pool is not None) != (pool == "map"):
        has = "has attention that pools, which would be left out; set pool=map"
        raise UserError(
            f"video: pool={pool}: {name} {has if pool != 'map' else 'has no attention that pools; set pool=avg'}"
        )
    if pool == "token" and not model.has_class_token:
        raise UserError(f"video: pool=token: {name} has no class token; set pool=avg")


def _with_statistics(model: Video) -> Video:
    """Give a model the size of its clips, and for every frame the mean and standard deviation of its backbone's images."""
    known: Any = as_timm(model)
    theirs = as_timm(cast(nn.Module, known.backbone)).pretrained_cfg
    statistics = {name: tuple(theirs[name]) * model.frames for name in ("mean", "std")}
    known.pretrained_cfg = {**known.pretrained_cfg, "input_size": (model.in_chans, *model.img_size), **statistics}
    return model


@register_model
def video(pretrained: bool = False, **kwargs: Any) -> Video:
    """A video model on a ViT of timm."""
    return _with_statistics(build_model_with_cfg(Video, "video", pretrained, **kwargs))
