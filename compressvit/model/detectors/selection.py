"""What Faster R-CNN finds, chosen with tensors whose sizes do not depend on the image: for `torch.export` and ONNX.

torchvision chooses image by image and asks how many boxes are left (`batched_nms` has two ways), which a graph cannot do: "Could not guard
on data-dependent expression". Here a box that is left out keeps its place and loses its score, and the images of a batch are suppressed at
once. The detections are torchvision's but for rounding: groups and images lie side by side in float32, which moves a box by up to 1/500
pixel with 1,203 classes at 1333², and by 1/64 in a batch of eight; a box whose overlap is that near the threshold may be decided
otherwise.

Images cannot be suppressed one by one, since a graph has no loop over a number of images left open. So the time of suppression rises with
the square of the batch: 4,507 proposals an image on 5 levels take 0.03, 0.11, 0.39 and 1.7 s for 1, 2, 4 and 8 images, torchvision's
`batched_nms` 0.05, 0.08, 0.15 and 0.34 s (one thread of a CPU). Give a graph batches of one or two where that matters.

Shapes: B images, K boxes of each, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image, nms, roi_align
from torchvision.ops.poolers import LevelMapper

from compressvit.model.detectors.prediction import Detections

NONE = -1.0  # the score of a box that is left out
SMALLEST = 1e-2  # side of a detection, in pixels; torchvision's `postprocess_detections` has it as a number


def select(
    rpn: RegionProposalNetwork, heads: RoIHeads, images: Tensor, maps: Mapping[str, Tensor], limit: int
) -> Detections:
    """The detections of images (B, C, H, W) from their maps of the pyramid, as `FasterRCNN.answer` gives them."""
    height, width = images.shape[-2:]
    proposals, proposed = _proposals(rpn, images, maps)
    features = pooled(heads.box_roi_pool, maps, proposals, height)
    logits, changes = heads.box_predictor(heads.box_head(features))
    boxes = heads.box_coder.decode_single(changes, proposals.flatten(0, 1)).view(*proposals.shape[:2], -1, 4)
    boxes = clip_boxes_to_image(boxes, (height, width))[:, :, 1:]  # the first class is background
    scores = logits.softmax(-1).view(*proposals.shape[:2], -1)[:, :, 1:]
    sure = (scores > heads.score_thresh) & _larger(boxes, SMALLEST) & (proposed > NONE)[..., None]
    count = scores.shape[-1]
    classes = torch.arange(count, device=scores.device).repeat(scores.shape[1])
    found = (boxes.flatten(1, 2), scores.masked_fill(~sure, NONE).flatten(1))
    kept = _suppressed(*found, heads.nms_thresh, (height, width), classes, count)
    best, index = kept.topk(min(limit, heads.detections_per_img, kept.shape[1]), dim=1)
    nothing = best == NONE
    scale = torch.tensor([width, height, width, height], device=boxes.device)
    places = found[0].gather(1, index[..., None].expand(-1, -1, 4)) / scale
    return Detections(
        places.masked_fill(nothing[..., None], 0.0),
        best.masked_fill(nothing, 0.0),
        classes[index].masked_fill(nothing, 0),
    )


def _proposals(rpn: RegionProposalNetwork, images: Tensor, maps: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The boxes (B, K, 4) in pixels that the region proposal network is surest of, and their scores (B, K)."""
    size = images.shape[-2], images.shape[-1]
    levels = list(maps.values())
    objectness, changes = rpn.head(levels)
    counts = [math.prod(values.shape[1:]) for values in objectness]
    logits, deltas = concat_box_prediction_layers(objectness, changes)
    anchors = rpn.anchor_generator(ImageList(images, [size]), levels)[0].repeat(images.shape[0], 1)
    boxes = rpn.box_coder.decode_single(deltas, anchors).view(images.shape[0], -1, 4)
    logits = logits.view(images.shape[0], -1)
    index = _best_of_each(logits, counts, rpn.pre_nms_top_n())
    boxes = clip_boxes_to_image(boxes.gather(1, index[..., None].expand(-1, -1, 4)), size)
    scores = logits.gather(1, index).sigmoid()
    good = _larger(boxes, rpn.min_size) & (scores >= rpn.score_thresh)
    of_levels = (values.split(_sizes(counts, rpn), 1) for values in (boxes, scores.masked_fill(~good, NONE)))
    left = [_suppressed(part, found, rpn.nms_thresh, size) for part, found in zip(*of_levels, strict=True)]
    kept = torch.cat(left, dim=1)
    best, index = kept.topk(min(rpn.post_nms_top_n(), kept.shape[1]), dim=1)
    return boxes.gather(1, index[..., None].expand(-1, -1, 4)), best


