"""Mask R-CNN of a timm backbone: Faster R-CNN with a third head, torchvision's, that outlines each object. timm knows it as `mask_rcnn`.

Paper: Mask R-CNN, ICCV 2017, https://arxiv.org/abs/1703.06870

    timm.create_model("mask_rcnn", backbone="swin_tiny_patch4_window7_224", num_classes=80)
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import fastrcnn_loss, maskrcnn_loss
from torchvision.ops import MultiScaleRoIAlign

from compressvit.errors import UserError
from compressvit.model.detectors.backbone import take_statistics
from compressvit.model.detectors.faster_rcnn import FOUND, FasterRCNN, RegionPrediction
from compressvit.model.detectors.faster_rcnn import default_cfgs as of_faster_rcnn
from compressvit.model.detectors.prediction import Detections, divergence
from compressvit.model.detectors.selection import pooled, select

default_cfgs = {"mask_rcnn": of_faster_rcnn["faster_rcnn"]}
DEPTH = 4  # of the mask head, in convolutions
CELLS = 14  # the side of the features that the mask head takes of a box; its masks have twice that


class MaskPrediction(RegionPrediction):
    """What Mask R-CNN says of a batch."""

    def _losses_of_heads(self, proposals: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Those of Faster R-CNN, and that of masks: binary cross-entropy over the points of each box, in the mask of its class.

        Torchvision's heads want a mask of every object. Here one whose mask in `masks` (n, H, W) is empty counts for classes and boxes
        alone, so this takes the same steps with their parts.
        """
        if not all("masks" in target for target in targets):
            raise UserError("mask_rcnn learns from masks, and its targets have none; take faster_rcnn to learn boxes")
        heads, maps, sizes = self._detector.heads, self._maps, self._images.image_sizes
        chosen, matched, labels, offsets = heads.select_training_samples(proposals, targets)
        logits, boxes = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, chosen, sizes)))
        of_classes, of_boxes = fastrcnn_loss(logits, boxes, labels, offsets)
        outlined = []  # which of an image's chosen boxes are of an object with a mask
        for target, label, which in zip(targets, labels, matched, strict=True):
            objects = torch.where(label > 0)[0]
            outlined.append(objects[target["masks"].flatten(1).any(1)[which[objects]]])
        chosen, matched = ([part[i] for part, i in zip(parts, outlined, strict=True)] for parts in (chosen, matched))
        shown = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, chosen, sizes)))
        masks, classes = ([target[key] for target in targets] for key in ("masks", "labels"))
        of_masks = maskrcnn_loss(shown, chosen, masks, classes, matched)
        return {"loss_classifier": of_classes, "loss_box_reg": of_boxes, "loss_mask": of_masks}

    def imitation(self, expected: RegionPrediction, temperature: float = 1.0) -> dict[str, Tensor]:
        """Also of masks: on the teacher's detections the divergence of each point of the mask of its class, mean over points, each
        detection by its score, and per detection."""
        found = super().imitation(expected, temperature)
        if not isinstance(expected, MaskPrediction):  # it teaches boxes alone
            return found
        labels = torch.cat([detections.labels + 1 for detections in expected._found or ()])
        scores = torch.cat([detections.scores for detections in expected._found or ()])
        boxes = [detections.boxes * self._scale() for detections in expected._found or ()]
        with torch.no_grad():
            theirs = expected._shown(boxes, labels)
        apart = divergence(self._shown(boxes, labels), theirs, temperature).flatten(1).mean(1)
        return {**found, "loss_mask": (scores * apart).sum() / scores.sum().clamp(min=1)}

    def _shown(self, boxes: list[Tensor], labels: Tensor) -> Tensor:
        """Logits of the mask of the class of each box, (n, M, M) for n boxes of all images, in pixels, and their labels from 1."""
        heads = self._detector.heads
        features = heads.mask_roi_pool(self._maps, boxes, self._images.image_sizes)
        logits: Tensor = heads.mask_predictor(heads.mask_head(features))
        return logits[torch.arange(len(labels), device=labels.device), labels].float()


class MaskRCNN(FasterRCNN):
    """A two-stage detector that also gives the mask of each object it finds.

    Args:
        outline: width of the mask head; the others are those of `FasterRCNN`.

    Attributes:
        masks: that it learns from masks and gives some.

    Raises:
        UserError: as `FasterRCNN`.
    """

    prediction = MaskPrediction
    name = "mask_rcnn"
    masks = True

    def __init__(
        self,
        backbone: str = "swin_tiny_patch4_window7_224",
        backbone_args: dict[str, Any] | None = None,
        img_size: int | tuple[int, int] = 800,
        num_classes: int = 80,
        in_chans: int = 3,
        channels: int = 256,
        representation: int = 1024,
        outline: int = 256,
    ):
        super().__init__(backbone, backbone_args, img_size, num_classes, in_chans, channels, representation)
        levels = self.heads.box_roi_pool.featmap_names
        self.heads.mask_roi_pool = MultiScaleRoIAlign(levels, output_size=CELLS, sampling_ratio=2)
        self.heads.mask_head = MaskRCNNHeads(channels, (outline,) * DEPTH, dilation=1)
        self.heads.mask_predictor = MaskRCNNPredictor(outline, outline, num_classes + 1)

    def _unchosen(self, images: Tensor, maps: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """That of Faster R-CNN, and the masks of as many detections as there can be."""
        features = images.new_empty(len(images) * FOUND, maps["0"].shape[1], CELLS, CELLS)
        return *super()._unchosen(images, maps), self.heads.mask_predictor(self.heads.mask_head(features))

    def answer(self, images: Tensor, limit: int = 100) -> Detections:
        """As that of `FasterRCNN`, with masks (B, limit, 28, 28)."""
        maps = self.maps(images)
        found = select(self.rpn, self.heads, images, maps, limit)
        size = images.shape[-2:]
        boxes = found.boxes * found.boxes.new_tensor([size[1], size[0], size[1], size[0]])
        features = self.heads.mask_head(pooled(self.heads.mask_roi_pool, maps, boxes, size[0]))
        shown = self.heads.mask_predictor(features).unflatten(0, found.scores.shape).sigmoid()
        own = (found.labels + 1)[..., None, None, None].expand(
            -1, -1, 1, *shown.shape[-2:]
        )  # the first class is background
        masks = shown.gather(2, own)[:, :, 0]
        return found._replace(masks=masks.masked_fill((found.scores == 0)[..., None, None], 0.0))

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """The layers whose outputs are of classes: scores, background first, boxes and masks."""
        return *super().get_classifier(), self.heads.mask_predictor.mask_fcn_logits

    def reset_classifier(self, num_classes: int) -> None:
        """Give the heads new layers for that many classes."""
        super().reset_classifier(num_classes)
        old = self.heads.mask_predictor.mask_fcn_logits
        new = MaskRCNNPredictor(old.in_channels, old.in_channels, num_classes + 1).mask_fcn_logits
        self.heads.mask_predictor.mask_fcn_logits = new.to(old.weight.device, old.weight.dtype)


@register_model
def mask_rcnn(pretrained: bool = False, **kwargs: Any) -> MaskRCNN:
    """Mask R-CNN on a timm backbone."""
    return take_statistics(build_model_with_cfg(MaskRCNN, "mask_rcnn", pretrained, **kwargs))
