"""Opens the data sets that a recipe can name, and checks them before anything is computed.

Map-style sets become `Samples`; streaming sets (WebDataset, TensorFlow and streaming Hugging Face datasets) stay timm's
`IterableImageDataset`.
"""

from __future__ import annotations

import gzip
import importlib.util
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.data import ImageDataset, IterableImageDataset, create_dataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset
from torchvision.datasets import SVHN, FashionMNIST, Flowers102, Food101

from compressvit.errors import UserError
from compressvit.files import expanded
from compressvit.lists import open_lists
from compressvit.samples import BrokenFiles, Pixels, Samples

if TYPE_CHECKING:
    from compressvit.data import Data

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TAR_IMAGE_TYPES = (".jpg", ".jpeg", ".png")  # as timm reads them
TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation", "eval", "evaluation", "test")
LAYOUT = """expected
  FOLDER/train/CLASS/*.jpg   (or FOLDER/train.tar, or a FOLDER/train/CLASS.tar for each class)
  FOLDER/val/CLASS/*.jpg     (or FOLDER/val.tar, …)
for images without classes use data.name=images"""
UNLABELED_LAYOUT = """expected images anywhere under FOLDER, or under FOLDER/train and FOLDER/val"""

FASHION_CACHE = Path("~/.cache/compressvit/fashion_mnist")
FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_FILES = tuple(f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))

_TORCHVISION: dict[str, Any] = {
    "torch/svhn": (SVHN, 10),
    "torch/flowers102": (Flowers102, 102),
    "torch/food101": (Food101, 101),
}

# the packages that timm imports for a prefix only when it is used
_PREFIX_PACKAGES = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow_datasets", "wds": "webdataset"}


@dataclass
class Datasets:
    """What `open_data` opened.

    Attributes:
        train, validation: `Samples`, or timm's `IterableImageDataset` for a streaming set.
        num_classes: the number of classes; None in an unlabeled set.
        class_names: names in target order, or None where the set does not say.
        labeled: False when every target is -1.
        broken: the files that could not be decoded so far.
    """

    train: Dataset
    validation: Dataset
    num_classes: int | None
    class_names: list[str] | None
    labeled: bool
    broken: BrokenFiles


def open_data(data: Data) -> Datasets:
    """Opens the training and the validation set that `data` names, and checks what can be checked without decoding.

    Raises:
        UserError: the folder is missing, empty or laid out differently, a package is missing, the classes of the two
            splits differ, there is only one class, or a label does not fit `data.num_classes`.
    """
    if data.name == "images":
        parts = _images(data)
        return Datasets(*parts, None, None, False, BrokenFiles(*parts))

    openers = {"digits": _digits, "fashion_mnist": _fashion_mnist, "folder": _folder, "lists": open_lists}
    other = _torchvision if data.name in _TORCHVISION else _timm
    sources: Any = openers.get(data.name, other)(data)
    class_names = _common_classes(sources, data.name)
    found = len(class_names) if class_names else None
    num_classes = data.num_classes or found
    if num_classes is None:
        raise UserError(f"data.name={data.name}: the set does not say how many classes it has; give data.num_classes=N")
    if found and found > num_classes:
        raise UserError(
            f"data.num_classes={num_classes}, but {data.name} has {found} classes; leave data.num_classes out, "
            f"or set {found}"
        )
    for source in sources:
        targets = getattr(source, "targets", None)
        if targets is not None:
            check_targets(torch.as_tensor(targets), num_classes, data.name)
    train = _limited(sources[0], data.limit_train, "limit_train")
    validation = _limited(sources[1], data.limit_val, "limit_val")
    return Datasets(train, validation, num_classes, class_names, True, BrokenFiles(train, validation))


def check_targets(targets: torch.Tensor, num_classes: int | None, name: str) -> None:
    """Raises UserError unless `targets` is (B,) and below `num_classes`; what is below 0 is no label."""
    if targets.ndim != 1:
        raise UserError(f"data.name={name}: each image must have one class, not a target of shape {targets.shape[1:]}")
    highest = int(targets.max()) if targets.numel() else -1
    if num_classes is not None and highest >= num_classes:
        raise UserError(
            f"data.name={name}: label {highest} is out of range for {num_classes} classes (0 to {num_classes - 1}); "
            f"set data.num_classes to {highest + 1} or more, or correct the labels"
        )


