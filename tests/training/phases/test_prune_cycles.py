"""Cycles of the `prune` phase with trainings that are only pretended; what becomes of the optimiser's moments."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.images import side
from helpers.training import CPU, Heard, largest_difference, random_batches, tiny_vit, values

from compressvit.errors import UserError
from compressvit.files import load_checkpoint
from compressvit.tasks.classification import TOP1
from compressvit.tasks.quality import Quality
from compressvit.training.loop import Phase, train
from compressvit.training.phases.prune.cycles import prune_and_train
from compressvit.training.phases.prune.neurons import prunable_plan, shrink_
from compressvit.training.phases.prune.spec import Prune
from compressvit.training.terms import labels_term
from compressvit.transforms import Adapters, AdaptFormer
from compressvit.transforms.applying import compress

PHASE = "1_prune"


class Trainer:
    """Runs the cycles of a small model with real trainings on random batches, judged by a list of marks."""

    def __init__(self, folder, *, marks=None, start=None, spec=None, quality=TOP1, **options):
        self.folder, self.heard, self.start = folder, Heard(), start
        self.quality = quality
        self.marks, self.judged, self.trained = iter(marks or ()), [], []
        defaults = {"epochs": 1, "clip_grad": None, "schedule": "constant", "target": {"neurons": 0.25}}
        self.spec = Prune(**{**defaults, **options})
        self.model = compress(tiny_vit(), [spec or Adapters(width=4)])
        self.batches = random_batches(2, 6)

    def judge(self, model):
        self.judged.append(values(model))
        return {self.quality.key: next(self.marks, 50.0)}

    def train(self, model, phase, moments):
        self.trained.append((phase, dict(prunable_plan(model).widths), copy.deepcopy(moments)))
        terms = [labels_term(1.0, 0.0)]
        told = {"batch_size": 6, "device": CPU, "log": self.heard, "evaluate": self.judge}
        return train(side(model), self.spec, phase, terms, self.batches, start=self.start, moments=moments, **told)

    def run(self):
        phase = Phase(PHASE, 2, 0, self.folder / f"{PHASE}.pt")
        how = {"train_cycle": self.train, "evaluate": self.judge, "gradients": dict, "activations": dict}
        how["quality"] = self.quality
        try:
            return prune_and_train(self.model, self.spec, phase, self.heard, **how)
        finally:
            self.heard.close()


def totals(history) -> list[int]:
    return [sum(widths.values()) for widths in history]


def test_a_target_of_accuracy_returns_the_last_adapters_that_reached_it(tmp_path):
    # Every training is judged at its end by the engine, and then for the target.
    trainer = Trainer(tmp_path, marks=[0, 80, 0, 70, 0, 60], target={"accuracy": 70})
    model, told, history = trainer.run()
    assert totals(history) == [16, 8] == totals(told["widths"])
    assert len(trainer.trained) == told["trainings"] == 3, "the last one was in vain, and was trained"
    assert prunable_plan(model).widths == history[-1]
    assert largest_difference(values(model), trainer.judged[3]) == 0


def test_a_target_is_a_figure_of_the_task_which_may_be_an_error(tmp_path):
    error = Quality("rmse", "error", "error", "error", "", 3, lower_is_better=True)
    trainer = Trainer(tmp_path, marks=[0, 0.2, 0, 0.5, 0, 0.7], target={"accuracy": 0.5}, quality=error)
    assert totals(trainer.run()[2]) == [16, 8]
    said = " ".join(trainer.heard.console.file.getvalue().split())
    assert "error 0.700 is above the target of 0.5; the adapters of the cycle before are kept" in said


def test_pruning_by_accuracy_ends_when_nothing_can_go(tmp_path):
    model, _, history = Trainer(tmp_path, target={"accuracy": 2}).run()
    assert totals(history) == [16, 8, 4, 2, 1]
    trainer = Trainer(tmp_path / "least", target={"accuracy": 2}, spec=AdaptFormer(width=4))
    model, _, history = trainer.run()
    assert totals(history) == [8, 4, 2], "a neuron in each"
    assert len(prunable_plan(model).bottlenecks(model)) == 2


def test_a_target_that_is_met_trains_once_and_an_impossible_one_never(tmp_path):
    assert totals(Trainer(tmp_path, target={"neurons": 16}).run()[2]) == [16]
    trainer = Trainer(tmp_path / "impossible", target={"parameters": 1})
    with pytest.raises(UserError, match=r"prune\.target\.parameters=1 leaves no neuron"):
        trainer.run()
    assert trainer.trained == []


@pytest.mark.wide_unless(lambda start: start)
@pytest.mark.parametrize("start", [None, {"top1": 90}], ids=["unknown", "known"])
def test_keep_best_compares_within_a_cycle(start, tmp_path):
    # What a cycle begins with is no candidate: adapters that have just lost neurons would be left untrained.
    trainer = Trainer(tmp_path, marks=[91, 92, 30, 20, 20, 5], start=start, keep="best", epochs=2)
    model, told, _ = trainer.run()
    assert told["start"] == start
    kept = [load_checkpoint(p)["kept_epoch"] for p in sorted(tmp_path.iterdir())]
    assert kept == [2, 1, 1]
    assert told["kept_epoch"] == 1
    assert largest_difference(values(model), trainer.judged[-2]) == 0
    assert next(trainer.marks, None) is None


def test_seeds_and_names_of_cycles_differ(tmp_path):
    trainer = Trainer(tmp_path)
    trainer.run()
    phases = [phase for phase, _, _ in trainer.trained]
    assert [p.name for p in phases] == [f"{PHASE}_cycle{c}" for c in range(3)]
    assert len({p.number for p in phases}) == len({p.checkpoint for p in phases}) == 3
    assert phases[0].checkpoint == tmp_path / f"{PHASE}.pt"


# -------------------------------------------------------------------------------------------------------- optimiser's moments


def trained_for(folder, *cuts, spec=None, **options):
    """A model after epochs of training on, between which `cuts` (of model and moments) are made; and its moments."""
    trainer, moments = Trainer(folder, spec=spec, **options), {}
    for i in range(len(cuts) + 1):
        found = trainer.train(trainer.model, Phase("p", 0, 0, folder / f"{i}.pt"), moments)
        moments = found["moments"]
        if i < len(cuts):
            cuts[i](trainer.model, moments)
    trainer.heard.close()
    return trainer.model, moments


def half(model):
    return {p: torch.arange(1, b.up.in_features, 2) for p, b in prunable_plan(model).bottlenecks(model).items()}


def test_a_training_that_is_cut_in_two_is_the_training(tmp_path):
    long, _ = trained_for(tmp_path / "long", epochs=2)
    cut, _ = trained_for(tmp_path / "cut", lambda model, moments: None)
    assert largest_difference(values(long), values(cut)) == 0


@pytest.mark.wide_unless(
    lambda spec, optimizer: (spec.name, optimizer) in (("adapters", "adamw"), ("adaptformer", "momentum"))
)
@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
@pytest.mark.parametrize(
    "spec", [Adapters(width=4, bias=True), AdaptFormer(width=4, scale="learnable", dropout=0.0)], ids=lambda s: s.name
)
def test_kept_neurons_go_on_as_if_the_others_were_masked(spec, optimizer, tmp_path):
    """Without clipping, AdamW and its like treat every number on its own: a removed neighbour must change nothing."""

    def cut(model, moments):
        before = copy.deepcopy(moments)
        shrink_(model, half(model), moments)
        for name, state in moments.items():
            dim = {"down": 0, "up": 1}.get(name.split(".")[-2]) if not name.endswith("up.bias") else None
            for key, value in before[name].items():
                kept = value.index_select(dim, torch.tensor([1, 3])) if dim is not None and value.ndim else value
                assert torch.equal(state[key], kept)

    def forget(model, moments):
        shrink_(model, half(model))
        moments.clear()

    def mask(model, moments):
        for b in prunable_plan(model).bottlenecks(model).values():
            b.up.weight.data[:, [0, 2]] = 0

    shrunk, reset, twin = (
        trained_for(tmp_path / do.__name__, do, spec=spec, optimizer=optimizer, max_steps=1)[0]
        for do in (cut, forget, mask)
    )
    shrink_(twin, half(twin))
    assert largest_difference(values(shrunk), values(twin)) < 1e-7  # measured up to 2e-9
    assert largest_difference(values(shrunk), values(reset)) > 1e-4  # measured from 1.6e-3


def test_moments_that_do_not_tell_neurons_apart_begin_anew(tmp_path):
    anew = []

    def cut(model, moments):  # of a matrix, it keeps sums over rows and columns
        shrink_(model, half(model), moments)
        anew.extend(name for name, state in moments.items() if not state)

    _, moments = trained_for(tmp_path, cut, optimizer="adafactorbv", spec=Adapters(width=40))
    assert anew == [name for name in moments if ".adapter." in name]
    assert all(moments.values())


def test_the_moments_of_an_adapter_that_is_gone_go_with_it():
    model = compress(tiny_vit(), [Adapters(width=2)])
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    moments = {n: {"step": torch.tensor(1.0), "exp_avg": torch.ones_like(model.get_parameter(n))} for n in names}
    shrink_(
        model, {p: torch.arange(0) if "attn" in p else torch.arange(2) for p in prunable_plan(model).widths}, moments
    )
    assert list(moments) == [n for n, p in model.named_parameters() if p.requires_grad]
