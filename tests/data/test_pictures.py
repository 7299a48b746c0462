"""Picture files: which formats are read, what each mode becomes, and what is said of it."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers.images import CPU, GRAY, PLAIN, class_folders, epoch, picture
from PIL import Image, features
from sklearn.datasets import load_digits

from compressvit.data import pictures
from compressvit.data.input import InputConfig
from compressvit.data.loaders import eval_loader, train_loader
from compressvit.data.opening import open_data
from compressvit.data.pictures import BrokenPicture, read_picture, to_channels
from compressvit.data.spec import Augment, Data
from compressvit.errors import UserError

DIGITS = np.round(load_digits().images[:12] * (255 / 16)).astype("uint8")
RGBA = InputConfig(4, 20, 24, (0.0,) * 4, (1.0,) * 4, "bicubic", 1.0)
EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n0 0 moveto 9 9 lineto stroke\nshowpage\n%%EOF\n"
)


def stored(image: Image.Image, kind: str = "PNG", **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def images_of(root, config=GRAY, **section) -> torch.Tensor:
    data = Data(name="images", root=str(root), group_by="folder", **section)
    datasets = open_data(data)
    return epoch(eval_loader(datasets, data, config, CPU))[0]


@pytest.mark.parametrize("kind", ["I;16 png", "I tiff", "F tiff", "I;16B tiff", "pgm"])
def test_digits_of_more_bits_are_the_digits(tmp_path, kind):
    """The same digits, stored in 8 bits, and as value × 257 in 16, or as 0..1 in floats."""
    for name in ("eight", "more"):
        (tmp_path / name / "train").mkdir(parents=True)
        (tmp_path / name / "val").mkdir()
    for i, digit in enumerate(DIGITS):
        wide = digit.astype(np.uint16) * 257
        image, file = {
            "I;16 png": (Image.fromarray(wide), f"{i}.png"),
            "I tiff": (Image.fromarray(wide.astype(np.int32)), f"{i}.tif"),
            "F tiff": (Image.fromarray((digit / 255).astype(np.float32)), f"{i}.tiff"),
            "I;16B tiff": (Image.frombytes("I;16B", (8, 8), wide.astype(">u2").tobytes()), f"{i}.tif"),
            "pgm": (Image.fromarray(wide.astype(np.int32)), f"{i}.pgm"),
        }[kind]
        for part in ("train", "val"):
            Image.fromarray(digit).save(tmp_path / "eight" / part / f"{i}.png")
            image.save(tmp_path / "more" / part / file)
    assert torch.equal(images_of(tmp_path / "eight"), images_of(tmp_path / "more"))
    data = Data(name="images", root=str(tmp_path / "more"))
    datasets = open_data(data)
    assert datasets.broken.notes() == []
    epoch(eval_loader(datasets, data, GRAY, CPU))
    note = datasets.notes()[-1]
    assert (note.what, note.count) == ("float" if kind == "F tiff" else "sixteen_bits", 12)
    assert datasets.broken.count == 0


def test_values_are_rounded():
    wide = np.arange(2**16).reshape(256, 256)
    found, done = read_picture(stored(Image.fromarray(wide.astype(np.uint16))))
    assert np.array_equal(np.asarray(found), np.round(wide / 257))
    assert done == pictures.Read.SIXTEEN_BITS
    floats = np.linspace(0, 1, 1001, dtype=np.float32)[None]
    assert np.array_equal(np.asarray(read_picture(stored(Image.fromarray(floats), "TIFF"))[0]), np.round(floats * 255))


def test_what_every_mode_becomes():
    colour = picture(0)
    gray = colour.convert("L")
    palette = colour.quantize(8)
    clear = Image.merge("RGBA", (*colour.split(), Image.new("L", colour.size, 0)))
    cases = {
        "1": (gray.convert("1"), gray.convert("1").convert("RGB")),
        "L": (gray, gray.convert("RGB")),
        "LA": (clear.convert("LA"), clear.convert("LA").convert("RGB")),
        "P": (palette, palette.convert("RGB")),
        "RGBA": (clear, colour),
        "CMYK": (colour.convert("CMYK"), colour.convert("CMYK").convert("RGB")),
        "YCbCr": (colour.convert("YCbCr"), colour.convert("YCbCr").convert("RGB")),
    }
    for mode, (image, expected) in cases.items():
        kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
        found, done = read_picture(stored(image, kind))
        alpha, cmyk = pictures.Read.ALPHA, pictures.Read.CMYK
        assert done == {"LA": alpha, "RGBA": alpha, "CMYK": cmyk}.get(mode, 0), mode
        for channels, wanted in ((3, expected), (1, None), (4, None)):
            converted = to_channels(found, channels)
            assert converted.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
            if wanted is not None:
                assert np.array_equal(np.asarray(converted), np.asarray(wanted)), mode
    assert np.asarray(to_channels(clear, 4))[..., 3].max() == 0
    assert np.asarray(to_channels(colour, 4))[..., 3].min() == 255


def test_transparent_colours_of_a_palette_are_colours_without_alpha():
    palette = picture(0).quantize(8)
    found, done = read_picture(stored(palette, transparency=0))
    assert done == pictures.Read.ALPHA
    assert np.array_equal(np.asarray(to_channels(found, 3)), np.asarray(palette.convert("RGB")))
    alpha = np.asarray(to_channels(found, 4))[..., 3]
    assert np.array_equal(alpha == 0, np.asarray(palette) == 0)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.fromarray(np.array([[0, 70000]], np.int32)), "its integers reach from 0 to 70000"),
        (Image.fromarray(np.array([[-3, 5]], np.int32)), "its integers reach from -3 to 5"),
        (Image.fromarray(np.array([[0.0, 255.0]], np.float32)), "its floats reach from 0 to 255"),
        (Image.fromarray(np.array([[0.0, np.nan]], np.float32)), "its floats reach from nan"),
        (Image.new("LAB", (4, 4)), "mode LAB"),
    ],
)
def test_values_without_a_rule_are_refused(image, words):
    with pytest.raises(BrokenPicture, match=words):
        read_picture(stored(image, "TIFF"))


def test_nearly_black_images_of_sixteen_bits_are_counted(tmp_path):
    for i in range(4):
        Image.fromarray(np.full((8, 8), 4095 if i else 65535, np.uint16)).save(tmp_path / f"{i}.png")
    data = Data(name="images", root=str(tmp_path), val_fraction=0.5)
    datasets = open_data(data)
    epoch(train_loader(datasets, data, GRAY, CPU)), epoch(eval_loader(datasets, data, GRAY, CPU))
    assert {note.what: note.count for note in datasets.broken.notes()} == {"sixteen_bits": 4, "dark": 3}


UPRIGHT, TURNED = Image.Exif(), Image.Exif()
UPRIGHT[274], TURNED[274] = 1, 6
DAMAGED = {
    "no header": b"Exif\0\0garbage",
    "ends early": TURNED.tobytes()[:20],
    "a table elsewhere": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "no entries that fit": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1\2" * 30,
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [False, True])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_exif_block_is_counted(tmp_path, damage, exif):
    for i, block in enumerate((DAMAGED[damage], UPRIGHT, TURNED, TURNED.tobytes()[:-2], b"")):
        picture(i).save(tmp_path / f"{i}.jpg", exif=block)
    data = Data(name="images", root=str(tmp_path), exif=exif, val_fraction=0.5)
    datasets = open_data(data)
    images = [part[i][0] for part in (datasets.train, datasets.validation) for i in range(len(part))]
    assert sorted(image.size for image in images) == [(20, 24)] * 2 * exif + [(24, 20)] * (5 - 2 * exif)
    found = {note.what: note for note in datasets.broken.notes()}
    assert {what: note.count for what, note in found.items()} == {"turned": 2, "bad_exif": 1}
    assert found["bad_exif"].text == "1 image with a damaged EXIF block, " + (
        "so not turned" if exif else "which was ignored"
    )


def test_a_black_image_of_sixteen_bits_is_only_black():
    _, done = read_picture(stored(Image.fromarray(np.zeros((8, 8), np.uint16))))
    assert done == pictures.Read.SIXTEEN_BITS


def test_an_upright_picture_is_not_turned():
    found, done = read_picture(stored(picture(0), exif=UPRIGHT), exif=True)
    assert done == 0
    assert np.array_equal(np.asarray(found), np.asarray(picture(0)))


@pytest.mark.parametrize("exif", [False, True])
def test_an_orientation_is_applied_by_option(tmp_path, exif):
    turned = Image.Exif()
    turned[274] = 6
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png", exif=turned)
    data = Data(name="images", root=str(tmp_path), exif=exif)
    datasets = open_data(data)
    found = datasets.train[0][0]
    expected = picture(0).transpose(Image.Transpose.ROTATE_270) if exif else picture(0)
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    (note,) = datasets.broken.notes()
    assert (note.what, note.count) == ("turned", 1)
    assert ("ignored" in note.text) is not exif
    config = InputConfig(3, *found.size[::-1], (0.0,) * 3, (1.0,) * 3, "bicubic", 1.0)
    datasets.train, datasets.validation = datasets.validation, datasets.train
    pixels = epoch(eval_loader(datasets, data, config, CPU))[0]
    assert np.array_equal((pixels[0] * 255).round().byte().permute(1, 2, 0).numpy(), np.asarray(expected))


def test_every_format_is_read_and_found(tmp_path):
    written = {
        "JPEG2000": "jp2",
        "PPM": "pgm",
        "TIFF": "tif",
        "WEBP": "webp",
        "TGA": "tga",
        "PCX": "pcx",
        "SGI": "sgi",
        "DIB": "dib",
    }
    written |= {"PNG": "PNG", "GIF": "gif", "BMP": "bmp", "JPEG": "jfif", "ICO": "ico", "QOI": "qoi"}
    if features.check("avif"):
        written["AVIF"] = "avif"
    for kind, extension in written.items():
        (tmp_path / "train").mkdir(exist_ok=True)
        picture(0).convert("RGB").save(tmp_path / "train" / f"{kind}.{extension}", kind)
    (tmp_path / "val").mkdir()
    picture(1).save(tmp_path / "val" / "0.png")
    datasets = open_data(Data(name="images", root=str(tmp_path)))
    assert len(datasets.train) == len(written)
    assert [datasets.train.read(i)[0].size for i in range(len(written))] == [
        (16, 13) if kind == "ICO" else (24, 20) for kind in sorted(written, key=str.lower)
    ]
    assert set(written) <= set(pictures.FORMATS)


@pytest.mark.parametrize("kind", ["MSP", "XBM", "SPIDER", "ICNS"])
def test_no_other_format_is_read(kind):
    """Whatever a file is called, and though Pillow reads it."""
    file = stored(picture(0).convert({"MSP": "1", "XBM": "1", "SPIDER": "F"}.get(kind, "RGB")), kind)
    assert Image.open(file).format == kind
    with pytest.raises(BrokenPicture, match="it is not an image"):
        read_picture(file)


def test_the_first_frame_is_read():
    frames = [picture(i) for i in range(3)]
    found, done = read_picture(stored(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert done == pictures.Read.FRAMES
    assert np.array_equal(
        np.asarray(to_channels(found, 3)), np.asarray(Image.open(stored(frames[0], "GIF")).convert("RGB"))
    )


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program called gs, first on the path, that leaves a mark when it is started."""
    mark = tmp_path / "started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return mark


