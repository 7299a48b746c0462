"""Sets of torchvision that timm does not name: `torch/svhn`, `torch/flowers102`, `torch/food101`."""

from __future__ import annotations

from torch.utils.data import Dataset

from compressvit.data.data_set import data_set
from compressvit.data.sets.base import download_root
from compressvit.data.spec import Data
from compressvit.errors import UserError

_CLASSES = {"torch/svhn": ("SVHN", 10), "torch/flowers102": ("Flowers102", 102), "torch/food101": ("Food101", 101)}


def open_torchvision(data: Data) -> tuple[Dataset, Dataset]:
    """Their evaluation split is `test` unless the recipe names another."""
    from torchvision import datasets

    name, classes = _CLASSES[data.name.lower()]
    kind, root = getattr(datasets, name), download_root(data)
    found = []
    for option, split in (("train_split", data.train_split), ("val_split", data.val_split)):
        split = "test" if split == "validation" else split
        try:
            found.append(kind(root, split=split, download=data.download))
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


for _name, (_, _count) in _CLASSES.items():
    data_set(_name, classes=_count)(open_torchvision)
