"""The benchmark of transfer: its draws, the layouts it reads, what it refuses, that nothing is chosen on what is tested, and its tables."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from compressvit.errors import UserError

CLASSES, TRAIN, TEST = 3, 6, 4  # of each domain: images of each class


@pytest.fixture
def parts(monkeypatch):
    """The program's modules: itself, its lists, its tasks and its tables."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    names = ("transfer", "transfer_lists", "transfer_tasks", "transfer_table")
    return tuple(importlib.import_module(name) for name in names)


def _picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        Image.new("RGB", (20, 12), (sum(file.stem.encode()) % 256, 90, 30)).save(file)


def _list(root: Path, name: str, domain: str, count: int, part: str, first: int = 0) -> None:
    lines = []
    for label in range(CLASSES):
        for i in range(count):
            path = f"{part}/{domain}-{label}-{i}.png"
            _picture(root / path)
            lines.append(f"{path} {label + first}")
    (root / f"{name}.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def domains(tmp_path):
    """Lists as DomainNet's, of four domains."""
    root = tmp_path / "sets"
    for domain in ("clip", "noto", "photo", "sketch"):
        _list(root, f"{domain}_train", domain, TRAIN, "train")
        _list(root, f"{domain}_test", domain, TEST, "val")
    return root


# ------------------------------------------------------------------------------------------------------------------- draws


def _paths(samples):
    return {path for path, _ in samples}


def test_fewer_shots_are_among_more_and_every_class_has_as_many(parts, domains):
    _, lists, _, _ = parts
    train = lists.read_layout(domains).domains["clip"].train
    drawn = [lists.draw(train, count, domains, 1, "clip") for count in (1, 2, 4)]
    for count, few in zip((1, 2, 4), drawn, strict=True):
        assert sorted(label for _, label in few) == sorted([*range(CLASSES)] * count)
    assert _paths(drawn[0]) < _paths(drawn[1]) < _paths(drawn[2])


def test_a_draw_depends_on_the_seed_and_not_on_order_folder_or_other_images(parts, domains):
    _, lists, _, _ = parts
    train = lists.read_layout(domains).domains["clip"].train
    drawn = lists.draw(train, 2, domains, 0, "clip")
    assert lists.draw(train[::-1], 2, domains, 0, "clip") == drawn
    assert lists.draw(train, 2, domains, 1, "clip") != drawn
    moved = [(path.replace(str(domains), "/elsewhere"), label) for path, label in train]
    assert [Path(path).name for path, _ in lists.draw(moved, 2, Path("/elsewhere"), 0, "")] == [
        Path(path).name for path, _ in drawn
    ]
    left = next(one for one in train if one not in drawn)
    assert lists.draw([one for one in train if one != left], 2, domains, 0, "clip") == drawn
    # as drawn when this was written: it never changes
    assert [Path(path).stem for path, _ in lists.draw(train, 1, domains, 0, "clip")] == [
        "clip-0-0",
        "clip-1-1",
        "clip-2-0",
    ]


def test_more_shots_than_a_class_has_are_refused(parts, domains):
    _, lists, _, _ = parts
    train = lists.read_layout(domains).domains["clip"].train
    with pytest.raises(
        UserError, match=r"^clip: 6 images of each class are asked for, and label 2 has 5; ask for 5 at most$"
    ):
        lists.draw(train[:-1], 6, domains, 0, "clip")


def test_a_fold_is_stratified_and_whole(parts, domains):
    _, lists, _, _ = parts
    train = lists.read_layout(domains).domains["clip"].train
    kept, held = lists.fold(train, domains)
    assert sorted(label for _, label in held) == [0, 1, 2]  # a fifth of six is one
    assert _paths(kept) | _paths(held) == _paths(train)
    assert not _paths(kept) & _paths(held)


# ----------------------------------------------------------------------------------------------------------------- layouts


def test_pacs_counts_from_1_and_tests_all_of_a_domain_that_was_not_seen(parts, tmp_path):
    _, lists, _, _ = parts
    for domain in ("photo", "cartoon"):
        for part, count in (("train", 3), ("crossval", 2), ("test", 5)):
            _list(tmp_path, f"{domain}_{part}_kfold", domain, count, "kfold", first=1)
    layout = lists.read_layout(tmp_path)
    photo = layout.domains["photo"]
    assert layout.classes == CLASSES
    assert {label for _, label in photo.train} == {0, 1, 2}
    assert [len(part) for part in (photo.train, photo.test, photo.unseen)] == [9, 6, 15]
    text = (tmp_path / "photo_train_kfold.txt").read_text()
    (tmp_path / "photo_train_kfold.txt").write_text(text.replace(" 1\n", " 0\n", 1))
    with pytest.raises(UserError, match="has label 0, but labels of PACS's lists count from 1"):
        lists.read_layout(tmp_path)


def test_folders_of_domains_share_their_classes_and_hold_out_a_fifth(parts, tmp_path):
    _, lists, _, _ = parts
    for domain in ("photo", "cartoon"):
        for name in ("dog", "horse"):
            for i in range(5):
                _picture(tmp_path / domain / name / f"{i}.png")
    (tmp_path / "photo" / "dog" / "notes.txt").write_text("x")
    layout = lists.read_layout(tmp_path)
    assert [len(part) for part in (layout.domains["photo"].train, layout.domains["photo"].test)] == [8, 2]
    assert not _paths(layout.domains["photo"].train) & _paths(layout.domains["photo"].test)
    assert any("1 file" in note for note in layout.notes), layout.notes  # what is passed over is counted
    for file in (tmp_path / "cartoon" / "horse").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="cartoon has no training image of 1 of the 2 classes"):
        lists.read_layout(tmp_path)


