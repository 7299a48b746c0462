"""From the last map of a backbone to logits of classes: a linear head, and SETR's naive head and its PUP.

Paper: Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective with Transformers, CVPR 2021,
https://arxiv.org/abs/2012.15840, §3.2. Widths, kernels and the order of layers are those of mmsegmentation's `SETRUPHead`, but that the map
is normalised by the backbone's own last norm, whose values are trained, and not by another one.

Shapes: B images, D width of the backbone, C classes, h × w the backbone's grid.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from compressvit.errors import UserError, did_you_mean

STAGES = 4  # of PUP, each of which doubles height and width: 16 times, as a ViT's patch has pixels


class Head(nn.Module):
    """Layers before the classifier, and the classifier, a convolution of 1 × 1.

    Args:
        layers: from (B, D, h, w) to (B, `width`, ·, ·).
        width: of what the classifier reads.
        classes: C.
    """

    def __init__(self, layers: nn.Module, width: int, classes: int):
        super().__init__()
        self.layers = layers
        self.classifier = new_classifier(width, classes)

    def forward(self, features: Tensor) -> Tensor:  # (B, D, h, w) -> (B, C, ·, ·)
        return self.classifier(self.layers(features))

    def reset_classifier(self, classes: int) -> None:
        """Give it a new classifier for that many classes."""
        old = cast(nn.Conv2d, self.classifier)
        self.classifier = new_classifier(old.in_channels, classes).to(old.weight.device, old.weight.dtype)


def new_classifier(width: int, classes: int) -> nn.Conv2d:
    """A classifier of every place, with mmsegmentation's initial values."""
    layer = nn.Conv2d(width, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def _convolution(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


def _up() -> nn.Module:
    return nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)


def linear(inputs: int, classes: int, channels: int) -> Head:
    """The classifier alone."""
    return Head(nn.Identity(), inputs, classes)


def naive(inputs: int, classes: int, channels: int) -> Head:
    """A layer of `channels` at every place, and the classifier."""
    return Head(nn.Sequential(*_convolution(inputs, channels, 1)), channels, classes)


def pup(inputs: int, classes: int, channels: int) -> Head:
    """Progressive upsampling: `STAGES` times a convolution of 3 × 3 to `channels`, and twice the height and width."""
    layers: list[nn.Module] = []
    for stage in range(STAGES):
        layers += [*_convolution(channels if stage else inputs, channels, 3), _up()]
    return Head(nn.Sequential(*layers), channels, classes)


HEADS = {"linear": linear, "naive": naive, "pup": pup}


def head_of(name: str, inputs: int, classes: int, channels: int) -> Head:
    """The head of that name.

    Args:
        inputs: D, the width of the map.
        channels: of its inner layers; a linear head has none.

    Raises:
        UserError: there is no such head.
    """
    if name not in HEADS:
        raise UserError(f"segmenter: head={name!r} is none that it has; {did_you_mean(name, HEADS)}")
    return HEADS[name](inputs, classes, channels)
