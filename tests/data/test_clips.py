"""Clips: which frames are taken, that all are moved alike, and what of videos and lists is passed over or refused."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from helpers.moving import frames, with_clips, write_folder, write_video
from PIL import Image

from compressvit.data.clip_transform import ClipTransform
from compressvit.data.clips import dense, segments
from compressvit.data.footage import read_frames
from compressvit.data.input import InputConfig
from compressvit.data.levels import BrokenPicture, Read
from compressvit.data.loaders import calibration_batches, eval_loader, train_loader
from compressvit.data.opening import open_data
from compressvit.data.samples import seeded
from compressvit.data.spec import Augment, Clip, Data
from compressvit.errors import UserError

CPU = torch.device("cpu")
CONFIG = InputConfig(12, 24, 24, (0.5, 0.4, 0.3) * 4, (0.2, 0.25, 0.3) * 4, "bilinear", 1.0, frames=4)


def everything(count):
    return range(count)


# Which frames


def test_frames_at_a_stride_by_hand():
    assert dense(20, 4, 3, 1) == [5, 8, 11, 14]  # 10 frames of 20, five on each side
    assert dense(20, 4, 3, 3) == [0, 3, 6, 9, 5, 8, 11, 14, 10, 13, 16, 19]
    assert dense(10, 4, 3, 1) == [0, 3, 6, 9]
    assert dense(7, 4, 3, 1) == [0, 3, 6, 6]  # the last is repeated
    assert dense(1, 4, 3, 2) == [0] * 8


def test_a_frame_of_every_part_by_hand():
    assert segments(16, 4, 1) == [2, 6, 10, 14]
    assert segments(16, 4, 2) == [1, 5, 9, 13, 3, 7, 11, 15]
    assert segments(3, 4, 1) == [0, 1, 1, 2]


def test_random_clips_are_everywhere_and_within():
    random.seed(0)
    starts = {dense(12, 4, 2, None)[0] for _ in range(200)}
    assert starts == set(range(6))  # the last clip is 5, 7, 9, 11
    found = [segments(12, 4, None) for _ in range(200)]
    assert {clip[2] for clip in found} == {6, 7, 8}


# From disk


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    pictures = frames(1, 12, seed=0)
    found, done = read_frames(str(write_folder(tmp_path / "clip", pictures)), everything)
    assert done == 0
    assert np.array_equal(np.stack(found), np.stack(pictures))


@pytest.mark.parametrize(
    "content", ["ffconcat version 1.0\nfile other.mp4\n", "#EXTM3U\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n"]
)
def test_a_list_named_like_a_video_opens_no_other_file(content, tmp_path):
    pytest.importorskip("av")
    write_video(tmp_path / "other.mp4", frames(0, 8, 1))
    (tmp_path / "a.mp4").write_text(content)
    with pytest.raises(BrokenPicture, match="no video that can be read"):
        read_frames(str(tmp_path / "a.mp4"), lambda count: [0])
    assert len(read_frames(str(tmp_path / "other.mp4"), lambda count: [0])[0]) == 1


def test_frames_of_a_video_are_those_that_were_encoded(tmp_path):
    pytest.importorskip("av")
    pictures = frames(1, 13, seed=0)
    path = str(write_video(tmp_path / "clip.mp4", pictures))
    for wanted in (range(13), [12, 3, 3, 0]):
        found, done = read_frames(path, lambda _, wanted=wanted: wanted)
        assert done == 0
        assert np.array_equal(np.stack(found), np.stack([pictures[i] for i in wanted]))


def test_a_varying_rate_is_told(tmp_path):
    pytest.importorskip("av")
    pictures = frames(1, 6, seed=0)
    path = str(write_video(tmp_path / "clip.mp4", pictures, times=[0, 1, 2, 6, 7, 8]))
    found, done = read_frames(path, everything)
    assert done == Read.VARYING
    assert np.array_equal(np.stack(found), np.stack(pictures))  # counted, not timed


def _sound(tmp_path):
    import av

    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return tmp_path / "sound.mkv"


def _text(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    return tmp_path / "text.mp4"


def _cut(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", frames(1, 12, seed=0)).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    return tmp_path / "cut.mp4"


def _no_frames(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def _broken_frame(tmp_path):
    folder = write_folder(tmp_path / "broken", frames(1, 4, seed=0))
    (folder / "2.png").write_bytes(b"no picture")
    return folder


def _two_sizes(tmp_path):
    folder = write_folder(tmp_path / "sizes", frames(1, 4, seed=0))
    Image.new("RGB", (8, 6)).save(folder / "2.png")
    return folder


BROKEN = [
    (_no_frames, "it is a folder without pictures, so a clip without frames"),
    (_broken_frame, "its frame 2.png: it is not an image"),
    (_two_sizes, "its frames are of several sizes: 36×32, 8×6"),
    (_text, "it is no video that can be read: Invalid data found when processing input"),
    (_cut, "it is no video that can be read: Invalid data"),
    (_sound, "it has no video stream, so no frames"),
]


@pytest.mark.parametrize(("make", "text"), BROKEN, ids=[make.__name__ for make, _ in BROKEN])
def test_what_is_no_clip_says_why(make, text, tmp_path):
    if make in (_text, _cut, _sound):
        pytest.importorskip("av")
    with pytest.raises(BrokenPicture, match=text):
        read_frames(str(make(tmp_path)), everything)


def test_fewer_frames_than_a_container_counts_are_chosen_from_again(tmp_path, monkeypatch):
    """DivX in AVI has packets without a frame."""
    pytest.importorskip("av")
    from compressvit.data import footage

    pictures = frames(1, 6, seed=0)
    path = str(write_video(tmp_path / "clip.mp4", pictures))
    plain = footage._decoded
    asked = []

    def counted(path, wanted, count):
        asked.append(list(wanted))
        return plain(path, wanted, count)

    monkeypatch.setattr(footage, "_decoded", counted)
    found, _ = read_frames(path, lambda count: [0, 7 if len(asked) == 0 else count - 1])
    assert asked == [[0, 7], [0, 5]]
    assert np.array_equal(found[1], pictures[5])


# Moved alike


def still(count=4, size=(40, 32)):
    picture = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    from compressvit.data.bands import Bands

    return Bands(np.concatenate([picture] * count, axis=2))


@pytest.mark.parametrize(
    "augment",
    [
        {"scale": (0.2, 0.6)},
        {"hflip": 0.5, "vflip": 0.5},
        {"color_jitter": 0.4},
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"translate": 4},
    ],
    ids=lambda augment: next(iter(augment)),
)
def test_all_frames_are_moved_and_coloured_alike(augment):
    transform = ClipTransform(CONFIG, Augment(**augment), Clip())
    seen = []
    for seed in range(8):
        with seeded(seed):
            pixels = transform(still()).unflatten(0, (4, 3))
        assert pixels.shape == (4, 3, 24, 24)
        assert all(torch.equal(frame, pixels[0]) for frame in pixels)
        seen.append(pixels[0])
    assert any(not torch.equal(pixels, seen[0]) for pixels in seen[1:])


def test_three_crops_lie_along_the_longer_side():
    values = np.zeros((24, 48, 3), np.uint8)
    values[:, :, 0] = 5 * np.arange(48)
    from compressvit.data.bands import Bands

    transform = ClipTransform(CONFIG, None, Clip(crops=3))
    pixels = transform(Bands(np.concatenate([values] * 8, axis=2)))  # two clips of four frames
    assert pixels.shape == (2 * 3 * 4 * 3, 24, 24)
    assert pixels.unflatten(0, (2, 3, 4, 3))[1, :, 3, 0, 0, 0].tolist() == [0, 60, 120]


# Loaded


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    with_clips(folder, {"data": {}}, 12, 5)
    return folder / "clips"


def data_of(root, **options):
    return Data(**{"name": "videos", "root": str(root), "batch_size": 4, "clip": {"stride": 2}} | options)


def test_a_batch_has_the_frames_of_its_clips_normalised(root):
    data = data_of(root)
    images, targets = next(iter(eval_loader(open_data(data), data, CONFIG, CPU)))
    assert images.shape == (4, 12, 24, 24)
    assert targets.tolist() == [0, 1, 0, 1]
    expected = read_frames(str(root / "val" / "000"), lambda n: dense(n, 4, 2, 1))[0]
    found = images[0].unflatten(0, (4, 3)) * torch.tensor([0.2, 0.25, 0.3])[:, None, None]
    found = (found + torch.tensor([0.5, 0.4, 0.3])[:, None, None]) * 255
    for frame, pixels in zip(expected, found, strict=True):
        square = Image.fromarray(frame).resize((27, 24), Image.Resampling.BILINEAR)
        wanted = torch.tensor(np.asarray(square.crop((2, 0, 26, 24)))).permute(2, 0, 1)
        assert (pixels - wanted).abs().max() < 1e-3  # measured 9.5e-6


def test_views_lie_beside_one_another_in_evaluation_alone(root):
    data = data_of(root, clip={"stride": 1, "views": 2, "crops": 3})
    datasets = open_data(data)
    images, _ = next(iter(eval_loader(datasets, data, CONFIG, CPU)))
    assert images.shape == (4, 2 * 3 * 12, 24, 24)
    images, _ = next(iter(train_loader(datasets, data, CONFIG, CPU)))
    assert images.shape == (4, 12, 24, 24)
    assert next(calibration_batches(datasets, data, CONFIG, CPU, images=4, seed=0)).images.shape == (4, 12, 24, 24)


def test_an_image_model_gets_one_frame(root):
    data = data_of(root)
    config = InputConfig(3, 24, 24, (0.5,) * 3, (0.2,) * 3, "bilinear", 1.0)
    images, _ = next(iter(eval_loader(open_data(data), data, config, CPU)))
    assert images.shape == (4, 3, 24, 24)
    views = data_of(root, clip={"views": 2})
    with pytest.raises(UserError, match=r"data.clip has 2 views of each video, and the model takes images"):
        eval_loader(open_data(views), views, config, CPU)


def test_an_epoch_is_a_function_of_the_seed_and_not_of_workers(root):
    data = data_of(root, augment={"scale": [0.3, 1.0], "hflip": 0.5, "auto_augment": "rand-m9-mstd0.5-inc1"})

    def epochs(data, seed):
        torch.manual_seed(seed)
        loader = train_loader(open_data(data), data, CONFIG, CPU)
        return [torch.cat([images for images, _ in loader]) for _ in range(2)]

    first, again, other = epochs(data, 0), epochs(data.model_copy(update={"num_workers": 1}), 0), epochs(data, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
