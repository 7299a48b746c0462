"""Images of other channels than 1, 3 and 4: `.npy` arrays and TIFFs of bands, what is refused of them, and where they are searched."""

from __future__ import annotations

import io
import logging
import struct
import sys
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from helpers.bands import bands, npy, npy_header, tiff
from helpers.images import CPU, PLAIN, epoch, picture
from PIL import Image

from compressvit.data.bands import Bands, picture_of
from compressvit.data.data_set import SETS, data_set
from compressvit.data.input import InputConfig
from compressvit.data.loaders import eval_loader, train_loader
from compressvit.data.opening import open_data
from compressvit.data.pictures import BrokenPicture, Read, picture_shape, read_picture
from compressvit.data.pixels import Pixels
from compressvit.data.spec import Data
from compressvit.data.tiff import INSTALL
from compressvit.errors import UserError

FIVE = InputConfig(5, 20, 24, (0.0,) * 5, (1.0,) * 5, "bicubic", 1.0)


def read(content: bytes, channels: int | None = None):
    return read_picture(io.BytesIO(content), channels=channels)


def pixels_of(content: bytes, channels: int | None = None) -> np.ndarray:
    image = read(content, channels)[0]
    return image.values if isinstance(image, Bands) else np.asarray(image)


# ---- arrays


@pytest.mark.parametrize(
    ("stored", "done"),
    [
        (lambda a: a, Read(0)),
        (np.asfortranarray, Read(0)),
        (lambda a: a.astype("<u2") * 257, Read.SIXTEEN_BITS),
        (lambda a: a.astype(">u2") * 257, Read.SIXTEEN_BITS),
        (lambda a: a.astype("<i4") * 257, Read.SIXTEEN_BITS),
        (lambda a: (a / 255).astype("<f4"), Read.FLOAT),
        (lambda a: a / 255, Read.FLOAT),
        (lambda a: (a / 255).astype(">f2"), Read.FLOAT),
    ],
    ids=["u1", "columns first", "u2", "big-endian u2", "i4", "f4", "f8", "f2"],
)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
def test_arrays_are_read_by_the_rules_of_pictures(stored, done, channels):
    values = bands(channels)
    assert values.std() > 20, "the test needs an image"
    image, how = read(npy(stored(values)), channels)
    assert isinstance(image, Image.Image) == (channels in (1, 3))
    assert np.array_equal(np.asarray(image) if channels in (1, 3) else image.values, values.squeeze())
    assert how == done


def test_arrays_of_gray_and_colour_are_pictures():
    gray, colour = read(npy(bands(1)[:, :, 0]), 3)[0], read(npy(np.asarray(picture(0))), 1)[0]
    assert (gray.mode, gray.size, colour.mode) == ("L", (24, 20), "RGB")
    assert np.array_equal(colour, picture(0))
    assert np.array_equal(read(npy(np.eye(4, dtype=bool)))[0], np.eye(4) * 255)


def test_values_of_sixteen_bits_and_floats_are_rounded_as_pillows():
    wide = np.arange(2**16, dtype=np.uint16).reshape(64, 128, 8)
    assert np.array_equal(pixels_of(npy(wide)), np.round(wide / 257))
    narrow = np.arange(2 * 5 * 400, dtype=np.uint16).reshape(20, 40, 5)  # below 4096
    assert read(npy(narrow))[1] == Read.SIXTEEN_BITS | Read.DARK


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros((4, 4, 5), np.int64), "its values are int64; uint8, 16 bits"),
        (np.zeros((4, 4, 5), np.int8), "its values are int8"),
        (np.zeros((4, 4), np.complex64), "its values are complex64"),
        (np.zeros((4, 4), [("a", "u1")]), "its values are fields"),
        (np.full((4, 4, 5), "x"), "its values are str32"),
        (np.full((4, 4, 5), -1, np.int16), "its integers reach from -1 to -1; 0 to 65535"),
        (np.full((4, 4, 5), 70_000, np.uint32), "its integers reach from 70000 to 70000"),
        (np.full((4, 4, 5), 2.5, np.float16), "its floats reach from 2.5 to 2.5; 0 to 1"),
        (np.array([[0, np.nan]]), "its floats reach from nan"),
        (np.zeros((0, 4, 5), np.uint8), "its shape is 0×4×5"),
        (np.zeros(4, np.uint8), "its shape is 4; "),
        (np.uint8(3), "its shape is that of a single number"),
        (np.zeros((1, 2, 3, 4), np.uint8), "its shape is 1×2×3×4; .height, width. and .height, width, channels. are"),
    ],
)
def test_arrays_without_a_rule_are_refused_by_name(values, words):
    with pytest.raises(BrokenPicture, match=words):
        read(npy(values))


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


