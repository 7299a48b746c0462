"""Distilling small models in shards, beside the same with whole models."""

from __future__ import annotations

import torch

import compressvit
from compressvit import processes
from compressvit.training.pairs import match_layers
from compressvit.training.phases.distill import Distill, _trained_along
from helpers.images import side
from helpers.training import fit, tiny_vit, values

RELATIONS = {"prediction": {"weight": 1.0}, "attention_relation": {"weight": 1.0}, "hidden_relation": {"weight": 0.1}}
SGD = {"epochs": 2, "lr": 0.1, "optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01, "log_every": 5}


def models(kind="plain", depth=4):
    """A student and its teacher, in double precision."""
    teacher = tiny_vit(seed=1, depth=depth).double().eval()
    if kind == "plain":
        return tiny_vit(seed=2, depth=depth).double(), teacher
    steps = {
        "multiplexed": [compressvit.Multiplex(share=2)],
        "one number": [compressvit.AdaptFormer(width=4, scale="learnable", dropout=0)],
        "all share": [compressvit.LORS(rank=2, init="scratch", share=4)],
    }
    torch.manual_seed(3)
    return compressvit.compress(teacher, steps[kind]), teacher


def distilled(folder, data, *, kind="plain", losses=None, batches=slice(None), **options):
    """The weights after distilling with this process's part of every batch, and what the log heard."""
    student, teacher = models(kind)
    spec = Distill(**{**SGD, "losses": RELATIONS if losses is None else losses, **options})
    with processes.joined():
        world, rank = processes.count(), processes.rank()
        mine = [(images[rank::world].double(), targets[rank::world]) for images, targets in data][batches]
        terms = spec.terms(student, match_layers(student, teacher, spec.layers)[0], None, teacher)
        with _trained_along(student, terms):
            heard = fit(student, spec, mine, folder, terms=terms, teacher=side(teacher))
    return values(student), heard.of("epoch")


def most_apart(one, others):
    """The largest difference of a weight, relative to the largest of its tensor."""
    return max(
        ((weights[name] - value).abs().max() / value.abs().max()).item()
        for weights in others
        for name, value in one.items()
    )
