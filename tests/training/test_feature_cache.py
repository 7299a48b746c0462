"""Keeping features: which models have some to keep, in which form, and what is noticed only in the first step."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.images import CPU, GRAY, side
from helpers.training import random_batches, tiny_vit
from torch import nn

from compressvit.data.input import Side
from compressvit.data.order import View
from compressvit.errors import UserError
from compressvit.model import surgery
from compressvit.model.cut import cut_of
from compressvit.model.weights import build
from compressvit.tasks.base import find_task
from compressvit.training.asking import Shown
from compressvit.training.cache.features import FeatureCache, form_of_features, refuse_moving
from compressvit.training.cache.spec import Features
from compressvit.training.cache.store import Index, Store, create
from compressvit.training.phases.finetune import Finetune
from compressvit.training.step import Pass
from compressvit.training.terms import labels_term

EXACT = Features(dtype="fp32")
RESNET = {"in_chans": 1, "num_classes": 4, "drop_rate": 0.0}


def probe(model: nn.Module) -> nn.Module:
    surgery.train_only(model, {name for name, _ in model.named_parameters() if name.startswith(("head", "fc"))})
    return model


def opened(model: nn.Module, folder) -> FeatureCache:
    cut = cut_of(model)
    form = form_of_features(EXACT, side(model), cut)
    create(folder, index := Index(images=12, bytes=form.bytes, identity={}))
    return FeatureCache(cut, None, EXACT, 1, form, Store(folder, index))


def trained_step(model: nn.Module, cache: FeatureCache | None, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss and its gradients, of a model in training mode."""
    task, features = find_task("classification"), None if cache is None else cache.within(model)
    terms = [labels_term(1.0, 0.0)]
    spec = Finetune()
    whole = Pass(side(model), None, terms, task, torch.autocast("cpu", enabled=False), spec, features)
    model.train().zero_grad()
    targets = torch.arange(len(images)) % 4
    loss, _, _ = whole(images, targets, task.labels(targets), Shown(View(0, 0), torch.arange(len(images)), 0))
    loss.backward()
    whole.close()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_step_has_the_loss_and_gradients_of_the_whole_model(tmp_path):
    model, images = probe(tiny_vit()), random_batches(1, 6)[0][0]
    expected = trained_step(model, None, images)
    cache = opened(model, tmp_path)
    for read in (0, 6):
        found = trained_step(model, cache, images)
        assert (cache.read, cache.asked) == (read, 6)
        assert found.keys() == expected.keys() == {"loss", "head.weight", "head.bias"}
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    calls = []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    trained_step(model, cache, images)
    assert calls == []
    trained_step(model, None, images)
    assert calls == [1]


def test_maps_of_several_sizes_are_kept_as_a_list():
    swin = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "window_size": 2}
    more = {"img_size": 64, "num_classes": 3, "channels": 16, "representation": 32}
    model = build("faster_rcnn", {"backbone": "swin_tiny_patch4_window7_224", "backbone_args": swin, **more})
    form = form_of_features(EXACT, Side(model, GRAY.at((3, 64, 64))), cut_of(model))
    assert form.listed
    shapes = [(1, 8, 16, 16), (1, 16, 8, 8), (1, 32, 4, 4), (1, 64, 2, 2)]
    assert [part.shape for part in form.parts] == shapes
    values = [torch.randn(3, *shape[1:]) for shape in shapes]
    encoded = form.encode(*values)
    assert encoded.shape == (3, form.bytes) == (3, 4 * sum(64 * 256 // 2**k // 8 for k in range(4)))
    for found, value in zip(form.decode(encoded), values, strict=True):
        assert torch.equal(found, value)


class Noisy(nn.Module):
    """Random in training, without a name that says so."""

    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


class Joined(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (Noisy, "those of what is before the classifier are others in training than in eval mode; name it in `frozen`"),
        (Joined, "tensor 1 of what is frozen for an image depends on the other images of the batch"),
    ],
)
def test_features_that_are_no_function_of_the_image_are_refused_in_the_first_step(module, told, tmp_path):
    model = probe(tiny_vit())
    model.norm = nn.Sequential(model.norm, module())
    refuse_moving(model, Finetune(), cut_of(model))  # nothing to see
    with pytest.raises(UserError, match=told):
        trained_step(model, opened(model, tmp_path), random_batches(1, 4)[0][0])


def test_statistics_that_are_gathered_are_refused():
    model = probe(timm.create_model("resnet10t", **RESNET))
    refuse_moving(model, Finetune(), cut_of(model))  # norms of which nothing is trained are in eval mode
    model.layer1[0].bn1 = nn.BatchNorm2d(model.layer1[0].bn1.num_features, affine=False)
    with pytest.raises(UserError, match=r"layer1\.0\.bn1 norms by the statistics of a batch; name it in `frozen`"):
        refuse_moving(model, Finetune(), cut_of(model))
    refuse_moving(model, Finetune(frozen=["layer1*"]), cut_of(model))


def test_dropout_is_refused_where_it_drops():
    model = probe(tiny_vit(drop_path_rate=0.1, attn_drop_rate=0.2))
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.attn_drop leaves something out at random \(with .* 0\.2\)"):
        refuse_moving(model, Finetune(), cut_of(model))
    refuse_moving(model, Finetune(frozen=["blocks"]), cut_of(model))
    refuse_moving(model, Finetune(frozen=["blocks"], drop_path=0.3), cut_of(model))
    assert all(module.training for module in model.modules())
    with pytest.raises(UserError, match=r"drop_path=0\.3 leaves out blocks at random; set drop_path=0"):
        refuse_moving(probe(tiny_vit()), Finetune(drop_path=0.3), cut_of(model))


def test_what_is_trained_before_the_cut_is_named():
    model = tiny_vit()
    with pytest.raises(
        UserError, match=r"must be frozen, and cls_token is trained; put `freeze: \{train: head\}` before"
    ):
        refuse_moving(model, Finetune(), cut_of(model))
    args = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8}
    given = {"backbone": "vit_tiny_patch16_224", "backbone_args": args, "img_size": 32, "num_classes": 3}
    model = build("segmenter", given).to(CPU)
    with pytest.raises(
        UserError, match=r"features of the backbone, .* backbone\.cls_token is trained; set backbone_lr=0"
    ):
        refuse_moving(model, Finetune(), cut_of(model))
    refuse_moving(model, Finetune(backbone_lr=0), cut_of(model))
    refuse_moving(model, Finetune(frozen=["backbone"]), cut_of(model))
