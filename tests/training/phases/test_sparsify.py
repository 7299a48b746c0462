"""Masks over the single weights of adapters: which stay, that the others stay zero, and what a run leaves behind."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from helpers.models import build, images_for, outputs, randomise
from helpers.recipes import fault, rows
from helpers.runs import done, metrics, refused, run
from torch.nn.attention import SDPBackend, sdpa_kernel

from compressvit.artifacts import artifact
from compressvit.artifacts.adapter import load_adapter
from compressvit.errors import UserError
from compressvit.tasks.classification import Classification
from compressvit.training.phases.prune.neurons import prunable_plan
from compressvit.training.phases.sparsify import Sparsify, sparsify_
from compressvit.transforms import PHM, Adapters, AdaptFormer
from compressvit.transforms.applying import compress
from compressvit.transforms.record import compression_of, trained_parameters

SIDES = [
    f"blocks.{i}.{part}.adapter.{side}.weight" for i in range(4) for part in ("attn", "mlp") for side in ("down", "up")
]


def adapted(spec=None, name="vit"):
    model = compress(build(name), [spec or Adapters(width=3)])
    randomise(model, scale=0.1)
    return model.eval()


def batches(model):
    return [(images_for(model, batch=3, seed=i), torch.tensor([i, 1, 2])) for i in range(2)]


def masks(model) -> torch.Tensor:
    return torch.cat([model.get_submodule(n.removesuffix(".weight")).mask.flatten() for n in SIDES])


def kept_best(model, importance: dict[str, torch.Tensor], keep: float) -> torch.Tensor:
    """The mask by a full sort, weight by weight."""
    flat = [(-float(v), i) for i, v in enumerate(torch.cat([importance[n].flatten() for n in SIDES]))]
    best = {i for _, i in sorted(flat)[: int(keep * len(flat))]}
    return torch.tensor([i in best for i in range(len(flat))])


def test_magnitude_keeps_the_largest_of_all_adapters_together():
    model = adapted()
    expected = kept_best(model, {n: model.get_parameter(n).detach().abs() for n in SIDES}, 0.3)
    left = sparsify_(model, Sparsify(density=0.3), list)
    assert torch.equal(masks(model), expected)
    assert sum(left.values()) == int(0.3 * expected.numel()) == int(expected.sum())


@pytest.mark.parametrize("score", ["snip", "grasp"])
def test_gradient_and_curvature_scores(score):
    model, data = adapted(), batches(adapted())
    weights = [model.get_parameter(n) for n in SIDES]
    with sdpa_kernel(SDPBackend.MATH):
        loss = sum(F.cross_entropy(model(x), y) for x, y in data) / len(data)
        slopes = torch.autograd.grad(loss, weights, create_graph=True)
        dot = sum((s * s.detach()).sum() for s in slopes)
        curved = torch.autograd.grad(dot, weights)
    found = {
        n: (w * s).detach().abs() if score == "snip" else (w * h).detach()
        for n, w, s, h in zip(SIDES, weights, slopes, curved, strict=True)
    }
    expected = kept_best(model, found, 0.4)
    sparsify_(model, Sparsify(density=0.4, score=score), lambda: data)
    assert (masks(model) == expected).float().mean() > 0.995  # seen 1.0; sums of another order may swap two
    assert all(p.grad is None for p in model.parameters())


class FirstOutput(Classification):
    """Another loss than cross-entropy."""

    def loss(self, outputs, targets, smoothing=0.0):
        return outputs[:, 0].square().mean()


def test_the_scores_go_by_the_loss_of_the_task():
    model, data = adapted(), batches(adapted())
    weights = [model.get_parameter(n) for n in SIDES]
    with sdpa_kernel(SDPBackend.MATH):
        slopes = torch.autograd.grad(sum(model(x)[:, 0].square().mean() for x, _ in data), weights)
    found = {n: (w * s).detach().abs() for n, w, s in zip(SIDES, weights, slopes, strict=True)}
    expected = kept_best(model, found, 0.4)
    by_classes = adapted()
    for each, task in ((model, FirstOutput()), (by_classes, None)):
        sparsify_(each, Sparsify(density=0.4, score="snip"), lambda: data, task=task)
    assert (masks(model) == expected).float().mean() > 0.995
    assert (masks(by_classes) == expected).float().mean() < 0.9


def test_random_follows_the_seed_and_equal_scores_keep_the_earlier():
    a, b, c = adapted(), adapted(), adapted()
    for model, seed in ((a, 1), (b, 1), (c, 2)):
        sparsify_(model, Sparsify(density=0.5, score="random"), list, seed)
    assert torch.equal(masks(a), masks(b))
    assert not torch.equal(masks(a), masks(c))
    alike = adapted()
    with torch.no_grad():
        for name in SIDES:
            alike.get_parameter(name).fill_(0.5)
    sparsify_(alike, Sparsify(density=0.25), list)
    found = masks(alike)
    assert found[: int(found.sum())].all()


@pytest.mark.parametrize("spec", [Adapters(width=3), Adapters(width=3, bias=True), AdaptFormer(width=3)], ids=repr)
def test_masked_weights_stay_zero_and_are_not_counted(spec):
    model = adapted(spec)
    before = trained_parameters(model)["trained_adapter"]
    plan = prunable_plan(model)
    left = sparsify_(model, Sparsify(density=0.2), list)
    total = sum(b.down.weight.numel() + b.up.weight.numel() for b in plan.bottlenecks(model).values())
    assert before - trained_parameters(model)["trained_adapter"] == total - sum(left.values())
    expected = outputs(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(images_for(model)).square().sum().backward()
        optimizer.step()
    for adapter in plan.bottlenecks(model).values():
        for layer in (adapter.down, adapter.up):
            assert (layer.weight[~layer.mask] == 0).all()
            assert (layer.weight[layer.mask] != 0).any()
    assert not torch.equal(outputs(model), expected)


def test_masks_travel_with_the_artifact(tmp_path):
    model = adapted()
    sparsify_(model, Sparsify(density=0.2), list)
    again = artifact.load(artifact.save(model, tmp_path / "student"))
    assert torch.equal(outputs(again), outputs(model))
    assert torch.equal(masks(again), masks(model))
    assert trained_parameters(again) == trained_parameters(model)
    assert compression_of(again).plans[0].masked


def test_what_cannot_be_masked_says_why():
    fresh = compress(build("vit"), [Adapters(width=3)])
    for score in ("magnitude", "snip", "grasp"):
        with pytest.raises(
            UserError,
            match=rf"only [\d,]+ have a score \({score}\) that is not zero: fresh adapters.*finetune step before",
        ):
            sparsify_(fresh, Sparsify(density=0.9, score=score), lambda: batches(fresh))
    with pytest.raises(
        UserError, match=r"prune removes neurons of adapters \(adapters or adaptformer\).*it was made by phm"
    ):
        sparsify_(compress(build("vit"), [PHM(n=2, ratio=0.25)]), Sparsify(density=0.5), list)
    twice = adapted()
    sparsify_(twice, Sparsify(density=0.5), list)
    with pytest.raises(UserError, match="were masked by an earlier `sparsify`"):
        sparsify_(twice, Sparsify(density=0.2), list)


RECIPE = """
teacher:
  model: vit_tiny_patch16_224
  args: {img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 16, depth: 2, num_heads: 2}
  weights: train
  finetune: {epochs: 1}