def _common_classes(sources: tuple[Any, Any], name: str) -> list[str] | None:
    train, validation = (_classes(source) for source in sources)
    if train and validation and train != validation:
        raise UserError(
            f"data.name={name}: the training and the validation split have different classes"
            f"\n  only in training: {_some(sorted({*train} - {*validation}))}"
            f"\n  only in validation: {_some(sorted({*validation} - {*train}))}"
            "\na target is the position of a class within its split, so both splits need the same class folders"
        )
    if train and len(train) == 1:
        raise UserError(f"data.name={name}: there is only one class, '{train[0]}', so nothing to tell apart; {LAYOUT}")
    return train


def _classes(source: Any) -> list[str] | None:
    """The class names of a source in target order, or None where it does not say."""
    holder = getattr(source, "reader", source)
    mapping = getattr(holder, "class_to_idx", None) or getattr(holder, "class_name_to_idx", None)
    if not mapping:
        return [str(name) for name in getattr(source, "classes", None) or ()] or None
    by_index: dict[int, str] = {}
    for name, index in mapping.items():  # ImageNet gives a class several names: the first is kept
        by_index.setdefault(int(index), str(name))
    return [by_index.get(i, str(i)) for i in range(max(by_index) + 1)]


def _some(names: Sequence[str], at_most: int = 5) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more if names else "none"