def test_tasks_of_vtab_are_chosen_on_their_lists_and_have_classes_of_their_own(parts, tmp_path):
    _, lists, tasks, _ = parts
    for task in ("cifar", "dtd"):
        for name, count, part in (
            ("train800", 4, "a"),
            ("val200", 1, "b"),
            ("train800val200", 5, "a"),
            ("test", 2, "c"),
        ):
            _list(tmp_path / task, name, task, count, part)
    layout = lists.read_layout(tmp_path)
    found = tasks.tasks_of(layout, "vtab", ["dtd"], [1], 0, tasks.Limits())
    assert [(task.name, task.classes, len(task.train), len(task.tests["dtd"])) for task in found] == [("dtd", 3, 15, 6)]
    fit, held = tasks.to_choose(layout, "vtab", found[0], ["dtd"], [1], tasks.Limits())
    assert (len(fit), len(held)) == (12, 3)
    assert list(lists.read_layout(tmp_path / "cifar").domains) == ["cifar"]
    with pytest.raises(UserError, match="which is for the protocol vtab"):
        tasks.tasks_of(layout, "few_shot", ["dtd"], [1], 0, tasks.Limits())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "val" / "noto-0-1.png").unlink(), "noto_test.txt: 1 of its 12 images are not there"),
        (lambda root: _list(root, "noto_train", "noto", 0, "train"), "lists no image"),
        (
            lambda root: (root / "noto_train.txt").write_text("train/noto-0-0.png 0\n"),
            "noto has no training image of 2 of the 3 classes",
        ),
        (lambda root: (root / "noto_test.txt").unlink(), "there is no .*noto_test.txt"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(parts, domains, spoil, message):
    _, lists, _, _ = parts
    spoil(domains)
    with pytest.raises(UserError, match=message):
        lists.read_layout(domains)


def test_a_label_that_is_no_class_is_refused(parts, domains):
    _, lists, _, _ = parts
    with pytest.raises(UserError, match=r"has label 2, but there are 2 classes, 0 to 1$"):
        lists.read_layout(domains, classes=2)


def test_refusals_are_a_sentence_and_exit_code_2(parts, domains, monkeypatch, capsys, tmp_path):
    program, *_ = parts
    words = f"x few_shot --data {domains} --weights none --output {tmp_path / 'out'} --shots 7"
    monkeypatch.setattr(sys, "argv", words.split())
    assert program.main() == 2
    assert "7 images of each class are asked for, and label 0 has 6" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*words.split(), "--domains", "skech"])
    assert program.main() == 2
    assert "did you mean 'sketch'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------- leakage


@pytest.mark.parametrize("protocol", ["few_shot", "leave_one_out", "one_source"])
@pytest.mark.parametrize("chosen", [["photo", "sketch"], ["clip", "noto", "photo", "sketch"]])
def test_nothing_is_learned_from_or_chosen_on_what_is_tested(parts, domains, protocol, chosen):
    _, lists, tasks, _ = parts
    layout, limits = lists.read_layout(domains), tasks.Limits()
    families: dict[str, set[str]] = {}
    found = tasks.tasks_of(layout, protocol, chosen, [1, 4], 0, limits)
    for task in found:
        fit, held = tasks.to_choose(layout, protocol, task, chosen, [1, 4], limits)
        families.setdefault(task.family, _paths(fit) | _paths(held))
        assert families[task.family] == _paths(fit) | _paths(held)  # the same for all of a family
    for task in found:
        seen = _paths(task.train) | families[task.family]
        for tested, samples in task.tests.items():
            assert not seen & _paths(samples)
            if protocol != "few_shot":
                assert not any(f"/{tested}-" in path for path in seen)


def test_one_domain_is_held_out_of_all_others_and_one_source_is_tested_on_them(parts, domains):
    _, lists, tasks, _ = parts
    layout = lists.read_layout(domains)
    (left,) = tasks.tasks_of(layout, "leave_one_out", ["photo"], [4], 0, tasks.Limits(per_class=2, tested=6))
    assert len(left.train) == 3 * CLASSES * 2
    assert {name: len(samples) for name, samples in left.tests.items()} == {"photo": 6}
    (source,) = tasks.tasks_of(layout, "one_source", ["photo"], [1, 4], 0, tasks.Limits())
    assert len(source.train) == 4 * CLASSES
    assert list(source.tests) == ["clip", "noto", "sketch"]


