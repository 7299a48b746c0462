"""Running a single training phase on random images, and comparing the weights it leaves."""

from __future__ import annotations

import io
import math

import timm
import torch
from rich.console import Console

from compressvit.log import RunLog
from compressvit.model import ties
from compressvit.training.loop import Phase, train
from compressvit.training.terms import labels_term
from helpers.images import side

CPU = torch.device("cpu")
VIT = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}


class Heard(RunLog):
    """A log that writes no files and keeps what it was told."""

    def __init__(self):
        super().__init__(None, Console(file=io.StringIO()))
        self.lines = []

    def scalars(self, phase, kind, step, values):
        self.lines.append({"kind": kind, "step": step, **values})

    def of(self, kind):
        return [line for line in self.lines if line["kind"] == kind]


class Normed(torch.nn.Module):
    """A batch norm of tokens."""

    def __init__(self):
        super().__init__()
        self.bn = torch.nn.BatchNorm1d(16)

    def forward(self, x):
        return self.bn(x.transpose(1, 2)).transpose(1, 2)


def tiny_vit(seed=0, **changes):
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **{**VIT, "num_classes": 4, **changes})


def random_batches(count, size, seed=0, classes=4):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 1, 8, 8, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(count)
    ]


def fit(
    model, spec, batches, folder, *, terms=None, teacher=None, evaluate=lambda model: {}, size=None, device=CPU, **more
):
    """Train on a list of batches and return what the log heard; `more` goes to the engine."""
    heard = Heard()
    try:
        train(
            side(model),
            spec,
            Phase("phase", 1, 0, folder / "phase.pt"),
            terms or [labels_term(1.0, spec.smoothing)],
            batches,
            batch_size=size or len(batches[0][0]),
            device=device,
            log=heard,
            evaluate=evaluate,
            teacher=teacher,
            **more,
        )
    finally:
        heard.close()
    return heard


def values(model):
    return {name: tensor.detach().clone() for name, tensor in ties.unique_state(model).items()}


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


def distance(first, second):
    """L2 norm of the difference of two sets of parameters."""
    assert first.keys() == second.keys()
    return math.sqrt(sum((first[n].double() - second[n].double()).square().sum().item() for n in first))