@pytest.mark.parametrize("name", ["folder", "images", "lists", "torch/image_folder"])
def test_an_eps_called_png_starts_no_program(tmp_path, ghostscript, name):
    root = class_folders(tmp_path / "set")
    for file in (root / "val" / "cat" / "0.jpg", root / "val" / "dog" / "3.jpg"):
        file.unlink()
        file.with_suffix(".png").write_bytes(EPS)
    for split in ("train", "val"):
        files = sorted((root / split).rglob("*.*"))
        (root / f"{split}.txt").write_text(
            "".join(f"{f.relative_to(root)} {int(f.parent.name == 'dog')}\n" for f in files)
        )
    data = Data(name=name, root=str(root), val_split="val")
    datasets = open_data(data)
    assert len(epoch(eval_loader(datasets, data, PLAIN, CPU))[0]) == 10
    assert sorted(path[-9:] for path in datasets.broken.paths) == ["cat/0.png", "dog/3.png"]
    assert not ghostscript.exists()


@pytest.mark.parametrize("name", ["folder", "torch/image_folder"])
def test_what_was_done_to_read_is_counted_whoever_lists_the_files(tmp_path, name):
    root = class_folders(tmp_path / "set")
    deep = root / "val" / "cat" / "deep.png"
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(deep)
    datasets = open_data(Data(name=name, root=str(root), val_split="val"))
    epoch(eval_loader(datasets, Data(name=name, root=str(root), val_split="val"), PLAIN, CPU))
    assert [(note.what, note.count) for note in datasets.broken.notes()] == [("sixteen_bits", 1)]


