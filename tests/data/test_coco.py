"""Pictures with boxes in COCO's format: what is read, what is passed over and counted, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from PIL import Image

from compressvit.data.annotated import Annotation
from compressvit.data.input import InputConfig
from compressvit.data.loaders import eval_loader, train_loader
from compressvit.data.opening import open_data
from compressvit.data.placed_transform import PlacedTransform
from compressvit.data.spec import Augment, Data
from compressvit.errors import UserError
from compressvit.model.detectors.prediction import Detections
from compressvit.tasks.precision import Precision

WIDTH, HEIGHT = 40, 20
BASE = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 9, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [4, 2, 8, 6], "area": 48, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 18, "bbox": [20, 10, 10, 10], "area": 100, "iscrowd": 0},
        {"id": 3, "image_id": 9, "category_id": 18, "bbox": [0, 0, 40, 20], "area": 800, "iscrowd": 0},
    ],
    "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
}
CONFIG = InputConfig(3, 32, 32, (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0, "squash")


@pytest.fixture
def folder(tmp_path):
    """Two splits of two pictures each."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for image in BASE["images"]:
            Image.new("RGB", (WIDTH, HEIGHT), (10, 20, 30)).save(tmp_path / split / image["file_name"])
        write(tmp_path, BASE, split)
    return tmp_path


def write(folder, content, split="train"):
    (folder / f"{split}.json").write_text(content if isinstance(content, str) else json.dumps(content))


def opened(folder, **options):
    return open_data(Data(name="coco", root=str(folder), batch_size=2, **options))


def changed(**parts):
    return {**copy.deepcopy(BASE), **parts}


def with_box(**values):
    content = copy.deepcopy(BASE)
    content["annotations"][0].update(values)
    return content


def test_categories_become_classes_in_order_of_their_ids(folder):
    found = opened(folder)
    assert found.class_names == ["car", "dog"]
    assert found.num_classes == 2
    path, annotation = found.train.source.samples[0]
    assert path == str(folder / "train" / "a.png")
    assert annotation == Annotation((HEIGHT, WIDTH), ((4, 2, 12, 8), (20, 10, 30, 20)), (0, 1), (False, False))
    texts = [note.text for note in found.notes()]
    assert "category ids of train.json are not 1 to 2: 3 is class 0, 18 is class 1, …" in texts


def test_what_both_sets_say_is_said_once(folder):
    texts = [note.text for note in opened(folder, val_split="train").notes()]
    assert texts
    assert len(set(texts)) == len(texts)


def test_one_class_is_enough(folder):
    alone = [{**box, "category_id": 3} for box in BASE["annotations"]]
    for split in ("train", "val"):
        write(folder, changed(annotations=alone, categories=[{"id": 3, "name": "tree"}]), split)
    datasets = opened(folder)
    assert datasets.class_names == ["tree"]
    assert "one class: tree, the category of train.json" in [note.text for note in datasets.notes()]


def test_the_layout_of_coco_itself(folder):
    (folder / "annotations").mkdir()
    for split in ("train", "val"):
        (folder / f"{split}.json").rename(folder / "annotations" / f"instances_{split}2017.json")
        (folder / split).rename(folder / f"{split}2017")
    assert len(opened(folder).train) == 2


def test_boxes_move_with_the_pixels(folder):
    images, targets = next(
        iter(eval_loader(opened(folder), Data(name="coco", root=str(folder)), CONFIG, torch.device("cpu")))
    )
    assert images.shape == (2, 3, 32, 32)
    expected = torch.tensor([[4 / 40, 2 / 20, 12 / 40, 8 / 20], [0.5, 0.5, 0.75, 1.0]])
    assert torch.allclose(targets[0]["boxes"], expected)
    assert targets[0]["size"].tolist() == [HEIGHT, WIDTH]
    flip = PlacedTransform(CONFIG, Augment(hflip=1.0))
    picture = Image.new("RGB", (WIDTH, HEIGHT))
    picture.paste((255, 255, 255), (4, 2, 12, 8))
    pixels, target = flip(picture, Annotation((HEIGHT, WIDTH), ((4, 2, 12, 8),), (1,), (False,)))
    x0, y0, x1, y1 = (target["boxes"][0] * 32).round().int().tolist()
    assert (x0, x1) == (22, 29)  # 40 − 12 and 40 − 4, in 32 of 40
    assert pixels[:, y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].min() == 255
    assert pixels.float().mean() == pytest.approx(255 * 48 / 800, rel=0.05)


