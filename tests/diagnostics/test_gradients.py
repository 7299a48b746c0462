"""Norms of the gradient: exact per use of a shared tensor, in step with what the optimiser sees, and without a trace in the weights."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from helpers.models import build, images_for, randomise
from helpers.training import fit, random_batches, tiny_vit, values
from torch import nn

from compressvit.diagnostics.gradient_findings import gradient_findings
from compressvit.diagnostics.gradients import GROUPS, GradientRow, GradientWatch, places
from compressvit.diagnostics.uses import Uses
from compressvit.errors import UserError
from compressvit.model import ties
from compressvit.model.backbone import describe
from compressvit.rows import read_rows
from compressvit.training.phases.finetune import Finetune
from compressvit.transforms import LORS, Adapters, Compacter, FacT, Multiplex
from compressvit.transforms.applying import compress

SHARING = {
    "multiplex": (Multiplex(share=2, mlp_conv=3), ("vit", "dinov2_registers", "swin")),
    "lors": (LORS(rank=2, share=2, metric="weights"), ("vit", "swin")),
    "fact": (FacT(rank=3), ("vit",)),  # every block reads the shared factors in each of its projections
    "compacter": (Compacter(n=2, ratio=0.25), ("vit", "swin")),
}
CASES = [
    pytest.param(spec, backbone, id=f"{name}-{backbone}") for name, (spec, many) in SHARING.items() for backbone in many
]


def sharing(spec, backbone) -> nn.Module:
    model = compress(build(backbone), [spec])
    randomise(model, 0.05)  # nothing is zero, so that every factor has a gradient
    return model.train()


def block_paths(model):
    return [info.path for info in describe(model).blocks]


def recorded(model, batches=1, precision=None) -> Uses:
    """One backward pass a batch, recorded."""
    uses = Uses(model, block_paths(model))
    uses.recording = True
    for seed in range(batches):
        torch.manual_seed(seed)
        with torch.autocast("cpu", precision, enabled=precision is not None):
            loss = model(images_for(model, seed=seed)).square().mean()
        loss.backward()
    uses.close()
    return uses


def summed(uses: Uses) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for names in uses.names.values():
        for first, name in names.items():
            total[first] = total.get(first, 0) + uses.gradients[name].double()
    return total


def furthest(first, second) -> float:
    return max(((first[n] - second[n]).norm() / second[n].norm()).item() for n in second)


@pytest.mark.wide_unless(lambda spec, backbone, batches: batches == 3 and backbone == "vit")
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize(("spec", "backbone"), CASES)
def test_uses_add_up_to_the_gradient(spec, backbone, batches):
    model = sharing(spec, backbone)
    uses = recorded(model, batches)
    shared = {group[0] for group in ties.tied_groups(model) if model.get_parameter(group[0]).requires_grad}
    total = summed(uses)
    assert set(total) == shared != set()
    expected = {name: model.get_parameter(name).grad.double() for name in shared}
    assert min(g.norm() for g in expected.values()) > 0
    assert furthest(total, expected) < 1e-6  # measured up to 1.1e-7


@pytest.mark.wide_unless(lambda spec, backbone: backbone == "vit")
@pytest.mark.parametrize(("spec", "backbone"), CASES)
def test_a_use_is_the_gradient_of_a_model_that_shares_nothing(spec, backbone):
    model = sharing(spec, backbone)
    alone = copy.deepcopy(model)
    for group in ties.tied_groups(alone):
        for name in group:
            path, _, own = name.rpartition(".")
            old = alone.get_parameter(name)
            setattr(alone.get_submodule(path), own, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
    assert not ties.tied_groups(alone)
    uses = recorded(model)
    recorded(alone)
    blocks = block_paths(model)
    for group in ties.tied_groups(model):
        if not model.get_parameter(group[0]).requires_grad:
            continue
        for block in blocks:
            inside = [name for name in group if name.startswith(f"{block}.")]
            if inside:
                expected = sum(alone.get_parameter(name).grad.double() for name in inside)
                found = uses.gradients[inside[0]].double()
                assert (found - expected).norm() <= 1e-6 * expected.norm() > 0


def test_autocast_casts_a_shared_weight_once_and_its_uses_are_told_apart():
    model = sharing(Multiplex(share=2), "vit")
    uses = recorded(model, precision=torch.bfloat16)
    expected = {name: model.get_parameter(name).grad.double() for name in summed(uses)}
    assert furthest(summed(uses), expected) < 2e-2  # bfloat16 has 8 bits; measured 2e-3
    own = [uses.gradients[f"blocks.{i}.attn.qkv.weight"] for i in (0, 1)]
    assert (own[0] - own[1]).norm() > 0.1 * own[0].norm()


def test_nothing_is_recorded_unless_asked_for_and_hooks_go():
    model = sharing(Multiplex(share=2), "vit")
    uses = Uses(model, block_paths(model))
    model(images_for(model)).sum().backward()
    assert uses.gradients == {}
    uses.close()
    assert not any(module._forward_hooks for module in model.modules())


# ------------------------------------------------------------------------------------------------------------ layers and kinds


@pytest.mark.parametrize("backbone", ["vit", "deit_distilled", "dinov2_registers", "swin", "convnext"])
def test_every_parameter_has_a_layer_and_a_kind(backbone):
    model = compress(build(backbone), [Adapters(width=3)])
    found = places(model)
    assert set(found) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    kinds = {kind for _, kind in found.values()}
    assert kinds <= set(GROUPS)
    assert {"norms", "MLP", "transforms", "embeddings", "head"} <= kinds
    assert ("attention" in kinds) == (backbone != "convnext")
    assert ("other" in kinds) == (backbone == "convnext")  # its depth-wise convolution
    blocks = [info.path for info in describe(model).blocks]
    layers = list(dict.fromkeys(layer for layer, _ in found.values()))
    assert [layer for layer in layers if layer in blocks] == blocks
    first = blocks[0]
    assert {n for n, (layer, _) in found.items() if layer == first} == {n for n in found if n.startswith(f"{first}.")}


def test_swins_merging_of_patches_is_an_embedding():
    assert places(build("swin"))["layers.1.downsample.reduction.weight"] == ("layers.1.downsample", "embeddings")


# ------------------------------------------------------------------------------------------------------------------- training


HARD = {
    "epochs": 2,
    "mixup": 0.5,
    "drop_path": 0.3,
    "smoothing": 0.1,
    "accumulate": 2,
    "ema": 0.9,
    "clip_grad": 0.01,
    "log_every": 1,
}


def multiplexed():
    return compress(tiny_vit(proj_drop_rate=0.2, depth=4), [Multiplex(share=2, mlp_conv=3)])


def trained(folder, *, watched, every=1, model=None, **options):
    """The weights that a phase leaves, the rows that were written, and what the log heard."""
    model = model or multiplexed()
    watch = GradientWatch(model, "phase", folder / "gradients.jsonl", every) if watched else None
    spec = Finetune(**{**HARD, **options})
    heard = fit(model, spec, random_batches(5, 6), folder, watches=[watch] if watch else [])
    if watch:
        watch.close()
    return values(model), read_rows(folder / "gradients.jsonl", GradientRow) if watched else [], heard


@pytest.mark.wide_unless(lambda precision: precision == "fp32")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_watching_changes_no_bit(tmp_path, precision):
    (tmp_path / "on").mkdir()
    on, rows, _ = trained(tmp_path / "on", watched=True, precision=precision)
    off, _, _ = trained(tmp_path, watched=False, precision=precision)
    assert all(torch.equal(on[name], off[name]) for name in off)
    assert len(rows) == 6
    start = values(multiplexed())
    assert not all(torch.equal(start[name], off[name]) for name in off)


def test_norms_are_those_the_optimiser_sees_before_clipping(tmp_path):
    plain = tiny_vit(depth=3)
    _, rows, heard = trained(tmp_path, watched=True, model=plain)
    told = [line["gradient_norm"] for line in heard.of("train")]
    assert [row.step for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row.epoch for row in rows] == [0, 0, 0, 1, 1, 1]
    for row, norm in zip(rows, told, strict=True):
        assert norm > HARD["clip_grad"]
        assert math.hypot(*(v for groups in row.norms.values() for v in groups.values())) == pytest.approx(
            norm, rel=1e-5
        )
        assert row.shared == {}
        assert list(row.norms) == [
            "cls_token",
            "pos_embed",
            "patch_embed",
            "blocks.0",
            "blocks.1",
            "blocks.2",
            "norm",
            "head",
        ]


def test_a_shared_step_tells_uses_and_sum(tmp_path):
    _, rows, heard = trained(tmp_path, watched=True)
    for row, line in zip(rows, heard.of("train"), strict=True):
        assert list(row.shared) == [f"blocks.{i}" for i in range(4)]
        for pair in (("blocks.0", "blocks.1"), ("blocks.2", "blocks.3")):
            own, sums = ([row.shared[b][kind] for b in pair] for kind in ("own", "sum"))
            assert sums[0] == sums[1]
            assert abs(own[0] - own[1]) <= sums[0] * (1 + 1e-6) <= sum(own) * (1 + 2e-6)  # the triangle's inequality
        for block, told in row.shared.items():
            kinds = row.norms[block]
            assert math.hypot(kinds["attention"], kinds["MLP"]) == pytest.approx(told["own"])
        # everything once: private parts as they are, and every shared tensor by its sum
        private = [v for groups in row.norms.values() for k, v in groups.items() if k not in ("attention", "MLP")]
        once = [row.shared[b]["sum"] for b in ("blocks.0", "blocks.2")]
        assert math.hypot(*private, *once) == pytest.approx(line["gradient_norm"], rel=1e-5)


def test_the_stride_is_kept(tmp_path):
    _, rows, _ = trained(tmp_path, watched=True, every=4, accumulate=1)
    assert [row.step for row in rows] == [1, 4, 8]


def test_a_teacher_of_another_kind_is_watched_by_its_parts(tmp_path):
    import timm

    model = timm.create_model("resnet10t", num_classes=3)
    watch = GradientWatch(model, "teacher", tmp_path / "rows.jsonl", 1)
    watch.before(0)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    watch.after(1, 0, 1.0)
    (row,) = read_rows(tmp_path / "rows.jsonl", GradientRow)
    assert {"conv1", "layer1.0", "fc"} <= set(row.norms)


def test_a_scaled_loss_is_told_unscaled_and_a_step_that_overflowed_is_left_out(tmp_path):
    model = multiplexed()
    model.eval()
    images = torch.randn(3, 1, 8, 8)
    found = []
    for scale in (1.0, 256.0, math.inf):
        watch = GradientWatch(model, "p", tmp_path / f"{scale}.jsonl", 1)
        watch.before(0)
        model.zero_grad()
        (model(images).square().mean() * scale).backward()
        for parameter in model.parameters():
            parameter.grad /= scale
        watch.after(1, 0, scale)
        watch.close()
        path = tmp_path / f"{scale}.jsonl"
        found.append(read_rows(path, GradientRow)[0].shared if path.is_file() else None)
    assert found[2] is None
    for block, told in found[0].items():
        assert found[1][block] == pytest.approx(told, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------------- findings


def rows_of(phase, steps, **extra):
    norms = {"blocks.0": {"MLP": 3.0, "norms": 4.0}, "blocks.1": {"MLP": 6.0, "norms": 8.0}}
    shared = {"blocks.0": {"own": 1.0, "sum": 3.0}, "blocks.1": {"own": 2.0, "sum": 3.0}}
    return [
        {"phase": phase, "epoch": 0, "step": s, "norms": norms, "shared": shared, **extra} for s in range(1, steps + 1)
    ]


def test_findings_of_rows():
    layers, groups, shared = gradient_findings(rows_of("a", 2) + rows_of("b", 1))
    assert [(r["phase"], r["step"], r["layer"], r["norm"]) for r in layers.records][:2] == [
        ("a", 1, "blocks.0", 5.0),
        ("a", 1, "blocks.1", 10.0),
    ]
    assert [r["norm"] for r in groups.records if r["group"] == "MLP"] == [pytest.approx(math.hypot(3, 6))] * 3
    assert [(r["layer"], r["own"], r["sum"]) for r in shared.records if r["phase"] == "a"] == [
        ("blocks.0", 1.0, 3.0),
        ("blocks.1", 2.0, 3.0),
    ]
    assert all(f.options["facet"] == "when" for f in (layers, groups, shared))
    assert "facet" not in gradient_findings(rows_of("a", 2))[0].options
    assert gradient_findings([]) == []
    assert len(gradient_findings([{**row, "shared": {}} for row in rows_of("a", 2)])) == 2


def test_a_long_training_is_thinned_to_means():
    rows = rows_of("a", 1000)
    for i, row in enumerate(rows):
        row["norms"] = {"blocks.0": {"MLP": float(i + 1)}}
    (layers, *_) = gradient_findings(rows)
    assert len(layers.records) == 143  # 1000 in stretches of 7
    assert layers.records[0] == {"phase": "a", "when": "a", "step": 7, "layer": "blocks.0", "norm": 4.0}
    assert layers.records[-1]["step"] == 1000


def test_rows_that_are_cut_short_or_of_another_kind(tmp_path):
    path = tmp_path / "gradients.jsonl"
    good = json.dumps(rows_of("a", 1)[0])
    path.write_text(f'{good}\n{good}\n{{"phase": "a", "st')
    assert len(read_rows(path, GradientRow)) == 2
    path.write_text(f'{good}\n{{"phase": \n{good}\n')
    with pytest.raises(UserError, match="damaged: line 2 is not JSON"):
        read_rows(path, GradientRow)
    path.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="another version of compressvit, or by another program: line 1 has no 'phase'"):
        read_rows(path, GradientRow)
