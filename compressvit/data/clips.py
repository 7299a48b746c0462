"""Clips: which frames of a video a model gets, and videos as a set of files.

A clip of T frames is an image whose channels are those of its frames, the first frame's first: (H, W, T · 3). A model that takes images
gets one frame. In evaluation several clips of one video, its views, lie beside one another: of every time, each crop.

Shapes: T frames of a clip, s the stride, n frames of the video.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from PIL import Image

from compressvit.data.bands import Bands, Picture
from compressvit.data.files import PictureFiles
from compressvit.data.footage import read_frames
from compressvit.data.levels import MODES, BrokenPicture, Read
from compressvit.data.spec import Clip
from compressvit.notes import Note

COLOURS = 3  # channels of a frame


def frames_of(channels: int | None) -> int:
    """How many frames an image of so many channels has; one where it is for a model of images, or for none.

    Raises:
        BrokenPicture: they are no whole frames.
    """
    if channels is None or channels in MODES:
        return 1
    if channels % COLOURS:
        raise BrokenPicture(f"the model takes {channels} channels, which are no whole frames of {COLOURS}")
    return channels // COLOURS


def dense(count: int, length: int, stride: int, views: int | None) -> list[int]:
    """Numbers of frames at a stride, as Kinetics is commonly sampled.

    From a video shorter than (T − 1) · s + 1 frames the last frame is repeated, as VideoMAE's released code does.

    Args:
        count: n.
        length: T.
        stride: s.
        views: how many clips, evenly from the beginning to the end, or one from the middle; None: one from a random place.
    """
    room = max(0, count - ((length - 1) * stride + 1))
    if views is None:
        starts = [random.randint(0, room)]
    else:
        starts = [room // 2] if views == 1 else [round(i * room / (views - 1)) for i in range(views)]
    return [min(start + i * stride, count - 1) for start in starts for i in range(length)]


def segments(count: int, length: int, views: int | None) -> list[int]:
    """Numbers of frames, one of each of T equal parts of the video, as TSN and as Something-Something is commonly sampled.

    A frame of a video of fewer than T frames is repeated.

    Args:
        count, length: n and T.
        views: how many clips, of which each takes another place in every part, one its middle; None: one of random places.
    """
    part = count / length
    if views is None:
        places = [[random.random() for _ in range(length)]]
    else:
        places = [[(2 * view + 1) / (2 * views)] * length for view in range(views)]
    return [min(int((i + place) * part), count - 1) for clip in places for i, place in enumerate(clip)]


class ClipFiles(PictureFiles):
    """Videos, or folders of frames, with their classes: `samples` holds (path, class).

    Args:
        clip: which frames are taken; its views are those of evaluation.
    """

    def __init__(
        self, samples: Sequence[tuple[str, int]], classes: list[str] | None, notes: Sequence[Note], clip: Clip
    ):
        super().__init__(samples, classes, notes)
        self.clip = clip

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        picture, target, _ = self.read(index, None, training=False)
        return picture, target

    def read(self, index: int, channels: int | None, *, training: bool) -> tuple[Picture, int, Read]:
        """The frames of a clip, or of several, beside one another, its class, and what was done to read it.

        Args:
            channels: of the model: T · 3, or those of one frame; None: one frame.
            training: take a random clip instead of those of evaluation.

        Raises:
            BrokenPicture: it cannot be read.
        """
        path, target = self.samples[index]
        length = frames_of(channels)
        short = Read(0)

        def choose(count: int) -> list[int]:
            nonlocal short
            views = None if training else self.clip.views if channels is not None else 1
            whole = length if self.clip.sampling == "segments" else (length - 1) * self.clip.stride + 1
            short = Read.SHORT if count < whole else Read(0)
            if self.clip.sampling == "segments":
                return segments(count, length, views)
            return dense(count, length, self.clip.stride, views)

        frames, done = read_frames(path, choose)
        if len(frames) == 1:
            return Image.fromarray(frames[0]), target, done | short
        return Bands(np.concatenate(frames, axis=2)), target, done | short
