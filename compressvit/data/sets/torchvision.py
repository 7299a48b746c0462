"""Sets of torchvision that timm does not name: `torch/svhn`, `torch/flowers102`, `torch/food101`."""

from __future__ import annotations

from typing import Any

from torchvision.datasets import SVHN, Flowers102, Food101

from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.files import expanded

_TORCHVISION: dict[str, Any] = {
    "torch/svhn": (SVHN, 10),
    "torch/flowers102": (Flowers102, 102),
    "torch/food101": (Food101, 101),
}


def open_torchvision(data: Data) -> tuple[Any, Any]:
    """Sets of torchvision that timm does not name; their evaluation split is `test` unless the recipe names another."""
    kind, classes = _TORCHVISION[data.name]
    if data.root is None:
        raise UserError(f"data.name={data.name} needs data.root=FOLDER, where the set is or is to be downloaded to")
    found = []
    for option, split in (("train_split", data.train_split), ("val_split", data.val_split)):
        split = "test" if split == "validation" else split
        try:
            found.append(kind(str(expanded(data.root, "data.root")), split=split, download=data.download))
        except (
            RuntimeError,
            ValueError,
            OSError,
        ) as error:  # torchvision's words for a set or a split that is not there
            way_out = "" if data.download else "; data.download=true fetches it"
            raise UserError(
                f"data.name={data.name}, data.{option}={split}, data.root={data.root}: {error}{way_out}"
            ) from error
    for source in found:  # not all of them name their classes
        source.classes = list(getattr(source, "classes", map(str, range(classes))))
    return found[0], found[1]