def _sizes(counts: Sequence[int], rpn: RegionProposalNetwork) -> list[int]:
    return [min(rpn.pre_nms_top_n(), count) for count in counts]


def _best_of_each(logits: Tensor, counts: Sequence[int], most: int) -> Tensor:
    """Indices (B, K) of the `most` best of each level, whose values follow one another in `logits` (B, all)."""
    first, found = 0, []
    for values in logits.split(list(counts), 1):
        found.append(values.topk(min(most, values.shape[1]), dim=1).indices + first)
        first += values.shape[1]
    return torch.cat(found, dim=1)


def _larger(boxes: Tensor, side: float) -> Tensor:
    """(…, 4) -> (…): whether both sides of a box are at least so long."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= side).all(-1)


def _suppressed(
    boxes: Tensor,
    scores: Tensor,
    overlap: float,
    size: tuple[int, int],
    groups: Tensor | None = None,
    count: int = 1,
) -> Tensor:
    """The scores (B, K) of boxes (B, K, 4), `NONE` where one of a higher score in the same image and group overlaps by more.

    All are suppressed in one call, on a plane of tiles: the groups of an image as near to a square as can be, because float32 loses
    digits far from 0, and images one below the other. Two boxes that lie apart from everything are always kept: a graph with
    torchvision's `nms` fails where it keeps fewer than two.

    Args:
        size: height and width of an image in pixels.
        groups: (K,), from 0 to `count` - 1; None: all are in one.
    """
    columns = math.isqrt(count - 1) + 1
    rows = -(-count // columns)
    group = torch.zeros_like(scores[0], dtype=torch.long) if groups is None else groups
    image = torch.arange(boxes.shape[0], device=boxes.device)[:, None]
    across, down = group % columns * (size[1] + 1), (image * rows + group // columns) * (size[0] + 1)
    move = torch.stack(torch.broadcast_tensors(across, down), dim=-1).float()  # half precision ends at 65,504
    outside = move.new_tensor([[-2.0, -2.0, -1.0, -1.0], [-4.0, -4.0, -3.0, -3.0]])
    apart = torch.cat([(boxes.float() + torch.cat([move, move], dim=-1)).flatten(0, 1), outside])
    flat = torch.cat([scores.flatten(), scores.new_zeros(2)])
    candidates = torch.where(flat > NONE)[0]
    kept = candidates[nms(apart[candidates], flat[candidates].float(), overlap)]
    return torch.full_like(flat, NONE).index_copy(0, kept, flat[kept])[:-2].view_as(scores)


def pooled(pool: MultiScaleRoIAlign, maps: Mapping[str, Tensor], boxes: Tensor, height: int) -> Tensor:
    """What `MultiScaleRoIAlign` gives of boxes (B, K, 4) in pixels: (B · K, channels, side, side)."""
    levels = [values for name, values in maps.items() if name in pool.featmap_names]
    octaves = [round(math.log2(height / values.shape[-2])) for values in levels]
    number = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)[:, None, None]
    rois = torch.cat([number.expand(-1, boxes.shape[1], 1), boxes], dim=-1).flatten(0, 1)
    level_of = LevelMapper(octaves[0], octaves[-1], pool.canonical_scale, pool.canonical_level)([rois[:, 1:]])
    found = boxes.new_zeros(rois.shape[0], levels[0].shape[1], *pool.output_size)
    for level, (values, octave) in enumerate(zip(levels, octaves, strict=True)):
        index = torch.where(level_of == level)[0]
        part = roi_align(values, rois[index], pool.output_size, 2.0**-octave, pool.sampling_ratio)
        found = found.index_copy(0, index, part)
    return found
