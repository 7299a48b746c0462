"""Masks in COCO's format: they are drawn as pycocotools draws them, and what gives no mask is told before its C code sees it."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch
from helpers.mutate import Chance, with_odd_value
from PIL import Image
from pycocotools import mask as coco
from torch.utils._python_dispatch import TorchDispatchMode

from compressvit.data.annotated import Annotation
from compressvit.data.input import InputConfig
from compressvit.data.loaders import eval_loader, train_loader
from compressvit.data.opening import open_data
from compressvit.data.outlines import FAULTS, BadOutline, Outlines, drawn, read_outline, runs
from compressvit.data.placed_transform import PlacedTransform
from compressvit.data.sets.coco import _Annotations
from compressvit.data.spec import Augment, Data
from compressvit.errors import UserError

HEIGHT, WIDTH = 20, 40
SIZE = (HEIGHT, WIDTH)
CONFIG = InputConfig(3, 32, 32, (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0, "squash", masks=True)
SQUARE = [4, 2, 12, 2, 12, 8, 4, 8]


def run_lengths(mask: np.ndarray) -> list[int]:
    flat = mask.flatten(order="F").astype(int)
    edges = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    return np.diff([0, *edges, len(flat)]).tolist()


def encoded(mask: np.ndarray) -> str:
    return coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


@pytest.mark.parametrize("density", [0.003, 0.05, 0.5, 0.98, 1.0])
def test_run_lengths_are_read_as_pycocotools_reads_them(density):
    """Packed and as a list, on masks of several sizes, together with the box around them."""
    generator, seen = np.random.default_rng(0), 0
    for _ in range(40):
        height, width = generator.integers(1, 90, 2).tolist()
        mask = generator.random((height, width)) < density
        if not mask.any():
            continue
        seen += 1
        text = encoded(mask)
        for counts in (text, run_lengths(mask)):
            outline, around = read_outline({"size": [height, width], "counts": counts}, (height, width))
            assert outline == text.encode()
            x, y, across, down = coco.toBbox(coco.encode(np.asfortranarray(mask.astype(np.uint8)))).tolist()
            assert around == (x, y, x + across, y + down)
        assert torch.equal(drawn([outline], (height, width))[0].bool(), torch.from_numpy(mask))
    assert seen > 10


def test_polygons_are_drawn_as_pycocotools_draws_them():
    parts = [[3.2, 1.1, 20.7, 2.4, 18.1, 15.3], [30, 10, 39.5, 10, 39.5, 19.9, 30, 19.9], [-5, 5, 4, 5, 4, 9, -5, 9]]
    outline, around = read_outline(parts, SIZE)
    assert around == (-5, 1.1, 39.5, 19.9)
    expected = coco.decode(coco.merge(coco.frPyObjects(parts, *SIZE)))
    assert torch.equal(drawn([outline], SIZE)[0], torch.from_numpy(expected))
    assert drawn([outline, None], SIZE).flatten(1).any(1).tolist() == [True, False]


def test_a_polygon_of_many_corners_is_drawn():
    angles = np.linspace(0, 2 * np.pi, 20_000)
    corners = np.stack([20 + 9 * np.cos(angles), 10 + 9 * np.sin(angles)], 1).ravel().tolist()
    outline, _ = read_outline([corners], SIZE)
    assert drawn([outline], SIZE).sum() == pytest.approx(81 * np.pi, rel=0.05)


def rle(counts, size=SIZE):
    return {"size": list(size), "counts": counts}


AREA = HEIGHT * WIDTH
FULL = encoded(np.ones(SIZE))
BAD = {
    "a number": (3, "form"),
    "no polygon": ([], "polygon"),
    "a text": ("polygon", "form"),
    "no size": ({"counts": [AREA]}, "form"),
    "other size": (rle([0, AREA], (WIDTH, HEIGHT)), "size"),
    "long size": (rle([0, AREA], (HEIGHT, WIDTH, 1)), "size"),
    "too few": (rle([10, 20]), "runs"),
    "too many": (rle([10, AREA]), "runs"),
    "negative": (rle([10, -5, AREA - 5]), "runs"),
    "halves": (rle([0.5, AREA - 0.5]), "runs"),
    "no number": (rle([None, AREA]), "runs"),
    "words": (rle(["10", str(AREA - 10)]), "runs"),
    "huge": (rle([2**70, 1]), "runs"),
    "nested": (rle([[1, 2], [3]]), "runs"),
    "nothing": (rle([]), "runs"),
    "no counts": (rle(None), "runs"),
    "empty text": (rle(""), "runs"),
    "cut off": (rle(FULL[:-1]), "runs"),
    "longer": (rle(FULL + FULL), "runs"),
    "ends in the middle": (rle("P"), "runs"),
    "long number": (rle("o" * 20 + "0"), "runs"),
    "other characters": (rle("\x01\x02"), "runs"),
    "no ASCII": (rle("ä0"), "runs"),
    "nul": (rle("0\0"), "runs"),
    "empty mask": (rle([AREA]), "empty"),
    "empty packed": (rle(encoded(np.zeros(SIZE))), "empty"),
    "odd": ([[1, 2, 3, 4, 5, 6, 7]], "polygon"),
    "two corners": ([[1, 2, 3, 4]], "polygon"),  # which pycocotools takes for a box
    "one of several": ([SQUARE, [1, 2]], "polygon"),
    "flat": (SQUARE, "polygon"),
    "nan": ([[*SQUARE[:-1], math.nan]], "polygon"),
    "infinite": ([[*SQUARE[:-1], math.inf]], "polygon"),
    "both infinities": ([[math.inf, *SQUARE[1:-1], -math.inf]], "polygon"),
    "far": ([[*SQUARE[:-1], 1e9]], "polygon"),  # of which pycocotools would draw five points a pixel
    "far left": ([[-1e9, *SQUARE[1:]]], "polygon"),
    "texts": ([["1", "2", "3", "4", "5", "6"]], "polygon"),
    "a text of corners": (["123456"], "polygon"),
    "an object": ([{"x": 1}], "polygon"),
    "huge numbers": ([[*SQUARE[:-1], 10**400]], "polygon"),
    "to and fro": ([[0, 0, WIDTH, HEIGHT] * 20_000], "long"),
    "a line": ([[1, 1, 30, 1, 10, 1]], "empty"),
    "a sliver": ([[1, 1.01, 30, 1.01, 30, 1.02]], "empty"),
    "outside": ([[45, 2, 60, 2, 60, 8]], "empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_gives_no_mask_is_named(case):
    given, fault = BAD[case]
    with pytest.raises(BadOutline) as error:
        read_outline(given, SIZE)
    assert str(error.value) == fault
    assert fault in FAULTS


def test_damaged_texts_are_refused_or_drawn():
    """Whatever a text of run lengths becomes by one other character, it is told or gives a mask of the right size."""
    generator = np.random.default_rng(0)
    good = encoded(np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)) % 7 < 3)
    refused = 0
    for _ in range(300):
        place, code = int(generator.integers(len(good))), int(generator.integers(1, 127))
        text = good[:place] + chr(code) + good[place + 1 :]
        try:
            outline, _ = read_outline(rle(text), SIZE)
        except BadOutline:
            refused += 1
        else:
            assert drawn([outline], SIZE).shape == (1, *SIZE)
    assert refused > 200


@pytest.mark.parametrize("first", [0, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_in_a_sentence_or_read(tmp_path, first):
    """Whatever one value of a file becomes, or a key or a place; masks that are kept are drawn."""
    write(
        tmp_path, [{"segmentation": [SQUARE]}, {"segmentation": rle([10, 30, AREA - 40])}, {"segmentation": rle(FULL)}]
    )
    good, read = json.loads((tmp_path / "train.json").read_text()), 0
    for seed in range(first, 300 + 10 * first):
        content = with_odd_value(good, Chance(seed))
        try:
            found = _Annotations(tmp_path / "train.json", content).read(tmp_path, tmp_path / "train", outside=False)
        except UserError:
            continue
        for _, annotation in found.samples:
            read += annotation.size == SIZE and len(drawn(annotation.outlines, SIZE)) > 0
    assert read > 100


def test_a_short_name_tells_outlines_apart():
    first, second = (Outlines([read_outline([corners], SIZE)[0], None]) for corners in (SQUARE, [*SQUARE[:-1], 9]))
    assert repr(first) == repr(Outlines(first)) != repr(second)
    assert len({repr(first), repr(Outlines(first[:1])), repr(Outlines((None, first[0]))), repr(Outlines())}) == 4
    assert len(repr(first)) < 40
    assert pickle.loads(pickle.dumps(first)) == first


# ----------------------------------------------------------------------------------------------------- moved with the pixels


def placed(annotation: Annotation, picture: Image.Image, augment: Augment | None):
    return PlacedTransform(CONFIG, augment)(picture, annotation)


def scene():
    """A white L on black, and a mask that covers it."""
    mask = np.zeros(SIZE, dtype=bool)
    mask[4:16, 8:14], mask[12:16, 8:30] = True, True
    outline, around = read_outline(rle(encoded(mask)), SIZE)
    picture = Image.fromarray((mask * 255).astype(np.uint8)).convert("RGB")
    return (
        picture,
        Annotation(SIZE, (around, (0.0, 0.0, 5.0, 4.0)), (1, 0), (False, False), Outlines([outline, None])),
        mask,
    )


@pytest.mark.parametrize(
    "augment", [{}, {"hflip": 1.0}, {"vflip": 1.0}, {"scale": (0.6, 0.9), "ratio": (1.5, 2.5), "hflip": 0.5}]
)
def test_masks_move_with_the_pixels(augment):
    picture, annotation, _ = scene()
    for seed in range(5):
        torch.manual_seed(seed)
        pixels, target = placed(annotation, picture, Augment(**augment))
        i = target["labels"].tolist().index(1)
        mask, white = target["masks"][i], pixels[0] > 127
        assert target["masks"].dtype == torch.bool
        assert target["masks"].shape == (len(target["labels"]), 32, 32)
        assert (mask & white).sum() / (mask | white).sum() > 0.7  # nearest and bilinear differ at edges; measured 0.77


def test_evaluation_has_the_masks_of_the_picture_on_disk():
    picture, annotation, mask = scene()
    _, target = placed(annotation, picture, None)
    assert "masks" not in target
    assert (coco.decode(target["runs"][0]) == mask).all()
    assert target["runs"][1] is None


def test_a_model_of_boxes_gets_no_masks():
    picture, annotation, _ = scene()
    for augment in (Augment(), None):
        _, target = PlacedTransform(InputConfig(*CONFIG.size, *(None,) * 2, "bilinear", 1.0, "squash"), augment)(
            picture, annotation
        )
        assert sorted(target) == ["boxes", "crowd", "labels", "size"]


class _Largest(TorchDispatchMode):
    """The most bytes of a tensor that an operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return found


