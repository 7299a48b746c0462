"""A transformed model is captured whole by what captures its teacher: torch.compile, torch.export, torch.jit.trace and torch.fx."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.contract import teacher
from helpers.models import BACKBONES, images_for, outputs, randomise

from compressvit.testing.cases import Case, cases_of, stand_for_families
from compressvit.transforms import IRPE, TRANSFORMS, VPT, LowRank, Multiplex
from compressvit.transforms.applying import compress

# torch captures the others whole; timm's Hiera counts the dimensions of its tensors as it runs.
UNTRACED = ("hiera",)
UNSCRIPTED = (
    *UNTRACED,
    "cvt",
)  # whose stages have names of their own instead of a list, and einops does not take TorchScript's numbers
CASES = [case for spec in TRANSFORMS.values() for case in cases_of(spec) if case.backbone in stand_for_families()]
CASES += [Case(VPT(prompts=3, deep=False), backbone, 2) for backbone in ("vit", "swin")]
NAMES = [
    name for name, spec in TRANSFORMS.items() if "decoder" not in spec.needs
]  # detectors: tests/model/test_adamixer.py
FIRST = pytest.mark.wide_unless(  # methods that change the backbone, and two of those that add to it
    lambda case: (
        case == next(other for other in CASES if other.spec.name == case.spec.name)
        and (not case.spec.freezes or case.spec.name in ("lora", "vpt"))
    )
)


def moved(case: Case) -> torch.nn.Module:
    """The case's student, in which nothing is zero or the identity."""
    student = case.student().eval()
    randomise(student, 0.05)
    return student


@torch.no_grad()
def largest_difference(captured, model: torch.nn.Module, images: torch.Tensor) -> float:
    """Relative to the largest output."""
    expected = model(images)
    return ((captured(images) - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.wide
@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_compile_captures_the_whole_student(backbone):
    architecture, args = BACKBONES[backbone]
    shallow = timm.create_model(
        architecture, **args | {"vit": {"depth": 2}, "swin": {"depths": (2,), "num_heads": (2,)}}[backbone]
    )
    model = compress(shallow.eval(), [Multiplex(share=2, mixing_bias=True, mlp_conv=3, form="reference")])
    images = images_for(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    difference = (outputs(compiled, images) - outputs(model, images)).abs().max()
    assert difference <= 1e-6  # seen 0.0


@pytest.mark.slow
def test_compiled_student_computes_the_same():
    model = compress(teacher("vit"), [Multiplex(share=2, mixing_bias=True, mlp_conv=3, form="reference"), IRPE()])
    images = images_for(model)
    difference = (outputs(torch.compile(model), images) - outputs(model, images)).abs().max()
    assert difference <= 1e-6  # TOLERANCE


@pytest.mark.wide_unless(lambda case: str(case) in ("multiplex0-vit", "lors0-vit"))
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_traced_student_computes_the_same_for_other_batches(case):
    model = moved(case)
    images = images_for(model)
    traced = torch.jit.trace(model, images[:1], check_trace=False)
    assert (
        largest_difference(traced, model, torch.cat([images, images.flip(0)])) <= 1e-5
    )  # lors sums in another order; others 0.0


@pytest.mark.wide_unless(
    lambda case: str(case) in ("multiplex0-vit", "lors0-vit", "low_rank0-vit", "narrow0-vit", "irpe0-vit", "vpt0-vit")
)
@FIRST
@pytest.mark.parametrize("case", [case for case in CASES if case.backbone not in UNTRACED], ids=str)
def test_symbolically_traced_student_computes_the_same_for_other_batches(case):
    model = moved(case)
    images = images_for(model)
    graph = torch.fx.symbolic_trace(model)
    for batch in (images[:1], torch.cat([images, images.flip(0)])):
        assert largest_difference(graph, model, batch) <= 1e-6  # seen 0.0


@pytest.mark.wide
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_exported_student_computes_the_same_for_other_batches(case):
    model = moved(case)
    images = images_for(model)
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(model, (images,), dynamic_shapes=sizes).module()
    assert largest_difference(exported, model, torch.cat([images, images.flip(0)])) <= 1e-5  # seen 0.0


@pytest.mark.wide_unless(lambda backbone: backbone == "vit")
@pytest.mark.parametrize("backbone", [name for name in stand_for_families() if name not in UNSCRIPTED])
def test_low_rank_student_is_scripted(backbone):
    if any(hasattr(module, "qkv_bias_separate") for module in teacher(backbone).modules()):
        pytest.skip("timm's attention reads the weight of qkv in a branch that is not run, but scripted")
    model = compress(teacher(backbone), [LowRank(budget={"parameters": 0.6}, metric="weights")])
    scripted = torch.jit.script(model)
    assert largest_difference(scripted, model, images_for(model)) <= 1e-6  # seen 0.0
