"""Lists of videos in the forms of Kinetics, Something-Something and HMDB51, and what of them is passed over or refused."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from helpers.moving import frames, write_folder
from helpers.runs import refused

from compressvit.data.footage import read_frames
from compressvit.data.input import InputConfig
from compressvit.data.levels import BrokenPicture
from compressvit.data.loaders import eval_loader
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.data.video_lists import Entry, read_entries
from compressvit.errors import UserError

KINETICS = "label,youtube_id,time_start,time_end,split\n"


@pytest.mark.parametrize(
    ("line", "entry"),
    [
        ("a/b.mp4 3", Entry(("a/b.mp4",), 3)),
        ("air drumming/b c.mp4 3", Entry(("air drumming/b c.mp4",), 3)),
        ("a/b.mp4,3", Entry(("a/b.mp4",), 3)),
        ("a/b.mp4, 3", Entry(("a/b.mp4",), 3)),
        ("a/b.mp4;3", Entry(("a/b.mp4",), 3)),
        ("a/b.mp4\t3", Entry(("a/b.mp4",), 3)),
        ("frames/12 37 3", Entry(("frames/12",), 3)),
        ("100218;Something falling, like a feather", Entry(("100218",), "Something falling, like a feather")),
        ("a.mp4,holding something", Entry(("a.mp4",), "holding something")),
    ],
)
def test_lines_of_lists(line, entry, tmp_path):
    (tmp_path / "list.csv").write_text(f"\n{line}\n")
    assert read_entries(tmp_path / "list.csv") == [entry]


def test_lists_of_kinetics(tmp_path):
    for split, place in (("train", "train/air drumming"), ("val", "air_drumming")):
        write_folder(tmp_path / place / f"ab-_{split}_000003_000013", frames(0, 3, seed=0))
        write_folder(tmp_path / split / f"{split}_000103_000113", frames(1, 3, seed=0))
        (tmp_path / f"{split}.csv").write_text(
            f"label,youtube_id,time_start,time_end,split\nair drumming,ab-_{split},3,13,{split}\nyoga,{split},103,113,{split}\n"
        )
    datasets = open_data(Data(name="videos", root=str(tmp_path)))
    assert datasets.class_names == ["air drumming", "yoga"]
    assert [target for _, target in datasets.validation.source.samples] == [0, 1]


def test_lists_with_texts_have_them_as_classes(tmp_path):
    for split, rows in (("train", "1;pushing\n2;Holding\n"), ("val", "2;pushing\n")):
        (tmp_path / f"{split}.csv").write_text(rows)
    for name in ("1", "2"):
        write_folder(tmp_path / name, frames(0, 3, seed=0))
    datasets = open_data(Data(name="videos", root=str(tmp_path)))
    assert datasets.class_names == ["Holding", "pushing"]
    assert datasets.train.source.samples == [(str(tmp_path / "1"), 1), (str(tmp_path / "2"), 0)]


def hmdb51(folder, splits="testTrainMulti_7030_splits"):
    (folder / splits).mkdir()
    for label in ("brush_hair", "cartwheel"):
        for i in range(4):
            write_folder(folder / label / f"{label}_{i}.avi", frames(0, 3, seed=i))
        for split, uses in ((1, "1120"), (2, "2110")):
            rows = [f"{label}_{i}.avi {use} \n" for i, use in enumerate(uses)]
            (folder / splits / f"{label}_test_split{split}.txt").write_text("".join(rows))
    return folder


def test_the_splits_of_hmdb51(tmp_path):
    hmdb51(tmp_path)
    first = open_data(Data(name="hmdb51", root=str(tmp_path)))
    assert (len(first.train), len(first.validation)) == (4, 2)
    assert first.class_names == ["brush_hair", "cartwheel"]
    second = open_data(Data(name="hmdb51", root=str(tmp_path), train_split="split2"))
    assert [path.rpartition("/")[2] for path, _ in second.validation.source.samples] == [
        "brush_hair_0.avi",
        "cartwheel_0.avi",
    ]


# Bad input


def lists(folder, train="a 0\nb 1\n", val="a 0\nb 1\n"):
    for name in ("a", "b"):
        write_folder(folder / name, frames(0, 3, seed=0))
    (folder / "train.csv").write_text(train)
    (folder / "val.csv").write_text(val)
    return folder


@pytest.mark.parametrize(
    ("rows", "options", "text"),
    [
        ("", {}, "train.csv lists no video"),
        ("a\n", {}, "line 1: 'a' is not `PATH LABEL`"),
        ("a -1\n", {}, "line 1: 'a -1' is not `PATH LABEL`"),
        ("a 0\nb 99999999\n", {}, "line 2: label 99999999 would make more than 1,000,000 classes"),
        ("a 0\nb 5\n", {"num_classes": 2}, "label 5"),
        ("c 0\nd 1\n", {}, "train.csv: none of its 2 videos is there, first"),
        ("../x/a 0\n", {}, "none of its 1 video is there"),
        ("a 0\nb 1\n", {"train_split": "trian"}, r"data.train_split=trian: there is no .*trian.csv or .txt; did you mean train"),
        (f"{KINETICS}a,b,c,3,train\n", {}, "line 2 is not label,youtube_id,time_start,time_end"),
        (f"{KINETICS}a,b,inf,3,train\n", {}, "line 2 is not label,.*: cannot convert float infinity to integer"),
        (f"{KINETICS}a,b\n", {}, "line 2 is not label,.*: it has fewer fields"),
        (f"{KINETICS}a,b,1,2,train\n{'x' * 200_000},b,1,2,train\n", {}, "line 3 is not label,.*: field larger than"),
        (f"{'x' * 200_000} 0\n", {}, "none of its 1 video is there, first .{80,200}…; paths"),
        ("a 0\nb 0\n", {"test_split": "test"}, "has splits of its own"),
    ],
)  # fmt: skip
def test_lists_that_cannot_be_used_are_refused(rows, options, text, tmp_path):
    lists(tmp_path, train=rows)
    with pytest.raises((UserError, ValueError), match=text):
        open_data(Data(name="videos", root=str(tmp_path), **options))


def test_pipes_are_not_waited_for(tmp_path):
    lists(tmp_path, train="a 0\npipe.mp4 1\n")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(UserError, match=r"train.csv: .*pipe.mp4 is a named pipe, not a video"):
        open_data(Data(name="videos", root=str(tmp_path)))
    (tmp_path / "frames").mkdir()
    os.mkfifo(tmp_path / "frames" / "0.png")
    with pytest.raises(BrokenPicture, match="a folder without pictures"):
        read_frames(str(tmp_path / "frames"), lambda count: [0])


def test_a_video_outside_of_the_root_is_refused(tmp_path):
    (tmp_path / "root").mkdir()
    lists(tmp_path / "root", train="a 0\n../other 1\n")
    write_folder(tmp_path / "other", frames(0, 3, seed=0))
    with pytest.raises(UserError, match=r"lies outside of data.root=.*data.outside=true reads such videos"):
        open_data(Data(name="videos", root=str(tmp_path / "root")))
    assert len(open_data(Data(name="videos", root=str(tmp_path / "root"), outside=True)).train) == 2


def test_a_split_that_hmdb51_does_not_have(tmp_path):
    hmdb51(tmp_path)
    with pytest.raises(UserError, match=r"there is no such split in .*found split1, split2"):
        open_data(Data(name="hmdb51", root=str(tmp_path), train_split="split4"))
    (tmp_path / "testTrainMulti_7030_splits" / "cartwheel_test_split1.txt").write_text("cartwheel_0.avi 3\n")
    with pytest.raises(UserError, match=r"line 1: 'cartwheel_0.avi 3' is not `NAME.avi 1`, 2 or 0"):
        open_data(Data(name="hmdb51", root=str(tmp_path)))


def test_videos_that_are_missing_are_counted(tmp_path):
    lists(tmp_path, train="a 0\nb 1\nc 0\nd 1\n")
    datasets = open_data(Data(name="videos", root=str(tmp_path)))
    assert len(datasets.train) == 2
    note = next(note for note in datasets.notes() if note.what == "missing_videos")
    assert note.text == "train.csv: 2 of its 4 videos not there, passed over, first c"


def test_videos_need_pyav_and_folders_do_not(tmp_path, monkeypatch):
    lists(tmp_path)
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "av" else plain(name, *rest))
    assert len(open_data(Data(name="videos", root=str(tmp_path))).train) == 2
    (tmp_path / "c.mp4").write_bytes(b"")
    lists_of = (tmp_path / "train.csv").read_text() + "c 1\n"
    (tmp_path / "train.csv").write_text(lists_of)
    with pytest.raises(
        UserError, match=r"c.mp4 is a video, and reading one needs PyAV: pip install av, or compressvit\[video\]"
    ):
        open_data(Data(name="videos", root=str(tmp_path)))


def test_broken_and_short_videos_are_counted(tmp_path):
    lists(tmp_path, val="a 0\nb 1\nempty 1\nlong 0\n")
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "long", frames(0, 9, seed=0))
    data = Data(name="videos", root=str(tmp_path), clip={"stride": 2}, batch_size=4)
    datasets = open_data(data)
    config = InputConfig(12, 24, 24, (0.5,) * 12, (0.2,) * 12, "bilinear", 1.0, frames=4)
    images, targets = next(iter(eval_loader(datasets, data, config, torch.device("cpu"))))
    assert len(images) == 3
    assert targets.tolist() == [0, 1, 0]
    assert datasets.broken.paths == [str(tmp_path / "empty")]
    texts = [note.text for note in datasets.notes()]
    assert "2 videos shorter than a clip, whose frames were repeated" in texts


def test_clips_are_refused_of_images():
    with pytest.raises(ValueError, match="clip: data 'digits' has no videos; leave it out"):
        Data(name="digits", clip={"stride": 2})


def test_the_command_says_it_in_one_sentence(tmp_path):
    lists(tmp_path, train="a 0\nb x y z\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "teacher: {model: video, weights: random, args: {backbone: vit_tiny_patch16_224, img_size: 32, frames: 2}}\n"
        f"data: {{name: videos, root: {tmp_path}}}\nsteps: [{{adaptformer: {{width: 4}}}}]\n"
    )
    assert "is not `PATH LABEL`" in refused("apply", recipe, "--output", tmp_path / "run")