def test_many_objects_of_a_large_picture_take_no_more_memory_than_one():
    size, outline = (300, 400), read_outline([SQUARE], (300, 400))[0]
    picture, largest = Image.new("RGB", size[::-1]), []
    for count in (1, 40):
        objects = ((4.0, 2.0, 120.0, 80.0),) * count, (0,) * count, (False,) * count, Outlines([outline] * count)
        with _Largest() as seen:
            placed(Annotation(size, *objects), picture, Augment(scale=(0.5, 1.0), hflip=0.5))
        largest.append(seen.bytes)
    assert largest[0] == largest[1] > 0


def test_an_image_without_objects_has_no_masks():
    for augment in (Augment(scale=(0.5, 1.0)), None):
        _, target = placed(Annotation(SIZE, (), (), ()), Image.new("RGB", (WIDTH, HEIGHT)), augment)
        assert target["masks"].shape == (0, 32, 32) if augment else "runs" not in target


# ----------------------------------------------------------------------------------------------------- files of annotations


def write(root, segmentations, **options):
    """Two splits of one picture whose objects have these segmentations and the box of `SQUARE`."""
    for split in ("train", "val"):
        (root / split).mkdir(exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / split / "a.png")
        content = {
            "images": [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
            "annotations": [
                {"id": i, "image_id": 1, "category_id": 1 + i % 2, "bbox": [4, 2, 8, 6], **given}
                for i, given in enumerate(segmentations, 1)
            ],
            "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}],
        }
        (root / f"{split}.json").write_text(json.dumps(content))
    return Data(name="coco", root=str(root), batch_size=1, **options)


TOLD = {
    "none": ({}, "have no segmentation, so that no mask of theirs is learned or judged"),
    "null": ({"segmentation": None}, "have no segmentation"),
    "empty list": ({"segmentation": []}, "have no segmentation"),
    "form": ({"segmentation": "x"}, "have a segmentation that is neither polygons nor run lengths"),
    "polygon": (
        {"segmentation": [[1, 2, 3]]},
        "have a polygon that is not three or more pairs of numbers near its image",
    ),
    "size": ({"segmentation": rle([0, AREA], (WIDTH, HEIGHT))}, "have run lengths for an image of another size"),
    "runs": ({"segmentation": rle([3])}, "have run lengths that are damaged or do not fill the image"),
    "empty": ({"segmentation": rle([AREA])}, "have a mask without a pixel"),
    **{
        f"{side} of its box": (
            {"segmentation": [corners]},
            "have a mask that reaches out of the box by more than a pixel, first annotation 2; both were kept",
        )
        for side, corners in {
            "left": [1, 2, 12, 2, 12, 8],
            "above": [4, 0, 12, 0, 12, 8],
            "right": [4, 2, 30, 2, 30, 8],
            "below": [4, 2, 12, 2, 12, 12],
        }.items()
    },
}


@pytest.mark.parametrize("case", TOLD)
def test_an_object_without_a_mask_is_counted_and_keeps_its_box(tmp_path, case):
    given, text = TOLD[case]
    found = open_data(write(tmp_path, [{"segmentation": [SQUARE]}, given]))
    texts = [note.text for note in found.notes() if "train.json" in note.text and "mask" in note.text]
    assert len(texts) == 1
    assert texts[0].startswith(f"1 box of train.json {text}")
    assert "first annotation 2" in texts[0]
    annotation = found.train.source.samples[0][1]
    assert len(annotation.boxes) == 2
    assert (annotation.outlines[1] is None) == ("of its box" not in case)


def test_a_file_without_masks_is_no_fault(tmp_path):
    found = open_data(write(tmp_path, [{}, {"segmentation": None}]))
    assert not any("mask" in note.text for note in found.notes())
    assert found.train.source.samples[0][1].outlines == ()
    assert not found.train.source.outlined


def test_other_masks_are_other_data(tmp_path):
    first = open_data(write(tmp_path, [{"segmentation": [SQUARE]}] * 2)).fingerprint()
    assert first == open_data(write(tmp_path, [{"segmentation": [SQUARE]}] * 2)).fingerprint()
    assert (
        first
        != open_data(write(tmp_path, [{"segmentation": [SQUARE]}, {"segmentation": [[*SQUARE[:-1], 9]]}])).fingerprint()
    )


def test_batches_hold_masks(tmp_path):
    data = write(tmp_path, [{"segmentation": [SQUARE]}, {}], augment={"hflip": 0.5})
    datasets = open_data(data)
    ((_, (target,)),) = train_loader(datasets, data, CONFIG, torch.device("cpu"))
    assert target["masks"].flatten(1).any(1).tolist() == [True, False]
    ((_, (target,)),) = eval_loader(datasets, data, CONFIG, torch.device("cpu"))
    assert [runs is None for runs in target["runs"]] == [False, True]
    assert coco.area(target["runs"][0]) == coco.area(runs(read_outline([SQUARE], SIZE)[0], SIZE)) > 0
