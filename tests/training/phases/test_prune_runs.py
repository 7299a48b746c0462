"""The `prune` phase in recipes: what a run leaves, how it goes on after a stop, what is refused."""

from __future__ import annotations

import json
import os
import signal
from xml.etree import ElementTree

import pytest
from helpers.recipes import GOOD, only_row
from helpers.runs import done, metrics, refused, run, student_bytes

from compressvit.artifacts import artifact
from compressvit.charts.findings import read
from compressvit.diagnostics.allocation import allocation_finding
from compressvit.files import load_checkpoint
from compressvit.recipe.recipe import parse_recipe
from compressvit.runs.plan import plan_recipe
from compressvit.training import step
from compressvit.training.phases.prune.neurons import prunable_plan

PHASE = "1_prune"
RECIPE = """\
teacher:
  model: vit_tiny_patch16_224
  weights: train
  args: {img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 16, depth: 2, num_heads: 2}
  finetune: {epochs: 1}
data: {name: digits, batch_size: 8, limit_train: 24, limit_val: 16, augment: {scale: [0.5, 1.0], random_erasing: 0.25}}
steps:
  - adapters: {width: 6}
  - prune: {epochs: 2, log_every: 1, lr: 5e-3, mixup: 0.2, target: {neurons: 0.25}, score: gradient, gradient_batches: 2}
"""
TEACHER, CYCLE = 3, 2 * 3  # batches of the teacher's training, and of every cycle's


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("prune") / "prune.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def whole(recipe):
    """A run that nobody stopped."""
    folder = recipe.parent / "whole"
    done("apply", "--no-report", recipe, "--output", folder)
    return folder


def widths_of(folder) -> list[dict[str, int]]:
    return json.loads((folder / "results.json").read_text())["phases"][PHASE]["widths"]


# -------------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.wide
@pytest.mark.parametrize("score", ["taylor", "activation"])
def test_other_measured_scores_choose_other_neurons(score, recipe, whole):
    folder = recipe.parent / score
    done("apply", "--no-report", recipe, f"steps.1.prune.score={score}", "--output", folder)
    assert [sum(cycle.values()) for cycle in widths_of(folder)] == [24, 12, 6]
    assert student_bytes(folder) != student_bytes(whole)


def test_a_run_tells_the_widths_everywhere(whole):
    widths = widths_of(whole)
    assert [sum(cycle.values()) for cycle in widths] == [24, 12, 6]
    assert set(widths[0].values()) == {6}
    assert prunable_plan(artifact.load(whole / "student")).widths == widths[-1]
    plan = json.loads((whole / "plan.json").read_text())
    assert plan["steps"][2]["summary"].startswith("3 trainings and 2 removals: 24 → at most 6 neurons")
    heard = metrics(whole, phase=PHASE, kind="widths")
    assert [{k: line[k] for k in widths[0]} for line in heard] == widths
    assert [line["step"] for line in heard] == [0, 1, 2]
    events = next((whole / "tensorboard").iterdir()).read_bytes()
    assert b"prune/widths/blocks.0.attn" in events
    assert b"prune_cycle2/train/loss" in events
    assert (whole / "widths.png").read_bytes().startswith(b"\x89PNG")
    allocation = read(whole / "diagnostics" / "allocation.json")
    assert {r["scope"] for r in allocation.records} == {"global"}
    for removals, cycle in enumerate(widths):
        found = {r["layer"]: r["neurons"] for r in allocation.records if r["removals"] == removals}
        assert found == cycle
        assert {r["even"] for r in allocation.records if r["removals"] == removals} == {6 / 2**removals}

    results = json.loads((whole / "results.json").read_text())
    student, ledger = results["student"], results["ledger"]
    assert student["trained_adapter"] == 2 * 16 * 6
    assert (
        sum(e["after"] - e["before"] for e in ledger) == student["parameters"] - results["teacher"]["parameters"] == 192
    )
    assert results["read_back_difference"] < 1e-6  # measured 0


