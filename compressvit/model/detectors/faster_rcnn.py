"""Faster R-CNN of a timm backbone: torchvision's region proposals and heads on a feature pyramid. timm knows it as `faster_rcnn`.

Paper: Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks, NeurIPS 2015, https://arxiv.org/abs/1506.01497, on
Feature Pyramid Networks for Object Detection, CVPR 2017, https://arxiv.org/abs/1612.03144

    timm.create_model("faster_rcnn", backbone="swin_tiny_patch4_window7_224", num_classes=80)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from compressvit.errors import UserError
from compressvit.model.detectors import regions
from compressvit.model.detectors.adamixer import default_cfgs as of_adamixer
from compressvit.model.detectors.backbone import backbone_of, take_statistics
from compressvit.model.detectors.prediction import Detections, Target
from compressvit.model.detectors.pyramid import LEVELS, feature_maps, require_divisible
from compressvit.model.detectors.selection import select

default_cfgs = {"faster_rcnn": {**of_adamixer["adamixer"], "classifier": "heads.box_predictor.cls_score"}}
PROPOSALS = 1000  # of an image in evaluation, as torchvision has it
FOUND = 100  # the most detections of an image
IMITATED = 512  # of an image, the teacher's surest, on which its student is compared: as many as are compared with the ground truth
SIDES = ((32,), (64,), (128,), (256,), (512,))  # of the anchors of each level, in pixels


class RegionPrediction:
    """What Faster R-CNN says of a batch: in training its features, from which `losses` computes the rest; in evaluation its detections.

    Iterating gives tensors: in evaluation boxes (1, B, K, 4), scores (1, B, K), classes (1, B, K) and, where there are any, masks
    (1, B, K, M, M), with zeros after an image's last detection; in training the maps of the pyramid.
    """

    def __init__(self, detector: FasterRCNN, images: Tensor, maps: dict[str, Tensor]):
        self._detector, self._maps = detector, maps
        self._images = ImageList(images, [tuple(images.shape[-2:])] * len(images))
        self._proposals: list[Tensor] = []  # in evaluation, of each image, from the surest
        self._found = None if detector.training else self._detect()

    def __iter__(self) -> Iterator[Tensor]:
        if self._found is None:
            return iter(self._maps.values())
        most = max(1, *(len(found.scores) for found in self._found))

        def padded(values: Sequence[Tensor]) -> Tensor:
            rows = [nn.functional.pad(v.float(), (*[0] * (2 * (v.ndim - 1)), 0, most - len(v))) for v in values]
            return torch.stack(rows)[None]

        parts = zip(*self._found, strict=True)  # boxes of all images, scores of all images, …
        return iter([padded(part) for part in parts if part[0] is not None])

    @property
    def maps(self) -> Mapping[str, Tensor]:
        """The maps (B, C, H, W) of the pyramid, by level."""
        return self._maps

    def _scale(self) -> Tensor:
        height, width = self._images.tensors.shape[-2:]
        return torch.tensor([width, height, width, height], device=self._images.tensors.device)

    def losses(self, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Torchvision's losses: of proposals, their boxes, the classes of sampled proposals, and their boxes.

        Args:
            targets: `boxes` (n, 4) in widths and heights of the image, `labels` (n,) from 0.
        """
        scale = self._scale()
        # in pixels, and 0 is background
        theirs = [{**t, "boxes": t["boxes"] * scale, "labels": t["labels"] + 1} for t in targets]
        proposals, of_proposals = self._detector.rpn(self._images, self._maps, theirs)
        return {**of_proposals, **self._losses_of_heads(proposals, theirs)}

    def _losses_of_heads(self, proposals: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Those of proposals, for targets as torchvision has them."""
        _, found = self._detector.heads(self._maps, proposals, self._images.image_sizes, targets)
        return cast(dict[str, Tensor], found)

    def imitation(self, expected: RegionPrediction, temperature: float = 1.0) -> dict[str, Tensor]:
        """The parts of the loss of a student against its teacher, on the teacher's own proposals; see `regions.imitation`.

        Args:
            expected: of the teacher, in eval mode, for the same images in the same size; gets no gradient.
            temperature: logits of both are divided by it.

        Raises:
            UserError: images, anchors or classes differ.
        """
        proposals = [boxes[:IMITATED] for boxes in expected._proposals]
        if self._images.image_sizes != expected._images.image_sizes:
            raise UserError(regions.DIFFERENT)
        with torch.no_grad():
            theirs = expected._of_proposals(proposals)
        sampled = self._detector.rpn.fg_bg_sampler.batch_size_per_image * len(proposals)
        return regions.imitation(self._of_proposals(proposals), theirs, temperature, sampled)

    def _of_proposals(self, proposals: list[Tensor]) -> regions.Numbers:
        """What the detector computes before it chooses, for proposals of each image (n, 4), in pixels."""
        rpn, heads = self._detector.rpn, self._detector.heads
        logits, changes = concat_box_prediction_layers(*rpn.head(list(self._maps.values())))
        pooled = heads.box_roi_pool(self._maps, proposals, self._images.image_sizes)
        found = heads.box_predictor(heads.box_head(pooled))
        return regions.Numbers(*(values.float() for values in (logits[:, 0], changes, *found)))

    def _detect(self) -> list[Detections]:
        proposals, _ = self._detector.rpn(self._images, self._maps)
        self._proposals = proposals
        found, _ = self._detector.heads(self._maps, proposals, self._images.image_sizes)
        scale = self._scale()
        masks = [f["masks"][:, 0] if "masks" in f else None for f in found]
        return [
            Detections(f["boxes"] / scale, f["scores"], f["labels"] - 1, mask)
            for f, mask in zip(found, masks, strict=True)
        ]

    def detections(self, limit: int = 100) -> list[Detections]:
        """Those of highest score of each image."""
        if self._found is None:
            raise TypeError("a model in training mode has no detections; call eval()")
        return [found.first(limit) for found in self._found]


class FasterRCNN(nn.Module):
    """A two-stage detector with anchors.

    Args:
        backbone: timm's name of it; it must have stages, as Swin, ConvNeXt and ResNet have.
        backbone_args: further arguments of `timm.create_model` for it.
        img_size: height and width of images in pixels, or one number for both.
        num_classes: of objects; background is none of them.
        channels: of the pyramid.
        representation: width of the box head.

    Raises:
        UserError: the backbone gives no pyramid, or its strides do not divide the image.
    """

    prediction = RegionPrediction
    name = "faster_rcnn"  # timm's

    def __init__(
        self,
        backbone: str = "swin_tiny_patch4_window7_224",
        backbone_args: dict[str, Any] | None = None,
        img_size: int | tuple[int, int] = 800,
        num_classes: int = 80,
        in_chans: int = 3,
        channels: int = 256,
        representation: int = 1024,
    ):
        super().__init__()
        self.task = "detection"
        self.num_classes, self.in_chans = num_classes, in_chans
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size = (height, width)
        self.backbone, (self._indices, widths, strides) = backbone_of(backbone, backbone_args, self.img_size, in_chans)
        if len(widths) == 1:
            raise UserError(
                f"{self.name} takes the maps of a backbone's stages, and {backbone} has one map; take swin_*, convnext_* or resnet*, "
                "or the detector adamixer"
            )
        require_divisible(height, width, strides)
        further = LastLevelMaxPool() if len(widths) == LEVELS else LastLevelP6P7(widths[-1], channels)
        self.fpn = FeaturePyramidNetwork(widths, channels, further)  # of five levels
        anchors = AnchorGenerator(SIDES, ((0.5, 1.0, 2.0),) * len(SIDES))
        head = RPNHead(channels, anchors.num_anchors_per_location()[0])
        kept = {"training": 2 * PROPOSALS, "testing": PROPOSALS}
        self.rpn = RegionProposalNetwork(anchors, head, 0.7, 0.3, 256, 0.5, kept, kept, 0.7)
        pool = MultiScaleRoIAlign([str(level) for level in range(len(widths))], output_size=7, sampling_ratio=2)
        box_head = TwoMLPHead(channels * 7 * 7, representation)
        predictor = FastRCNNPredictor(representation, num_classes + 1)
        self.heads = RoIHeads(pool, box_head, predictor, 0.5, 0.5, 512, 0.25, None, 0.05, 0.5, FOUND)

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """The pyramid of images (B, C, H, W): one map (B, channels, H_l, W_l) per level, from the largest."""
        found = feature_maps(self.backbone, images, self._indices)
        return self.fpn({str(level): values for level, values in enumerate(found)})

    def answer(self, images: Tensor, limit: int = 100) -> Detections:
        """As `forward(images).detections(limit)` in eval mode, in tensors (B, limit, …), with zeros after an image's last detection.

        Sizes depend on nothing that is found, so this can be exported.
        """
        return select(self.rpn, self.heads, images, self.maps(images), limit)

    def forward(self, images: Tensor) -> RegionPrediction | tuple[Tensor, ...]:
        """
        Args:
            images: (B, C, H, W), normalised as the backbone's.

        Returns:
            What is found; on the meta device, where nothing can be chosen, the logits and boxes of `PROPOSALS` proposals an image.
        """
        maps = self.maps(images)
        return self._unchosen(images, maps) if images.is_meta else self.prediction(self, images, maps)

    def _unchosen(self, images: Tensor, maps: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """All that is computed, for as many proposals as there can be: what a count of operations needs."""
        self.rpn.head(list(maps.values()))
        features = images.new_empty(len(images) * PROPOSALS, maps["0"].shape[1], 7, 7)
        return self.heads.box_predictor(self.heads.box_head(features))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass, as timm does."""
        cast(Any, self.backbone).set_grad_checkpointing(enable)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """The layers whose outputs are of classes: scores, background first, and boxes."""
        return self.heads.box_predictor.cls_score, self.heads.box_predictor.bbox_pred

    def reset_classifier(self, num_classes: int) -> None:
        """Give the heads new layers for that many classes."""
        if num_classes < 1:
            raise UserError("a detector has at least one class of objects")
        old = self.heads.box_predictor.cls_score
        self.num_classes = num_classes
        predictor = FastRCNNPredictor(old.in_features, num_classes + 1)
        self.heads.box_predictor = predictor.to(old.weight.device, old.weight.dtype)


@register_model
def faster_rcnn(pretrained: bool = False, **kwargs: Any) -> FasterRCNN:
    """Faster R-CNN on a timm backbone."""
    return take_statistics(build_model_with_cfg(FasterRCNN, "faster_rcnn", pretrained, **kwargs))