def _evenly(count: int, limit: int | None) -> Sequence[int]:
    return range(count) if limit is None or limit >= count else [i * count // limit for i in range(limit)]


def _limited(source: Any, limit: int | None, option: str) -> Dataset:
    if not isinstance(source, IterableImageDataset):
        return Samples(source, _evenly(len(source), limit))
    if limit is not None:
        raise UserError(
            f"data.{option}={limit}: a streaming set is read in the order of its shards and cannot be thinned out; "
            "name fewer shards in data.train_split or data.val_split"
        )
    return source


def _digits(data: Data) -> tuple[Pixels, Pixels]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = torch.from_numpy((digits.images * (255 / 16)).round().astype("uint8"))  # ink is stored as 0 to 16
    targets = torch.from_numpy(digits.target.astype("int64"))
    parts = train_test_split(range(len(targets)), test_size=0.2, random_state=0, stratify=targets)
    train, validation = (Pixels(pixels[part], targets[part], list("0123456789")) for part in parts)
    return train, validation


def _fashion_mnist(data: Data) -> tuple[Pixels, Pixels]:
    cache = FASHION_CACHE.expanduser()
    places = [cache, FASHION_DEBIAN] if data.root is None else [expanded(data.root, "data.root")]
    for folder in (f for place in places for f in (place / "FashionMNIST" / "raw", place)):
        if all((folder / f).is_file() or (folder / f"{f}.gz").is_file() for f in FASHION_FILES):
            return _read_fashion_mnist(folder)
    if data.download:
        try:
            FashionMNIST(str(places[0]), download=True)
        except (RuntimeError, OSError) as error:
            raise UserError(f"data.download=true: Fashion-MNIST could not be downloaded: {error}") from error
        return _read_fashion_mnist(places[0] / "FashionMNIST" / "raw")
    raise UserError(
        f"data.name=fashion_mnist: not found in {' or '.join(map(str, places))}; supply it in one of these ways"
        f"\n  data.root=FOLDER        with {FASHION_FILES[0]}[.gz] and its three companions, or with FashionMNIST/raw/"
        f"\n  {FASHION_CACHE}         the same, found without data.root"
        f"\n  apt-get install dataset-fashion-mnist        (Debian, Ubuntu; lands in {FASHION_DEBIAN})"
        "\n  data.download=true      fetches 30 MB"
    )


def _read_fashion_mnist(folder: Path) -> tuple[Pixels, Pixels]:
    # torchvision reads one layout of unpacked files. The copies made for it last only as long as the reading, so that
    # another set under the same file names can never be taken for this one later.
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        try:
            for name in FASHION_FILES:
                plain = folder / name
                with plain.open("rb") if plain.is_file() else gzip.open(f"{plain}.gz") as source:
                    (raw / name).write_bytes(source.read())
            sets = [FashionMNIST(scratch, train=train) for train in (True, False)]
        except (OSError, EOFError, zlib.error, RuntimeError, ValueError, TypeError, AssertionError, KeyError) as error:
            raise UserError(f"{folder}: the Fashion-MNIST files cannot be read ({error}); fetch them again") from error
    for part in sets:
        if len(part.data) != len(part.targets) or not len(part.data):
            raise UserError(f"{folder}: {len(part.data)} images, {len(part.targets)} labels; fetch the files again")
    train, validation = (Pixels(part.data, part.targets, FashionMNIST.classes) for part in sets)
    return train, validation


def _existing(data: Data) -> Path:
    """data.root as a folder that is there, or a UserError that says how to supply it."""
    layout = UNLABELED_LAYOUT if data.name == "images" else LAYOUT
    if data.root is None:
        raise UserError(f"data.name={data.name} needs data.root=FOLDER; {layout}")
    root = expanded(data.root, "data.root")
    if not root.is_dir():
        fault = "this is a file" if root.exists() else "there is no such folder"
        raise UserError(f"data.root={data.root}: {fault}; {layout}")
    return root


def _folder(data: Data) -> tuple[ImageDataset, ImageDataset]:
    root = _existing(data)
    opened = []
    for option, split, folders in (
        ("train_split", data.train_split, TRAIN_FOLDERS),
        ("val_split", data.val_split, VAL_FOLDERS),
    ):
        names = dict.fromkeys([split, *folders] if split in folders else [split])
        paths = [path for name in names for path in (root / name, root / f"{name}.tar") if path.exists()]
        if not paths:
            raise UserError(
                f"data.root={data.root}: nothing for data.{option}={split} (looked for {', '.join(names)}, as a folder "
                f"or .tar); found {_some(sorted(p.name for p in root.iterdir()))}; {LAYOUT}"
            )
        opened.append(_class_folders(paths[0]))
    return opened[0], opened[1]


def _class_folders(path: Path) -> ImageDataset:
    tars = path.is_file() or any(path.glob("*.tar"))
    try:
        if tars:
            # open tar files must not be shared with forked workers, and timm's index of large tars is a pickle
            reader = ReaderImageInTar(str(path), cache_tarfiles=False, cache_tarinfo=False)
            dataset = ImageDataset(str(path), reader=reader)
        else:
            dataset = create_dataset("", root=str(path), search_split=False, input_key=";".join(IMAGE_TYPES))
    except (RuntimeError, ValueError, AssertionError, OSError, tarfile.TarError) as error:
        types = ", ".join(TAR_IMAGE_TYPES if tars else IMAGE_TYPES)
        raise UserError(f"{path}: no images ({types}) can be found in it; {LAYOUT}") from error
    if "" in (_classes(dataset) or ()):
        raise UserError(f"{path}: images lie directly in it rather than in one folder per class; {LAYOUT}")
    return dataset


def _images(data: Data) -> tuple[Samples, Samples]:
    root = _existing(data)
    if (root / "train").is_dir() and (root / "val").is_dir():
        parts: Any = [(s, range(len(s))) for s in (_readable(root / split, data) for split in ("train", "val"))]
    else:
        source = _readable(root, data)
        count = len(source)
        if count < 2:
            raise UserError(f"data.root={data.root}: one image cannot be both trained on and held out; add images")
        every = round(1 / data.val_fraction)
        held_out = set(range(every - 1, count, every)) or {count - 1}
        parts = (source, [i for i in range(count) if i not in held_out]), (source, sorted(held_out))
    train, validation = (
        Samples(source, [part[i] for i in _evenly(len(part), limit)], labeled=False)
        for (source, part), limit in zip(parts, (data.limit_train, data.limit_val), strict=True)
    )
    return train, validation


def _readable(folder: Path, data: Data) -> Any:
    """All images in a folder or below it, whatever their folders are called."""
    try:
        return create_dataset("", root=str(folder), search_split=False, input_key=";".join(IMAGE_TYPES))
    except RuntimeError as error:
        raise UserError(f"data.root={data.root}: no images in {folder} or below ({', '.join(IMAGE_TYPES)})") from error


def _torchvision(data: Data) -> tuple[Any, Any]:
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


def _timm(data: Data) -> tuple[Any, Any]:
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
