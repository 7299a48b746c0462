"""Whether the class folders of the images that `shrink` is given are labels of its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from compressvit.data.sets.folder import class_folders, folders_beside
from compressvit.data.spec import Data
from compressvit.errors import UserError, option


def labels_for(teacher: nn.Module, data: Mapping[str, Any]) -> tuple[str, bool]:
    """Whether labels are used for evaluation, in words too.

    Args:
        data: the recipe's section: `root`, and where folders in it are to be taken for classes, `val_fraction`.

    Raises:
        UserError: these folders cannot be the classes of the model.
    """
    classes = getattr(teacher, "num_classes", 0)
    fraction = data.get("val_fraction")
    found = class_folders(Data(name="folder", root=data["root"], val_fraction=fraction))
    if fraction is not None:
        _require_classes(found[0] if found else set(), classes, fraction)
    if found is None:
        folders = folders_beside(Data(name="folder", root=data["root"]))
        why = (
            f"the {folders} folders of the images are not taken for classes, which are folders in train/ and val/, or any with "
            f"{option('val_fraction', 0.1)}"
            if folders
            else "the images are not in train/ and val/ with a folder per class in each"
        )
        return f"no labels: {why}", False
    train, validation = found
    if not classes and (len(train) < 2 or not validation <= train):
        return (
            f"labels are not used: val/ has {len(validation)} class folders, not all of them among the {len(train)} of train/",
            False,
        )
    if not classes:
        return f"k-NN accuracy by the labels of {len(train)} class folders", True
    if len(train) != classes:
        return f"labels are not used: there are {len(train)} class folders, and the model has {classes} classes", False
    return f"accuracy by the labels of {len(train)} class folders", True


def _require_classes(names: set[str], classes: int, fraction: float) -> None:
    """Refuse folders that are to be taken for classes and cannot be those of the model, which has so many (0: no classifier)."""
    asked = option("val_fraction", fraction)
    if len(names) < 2:
        raise UserError(
            f"{asked} takes the folders directly in IMAGES for classes, and there are {len(names)}; leave it out"
        )
    if classes and classes != len(names):
        raise UserError(
            f"{asked} takes the folders directly in IMAGES for classes, and there are {len(names)}, where the model has {classes} classes; "
            "leave it out, and the images are used without labels"
        )
