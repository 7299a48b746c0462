"""A task and a data set as a package of somebody else's would offer them: how many rectangles an image has, and where the first is.

Targets have another form than classes: a mapping for each image, with a tensor of as many boxes as it has rectangles. A model's five
outputs are the number of rectangles and the first one's left, top, right and bottom, as fractions of the image.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from compressvit.data.data_set import data_set
from compressvit.tasks.base import Answers, Measure, Metrics, Task, task
from compressvit.tasks.quality import Quality

SIDE = 8


class Rectangles(Dataset):
    """Black images with none to three light rectangles, always the same."""

    def __init__(self, count: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.items = [self._item(number % 4, generator) for number in range(count)]

    @staticmethod
    def _item(rectangles: int, generator: torch.Generator) -> tuple[Image.Image, dict[str, torch.Tensor]]:
        pixels = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
        boxes = []
        for _ in range(rectangles):
            left, top = torch.randint(SIDE - 2, (2,), generator=generator).tolist()
            right, bottom = left + 2, top + 2
            pixels[top:bottom, left:right] = 200
            boxes.append([left, top, right, bottom])
        found = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) / SIDE
        return Image.fromarray(pixels.numpy()), {"boxes": found}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Image.Image, dict[str, torch.Tensor]]:
        return self.items[index]


@data_set("rectangles", task="count_and_box", full_frame=True)
def open_rectangles(data: Any) -> tuple[Dataset, Dataset]:
    return Rectangles(64, 0), Rectangles(32, 1)


class Errors(Metrics):
    """Mean absolute error of the number of rectangles."""

    def __init__(self, beside_teacher: bool):
        self.sums = dict.fromkeys(("count_error", "teacher_count_error") if beside_teacher else ("count_error",), 0.0)
        self.images = 0

    def add(self, outputs: Any, targets: Any, expected: Any | None) -> None:
        self.images += len(targets)
        for key, values in zip(self.sums, (outputs, expected), strict=False):
            self.sums[key] += sum(abs(float(v[0]) - len(t["boxes"])) for v, t in zip(values, targets, strict=True))

    def result(self) -> dict[str, float | None]:
        return {key: total / self.images for key, total in self.sums.items()}


class Found(Answers):
    measure = "count"

    def add(self, outputs: Any, targets: Any, expected: Any | None) -> torch.Tensor:
        self.outputs, self.targets = outputs.cpu(), targets
        return torch.tensor([abs(float(o[0]) - len(t["boxes"])) for o, t in zip(outputs, targets, strict=True)])

    def describe(self, index: int) -> dict[str, Any]:
        boxes = self.targets[index]["boxes"]
        return {
            "true": f"{len(boxes)} rectangles",
            "student": f"{float(self.outputs[index, 0]):.1f} rectangles",
            "boxes": boxes.tolist(),
        }

    def draw(self, picture: Image.Image, description: Any) -> Image.Image:
        drawn = picture.convert("RGB")
        for left, top, right, bottom in description["boxes"]:
            corners = (left * SIDE, top * SIDE, right * SIDE - 1, bottom * SIDE - 1)
            ImageDraw.Draw(drawn).rectangle(corners, outline=(255, 0, 0))
        return drawn


@task("count_and_box")
class CountAndBox(Task):
    qualities = (
        Quality("count_error", "error", "error of the number", "error of the number", "", 3, lower_is_better=True),
    )
    ranking = ("count_error",)
    graded = ("count_error",)
    measures: ClassVar = {
        "count": Measure("The images whose number of rectangles is most wrong.", lambda v: f"{v:.1f} off")
    }

    def fits(self, model: Any) -> bool:
        return getattr(model, "num_classes", 0) == 5

    def head_size(self, classes: int | None) -> int:
        return 5

    def loss(self, outputs: Any, targets: Any, smoothing: float = 0.0) -> torch.Tensor:
        losses = []
        for output, target in zip(outputs.float(), targets, strict=True):
            losses.append((output[0] - len(target["boxes"])).square())
            if len(target["boxes"]):
                losses.append((output[1:] - target["boxes"][0]).abs().sum())
        return torch.stack(losses).sum() / len(targets)

    def metrics(self, model: Any, teacher: Any | None, labelled: bool) -> Metrics:
        return Errors(teacher is not None)

    def answers(self, model: Any, names: Any, labelled: bool) -> Answers:
        return Found()