student: {head: new}
data: {name: digits, batch_size: 32, limit_train: 64, limit_val: 32}
steps:
  - adapters: {width: 4}
  - finetune: {epochs: 1}
  - sparsify: {density: 0.25, score: SCORE, epochs: 1, gradient_batches: 2}
"""


@pytest.mark.wide_unless(lambda score: score == "snip")
@pytest.mark.parametrize("score", ["snip", "grasp"])
def test_a_run_masks_trains_and_resumes(score, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.replace("SCORE", score))
    code, out, _ = run("plan", recipe)
    assert code == 0
    assert "keeps 25% of the weights of adapters" in out
    assert "trains 512 parameters (in the end 128, if every adapter loses equally) and 170 of the classifier" in out
    done("apply", "--no-report", recipe, "--output", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["student"]["trained_adapter"] == 128
    assert sum(results["phases"]["2_sparsify"]["weights_left"].values()) == 128
    student = artifact.load(tmp_path / "run" / "student")
    backbone = artifact.load(tmp_path / "run" / "teacher")
    images = torch.randn(2, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(
            load_adapter(backbone, tmp_path / "run" / "adapter.safetensors").eval()(images), student(images)
        )
    (tmp_path / "run" / "checkpoints" / "2_sparsify.pt").unlink()
    done("apply", "--no-report", tmp_path / "run", "--resume")
    again = artifact.load(tmp_path / "run" / "student")
    assert all(
        torch.equal(a, b) for a, b in zip(student.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_the_best_epoch_is_one_of_the_masked_model(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.replace("SCORE, epochs: 1", "snip, epochs: 3, lr: 0.3, keep: best"))
    done("apply", "--no-report", recipe, "--output", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    phase = results["phases"]["2_sparsify"]
    scores = {row["epoch"]: row["top1"] for row in metrics(tmp_path / "run", phase="2_sparsify", kind="evaluate")}
    scores[0] = phase["start"]["top1"]
    assert len(set(scores.values())) > 1
    assert results["student"]["top1"] == scores[phase["kept_epoch"]] == max(scores.values())
    student = artifact.load(tmp_path / "run" / "student")
    layers = [layer for b in compression_of(student).plans[0].bottlenecks(student).values() for layer in (b.down, b.up)]
    assert sum(int((layer.weight != 0).sum()) for layer in layers) <= 128


def test_the_share_in_its_old_spelling_is_refused_with_the_new_one():
    found = rows(fault(RECIPE.replace("density: 0.25", "keep: 0.25").replace("SCORE", "snip")))
    sentences = {path: text for _, path, text in found}
    assert sentences["steps[2].sparsify.keep"].endswith("the share is density=0.25 now")
    assert sentences["steps[2].sparsify.density"].startswith("missing")


def test_pruning_after_masking_is_refused_by_the_plan(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.replace("SCORE", "snip") + "  - prune: {target: {neurons: 0.5}, epochs: 1}\n")
    assert "remove neurons (`prune`) before masking, and mask once" in refused(
        "apply", recipe, "--output", tmp_path / "run"
    )
