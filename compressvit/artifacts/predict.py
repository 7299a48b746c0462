"""What a model in ONNX says of image files. Written by `compressvit export`; needs onnxruntime, numpy and pillow alone.

    python MODEL_predict.py IMAGE…              the model is the file MODEL.onnx beside this one
    python MODEL_predict.py --json IMAGE…       for programs; features whole
    python MODEL_predict.py --masks FOLDER IMAGE…   also write the classes of pixels, of a model that gives these, to FOLDER/IMAGE.png

Size, normalisation and names of the classes are read from the model's file. IMAGE may be an array (height, width, channels) that numpy.save
wrote; for a model of other channels than 1, 3 and 4 it has to be.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
TEXTS = ("interpolation", "crop_mode")  # of the metadata; others may have added to them
NUMBERS = ("input_size", "mean", "std", "crop_pct", "outputs")
OPTIONAL = ("label_names", "exif")
# What Pillow may open, whatever a file is called: it starts other programs for some formats, as Ghostscript for PostScript.
FORMATS = [
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "DIB",
    "GIF",
    "TIFF",
    "PPM",
    "JPEG2000",
    "AVIF",
    "QOI",
    "PCX",
    "SGI",
    "ICO",
    "TGA",
]
BANDS = "bands are read from an array (height, width, channels) that numpy.save wrote"
TOP = 5  # classes that are told
SURE = 0.3  # score from which a detection is told


def open_model(file: Path) -> tuple[Any, dict]:
    """The model as onnxruntime's session, and what its file says of it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    said = session.get_modelmeta().custom_metadata_map
    if missing := [key for key in (*TEXTS, *NUMBERS) if key not in said]:
        raise ValueError(f"its metadata have no {missing[0]}, so it is not as `compressvit export` wrote it")
    numbers = {key: json.loads(said[key]) for key in (*NUMBERS, *OPTIONAL) if key in said}
    return session, {**numbers, **{key: said[key] for key in TEXTS}}


def read(file: Path, about: dict) -> Image.Image | np.ndarray:
    """The image in a file, turned as its EXIF block says where the model was made with such images; or the array in it.

    Raises:
        ValueError: it is damaged, or its array would have to be unpickled.
    """
    with open(file, "rb") as stream:
        is_array = stream.read(6) == b"\x93NUMPY"
    if is_array:
        try:  # mapped, so that no memory is taken for more than the file has
            return np.load(file, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # a damaged header leads to errors of every kind
            raise ValueError(f"its array cannot be read: {str(error) or type(error).__name__}") from error
    try:
        Image.init()
        with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            image.load()
            return ImageOps.exif_transpose(image) if about.get("exif") else image
    except UnidentifiedImageError as error:
        raise ValueError(f"it is no image of a format that is read ({', '.join(FORMATS)}); {BANDS}") from error


def prepare(image: Image.Image | np.ndarray, about: dict) -> np.ndarray:
    """An image as the model takes it: float32 (channels, height, width), resized and cropped as timm does in evaluation.

    Raises:
        ValueError: its values are not of 8 or 16 bits or floats from 0 to 1, or it has other channels than the model takes.
    """
    channels, height, width = about["input_size"]
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3) or not image.size:
            raise ValueError(f"its shape is {image.shape}, not (height, width) or (height, width, channels)")
        levels = _levels(image)
        levels = levels[:, :, 0] if levels.ndim == 3 and levels.shape[2] == 1 else levels
        if levels.ndim == 3 and levels.shape[2] != 3:
            return _bands(levels, about)
        image = Image.fromarray(levels)
    elif image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_levels(np.asarray(image)))
    if channels not in MODES:
        given = "1 channel" if image.mode in ("1", "L", "LA") else "3 channels"
        raise ValueError(f"it has {given}, and the model takes {channels}; {BANDS}")
    image = image.convert(MODES[channels])
    high, wide = (math.floor(side / about["crop_pct"]) for side in (height, width))
    border = about["crop_mode"] == "border"
    if about["crop_mode"] == "squash":
        size = (wide, high)
    elif border or high != wide:
        ratios = (image.height / high, image.width / wide)
        ratio = max(ratios) if border else min(ratios)
        size = (round(image.width / ratio), round(image.height / ratio))
    else:  # the shorter side becomes that long
        short = min(image.size)
        size = (int(high * image.width / short), int(high * image.height / short))
    if image.size != size:
        word = about["interpolation"].partition("-")[0]  # Pillow's 'nearest' is torch's 'nearest-exact'
        word = {"random": "bilinear"}.get(
            word, word
        )  # timm's: bilinear or bicubic by chance, and an answer is always the same
        image = image.resize(size, Image.Resampling[word.upper()])
    image = _centre(image, width, height, [round(255 * value) for value in about["mean"]] if border else [0] * channels)
    pixels = np.asarray(image, np.float32).reshape(height, width, channels).transpose(2, 0, 1)
    mean, std = (np.array(about[name], np.float32).reshape(-1, 1, 1) for name in ("mean", "std"))
    return (pixels - 255 * mean) / (255 * std)


def _bands(levels: np.ndarray, about: dict) -> np.ndarray:
    """Each channel of (height, width, channels) like a gray picture."""
    channels, height, width = about["input_size"]
    if levels.shape[2] != channels:
        raise ValueError(f"it has {levels.shape[2]} channels, and the model takes {channels}; {BANDS}")
    of_one = [
        {**about, "input_size": [1, height, width], "mean": [mean], "std": [std]}
        for mean, std in zip(about["mean"], about["std"], strict=True)
    ]
    return np.concatenate([prepare(Image.fromarray(levels[:, :, i].copy()), one) for i, one in enumerate(of_one)])