def test_every_removal_is_followed_by_a_training_with_a_checkpoint_of_its_own(whole):
    phases = {line["phase"] for line in metrics(whole, kind="epoch")} - {"teacher"}
    assert phases == {f"{PHASE}_cycle{c}" for c in range(3)}
    assert all(len(metrics(whole, phase=phase, kind="epoch")) == 2 for phase in phases)
    names = [f"{PHASE}.pt", f"{PHASE}_cycle1.pt", f"{PHASE}_cycle2.pt"]
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == [*names, "teacher.pt"]
    for name, cycle in zip(names, widths_of(whole), strict=True):
        saved = load_checkpoint(whole / "checkpoints" / name)
        assert saved["done"]
        for path, hidden in cycle.items():
            if hidden:
                weight = f"{path}.adapter.down.weight"
                assert saved["model"][weight].shape == saved["moments"][weight]["exp_avg"].shape == (hidden, 16)
            else:
                assert not [n for part in ("model", "moments") for n in saved[part] if n.startswith(f"{path}.adapter")]


@pytest.mark.wide_unless(lambda told: told == 2)
@pytest.mark.parametrize(
    ("batch", "told"),
    [
        (TEACHER + CYCLE, 1),  # the last step of the first training
        (TEACHER + CYCLE + 2, 2),  # amid the second
        (TEACHER + 2 * CYCLE + 3, 3),  # between two epochs of the third
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(whole, recipe, tmp_path, monkeypatch, batch, told):
    folder, seen, total = tmp_path / "run", [], step.total_of

    def counted(*args):
        seen.append(1)
        if len(seen) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return total(*args)

    with monkeypatch.context() as patch:
        patch.setattr(step, "total_of", counted)
        code, _, err = run("apply", "--no-report", recipe, "--output", folder)
    assert code == 128 + signal.SIGTERM
    assert "--resume" in err
    assert not (folder / "student").exists()
    assert len(metrics(folder, phase=PHASE, kind="widths")) == told
    done("apply", "--no-report", recipe, "--output", folder, "--resume")
    assert student_bytes(folder) == student_bytes(whole)
    assert widths_of(folder) == widths_of(whole)
    for name in (PHASE, *(f"{PHASE}_cycle{c}" for c in range(3)), "0_adapters"):
        lines = [[{**line, "time": 0} for line in metrics(f, phase=name)] for f in (folder, whole)]
        assert lines[0] == lines[1]  # none lost, none twice


def test_an_accuracy_out_of_reach_prunes_nothing(recipe, tmp_path):
    options = ["steps.1.prune.target={accuracy: 100}", "steps.1.prune.epochs=1", "steps.1.prune.keep=best"]
    out = done("apply", "--no-report", recipe, "--output", tmp_path / "run", *options)
    assert "is below the target of 100%; nothing was pruned" in out
    assert [set(cycle.values()) for cycle in widths_of(tmp_path / "run")] == [{6}]
    assert (tmp_path / "run" / "widths.png").is_file()


# ------------------------------------------------------------------------------------------------------------------- refusals


PRUNE = "  - prune: {target: {neurons: 0.25}}\n"
ADAPTED = "  - adapters: {width: 4}\n"
NO_ADAPTERS = "prune removes neurons of adapters (adapters or adaptformer), and the model has none: it was made by "


@pytest.mark.parametrize(
    ("steps", "change", "words"),
    [
        (PRUNE, {}, NO_ADAPTERS + "no transform; put such a step before it"),
        ("  - phm: {n: 2}\n" + PRUNE, {}, NO_ADAPTERS + "phm; put such a step before it"),
        (PRUNE + ADAPTED, {}, NO_ADAPTERS + "no transform"),
        (
            ADAPTED + "  - adaptformer: {width: 4}\n" + PRUNE,
            {},
            "adapters of 2 steps, adapters, adaptformer; leave one of them",
        ),
        (
            ADAPTED + PRUNE,
            {"neurons: 0.25": "neurons: 17"},
            "prune.target.neurons=17 is above the 16 that the adapters have",
        ),
        (ADAPTED + PRUNE, {"neurons: 0.25": "macs: 1e-6"}, "prune.target.macs=1e-06 leaves no neuron"),
        (
            ADAPTED + PRUNE,
            {"args: {": "args: {num_classes: 0, "},
            "prune learns from labels, but the model has no classifier",
        ),
        (
            ADAPTED + PRUNE,
            {"name: digits": "name: images\n  root: x"},
            "learns from labels, but the images of data 'images' have none",
        ),
    ],
    ids=["alone", "phm", "after", "two", "above", "nothing", "headless", "unlabeled"],
)
def test_what_cannot_be_pruned_is_refused_by_the_plan(steps, change, words):
    text = GOOD.split("steps:")[0].replace("weights: train", "weights: a.safetensors") + "steps:\n" + steps
    for old, new in change.items():
        text = text.replace(old, new)
    found = plan_recipe(parse_recipe(text, "x.yaml")).conflicts
    assert any(c.startswith("steps[") and ".prune: " in c and words in c for c in found), found


TARGETS = {"{}": "none", "{neurons: 0.5, macs: 0.5}": "neurons and macs", "{accuracy: 9, macs: 9}": "macs and accuracy"}


@pytest.mark.parametrize(("target", "given"), TARGETS.items())
def test_a_target_is_one_thing(target, given):
    _, path, sentence = only_row(GOOD.split("steps:")[0] + f"steps:\n{ADAPTED}  - prune: {{target: {target}}}\n")
    assert path == "steps[1].prune.target"
    assert sentence == f"a target is one of neurons, parameters, macs and accuracy; given: {given}"


@pytest.mark.parametrize(("wanted", "sentence"), [(0.9, "for 90% give 90"), (101, "so it is at most 100")])
def test_a_target_of_accuracy_is_in_the_unit_of_the_task(wanted, sentence):
    steps = f"steps:\n{ADAPTED}  - prune: {{target: {{accuracy: {wanted}}}}}\n"
    _, path, text = only_row(GOOD.split("steps:")[0] + steps)
    assert path == "steps"
    assert text.startswith(f"steps[1].prune.target.accuracy={wanted:g} is in percent")
    assert text.endswith(sentence)


def test_a_refused_prune_leaves_no_folder(recipe, tmp_path):
    words = ("apply", "--no-report", recipe, "--output", tmp_path / "run", "steps.1.prune.target={neurons: 25}")
    assert "neurons=25 is above the 24" in refused(*words)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------------- plot


@pytest.mark.parametrize("removals", [0, 1, 4, 8])
def test_the_bars_of_every_cycle_have_a_colour_of_their_own(removals, tmp_path):
    names = [f"layers.2.blocks.{i}.{part}" for i in range(6) for part in ("attn", "mlp")]
    history = [
        {name: 64 // 2**cycle * (i != 3 or not cycle) for i, name in enumerate(names)} for cycle in range(removals + 1)
    ]
    allocation_finding({"prune": ("global", history)}).picture(tmp_path / "widths.svg")
    marks = list(ElementTree.parse(tmp_path / "widths.svg").iter())
    bars = [mark for mark in marks if mark.get("aria-roledescription") == "bar"]
    said = [dict(part.split(": ") for part in bar.attrib["aria-label"].split("; ")) for bar in bars]
    cycles = list(dict.fromkeys(one["cycle"] for one in said))
    length = "neurons of the adapter (linear to 1, then logarithmic)"
    drawn = [[int(one[length]) for one in said if one["cycle"] == cycle] for cycle in cycles]
    assert drawn == [list(widths.values()) for widths in history], "later cycles over earlier ones"
    colours = {(bar.get("fill"), one["cycle"]) for bar, one in zip(bars, said, strict=True)}
    assert len({fill for fill, _ in colours}) == len(colours) == removals + 1
    assert {float(bar.get("opacity", 1)) for bar in bars} == {1}, "opaque: the legend's are those of the bars"
    assert list(dict.fromkeys(one["layer"] for one in said)) == names
    left = history[-1]
    notes = [mark.text for mark in marks if mark.text and ("→" in mark.text or "gone" in mark.text)]
    assert notes == [f"64 → {left[n]}" if left[n] else "64, gone" for n in names]
