"""`fashion_mnist`: 70,000 grey images of clothes, from the files of the original distribution."""

from __future__ import annotations

import gzip
import tempfile
import zlib
from pathlib import Path

from compressvit.data.data_set import data_set
from compressvit.data.pixels import Pixels
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.files import expanded

FASHION_CACHE = Path("~/.cache/compressvit/fashion_mnist")
FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_FILES = tuple(f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


@data_set("fashion_mnist", classes=10, full_frame=True)
def open_fashion_mnist(data: Data) -> tuple[Pixels, Pixels]:
    """From data.root, else from where compressvit or Debian keep it; with data.download=true fetched if it is there nowhere."""
    cache = FASHION_CACHE.expanduser()
    places = [cache, FASHION_DEBIAN] if data.root is None else [expanded(data.root, "data.root")]
    for folder in (f for place in places for f in (place / "FashionMNIST" / "raw", place)):
        if all((folder / f).is_file() or (folder / f"{f}.gz").is_file() for f in FASHION_FILES):
            return _read_fashion_mnist(folder)
    if data.download:
        from torchvision.datasets import FashionMNIST

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
    from torchvision.datasets import FashionMNIST

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