def test_what_is_small_for_the_model_is_to_be_found_all_the_same():
    """Average precision is pycocotools' on the annotations as they are: one object of two is found, at 51 of 101 recalls."""
    boxes = ((100.0, 100.0, 103.5, 130.0), (300.0, 200.0, 450.0, 350.0))
    annotation = Annotation((480, 640), boxes, (0, 0), (False, False))
    transform = PlacedTransform(InputConfig(3, 168, 168, (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0, "squash"), None)
    _, target = transform(Image.new("RGB", (640, 480)), annotation)
    scale = torch.tensor([640, 480, 640, 480])
    assert torch.equal(target["boxes"], (torch.tensor(boxes, dtype=torch.float64) / scale).float())
    precision = Precision(1)
    precision.add([Detections(target["boxes"][1:], torch.ones(1), target["labels"][1:])], [target])
    assert precision.result() == pytest.approx(dict.fromkeys(("ap", "ap50", "ap75"), 100 * 51 / 101))


def test_boxes_that_a_crop_leaves_out_are_gone():
    annotation = Annotation(
        (100, 100), ((0, 0, 30, 30), (70, 70, 100, 100), (45, 45, 55, 55)), (0, 1, 2), (False, False, True)
    )
    crop = PlacedTransform(CONFIG, Augment(scale=(0.1, 0.1), ratio=(1.0, 1.0)))
    kept = set()
    for seed in range(30):
        torch.manual_seed(seed)
        _, target = crop(Image.new("RGB", (100, 100)), annotation)
        assert ((target["boxes"] >= 0) & (target["boxes"] <= 1)).all()
        assert len(target["boxes"]) == len(target["labels"]) == len(target["crowd"]) < 3
        kept |= set(target["labels"].tolist())
    assert kept == {0, 1, 2}


def test_training_batches_hold_a_mapping_for_each_image(folder):
    data = Data(name="coco", root=str(folder), batch_size=2, augment={"hflip": 0.5, "color_jitter": 0.2})
    images, targets = next(iter(train_loader(open_data(data), data, CONFIG, torch.device("cpu"))))
    assert images.dtype == torch.float32
    assert [sorted(target) for target in targets] == [["boxes", "crowd", "labels", "size"]] * 2


PASSED_OVER = {
    "without an area": (
        with_box(bbox=[4, 2, 0, 6]),
        "1 box of train.json without an area were passed over, first annotation 1",
        1,
    ),
    "negative": (with_box(bbox=[4, 2, -3, 6]), "without an area", 1),
    "outside": (with_box(bbox=[60, 2, 8, 6]), "1 box of train.json outside their images were passed over", 1),
    "cut": (with_box(bbox=[30, 2, 18, 6]), "1 box of train.json reach out of their images and were cut at the edge", 2),
    "crowd": (with_box(iscrowd=1), "1 box of train.json of crowds", 2),
    "no image": (with_box(image_id=8), "1 box of images that train.json does not list were passed over", 1),
    "no number of an image": (with_box(image_id=[7]), "1 box of images that train.json does not list were passed", 1),
    "same id": (with_box(id=2), "1 box of train.json whose id another has, first 2; all were kept", 2),
    "empty": (
        changed(annotations=BASE["annotations"][:2]),
        "1 image of train.json without a box: background alone",
        2,
    ),
}


@pytest.mark.parametrize("case", PASSED_OVER)
def test_what_is_passed_over_is_counted(folder, case):
    content, text, boxes = PASSED_OVER[case]
    write(folder, content)
    found = opened(folder)
    assert any(text in note.text for note in found.notes()), [note.text for note in found.notes()]
    assert len(found.train.source.samples[0][1].boxes) == boxes


def test_a_box_that_reaches_out_is_cut(folder):
    write(folder, with_box(bbox=[30, -5, 18, 10]))
    assert opened(folder).train.source.samples[0][1].boxes[0] == (30, 0, 40, 5)


REFUSED = {
    "not json": ("{", "it is not JSON"),
    "a list": ([], "it has no list 'categories' of objects"),
    "no images": ({k: v for k, v in BASE.items() if k != "images"}, "it has no list 'images' of objects"),
    "no annotations": (
        {k: v for k, v in BASE.items() if k != "annotations"},
        "it has no list 'annotations' of objects",
    ),
    "numbers": (changed(annotations=[1]), "it has no list 'annotations' of objects"),
    "no categories": (changed(categories=[]), "its list 'categories' is empty"),
    "same image": (changed(images=BASE["images"][:1] * 2), "two entries of 'images' have the id 7"),
    "id": (
        changed(categories=[{"id": "x", "name": "dog"}]),
        "an entry of 'categories' has the id 'x', which is not a whole number",
    ),
    "category": (
        with_box(category_id=5),
        r"annotation 1 is of category 5, which is none of its categories \(3 to 18\)",
    ),
    "no number of a category": (with_box(category_id={}), r"annotation 1 is of category {}, which is none of its"),
    "no bbox": (with_box(bbox=None), r"annotation 1 has the bbox None, which is not \[x, y, width, height\] in pixels"),
    "three numbers": (with_box(bbox=[1, 2, 3]), r"has the bbox \[1, 2, 3\]"),
    "nan": (json.dumps(with_box(bbox=[1, 2, float("nan"), 4])), "has the bbox"),
    "height": (changed(images=[{**BASE["images"][0], "height": -1}, BASE["images"][1]]), "image 7 has the height -1"),
    "a truth": (changed(images=[{**BASE["images"][0], "width": True}, BASE["images"][1]]), "has the width True"),
    "longer than can be drawn": (
        changed(images=[{**BASE["images"][0], "width": 10**25, "height": 10**25}, BASE["images"][1]]),
        "image 7 has the height 10000000000000000000000000, which is not a number of pixels from 1 to 134,217,728",
    ),
    "larger than can be counted": (
        changed(
            images=[{**BASE["images"][0], "width": 100_000, "height": 100_000}, BASE["images"][1]],
            annotations=[
                {
                    **BASE["annotations"][0],
                    "segmentation": {"size": [100_000, 100_000], "counts": [0, 10**10]},
                }
            ],
        ),
        "image 7 has 100000×100000 pixels; pictures of up to 4,294,967,295 are read",
    ),
    "no picture": (
        changed(images=[{**BASE["images"][0], "file_name": "c.png"}, BASE["images"][1]]),
        "1 of its 2 pictures are not there",
    ),
    "outside": (
        changed(images=[{**BASE["images"][0], "file_name": "../../etc/passwd"}, BASE["images"][1]]),
        "outside .*data.outside=true",
    ),
    "no name": (
        changed(images=[{**BASE["images"][0], "file_name": 3}, BASE["images"][1]]),
        "image 7 has the file_name 3",
    ),
    "other classes": (changed(categories=[{"id": 18, "name": "dog"}, {"id": 3, "name": "cat"}]), "classes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_a_sentence(folder, case):
    content, text = REFUSED[case]
    write(folder, content)
    with pytest.raises(UserError, match=text):
        opened(folder)


def test_a_split_that_is_not_there(folder):
    with pytest.raises(
        UserError, match=r"data.val_split=minival: there are no annotations of that split in .*expected"
    ):
        opened(folder, val_split="minival")
    (folder / "extra.json").write_text("{}")
    with pytest.raises(UserError, match=r"extra.json is there, but no folder .*extra with its pictures"):
        opened(folder, train_split="extra")


def test_a_picture_of_another_size_is_broken(folder, caplog):
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "val" / "b.png")
    data = Data(name="coco", root=str(folder))
    found = open_data(data)
    ((images, targets),) = eval_loader(found, data, CONFIG, torch.device("cpu"))
    assert len(images) == len(targets) == 1
    assert found.broken.paths == [str(folder / "val" / "b.png")]
    assert "it has 20×40 pixels, and its annotations are for 40×20" in caplog.text


@pytest.mark.parametrize(
    ("augment", "text"),
    [
        ({"auto_augment": "rand-m9"}, "data.augment.auto_augment does not move boxes"),
        ({"translate": 2}, "translate does not move"),
    ],
)
def test_augmentations_that_do_not_move_boxes_are_refused(augment, text):
    with pytest.raises(UserError, match=text):
        PlacedTransform(CONFIG, Augment(**augment))
