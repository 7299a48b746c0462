"""Whatever `timm.data.create_dataset` reads by name: `torch/cifar100`, `wds/…`, `hfds/…`, `tfds/…`."""

from __future__ import annotations

from functools import partial

from torch.utils.data import Dataset

from compressvit.data.data_set import data_set
from compressvit.data.pictures import read_picture
from compressvit.data.sets.base import download_root
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.files import expanded

_TORCH = {
    "cifar10": 10,
    "cifar100": 100,
    "mnist": 10,
    "kmnist": 10,
    "qmnist": 10,
    "fashion_mnist": 10,
    "imagenet": 1000,
    "places365": 365,
    "inaturalist": None,
    "image_folder": None,
}


@data_set("tfds/NAME", package="tensorflow_datasets", streams=True)
@data_set("hfids/NAME", package="datasets", streams=True)
@data_set("hfds/NAME", package="datasets")
@data_set("wds/NAME", package="webdataset", streams=True)
def open_timm(data: Data) -> tuple[Dataset, Dataset]:
    """As timm reads it: prefixes, splits and roots mean what they mean there."""
    from timm.data import create_dataset
    from torchvision.datasets.folder import default_loader

    prefix = data.name.partition("/")[0].lower()
    if prefix in ("torch", "wds"):
        download_root(data)
    sources: list[Dataset] = []
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
                input_img_mode="RGB" if prefix == "tfds" else "",  # else `compressvit.data.pictures` converts
            )
            if getattr(source, "loader", None) is default_loader:
                source.loader = partial(read_picture, exif=data.exif)  # also what was done to read it, for `Samples`
            count = len(source)
        except Exception as error:  # each reader objects in its own way, always to what the recipe asked for
            way_out = (
                "; data.download=true downloads it if its licence allows it"
                if prefix == "torch" and not data.download
                else ""
            )
            raise UserError(f"{asked}: {str(error) or type(error).__name__}{way_out}") from error
        if not count:
            raise UserError(
                f"{asked}: no samples, or the set does not say how many; the split of a WebDataset may end in the "
                "number, such as 'val-{000..007}.tar|5000'"
            )
        sources.append(source)
    return sources[0], sources[1]


for _name, _classes in _TORCH.items():
    data_set(f"torch/{_name}", classes=_classes)(open_timm)
