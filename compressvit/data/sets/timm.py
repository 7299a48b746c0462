"""Whatever `timm.data.create_dataset` reads by name: `torch/cifar100`, `wds/…`, `hfds/…`, `tfds/…`."""

from __future__ import annotations

import importlib.util
from typing import Any

from timm.data import create_dataset

from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.files import expanded

# the packages that timm imports for a prefix only when it is used
_PREFIX_PACKAGES = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow_datasets", "wds": "webdataset"}


def open_timm(data: Data) -> tuple[Any, Any]:
    prefix = data.name.partition("/")[0].lower()
    package = _PREFIX_PACKAGES.get(prefix)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UserError(f"data.name={data.name} needs a package: pip install {package.replace('_', '-')}")
    if data.root is None and prefix in ("torch", "wds"):
        raise UserError(f"data.name={data.name} needs data.root=FOLDER, where the set is or is to be downloaded to")
    sources: list[Any] = []
    for option, split, batch_size in (
        ("train_split", data.train_split, data.batch_size),
        ("val_split", data.val_split, data.eval_batch_size or data.batch_size),
    ):
        asked = f"data.name={data.name}, data.{option}={split}, data.root={data.root}"
        try:
            source = create_dataset(
                data.name,
                root=data.root and str(expanded(data.root, "data.root")),
                split=split,
                is_training=not sources,
                download=data.download and prefix in ("torch", "tfds", "hfids"),
                batch_size=batch_size,
            )
            count = len(source)
        except Exception as error:  # each reader objects in its own way, always to what the recipe asked for
            way_out = "; data.download=true fetches it if it may be" if prefix == "torch" and not data.download else ""
            raise UserError(f"{asked}: {str(error) or type(error).__name__}{way_out}") from error
        if not count:
            raise UserError(
                f"{asked}: no samples, or the set does not say how many; the split of a WebDataset may end in the "
                "number, such as 'val-{000..007}.tar|5000'"
            )
        sources.append(source)
    return sources[0], sources[1]
