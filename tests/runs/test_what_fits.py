"""Where memory runs out in a training, it is said which batch would fit."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers.runs import TINY, refused

from compressvit.model.cost import saved_bytes
from compressvit.recipe.recipe import parse_recipe
from compressvit.runs import what_fits as module
from compressvit.runs.job import prepare
from compressvit.runs.plan import plan_job
from compressvit.runs.what_fits import Need, memory_of, need
from compressvit.training.loop import Trainer


def needs(text: str) -> Need:
    job = prepare(parse_recipe(text), "cpu")
    return need(job, plan_job(job))


def test_the_bytes_of_an_image_are_those_that_a_batch_keeps():
    """Without losses of its own, a step keeps what autograd keeps of the model."""
    recipe = TINY.partition("steps:")[0] + "steps: [repadapter: {width: 4}, finetune: {epochs: 1}]\n"
    job = prepare(parse_recipe(recipe), "cpu")
    found = need(job, plan_job(job))
    model = job.architecture.build().train()
    weights = [*model.parameters(), *model.buffers()]
    kept = saved_bytes(lambda: model(torch.zeros(32, 1, 8, 8)), weights)
    # the teacher is trained as a whole, of the student only adapters
    assert found.image == pytest.approx(kept / 32, rel=0.01)  # measured: 1.2e-3, what does not grow with the batch
    assert found.fixed == 4 * sum(p.nbytes for p in model.parameters())


def test_losses_and_the_teacher_beside_them_are_counted():
    alone = TINY.partition("steps:")[0] + "steps: [multiplex: {share: 2}, finetune: {epochs: 1}]\n"
    distilled, apart = needs(TINY), needs(alone)
    job = prepare(parse_recipe(TINY), "cpu")
    assert distilled.image - apart.image == plan_job(job).steps[-1].loss_bytes_total // 32
    assert distilled.fixed - apart.fixed == sum(p.nbytes for p in job.teacher.model.parameters())


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (
            lambda takes: (takes.fixed + 20 * takes.image) / 0.9 + 1,
            r"data\.batch_size=20 would fit, with accumulate=2 in",
        ),
        (lambda takes: takes.fixed, "which is not enough for one"),
        (lambda takes: 1e12, "which is enough for 32: see what else uses it"),
        (lambda takes: None, r"memory ran out: MemoryError\. Give a smaller data.batch_size \(now 32\)"),
    ],
)
def test_a_run_says_what_would_fit(tmp_path, monkeypatch, memory, words):
    (tmp_path / "recipe.yaml").write_text(TINY)
    given = memory(needs(TINY))
    monkeypatch.setattr(module, "memory_of", lambda device: None if given is None else int(given))

    def full(self, images, targets):
        raise MemoryError

    monkeypatch.setattr(Trainer, "backward", full)
    message = refused("apply", tmp_path / "recipe.yaml", "--output", tmp_path / "run", "--no-report", "--device", "cpu")
    assert re.search(words, message), message
    assert "Give a smaller data.batch_size (now 32)" in message


def test_a_container_has_what_it_is_given(tmp_path, monkeypatch):
    whole = memory_of(torch.device("cpu"))
    for text, expected in (("1048576\n", 2**20), ("max\n", whole)):
        (tmp_path / "max").write_text(text)
        monkeypatch.setattr(module, "_CGROUP", tmp_path / "max")
        assert memory_of(torch.device("cpu")) == expected
    assert memory_of(torch.device("meta")) is None
    assert json.dumps(whole)
