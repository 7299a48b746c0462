"""From a picture and its annotation to the pixels of a model and the ground truth, moved alike. Transforms are torchvision's."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from compressvit.data import pictures
from compressvit.data.annotated import Annotation
from compressvit.data.class_masks import ClassMask
from compressvit.data.input import InputConfig
from compressvit.data.outlines import drawn, runs
from compressvit.data.spec import Augment
from compressvit.errors import UserError
from compressvit.tasks.precision import Runs

LEAST_SIDE = 1.0  # pixels of what an augmentation must leave of a box


def tensors(annotation: Annotation) -> dict[str, Any]:
    """An annotation's boxes (n, 4), classes and crowds as torchvision's `transforms.v2` takes them."""
    boxes = torch.tensor(annotation.boxes, dtype=torch.float64).reshape(-1, 4)
    return {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=annotation.size),
        "labels": torch.tensor(annotation.labels, dtype=torch.long),
        "crowd": torch.tensor(annotation.crowd, dtype=torch.bool),
    }


def _places(size: tuple[int, int]) -> dict[str, tv_tensors.Mask]:
    """The row and the column of every pixel of a picture, each float32 (H, W): moved as masks, they say which pixel each came from, so that
    the masks of many objects need not be moved, at the size on disk, all at once."""
    height, width = size
    rows, columns = torch.arange(height, dtype=torch.float32), torch.arange(width, dtype=torch.float32)
    return {"rows": tv_tensors.Mask(rows[:, None].expand(size)), "columns": tv_tensors.Mask(columns.expand(size))}


class PlacedTransform:
    """From a picture and its annotation to the pixels of a model and the ground truth of `tasks.detection` or `tasks.segmentation`, both
    moved alike.

    The picture is resized to the model's size, each side by itself. Transforms are torchvision's. A detector of masks also gets these: to
    train, `masks` (n, H, W) of bool, moved with the pixels; in evaluation `runs`, those of the picture on disk as run lengths. Of a mask of
    classes a pixel is the nearest one's; in evaluation it is that of the picture on disk.

    Args:
        config: the model's input.
        augment: None in evaluation.

    Raises:
        UserError: an augmentation that does not move boxes, a way of cropping that would lose some, or a model of bands.
    """

    def __init__(self, config: InputConfig, augment: Augment | None, *, exif: bool = False):
        if config.channels not in pictures.MODES:
            raise UserError(
                f"the model takes {config.channels} channels; boxes and masks are learned on pictures of 1, 3 or 4 channels"
            )
        if exif:
            raise UserError("data.exif=true would turn pictures away from their boxes and masks; leave it out")
        if config.crop_mode != "squash" or config.crop_pct != 1:
            raise UserError(
                f"data.crop_mode={config.crop_mode}, crop_pct={config.crop_pct:g} would cut objects off in evaluation; models of boxes and "
                "masks take crop_mode=squash, crop_pct=1"
            )
        self.channels, self.masks, self.training = config.channels, config.masks, augment is not None
        size = (config.height, config.width)
        how = v2.InterpolationMode(config.interpolation)
        if augment is None:
            self.move: Any = v2.Resize(size, interpolation=how)
            return
        for name in ("auto_augment", "translate"):
            if getattr(augment, name):
                raise UserError(
                    f"data.augment.{name} does not move boxes and masks; what does is scale, ratio, hflip, vflip, and color_jitter moves "
                    "nothing"
                )
        steps: list[Any] = [
            v2.RandomResizedCrop(size, augment.scale, augment.ratio, interpolation=how)
            if augment.scale
            else v2.Resize(size, how)
        ]
        steps += [v2.RandomHorizontalFlip(augment.hflip)] if augment.hflip else []
        steps += [v2.RandomVerticalFlip(augment.vflip)] if augment.vflip else []
        jitter = augment.color_jitter
        steps += [v2.ColorJitter(jitter, jitter, jitter)] if jitter else []
        self.move = v2.Compose(steps)

    def __call__(self, image: Image.Image, annotation: Any) -> tuple[torch.Tensor, Any]:
        """The pixels, uint8 (C, H, W), and the ground truth; an image without an annotation keeps its target."""
        image = pictures.to_channels(pictures.standard(image)[0], self.channels)
        if isinstance(annotation, ClassMask):
            return self._with_classes(image, annotation)
        if not isinstance(annotation, Annotation):
            return v2.functional.pil_to_tensor(self.move(image)), annotation
        target = tensors(annotation)
        if self.training:
            image, target = self._augmented(image, target, annotation)
            height, width = image.height, image.width
        else:  # the annotation's own boxes: what is small at the size of the model is to be found all the same
            image, (height, width) = self.move(image), annotation.size
            if self.masks and annotation.outlines:
                target["runs"] = _runs(annotation)
        boxes = target["boxes"].as_subclass(torch.Tensor) / torch.tensor([width, height, width, height])
        return v2.functional.pil_to_tensor(image), {
            **target,
            "boxes": boxes.float(),
            "size": torch.tensor(annotation.size),
        }

    def _with_classes(self, image: Image.Image, mask: ClassMask) -> tuple[torch.Tensor, torch.Tensor]:
        """The pixels, and the classes of these, uint8 (H, W); in evaluation those of the picture on disk."""
        values = torch.from_numpy(mask.values)
        if self.training:
            image, moved = self.move(image, tv_tensors.Mask(values))
            values = moved.as_subclass(torch.Tensor)
        else:
            image = self.move(image)
        return v2.functional.pil_to_tensor(image), values

    def _augmented(
        self, image: Image.Image, target: dict[str, Any], annotation: Annotation
    ) -> tuple[Image.Image, dict[str, Any]]:
        """Both moved alike, and of the ground truth what is left in the image."""
        outlines = annotation.outlines if self.masks else ()
        image, target = self.move(image, {**target, **(_places(annotation.size) if outlines else {})})
        places = [target.pop(name).as_subclass(torch.Tensor).long() for name in ("rows", "columns") if outlines]
        target["boxes"] = v2.functional.clamp_bounding_boxes(target["boxes"])
        sides = target["boxes"].as_subclass(torch.Tensor)
        kept = ((sides[:, 2:] - sides[:, :2]) >= LEAST_SIDE).all(dim=1)
        target = {name: value.as_subclass(torch.Tensor)[kept] for name, value in target.items()}
        if places:
            chosen = [outlines[i] for i in kept.nonzero().flatten().tolist()]
            target["masks"] = drawn(chosen, annotation.size, (places[0], places[1])).bool()
        elif self.masks:
            target["masks"] = torch.zeros(int(kept.sum()), image.height, image.width, dtype=torch.bool)
        return image, target


def _runs(annotation: Annotation) -> list[Runs | None]:
    """The masks of a picture's objects at its size on disk; None of an object without."""
    return [None if outline is None else runs(outline, annotation.size) for outline in annotation.outlines]