def _levels(values: np.ndarray) -> np.ndarray:
    """Values as uint8."""
    if values.dtype == np.uint8:
        return np.asarray(values)
    if values.dtype == bool:
        return values * np.uint8(255)
    if values.dtype.kind == "f":
        values = values.astype(np.float32) if values.dtype.itemsize < 4 else values
        return (_within(values, 1, "floats") * 255).round().astype(np.uint8)
    if values.dtype.name not in ("int16", "uint16", "int32", "uint32"):
        raise ValueError(f"its values are {values.dtype}; uint8, 16 bits of 0 to 65535, and floats of 0 to 1 are read")
    return ((_within(values, 65535, "integers").astype(np.int64) + 128) // 257).astype(np.uint8)


def _within(values: np.ndarray, most: int, what: str) -> np.ndarray:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= most):  # NaN is not
        raise ValueError(f"its {what} reach from {low:g} to {high:g}; 0 to {most} are read")
    return values


def _centre(image: Image.Image, width: int, height: int, fill: list[int]) -> Image.Image:
    """The middle of an image, with a border where it is too small."""
    if image.width < width or image.height < height:
        whole = Image.new(image.mode, (max(width, image.width), max(height, image.height)), tuple(fill))
        whole.paste(image, ((whole.width - image.width) // 2, (whole.height - image.height) // 2))
        image = whole
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def answer(found: dict[str, np.ndarray], size: tuple[int, int], about: dict) -> dict:
    """What the outputs for one image say: classes with probabilities, or of pixels with their share of the image, boxes in pixels of the
    image, or features."""
    names = about.get("label_names")
    if "logits" in found and found["logits"].ndim == 3:
        counts = np.bincount(found["logits"].argmax(0).ravel())
        most = [int(i) for i in np.argsort(-counts, kind="stable")[:TOP] if counts[i]]
        shares = counts / counts.sum()
        return {"pixels": [{"class": names[i] if names else i, "share": float(shares[i])} for i in most]}
    if "logits" in found:
        logits = found["logits"].astype(np.float64)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = [int(i) for i in np.argsort(-shares)[:TOP]]
        return {"classes": [{"class": names[i] if names else i, "probability": float(shares[i])} for i in best]}
    if "boxes" in found:
        sides = np.array([*size, *size])
        return {
            "objects": [
                {"class": names[label] if names else int(label), "score": float(score), "box": (box * sides).tolist()}
                for box, score, label in zip(found["boxes"], found["scores"], found["labels"], strict=True)
                if score >= SURE
            ]
        }
    return {"features": next(iter(found.values())).ravel().tolist()}


def mask_of(logits: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """The likeliest class of every pixel of an image of width and height `size`, of logits (classes, height, width), which are resized."""
    bilinear = Image.Resampling.BILINEAR
    resized = [np.asarray(Image.fromarray(part.astype(np.float32)).resize(size, bilinear)) for part in logits]
    return Image.fromarray(np.argmax(resized, axis=0).astype(np.uint8))


def in_words(said: dict) -> str:
    if "pixels" in said:
        return "  ".join(f"{row['class']} on {100 * row['share']:.1f} %" for row in said["pixels"])
    if "classes" in said:
        return "  ".join(f"{row['class']} {100 * row['probability']:.1f} %" for row in said["classes"])
    if "objects" in said:
        rows = [f"{row['class']} {row['score']:.2f} at {[round(x) for x in row['box']]}" for row in said["objects"]]
        return "  ".join(rows) or f"no object of a score of {SURE} or more"
    first = "  ".join(f"{value:.4f}" for value in said["features"][:4])
    return f"{len(said['features'])} features: {first} …"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path)
    here = Path(__file__)
    usual = here.with_name(f"{here.stem.removesuffix('_predict')}.onnx")
    parser.add_argument("--model", type=Path, default=usual, help=f"the file of the model (default: {usual.name})")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each image")
    parser.add_argument("--masks", metavar="FOLDER", type=Path, help="write the classes of pixels there, as IMAGE.png")
    arguments = parser.parse_args()
    try:
        session, about = open_model(arguments.model)
    except ValueError as error:
        parser.exit(2, f"{arguments.model}: {error}\n")
    for file in arguments.images:
        try:
            image = read(file, about)
            pixels = prepare(image, about)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            parser.exit(2, f"{file}: {error}\n")
        values = session.run(about["outputs"], {"images": pixels[None]})
        found = {name: value[0] for name, value in zip(about["outputs"], values, strict=True)}
        size = image.shape[1::-1] if isinstance(image, np.ndarray) else image.size
        said = answer(found, size, about)
        if arguments.masks is not None:
            if "pixels" not in said:
                parser.exit(2, f"{arguments.model}: --masks: it gives no classes of pixels; leave it out\n")
            arguments.masks.mkdir(parents=True, exist_ok=True)
            mask_of(found["logits"], size).save(arguments.masks / f"{file.stem}.png")
        print(json.dumps({"file": str(file), **said}) if arguments.json else f"{file}: {in_words(said)}")


if __name__ == "__main__":
    main()
