"""Pictures whose ground truth lies at places in them: boxes and masks, which move with the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from compressvit.data import pictures
from compressvit.data.files import PictureFiles
from compressvit.data.input import InputConfig
from compressvit.data.notes import Note
from compressvit.data.pictures import BrokenPicture
from compressvit.data.spec import Augment
from compressvit.errors import UserError

LEAST_SIDE = 1.0  # pixels of what an augmentation must leave of a box


@dataclass(frozen=True)
class Annotation:
    """The ground truth of one picture.

    Attributes:
        size: height and width of the picture, in pixels.
        boxes: (x0, y0, x1, y1) of each object, in pixels.
        labels: its class, from 0.
        crowd: whether it stands for many objects that were not told apart.
    """

    size: tuple[int, int]
    boxes: tuple[tuple[float, float, float, float], ...]
    labels: tuple[int, ...]
    crowd: tuple[bool, ...]

    def tensors(self) -> dict[str, Any]:
        """The same as torchvision's `transforms.v2` takes it."""
        boxes = torch.tensor(self.boxes, dtype=torch.float32).reshape(-1, 4)
        return {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=self.size),
            "labels": torch.tensor(self.labels, dtype=torch.long),
            "crowd": torch.tensor(self.crowd, dtype=torch.bool),
        }


class AnnotatedFiles(PictureFiles):
    """Picture files with annotations: `samples` holds (path, `Annotation`)."""

    def __init__(self, samples: Sequence[tuple[str, Annotation]], classes: list[str], notes: Sequence[Note] = ()):
        self.samples: list[tuple[str, Any]] = list(samples)
        self.classes, self.notes = classes, list(notes)
        self.targets: Any = None  # they are not numbers


class PlacedTransform:
    """From a picture and its annotation to the pixels of a model and the ground truth of `tasks.detection`, both moved alike.

    The picture is resized to the model's size, each side by itself. Transforms are torchvision's.

    Args:
        config: the model's input.
        augment: None in evaluation.

    Raises:
        UserError: an augmentation that does not move boxes, or a way of cropping that would lose some.
    """

    def __init__(self, config: InputConfig, augment: Augment | None, *, exif: bool = False):
        if exif:
            raise UserError("data.exif=true would turn pictures away from their boxes; leave it out")
        if config.crop_mode != "squash" or config.crop_pct != 1:
            raise UserError(
                f"data.crop_mode={config.crop_mode}, crop_pct={config.crop_pct:g} would cut objects off in evaluation; detectors take "
                "crop_mode=squash, crop_pct=1"
            )
        self.channels = config.channels
        size = (config.height, config.width)
        how = v2.InterpolationMode(config.interpolation)
        if augment is None:
            self.move: Any = v2.Resize(size, interpolation=how)
            return
        for name in ("auto_augment", "translate"):
            if getattr(augment, name):
                raise UserError(
                    f"data.augment.{name} does not move boxes; detection takes scale, ratio, hflip, vflip, color_jitter"
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
        if not isinstance(annotation, Annotation):
            return v2.functional.pil_to_tensor(self.move(image)), annotation
        image, target = self.move(image, annotation.tensors())
        pixels = v2.functional.pil_to_tensor(image)
        height, width = pixels.shape[-2:]
        target["boxes"] = v2.functional.clamp_bounding_boxes(target["boxes"])
        sides = target["boxes"].as_subclass(torch.Tensor)
        kept = ((sides[:, 2:] - sides[:, :2]) >= LEAST_SIDE).all(dim=1)
        target = {name: value.as_subclass(torch.Tensor)[kept] for name, value in target.items()}
        target["boxes"] = target["boxes"] / torch.tensor([width, height, width, height])
        target["size"] = torch.tensor(annotation.size)
        return pixels, target


def require_size(image: Image.Image, annotation: Any) -> None:
    """Raise a `BrokenPicture` where a picture is not of the size that its annotation says."""
    if isinstance(annotation, Annotation) and (image.height, image.width) != annotation.size:
        height, width = annotation.size
        raise BrokenPicture(f"it has {image.width}×{image.height} pixels, and its annotations are for {width}×{height}")