def test_nothing_is_unpickled():
    file = io.BytesIO()
    np.save(file, np.array([[Bomb(), Bomb()]], object), allow_pickle=True)
    with pytest.raises(BrokenPicture, match="its values are Python objects"):
        read(file.getvalue())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy(bands(5))[:-1], "it is truncated: an array of 20×24×5 uint8 has 2,400 bytes, and 2,399 are there"),
        (npy(bands(5))[:60], "the header of the array is damaged"),
        (b"\x93NUMPY", "the header"),
        (b"\x93NUMPY\x09\x00" + npy(bands(5))[8:], "the header"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}", "the header"),
        (b"\x93NUMPY\x01\x00\xe8\x23" + b"-" * 9191 + b"1", "the header"),  # a MemoryError of Python's parser
        (b"\x93NUMPY\x01\x00\xe8\x03" + b"(" * 1000, "the header"),
        (npy_header((1000, 1000, 5)), "it is truncated: an array of 1000×1000×5 uint16 has 10,000,000 bytes, and 0"),
        (npy_header((10**6, 10**6)), "its shape is 1000000×1000000, which could be a decompression bomb"),
        (npy_header((8, 8, 10**9)), "its shape is 8×8×1000000000, which could"),
        (npy_header((2**40, 2**40, 2**40)), "could be a decompression bomb"),
        (npy_header((-4, 4, 5)), "its shape is -4×4×5"),
    ],
)
def test_a_damaged_array_takes_no_memory(content, words):
    tracemalloc.start()
    try:
        with pytest.raises(BrokenPicture, match=words):
            read(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**21  # measured up to 0.9 MB, of Python's parser of literals


def test_the_limit_is_pillows(monkeypatch):
    content = npy(bands(13))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 240)
    with pytest.raises(BrokenPicture, match=r"20×24×13, which could .* 480 pixels and 1,920 bytes"):
        read(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert pixels_of(content).shape == (20, 24, 13)


# ---- TIFF


@pytest.mark.parametrize("planar", [False, True], ids=["by pixel", "by band"])
@pytest.mark.parametrize(
    ("photometric", "channels"), [*(("minisblack", c) for c in (2, 4, 5, 6, 10)), *(("rgb", c) for c in (5, 6, 10))]
)
def test_tiffs_of_bands_are_read_whole(planar, photometric, channels):
    """Of those that are called colours Pillow reads the first three, and of those that are gray, by band, the first."""
    pytest.importorskip("tifffile")
    values = bands(channels)
    for kind in (np.uint8, np.uint16, np.float32):
        stored = values / 255 if kind is np.float32 else values.astype(np.uint16) * 257 if kind is np.uint16 else values
        for options in ({}, {"tile": (16, 16)}, {"compression": "zlib"}, {"byteorder": ">"}, {"bigtiff": True}):
            content = tiff(stored.astype(kind), planar=planar, photometric=photometric, **options)
            assert np.array_equal(pixels_of(content, channels), values), (kind, options)


def test_a_tiff_with_alpha_is_a_picture_as_before():
    pytest.importorskip("tifffile")
    values = bands(4)
    for channels in (None, 1, 3, 4):
        image = read(tiff(values, photometric="rgb"), channels)[0]
        assert image.mode == "RGBA"
        assert np.array_equal(image, values)
    with pytest.raises(BrokenPicture, match="it has 3 channels, and the model takes 5"):
        read(tiff(values[:, :, :3], photometric="rgb"), 5)
    for channels in (1, 3):  # as Pillow reads it
        assert read(tiff(bands(5), photometric="rgb"), channels)[0].mode == "RGB"


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize("planar", [False, True])
def test_bands_called_gray_are_no_picture_of_the_first(kind, planar):
    """Pillow reads the first of those that lie one after the other."""
    pytest.importorskip("tifffile")
    values = (bands(5) / (255 if kind is np.float32 else 1)).astype(kind)
    for channels in (1, 3, 4):
        with pytest.raises(BrokenPicture, match=f"it has 5 channels, and the model takes {channels}"):
            read(tiff(values, planar=planar), channels)
    colours, _ = read(tiff(values[:, :, :3], planar=planar), 3)
    assert np.array_equal(colours, bands(5)[:, :, :3])


def test_bands_are_not_pages():
    pages = [Image.fromarray(bands(1, seed=i)[:, :, 0]) for i in range(5)]
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(BrokenPicture, match="it has 1 channel, and the model takes 5; it has several pages, and bands"):
        read(file.getvalue(), 5)
    assert read(file.getvalue(), 3)[1] == Read.FRAMES


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_of_bands_are_turned_as_pillow_turns_those_of_colours(orientation):
    pytest.importorskip("tifffile")
    values, tags = bands(5), [(274, "H", 1, orientation, True)]
    five = pixels_of(tiff(values, extratags=tags), 5)
    three = np.asarray(read(tiff(values[:, :, :3], photometric="rgb", extratags=tags), 3)[0])
    assert np.array_equal(five[:, :, :3], three)


def test_without_the_package_a_tiff_of_bands_says_what_to_install(monkeypatch):
    pytest.importorskip("tifffile")
    content = tiff(bands(10))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    for channels in (None, 3, 10):
        with pytest.raises(BrokenPicture, match="it is a TIFF of 10 bands, which Pillow does not read") as told:
            read(content, channels)
        assert str(told.value).endswith(INSTALL)


def changed(content: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF with another number in a tag of its first page."""
    (place,) = struct.unpack("<I", content[4:8])
    (count,) = struct.unpack("<H", content[place : place + 2])
    for entry in range(place + 2, place + 2 + 12 * count, 12):
        if struct.unpack("<H", content[entry : entry + 2]) == (tag,):
            return content[: entry + 2] + struct.pack("<HII", 4, 1, value) + content[entry + 12 :]
    raise AssertionError(f"no tag {tag}")


def test_a_damaged_tiff_is_a_broken_picture(caplog):
    pytest.importorskip("tifffile")
    whole = tiff(bands(5))
    deflated = tiff(bands(5), compression="zlib")
    cases = {
        "it is truncated: its pixels are 2,400 bytes": whole[:1000],
        "it is truncated: the header": whole[:30],
        "could be a decompression bomb": changed(deflated, 256, 2**30),
        "its shape is .*×5, which could": changed(changed(whole, 256, 10**6), 257, 10**6),
        "its compression is LZMA": changed(deflated, 259, 34925),
        "imagecodecs": changed(deflated, 259, 5),  # LZW
        "Error -5 while decompressing": deflated[:500] + b"\0" * 300,
    }
    for words, content in cases.items():
        with caplog.at_level(logging.WARNING), pytest.raises(BrokenPicture, match=words):
            read(content, 5)
    assert not caplog.records, "tifffile logs what the picture's own error says"


def test_a_strip_that_unpacks_to_more_than_its_pixels_is_not_unpacked(monkeypatch):
    pytest.importorskip("tifffile")
    content = tiff(bands(5), compression="zlib")
    bomb = zlib.compress(b"\0" * 10**7)
    bombed = changed(changed(content, 273, len(content)), 279, len(bomb)) + bomb
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    with pytest.raises(BrokenPicture, match="more than its pixels, and could be a decompression bomb"):
        read(bombed, 5)
    assert np.array_equal(pixels_of(content, 5), bands(5))


# ---- in data sets


def test_the_shape_is_known_from_the_header(tmp_path):
    (tmp_path / "a.npy").write_bytes(npy(bands(5)))
    (tmp_path / "b.npy").write_bytes(npy(bands(1)[:, :, 0]))
    (tmp_path / "c.npy").write_bytes(b"\x93NUMPY")
    picture(0).save(tmp_path / "d.png")
    assert picture_shape(tmp_path / "a.npy", 5) == (20, 24, 5)
    assert picture_shape(tmp_path / "b.npy", 5) == (20, 24, 1)
    assert picture_shape(tmp_path / "c.npy", 5) is None
    assert picture_shape(tmp_path / "d.png", 5) == (20, 24, 3)
    pytest.importorskip("tifffile")
    for name, photometric in (("e.tif", "minisblack"), ("f.tif", "rgb")):
        (tmp_path / name).write_bytes(tiff(bands(5), photometric=photometric))
        assert picture_shape(tmp_path / name, 5) == (20, 24, 5)
    assert picture_shape(tmp_path / "e.tif", 3) == (20, 24, 5)
    assert picture_shape(tmp_path / "f.tif", 3) == (20, 24, 3)  # as Pillow reads it


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_other_channels_are_counted_and_told(tmp_path, workers, caplog):
    for i in range(8):
        np.save(tmp_path / f"{i}.npy", bands((5, 3, 5, 4, 5, 5, 5, 5)[i], seed=i))
    np.save(tmp_path / "8.npy", bands(1, (5, 24))[:, :, 0].repeat(1, 1)[:, :, None].repeat(7, 2))
    (tmp_path / "9.npy").write_bytes(npy(bands(5))[:-1])
    data = Data(name="images", root=str(tmp_path), val_fraction=0.5, batch_size=5, num_workers=workers, group_by="none")
    datasets = open_data(data)
    with caplog.at_level(logging.WARNING, logger="compressvit"):
        found = epoch(eval_loader(datasets, data, FIVE, CPU))[0], epoch(train_loader(datasets, data, FIVE, CPU))[0]
    assert [len(images) for images in found] == [2, 5]
    assert torch.equal((found[0][0] * 255).round().byte(), torch.from_numpy(bands(5, seed=5)).permute(2, 0, 1))
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert datasets.broken.count == len(caplog.records) == 4
    assert "1.npy: it has 3 channels, and the model takes 5" in told
    assert "3.npy: it has 4 channels, and the model takes 5" in told
    assert (
        "8.npy: it has 7 channels, and the model takes 5; its shape is 5×24×7, and that of an array is (height" in told
    )
    assert "9.npy: it is truncated" in told


def test_a_set_of_other_channels_is_refused_with_the_reason(tmp_path):
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", bands(4, seed=i))
    data = Data(name="images", root=str(tmp_path))
    with pytest.raises(UserError, match=r"3 consecutive .*0.npy \(it has 4 channels, and the model takes 3\)"):
        epoch(train_loader(open_data(data), data, PLAIN, CPU))


def test_pictures_in_memory_are_of_one_channel():
    data = Data(name="digits", batch_size=4)
    with pytest.raises(UserError, match="it has 1 channel, and the model takes 5"):
        epoch(eval_loader(open_data(data), data, FIVE, CPU))


@pytest.mark.parametrize(("arrays", "found"), [(None, 2), (True, 4), (False, 2)])
def test_arrays_beside_pictures_are_taken_if_asked_for(tmp_path, arrays, found):
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        for i in range(2):
            picture(i).save(tmp_path / split / "cat" / f"{i}.png")
            np.save(tmp_path / split / "cat" / f"{i}.npy", np.asarray(picture(i)))
    datasets = open_data(Data(name="images", root=str(tmp_path), arrays=arrays))
    assert len(datasets.train) == len(datasets.validation) == found
    notes = [note for note in datasets.found if note.what == "arrays"]
    assert [note.count for note in notes] == ([] if arrays else [2, 2])
    assert all("data.arrays=true" in note.text for note in notes)


def test_arrays_alone_are_images(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                np.save(tmp_path / split / name / f"{i}.npy", bands(5, seed=i))
    folders = Data(name="folder", root=str(tmp_path), batch_size=4)
    datasets = open_data(folders)
    expected = epoch(eval_loader(datasets, folders, FIVE, CPU))
    assert expected[1].tolist() == [0, 0, 1, 1]
    with pytest.raises(UserError, match=r"no images \(.jpg, .*, .npy\) can be found"):
        open_data(folders.model_copy(update={"arrays": False}))
    (tmp_path / "tars").mkdir()
    for split in ("train", "val"):
        with tarfile.open(tmp_path / "tars" / f"{split}.tar", "w") as tar:
            tar.add(tmp_path / split, arcname=split)
    (tmp_path / "tars" / "list.txt").touch()
    tars = folders.model_copy(update={"root": str(tmp_path / "tars")})
    found = epoch(eval_loader(open_data(tars), tars, FIVE, CPU))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    with pytest.raises(UserError, match="no images"):
        open_data(tars.model_copy(update={"arrays": False}))
    (tmp_path / "train.txt").write_text(
        "".join(f"val/{c}/{i}.npy {k}\n" for k, c in enumerate(("cat", "dog")) for i in (0, 1))
    )
    (tmp_path / "validation.txt").write_text((tmp_path / "train.txt").read_text())
    lists = Data(name="lists", root=str(tmp_path), batch_size=4)
    assert torch.equal(epoch(eval_loader(open_data(lists), lists, FIVE, CPU))[0], expected[0])


def test_a_registered_set_may_give_arrays(monkeypatch):
    len(SETS)  # found, so that what is added below can be taken out
    for table in ("_entries", "_modules"):
        monkeypatch.setattr(SETS, table, dict(getattr(SETS, table)))

    class Arrays(Pixels):
        def __getitem__(self, index):
            return bands(5, seed=index).astype(np.uint16) * 257, 0

    @data_set("arrays_of_bands", classes=2, full_frame=True)
    def open_arrays(data):
        return (Arrays(torch.zeros(2, 8, 8), torch.zeros(2, dtype=torch.long), ["a", "b"]),) * 2

    data = Data(name="arrays_of_bands", batch_size=2)
    datasets = open_data(data)
    images, _ = epoch(eval_loader(datasets, data, FIVE, CPU))
    assert torch.equal((images[1] * 255).round().byte(), torch.from_numpy(bands(5, seed=1)).permute(2, 0, 1))
    assert datasets.broken.notes()[0].what == "sixteen_bits"


def test_parts_of_bands_are_pictures():
    image, _ = picture_of(bands(5))
    assert [image.part(a, b).mode for a, b in ((0, 3), (3, 5), (4, 5))] == ["RGB", "RGB", "L"]
    assert np.array_equal(np.asarray(image.part(3, 5))[:, :, :2], image.values[:, :, 3:])