def test_other_packages_start_no_program_either(ghostscript):
    with pytest.raises(OSError, match="Ghostscript"):
        Image.open(io.BytesIO(EPS)).load()
    assert not ghostscript.exists()


def png_of(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_a_broken_image(tmp_path, caplog):
    root = class_folders(tmp_path)
    (root / "val" / "cat" / "0.png").write_bytes(png_of(60000, 60000))
    data = Data(name="folder", root=str(root))
    datasets = open_data(data)
    with caplog.at_level("WARNING", logger="compressvit"):
        assert len(epoch(eval_loader(datasets, data, PLAIN, CPU))[0]) == 12
    assert datasets.broken.paths == [str(root / "val" / "cat" / "0.png")]
    assert "could be decompression bomb DOS attack" in caplog.text


def test_a_model_of_four_channels_is_given_alpha(tmp_path):
    for i in range(4):
        image = picture(i).convert("RGBA" if i % 2 else "RGB")
        if i % 2:
            image.putalpha(7)
        image.save(tmp_path / f"{i}.png")
    data = Data(name="images", root=str(tmp_path), val_fraction=0.5)
    alpha = {}
    for make in (train_loader, eval_loader):
        images = epoch(make(open_data(data), data, RGBA, CPU))[0]
        assert images.shape == (2, 4, 20, 24)
        alpha[make] = {round(v * 255) for v in images[:, 3].unique().tolist()}
    assert alpha == {train_loader: {255}, eval_loader: {7}}
    policy = data.model_copy(update={"augment": Augment(auto_augment="rand-m9")})
    with pytest.raises(UserError, match="4 channels; set it to null"):
        train_loader(open_data(policy), policy, RGBA, CPU)
    digits = Data(name="digits", limit_val=3)
    images = epoch(
        eval_loader(open_data(digits), digits, InputConfig(4, 8, 8, (0.0,) * 4, (1.0,) * 4, "bicubic", 1.0), CPU)
    )[0]
    assert images[:, 3].min() == 1


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA", "JPEG2000", "ICO", "PCX", "SGI", "QOI"]
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_broken_pictures_and_nothing_else(kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    whole = stored(picture(0), kind).getvalue()
    rng = np.random.default_rng(0)
    broken = 0
    for trial in range(60):
        damaged = bytearray(whole[: rng.integers(1, len(whole))] if trial % 2 else whole)
        for place in rng.integers(0, min(len(damaged), 80), 3):
            damaged[place] = rng.integers(256)
        try:
            image, _ = read_picture(io.BytesIO(bytes(damaged)))
            assert to_channels(image, 3).mode == "RGB"
        except BrokenPicture:
            broken += 1
    assert broken > 10
