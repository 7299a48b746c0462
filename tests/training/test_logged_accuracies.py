"""The accuracies that a phase logs of its training batches, against the model's own outputs."""

from __future__ import annotations

import pytest
import torch
from helpers.training import fit, random_batches, tiny_vit

from compressvit.training.phases.finetune import Finetune


def test_they_are_of_the_labelled_images_of_the_batch(tmp_path):
    model = tiny_vit(num_classes=9)
    ((images, targets),) = random_batches(1, 24, classes=9)
    targets[::5] = -1  # no label
    with torch.no_grad():
        logits = model.train()(images)
    known = targets >= 0
    place = (logits[known] > logits[known].gather(1, targets[known][:, None])).sum(dim=1)
    spec = Finetune(epochs=1, lr=1e-9, warmup_epochs=0, log_every=1)
    heard = fit(model, spec, [(images, targets)], tmp_path)
    lines = [line for line in heard.lines if "top5" in line]
    assert lines
    assert 0 < (place < 5).sum() < len(place)
    for line in lines:
        assert line["top1"] == pytest.approx(100 * (place == 0).double().mean().item())
        assert line["top5"] == pytest.approx(100 * (place < 5).double().mean().item())
