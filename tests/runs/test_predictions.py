"""What is gathered of the predictions at the end of a run: counts, confusions, and the images that are kept."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch import nn

from compressvit.data.input import InputConfig
from compressvit.runs.files import PredictionsFile
from compressvit.runs.predictions import EXAMPLES, Predictions
from compressvit.tasks.base import TASKS
from compressvit.tasks.classification import ClassAnswers
from compressvit.tasks.features import Features

GREY = InputConfig(1, 8, 8, (0.5,), (0.25,), "bilinear", 1.0)
COLOUR = InputConfig(3, 224, 160, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), "bilinear", 1.0)


def logits(*rows):
    """Rows of probabilities as the logits that have them."""
    return torch.tensor(rows).log()


@pytest.fixture
def told(tmp_path):
    """Three classes of which the last has no image; the student takes b for a twice, the teacher once and a for b once."""
    seen = Predictions(GREY, ClassAnswers(3, ["a", "b"], labelled=True))
    a, b = [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]
    images = torch.stack([torch.full((1, 8, 8), level) for level in (-2.0, 0.0, 1.0, 2.0)])
    targets = torch.tensor([0, 0, 1, 1])
    for half in (slice(0, 2), slice(2, 4)):
        seen.add(images[half], targets[half], logits(a, a, a, a)[half], logits(a, b, a, [0.2, 0.7, 0.1])[half])
    seen.write(tmp_path)
    return json.loads((tmp_path / "predictions.json").read_text()), tmp_path


def test_accuracy_by_class(told):
    assert told[0]["classes"] == [
        {"class": "a", "images": 2, "teacher": 50.0, "student": 100.0},
        {"class": "b", "images": 2, "teacher": 50.0, "student": 0.0},
    ]
    assert told[0]["images"] == 4


def test_confusions_that_changed(told):
    assert told[0]["confusions"] == [
        {"true": "b", "answer": "a", "teacher": 1, "student": 2},
        {"true": "a", "answer": "b", "teacher": 1, "student": 0},
    ]
    assert told[0]["confusions_in_all"] == 2


def test_the_images_on_which_they_differ_most_come_first(told):
    content, folder = told
    assert content["measure"] == "shift"
    first, second, *rest = content["examples"]
    assert first["value"] == pytest.approx(0.7)
    assert (first["true"], first["student"]["class"], first["teacher"]["class"]) == ("a", "a", "b")
    assert first["teacher"]["probability"] == pytest.approx(0.8)
    assert second["value"] == pytest.approx(0.6)
    assert [one["value"] for one in rest] == [0, 0]
    levels = [Image.open(folder / one["file"]).getpixel((0, 0)) for one in content["examples"]]
    assert levels[:2] == [128, 255], "0 and 2 standard deviations above a mean of a half"
    assert sorted(levels[2:]) == [0, 191]


@pytest.mark.parametrize(
    ("channels", "mode", "drawn"),
    [
        (1, "L", None),
        (2, "L", "the first of 2, in gray"),
        (3, "RGB", None),
        (4, "RGB", None),
        (5, "RGB", "the first 3 of 5, as red, green and blue"),
    ],
)
def test_pictures_of_bands_show_the_first_of_them(tmp_path, channels, mode, drawn):
    config = InputConfig(channels, 8, 8, (0.0,) * channels, (1.0,) * channels, "bilinear", 1.0)
    seen = Predictions(config, ClassAnswers(2, ["a", "b"], labelled=True))
    levels = torch.arange(channels) / 10
    seen.add(levels.view(1, -1, 1, 1).expand(1, -1, 8, 8), torch.tensor([0]), logits([0.4, 0.6]), logits([0.6, 0.4]))
    seen.write(tmp_path)
    content = json.loads((tmp_path / "predictions.json").read_text())
    assert content.get("drawn") == drawn
    assert PredictionsFile.model_validate(content).drawn == drawn
    image = Image.open(tmp_path / content["examples"][0]["file"])
    assert image.mode == mode
    assert image.getpixel((0, 0)) == (0 if mode == "L" else (0, 26, 51))


def test_only_the_most_different_are_kept_of_many():
    seen = Predictions(GREY, ClassAnswers(2, None, labelled=True))
    for batch in torch.linspace(0.5, 0.95, 120)[torch.randperm(120, generator=torch.Generator().manual_seed(0))].split(
        7
    ):
        share = torch.stack([batch, 1 - batch], 1)
        seen.add(torch.zeros(len(batch), 1, 8, 8), torch.zeros(len(batch)).long(), share.log(), (share * 0 + 0.5).log())
    values = [one["value"] for one in seen.as_dict()["examples"]]
    assert values == pytest.approx((torch.linspace(0.5, 0.95, 120).flip(0)[:EXAMPLES] - 0.5).tolist(), abs=1e-4)


def test_a_student_on_its_own_shows_what_it_is_most_wrong_about(tmp_path):
    seen = Predictions(COLOUR, ClassAnswers(2, ["cat", "dog"], labelled=True))
    pixels = torch.randn(3, 3, 224, 160)
    seen.add(pixels, torch.tensor([0, 0, 1]), logits([0.9, 0.1], [0.2, 0.8], [0.4, 0.6]), None)
    seen.write(tmp_path)
    content = json.loads((tmp_path / "predictions.json").read_text())
    assert (content["measure"], content["compared"]) == ("loss", False)
    assert content["classes"][0] == {"class": "cat", "images": 2, "student": 50.0}
    assert content["confusions"] == [{"true": "cat", "answer": "dog", "student": 1}]
    assert content["examples"][0]["student"] == {"class": "dog", "probability": 0.8}
    assert Image.open(tmp_path / content["examples"][0]["file"]).size == (69, 96)


def test_headless_models_by_the_cosine_of_their_features(tmp_path):
    """The data has classes, which the models do not tell apart."""
    seen = Predictions(
        GREY, TASKS["features"].answers(nn.Identity(), ["cat", "dog"], labelled=True)
    )  # the data's classes, which the models do not tell apart
    ours, theirs = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    seen.add(torch.zeros(2, 1, 8, 8), torch.tensor([-1, -1]), Features(ours, None), Features(theirs, None))
    content = seen.as_dict()
    assert (content["measure"], content["classes"], content["confusions"]) == ("cosine", None, None)
    assert [one["value"] for one in content["examples"]] == [0, 1]
    assert set(content["examples"][0]) == {"file", "value"}


def test_backbones_without_pooling_are_only_counted(tmp_path):
    seen = Predictions(GREY, TASKS["features"].answers(nn.Identity(), None, labelled=False))
    maps = Features(torch.ones(2, 5, 4), None)
    seen.add(torch.zeros(2, 1, 8, 8), torch.tensor([-1, -1]), maps, maps)
    assert (seen.images, seen.as_dict()) == (2, {})


def test_a_picture_does_not_keep_its_batch():
    seen = Predictions(GREY, ClassAnswers(2, None, labelled=True))
    pixels = torch.zeros(50, 1, 8, 8)
    seen.add(pixels, torch.zeros(50, dtype=torch.long), torch.randn(50, 2), torch.randn(50, 2))
    kept = [entry[-1] for entry in seen._examples]
    assert kept
    assert all(picture.untyped_storage().nbytes() == 4 * 64 for picture in kept)


def test_outputs_that_are_not_numbers_are_still_written(tmp_path):
    seen = Predictions(GREY, ClassAnswers(2, None, labelled=True))
    seen.add(torch.zeros(1, 1, 8, 8), torch.tensor([1]), torch.tensor([[torch.nan, 0.0]]), logits([0.5, 0.5]))
    seen.write(tmp_path)
    assert json.loads((tmp_path / "predictions.json").read_text())["examples"][0]["value"] == 0.5


def test_nothing_is_written_where_there_is_nothing_to_tell(tmp_path):
    seen = Predictions(GREY, TASKS["features"].answers(nn.Identity(), None, labelled=False))
    seen.add(torch.zeros(2, 1, 8, 8), torch.tensor([-1, -1]), Features(torch.ones(2, 4), None), None)
    seen.write(tmp_path)
    assert list(tmp_path.iterdir()) == []