def test_of_equals_the_smaller_rate_is_chosen(parts):
    program, *_ = parts
    tried = [{"accuracy": 50.0, "rate": 1e-2}, {"accuracy": 50.0, "rate": 2e-3}, {"accuracy": 49.0, "rate": 1e-4}]
    assert program.best(tried)["rate"] == 2e-3
    assert program.best([*tried, {"accuracy": 51.0, "rate": 1.0}])["rate"] == 1.0


# ------------------------------------------------------------------------------------------------------------------ tables


def _cell(method, seed, right, **about):
    counts = {"trained_adapter": 10, "trained_head": 3, "adapter_bytes": 2_000_000, "macs": 10**9, "minutes": 1.0}
    usual = {"protocol": "one_source", "task": "photo_4", "shots": 4, "images": 12}
    return {**usual, "method": method, "seed": seed, "right": right, **counts, **about}


def test_a_difference_is_of_the_same_images_and_seeds(parts):
    *_, table = parts
    base = [1, 0] * 50
    better = [1] * 10 + base[10:]  # right wherever the probe is, and in five more of a hundred
    cells = [_cell(m, s, {"clip": r, "noto": base}) for m, r in (("linear", base), ("lora", better)) for s in (0, 1)]
    rows = table.by_row([*cells, _cell("lora", 2, {"clip": [0] * 100, "noto": base})])
    found = table.row(rows, ("one_source", "photo_4", "lora"))
    assert found["difference"]["seeds"] == [0, 1]  # seed 2 has no probe
    assert found["difference"]["mean"] == pytest.approx(2.5)
    assert found["difference"]["deviation_of_seeds"] == pytest.approx(0)
    low, high = found["difference"]["interval_over_images"]
    assert 0 < low < 2.5 < high
    alone = found["accuracy"]["noto"]["interval_over_images"]
    assert high - low < 0.5 * (alone[1] - alone[0])  # paired: 4.0 against 19 points
    assert found["mean_over_domains"] == pytest.approx((100 * 110 / 300 + 50) / 2)
    text = table.table([found])
    assert "13 (3)" in text
    assert "2.000" in text


def test_means_by_group_say_how_many_tasks_there_are(parts):
    *_, table = parts
    scores = {"cifar": [1, 1], "dtd": [1, 0], "eurosat": [0, 0], "kitti": [1, 0]}
    cells = [_cell("linear", 0, {name: right}, protocol="vtab", task=name) for name, right in scores.items()]
    found = table.by_row(cells)
    groups = table.groups([table.row(found, key) for key in found])["linear"]
    assert groups["natural"] == {"mean": 75.0, "tasks": 2, "of": 7}
    assert groups["mean"] == pytest.approx((75 + 0 + 50) / 3)
    assert sum(map(len, parts[2].GROUPS.values())) == 19


# --------------------------------------------------------------------------------------------------------------------- run


@pytest.mark.slow
def test_it_runs_and_goes_on_where_it_was_stopped(parts, domains, monkeypatch, capsys, tmp_path):
    program, *_ = parts
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    words = (
        f"x one_source --data {domains} --weights {tmp_path / 'vit.safetensors'} --model vit_tiny_patch16_224 --size 32 "
        f"--squash --epochs 1 --batch 4 --seeds 0 --shots 5 --domains photo --methods linear repadapter --fixed --output {tmp_path / 'out'}"
    ).split()
    monkeypatch.setattr(sys, "argv", [*words, "--hours", "0"])
    assert program.main() == 0
    assert "would exceed the 0 hours" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", words)
    assert program.main() == 0
    assert "2 of 2 cells are to be run" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "cells.json").read_text())
    assert [row["method"] for row in rows] == ["linear", "repadapter"]
    assert rows[0]["trained"] == rows[0]["trained_head"] == 192 * 3 + 3
    assert rows[1]["trained"] > rows[1]["trained_head"]
    assert all(row["megabytes"] > 0 for row in rows)
    choice = json.loads((tmp_path / "out" / "choice_one_source_photo_repadapter.json").read_text())
    assert 2 < len(choice["tried"]) <= 4  # of two, one is at an edge
    folder = tmp_path / "out" / "cells" / "one_source_photo_5_linear_seed0"
    cell = json.loads((folder / "cell.json").read_text())
    assert {name: len(right) for name, right in cell["right"].items()} == dict.fromkeys(
        ("clip", "noto", "sketch"), CLASSES * TEST
    )
    own = json.loads((folder / "results.json").read_text())["student"]["top1"]  # of clip, all twelve
    assert own == pytest.approx(100 * sum(cell["right"]["clip"]) / 12)
    assert program.main() == 0
    assert "0 of 2 cells are to be run" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "--epochs", "2"])
    with pytest.raises(SystemExit, match="cells of other epochs"):
        program.main()
