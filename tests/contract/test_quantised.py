"""Which linear layers of a student quantisers to 8 bits reach, and that its outputs stay close."""

from __future__ import annotations

import copy
import functools

import pytest
import timm
import torch
from helpers.models import VIT, images_for, randomise
from torch import nn
from torch.ao.nn.quantized.dynamic import Linear as DynamicLinear

from compressvit.artifacts import artifact
from compressvit.artifacts.merge import merged_copy
from compressvit.errors import UserError
from compressvit.transforms import LORS, SSF, Adapters, FacT, LoRA, LowRank, Multiplex, RepAdapter, Transform
from compressvit.transforms.applying import compress, materialise

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

BACKBONE = 4 * 4 + 1  # linear layers: 4 in each of 4 blocks, and the classifier
# By student: its transform, the layers that torch's dynamic quantisation reaches, and how many linear layers there are.
STUDENTS: dict[str, tuple[Transform, int, int]] = {
    "low_rank": (LowRank(rank=8, metric="weights"), 33, 33),
    "pivoted": (LowRank(rank=8, metric="weights", pivoted=True), 33, 33),
    "multiplex": (Multiplex(share=2, mixing_bias=True, mlp_conv=3), BACKBONE, BACKBONE),
    "lors": (LORS(rank=2, share=2, metric="weights"), 1, BACKBONE),
    "adapters": (Adapters(width=8), BACKBONE, BACKBONE + 16),
    "repadapter": (RepAdapter(width=8), BACKBONE + 8, BACKBONE + 8),
    "lora": (LoRA(rank=2), BACKBONE - 4, BACKBONE),
    "ssf": (SSF(std=0.02), 1, BACKBONE),
    "fact": (FacT(rank=2), 1, BACKBONE),
}
MERGED = ("repadapter", "lora", "ssf", "fact")


@functools.cache
def student(name: str) -> nn.Module:
    torch.manual_seed(0)
    teacher = timm.create_model("vit_tiny_patch16_224", **{**VIT, "embed_dim": 64}).eval()
    made = compress(teacher, [STUDENTS[name][0]]).eval()
    randomise(made, 0.02)
    return made


def dynamic(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def reached(model: nn.Module, kind: type[nn.Module] = DynamicLinear) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@torch.no_grad()
def least_cosine(model: nn.Module, other: nn.Module) -> float:
    images = images_for(model).repeat(
        32, 1, 1, 1
    )  # of so many tokens that a shared weight is added to, where it can be
    return nn.functional.cosine_similarity(model(images), other(images), dim=1).min().item()


@pytest.mark.wide_unless(lambda name: name in ("multiplex", "low_rank", "lora"))
@pytest.mark.parametrize("name", STUDENTS)
def test_dynamic_quantisation_reaches_plain_layers_and_leaves_others_as_they_are(name):
    _, count, linear = STUDENTS[name]
    assert reached(student(name), nn.Linear) == linear
    quantised = dynamic(copy.deepcopy(student(name)))
    assert reached(quantised) == count
    assert least_cosine(student(name), quantised) > 0.99  # the teacher: 0.997


@pytest.mark.parametrize("name", MERGED)
def test_dynamic_quantisation_reaches_every_layer_of_a_merged_student(name):
    merged = merged_copy(student(name))
    quantised = dynamic(copy.deepcopy(merged))
    assert reached(quantised) == BACKBONE
    assert least_cosine(student(name), quantised) > 0.99


def test_dynamic_quantisation_reaches_every_layer_of_a_materialised_lors_student():
    quantised = dynamic(materialise(copy.deepcopy(student("lors"))))
    assert reached(quantised) == BACKBONE
    assert least_cosine(student("lors"), quantised) > 0.99


@pytest.mark.parametrize("config", ["Int8DynamicActivationInt8WeightConfig", "Int8WeightOnlyConfig"])
@pytest.mark.parametrize("name", STUDENTS)
def test_torchao_reaches_every_layer(name, config):
    quantization = pytest.importorskip("torchao.quantization")
    model = copy.deepcopy(student(name))
    quantization.quantize_(model, getattr(quantization, config)())
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == STUDENTS[name][2]
    assert all(type(layer.weight) is not nn.Parameter for layer in layers)
    assert least_cosine(student(name), model) > 0.99


def test_a_quantised_student_is_not_saved(tmp_path):
    quantised = dynamic(copy.deepcopy(student("low_rank")))
    with pytest.raises(
        UserError,
        match=r"an artifact holds plain tensors only; save the model before it is quantised, and quantise what",
    ):
        artifact.save(quantised, tmp_path / "student")
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize("config", ["Int8DynamicActivationInt8WeightConfig", "Int8WeightOnlyConfig"])
def test_a_student_quantised_by_torchao_is_not_saved(tmp_path, config):
    quantization = pytest.importorskip("torchao.quantization")
    model = copy.deepcopy(student("low_rank"))
    quantization.quantize_(model, getattr(quantization, config)())
    with pytest.raises(UserError, match="save the model before it is quantised"):
        artifact.save(model, tmp_path / "student")


class Wrapped(torch.Tensor):
    """A weight that is not added to, as those of quantisers: it is only read by `linear`."""

    def __tensor_flatten__(self):
        return [], None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, *bias = args
            return func(x, weight.as_subclass(torch.Tensor), *bias)
        if func is torch.Tensor.add or func is torch.add:
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_shared_weight_that_cannot_be_added_to_is_applied_to_the_tokens():
    model = copy.deepcopy(student("lors"))
    for layer in {id(layer.weight): layer for layer in model.modules() if hasattr(layer, "low_rank")}.values():
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Wrapped))
    assert least_cosine(student("lors"), model) > 0.99999
