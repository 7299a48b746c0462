"""The recipe's `data` section: which images, and how they are augmented."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic.config import JsonDict

from compressvit.data.data_set import SETS, find_set, list_of_sets
from compressvit.spec import Spec
from compressvit.tasks.base import find_task

Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]

MOST_CHANNELS = 2**16  # as many as a TIFF can have
VAL_FRACTION = 0.1  # of `images` without a val/, where the recipe does not say


class Augment(Spec):
    """Augmentation of training images. By default there is none: images are resized and cropped as in evaluation."""

    scale: tuple[float, float] | None = Field(
        default=None, description="Area of the random resized crop, as fractions of the image; none = no random crop."
    )
    ratio: tuple[float, float] = Field(default=(3 / 4, 4 / 3), description="Aspect ratios of the random resized crop.")
    hflip: float = Field(default=0.0, ge=0, le=1, description="Probability of a left-right flip.")
    vflip: float = Field(default=0.0, ge=0, le=1, description="Probability of an upside-down flip.")
    translate: int = Field(
        default=0,
        ge=0,
        le=2**16,
        description="Random shift by up to this many pixels each way, filled with zero (black).",
    )
    color_jitter: float | None = Field(
        default=None,
        ge=0,
        description="Strength of brightness, contrast and saturation jitter; timm skips it if auto_augment is set.",
    )
    auto_augment: str | None = Field(
        default=None,
        description="A timm policy: rand-m9-mstd0.5-inc1, augmix-m3-w3, original, 3a, …; none = no policy.",
    )
    repeats: int = Field(
        default=1,
        ge=1,
        description="Repeated augmentation (DeiT: 3): an epoch has each of 1/repeats of the images so many times, differently augmented.",
    )
    random_erasing: float = Field(
        default=0.0, ge=0, le=1, description="Probability that a rectangle of the image is erased."
    )
    erasing_mode: Literal["pixel", "rand", "const"] = Field(
        default="pixel", description="Erase with noise per pixel, one random colour, or the mean colour."
    )
    erasing_count: int = Field(default=1, ge=1, description="At most this many rectangles per image.")
    interpolation: Interpolation | Literal["random"] = Field(
        default="bicubic",
        description="Resampling in the random crop and in auto_augment; random = bilinear or bicubic by chance.",
    )

    @field_validator("scale", "ratio")
    @classmethod
    def _is_range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < value[0] <= value[1]:
            raise ValueError(f"{list(value)} is not a range: give [low, high] with 0 < low <= high")
        return value

    @field_validator("scale")
    @classmethod
    def _is_area(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[1] > 1:
            raise ValueError(f"{list(value)}: a crop cannot be larger than the image; give fractions up to 1.0")
        return value

    @field_validator("auto_augment")
    @classmethod
    def _is_policy(cls, value: str | None) -> str | None:
        if value is None:
            return None
        from timm.data import create_transform

        try:
            create_transform(32, is_training=True, auto_augment=value)
        except Exception as error:  # timm parses the text with asserts and conversions
            raise ValueError(
                f"'{value}' is not a policy that timm knows ({error}); for example "
                "rand-m9-mstd0.5-inc1, augmix-m3-w3 or original"
            ) from error
        return value


class Clip(Spec):
    """Which frames of a video are a clip. How many a clip has is what the model takes (`frames` of the model `video`)."""

    sampling: Literal["dense", "segments"] = Field(
        default="dense",
        description="dense: frames at a stride, from a random place in training and from the middle in evaluation (Kinetics); segments: "
        "one frame of each of as many equal parts of the video as a clip has frames, a random one in training and the middle one in "
        "evaluation (TSN; Something-Something).",
    )
    stride: int = Field(
        default=4, ge=1, le=2**16, description="Frames from each that is taken to the next, of dense sampling."
    )
    views: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Clips in time of each video in evaluation, whose logits a model of clips averages. Published figures: 5 on Kinetics, "
        "2 on Something-Something.",
    )
    crops: Literal[1, 3] = Field(
        default=1,
        description="Crops of each of these clips: the centre as of images, or 3 squares along the longer side, as in published figures.",
    )

    @property
    def shown(self) -> int:
        """How many clips of a video an evaluation shows."""
        return self.views * self.crops


def _describe_names(schema: JsonDict) -> None:
    """Say in the schema which sets there are; the registry is not read before somebody asks."""
    schema["description"] = list_of_sets()


class Data(Spec):
    """The data set and how it is loaded."""

    name: str = Field(description="A data set", json_schema_extra=_describe_names)
    task: str | None = Field(
        default=None,
        description="What a model's outputs mean; none = the task of the set, mostly classification, or features for a model without "
        "a classifier.",
    )
    root: str | None = Field(
        default=None, description="Folder of the set; ~ is the home folder. Not needed for digits."
    )
    download: bool = Field(
        default=False, description="Download the set into root if it is missing and its licence allows it."
    )
    train_split: str = Field(default="train", description="Name of the training split.")
    val_split: str = Field(
        default="validation", description="Name of the validation split; folder also finds val/, valid/, test/."
    )
    batch_size: int = Field(default=64, ge=1, le=2**20, description="Images per training batch, per process.")
    eval_batch_size: int | None = Field(
        default=None, ge=1, le=2**20, description="Images per evaluation batch; none = batch_size."
    )
    num_workers: int = Field(
        default=0, ge=0, le=1024, description="Processes that load images; 0 = the training process loads them."
    )
    num_classes: int | None = Field(
        default=None, ge=2, description="Number of classes, if the set does not say or has gaps."
    )
    classes: str | None = Field(
        default=None,
        description="Order of the classes of `folder`: natural (as timm: 2 before 10; the default), plain (as torchvision: 10 before 2), "
        "or a file with one class name per line. For other sets, such a file names the classes.",
    )
    reduce_zero_label: bool = Field(
        default=False,
        description="Of masks of classes (`segmentation`): 0 is ignored and 1 the first class, as in ADE20K; 255 is always ignored.",
    )
    outside: bool | None = Field(
        default=None,
        description="Read images outside root. none: only through links; true: also by absolute paths and ../ in lists; false: never. "
        "Such images are counted.",
    )
    exif: bool = Field(
        default=False,
        description="Rotate images by their EXIF orientation; false ignores it, as torchvision and timm do.",
    )
    arrays: bool | None = Field(
        default=None,
        description="Search folders and tar files for .npy arrays, too. none: where there are no pictures; true: also beside pictures; "
        "false: never. Lists name what they mean.",
    )
    mean: tuple[float, ...] | None = Field(
        default=None, description="Mean of each channel in 0..1, or one for all; none = the model's."
    )
    std: tuple[float, ...] | None = Field(
        default=None, description="Standard deviation of each channel in 0..1, or one for all; none = the model's."
    )
    crop_pct: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Evaluation: fraction of the resized image kept by the centre crop; none = the model's.",
    )
    crop_mode: Literal["center", "squash", "border"] | None = Field(
        default=None,
        description="Evaluation: timm's center (resize the shorter side, crop), squash (resize both sides) or border; none = the model's.",
    )
    interpolation: Interpolation | None = Field(default=None, description="Evaluation: resampling; none = the model's.")
    val_fraction: float | None = Field(
        default=None,
        gt=0,
        le=0.5,
        description="Hold out so much of a set that has no validation split, in whole photographs (see group_by). `folder` takes the "
        "folders directly in root, or in train/, for classes, and `lists` splits train_split: by a hash of the names of the files, so that "
        "nothing changes sides where others are added. `images`: every 1/val_fraction-th photograph, every tenth where this is none; by "
        "the hash with test_fraction.",
    )
    test_split: str | None = Field(
        default=None,
        description="Name of a test split, for `folder`, `lists` and `images`: the figures at the end are of its images, and nothing is "
        "chosen on them. none = they are of the validation split, on which keep: best chooses.",
    )
    test_fraction: float | None = Field(
        default=None,
        gt=0,
        le=0.5,
        description="Instead of test_split: hold out so much for the test, by the same hash as val_fraction, which folder and lists need "
        "beside it.",
    )
    group_by: str | None = Field(
        default="auto",
        description="Which images are of one photograph, as crops and frames are. Whole photographs are held out (val_fraction), "
        "and so it is in fits to calibration images. auto = as file names tell (0001_Bridge_0.jpg, 0001_Bridge_1.jpg, …), unless these "
        "look like those of classes or cameras; stem = equal names but for a number at the end; folder = one folder; none = every image by "
        "itself; or a regular expression whose match in the path (or its groups in parentheses) is the same, e.g. '([^/]+)_crop'.",
    )
    limit_train: int | None = Field(
        default=None, ge=1, description="Use at most this many training images, evenly spaced."
    )
    limit_val: int | None = Field(
        default=None, ge=1, description="Use at most this many validation images, evenly spaced."
    )
    clip: Clip = Field(default=Clip(), description="Which frames of each video are taken, of sets of videos.")
    augment: Augment = Field(default=Augment(), description="Augmentation of training images.")

    @field_validator("name")
    @classmethod
    def _is_known(cls, value: str) -> str:
        find_set(value)
        return value

    @field_validator("task")
    @classmethod
    def _is_task(cls, value: str | None) -> str | None:
        if value is not None:
            find_task(value)
        return value

    @field_validator("group_by")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"'{value}' is none of auto, stem, folder and none, nor a regular expression: {error}"
            ) from error
        return value

    @field_validator("mean", "std")
    @classmethod
    def _is_per_channel(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and not 0 < len(value) <= MOST_CHANNELS:
            raise ValueError(f"{len(value)} numbers: give one for each channel of the model, or one for all")
        return value

    @field_validator("std")
    @classmethod
    def _is_positive(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and min(value) <= 0:
            raise ValueError(f"{list(value)}: images are divided by std, so it must be above 0")
        return value

    @model_validator(mode="after")
    def _can_be_held_out(self) -> Data:
        given = [key for key in ("val_fraction", "test_split", "test_fraction") if getattr(self, key) is not None]
        if given and not find_set(self.name).parts:
            able = ", ".join(entry.name for entry in SETS.values() if entry.parts)
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])}: data '{self.name}' has splits of its own; leave it out (it is for {able})"
            )
        if self.test_split is not None and self.test_fraction is not None:
            raise ValueError(
                f"test_split={self.test_split} and test_fraction={self.test_fraction:g} both say what the test is; give one of them"
            )
        if self.test_fraction is not None and self.test_fraction + (self.val_fraction or VAL_FRACTION) >= 1:
            raise ValueError(
                f"val_fraction={self.val_fraction or VAL_FRACTION:g} and test_fraction={self.test_fraction:g} leave nothing to "
                "train on; give less"
            )
        return self

    @model_validator(mode="after")
    def _has_masks(self) -> Data:
        if self.reduce_zero_label and self.usual_task != "segmentation":
            raise ValueError(
                f"reduce_zero_label=true: data '{self.name}' has no masks of classes; leave it out (it is for name=segmentation)"
            )
        return self

    @model_validator(mode="after")
    def _has_clips(self) -> Data:
        if self.clip != Clip() and not find_set(self.name).clips:
            able = ", ".join(entry.name for entry in SETS.values() if entry.clips)
            raise ValueError(f"clip: data '{self.name}' has no videos; leave it out (it is for {able})")
        return self

    @property
    def labelled(self) -> bool:
        """Whether the images of the set have classes."""
        return find_set(self.name).labelled

    @property
    def usual_task(self) -> str:
        """The word of the task: that of the recipe, or of the set. A model that cannot do it has another (`task_of`)."""
        entry = find_set(self.name)
        return self.task or entry.task or entry.truth or "features"


def known_classes(data: Data) -> int | None:
    """The number of classes if it is known without disk access: declared, or a property of a named set; else None."""
    return data.num_classes or find_set(data.name).classes
