"""Checkpoints beside a frozen backbone: they hold what is trained, and refuse to go on beside another one."""

from __future__ import annotations

import os
import signal

import pytest
import timm
import torch
from helpers.runs import done, refused, run, student_bytes
from helpers.training import fit, largest_difference, random_batches, tiny_vit, values

from compressvit.artifacts import artifact
from compressvit.artifacts.adapter import load_adapter, save_adapter
from compressvit.errors import UserError
from compressvit.files import load_checkpoint
from compressvit.model import stored, surgery
from compressvit.model.backbone import head_names
from compressvit.model.weights import build
from compressvit.recipe.recipe import load_recipe
from compressvit.runs.plan import plan_recipe
from compressvit.training import step
from compressvit.training.phases.finetune import Finetune
from compressvit.transforms import LORS, SSF, Adapters, BitFit, Compacter, Freeze, HeadNorm, Multiplex, RepAdapter
from compressvit.transforms.applying import compress

ARGS = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "depth": 3, "num_heads": 2}
RECIPE = f"""
teacher: {{model: vit_tiny_patch16_224, args: {ARGS}, weights: WEIGHTS, num_classes: 3}}
student: {{head: new}}
data: {{name: digits, batch_size: 8, limit_train: 32, limit_val: 30, augment: {{scale: [0.5, 1.0]}}}}
steps:
  - adapters: {{width: 2}}
  - head_norm
  - finetune: {{epochs: 3, lr: 1.0e-2, ema: 0.9, keep: best, drop_path: 0.2}}
"""


@pytest.fixture
def recipe(tmp_path):
    torch.manual_seed(0)
    artifact.save(timm.create_model("vit_tiny_patch16_224", **ARGS, num_classes=3), tmp_path / "backbone")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("WEIGHTS", str(tmp_path / "backbone")))
    return path


def stopped(recipe, folder, monkeypatch, batch=6):
    """A run that was stopped amid its second epoch; its checkpoint."""
    seen, total = [], step.total_of

    def counted(*args):
        seen.append(1)
        if len(seen) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return total(*args)

    with monkeypatch.context() as patch:
        patch.setattr(step, "total_of", counted)
        assert run("apply", "--no-report", recipe, "--output", folder)[0] == 128 + signal.SIGTERM
    return folder / "checkpoints" / "2_finetune.pt"


@pytest.mark.wide
def test_a_run_goes_on_from_what_was_trained_to_the_same_bits(recipe, tmp_path, monkeypatch):
    done("apply", "--no-report", recipe, "--output", tmp_path / "whole")
    file = stopped(recipe, tmp_path / "run", monkeypatch)
    saved = load_checkpoint(file)
    student = artifact.load(tmp_path / "whole" / "student")
    wanted = surgery.added_parameters(student) | surgery.added_buffers(student) | head_names(student)
    for part in (saved["model"], saved["average"], saved["best"]["model"]):
        assert part.keys() == wanted
    assert "head.head_norm.running_mean" in wanted
    assert file.stat().st_size < 120_000 < 350_000 < (tmp_path / "whole" / "student" / stored.TENSORS).stat().st_size
    done("apply", "--no-report", recipe, "--output", tmp_path / "run", "--resume")
    assert student_bytes(tmp_path / "run") == student_bytes(tmp_path / "whole")


def test_another_backbone_is_refused(recipe, tmp_path, monkeypatch):
    stopped(recipe, tmp_path / "run", monkeypatch)
    torch.manual_seed(1)
    artifact.save(timm.create_model("vit_tiny_patch16_224", **ARGS, num_classes=3), tmp_path / "backbone")
    message = refused("apply", recipe, "--output", tmp_path / "run", "--resume")
    assert "2_finetune.pt was trained with another backbone: the frozen weights have changed since the run" in message
    assert "Restore the file that teacher.weights (or student.weights) named then" in message


SPEC = Finetune(epochs=1, lr=1e-2)


@pytest.mark.parametrize(
    ("steps", "whole"),
    [
        ([], True),
        ([RepAdapter(width=2)], False),
        ([BitFit(), Compacter(n=2, ratio=0.25)], False),
        ([Multiplex(share=2), Adapters(width=2)], True),  # the backbone itself was changed
        ([LORS(rank=2, metric="weights"), Adapters(width=2)], True),
    ],
    ids=lambda value: "+".join(s.name for s in value) or "plain" if isinstance(value, list) else "",
)
def test_what_a_checkpoint_holds(steps, whole, tmp_path):
    """And a finished phase is loaded from it onto the model as it was before."""
    model = compress(tiny_vit(), steps) if steps else tiny_vit()
    fit(model, SPEC, random_batches(2, 4), tmp_path)
    saved = load_checkpoint(tmp_path / "phase.pt")["model"]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert saved.keys() == (values(model).keys() if whole else trained)
    torch.manual_seed(0)
    again = compress(tiny_vit(), steps) if steps else tiny_vit()
    fit(again, SPEC, random_batches(2, 4), tmp_path)
    assert largest_difference(values(again), values(model)) == 0


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: compress(tiny_vit(), [Adapters(width=3)]), r"different student: blocks\.0\.\S+adapter\.down\.weight is \(2, 16\), and"),
        (lambda: compress(tiny_vit(), [Adapters(width=2), RepAdapter(width=2)]), r"repadapter\.\S+ is not in it"),
        (lambda: compress(tiny_vit(), [Adapters(width=2), HeadNorm()]), r"head\.head_norm\.running_mean is not in it"),
        (lambda: compress(tiny_vit(num_classes=5), [Adapters(width=2)]), r"different student: head\.weight is \(4, 16\), and"),
        (lambda: compress(tiny_vit(seed=1), [Adapters(width=2)]), "with another backbone"),
        (lambda: compress(tiny_vit(patch_size=2), [Adapters(width=2)]), "with another backbone"),
        (lambda: compress(tiny_vit(qkv_bias=False), [Adapters(width=2)]), "with another backbone"),
        (tiny_vit, "different student"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_structure_or_backbone_is_refused(other, words, tmp_path):
    fit(compress(tiny_vit(), [Adapters(width=2)]), SPEC, random_batches(2, 4), tmp_path)
    model = other()
    before = values(model)
    with pytest.raises(UserError, match=words):
        fit(model, SPEC, random_batches(2, 4), tmp_path)
    assert largest_difference(values(model), before) == 0


def test_named_modules_are_not_trained_and_stay_in_eval_mode(tmp_path):
    model, modes = tiny_vit(drop_rate=0.1), []
    model.blocks[0].mlp.register_forward_hook(lambda module, args, output: modes.append(module.training))
    before = values(model)
    spec = Finetune(epochs=2, lr=1e-2, frozen=("patch_embed", "blocks.*.mlp"))
    fit(model, spec, random_batches(2, 4), tmp_path)
    moved = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if not name.startswith("patch_embed.") and ".mlp." not in name}
    assert modes
    assert not any(modes)
    assert all(parameter.requires_grad for parameter in model.parameters())


CVT = {"img_size": 8, "in_chans": 1, "num_classes": 4, "depths": (1, 1), "embed_dims": (8, 16), "num_heads": (1, 2)}
CVT |= {"patch_sizes": (3, 3), "patch_strides": (1, 2), "patch_paddings": (1, 1)}


@pytest.mark.parametrize(
    ("specs", "moves"),
    [
        ([Adapters(width=2)], []),
        ([SSF()], []),
        ([Freeze(train="head")], []),
        ([Freeze(train="attention")], ["attn"]),
        ([BitFit()], ["attn"]),
    ],
    ids=lambda value: value[0].name if value and not isinstance(value[0], str) else "",
)
def test_batch_norms_of_a_frozen_backbone_keep_their_statistics(specs, moves, tmp_path):
    """And of those that are trained, an adapter's file has them."""
    torch.manual_seed(0)
    backbone = build("cvt_13", CVT)
    model = compress(backbone, specs)
    before = values(model)
    spec = Finetune(epochs=1, lr=1e-2)
    fit(model, spec, random_batches(2, 4), tmp_path)
    moved = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    assert {name.split(".")[3] for name in moved if "running" in name} == set(moves)
    assert any("ssf" in name or "adapter" in name or name.endswith("bias") for name in moved)
    again = load_adapter(backbone, save_adapter(model, tmp_path / "adapter.safetensors"))
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again.eval()(images), model.eval()(images))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("frozen: [block.0]", "frozen: 'block.0' matches no module of vit_tiny_patch16_224; did you mean 'blocks.0'?"),
        ("frozen: [blocks, '*']", "there is nothing to train: earlier steps, or `frozen`, froze every parameter"),
        (
            "backbone_lr: 0",
            "backbone_lr=0 freezes the backbone of a detector or segmenter, and vit_tiny_patch16_224 is none",
        ),
    ],
)
def test_what_freezes_nothing_or_everything_is_refused(recipe, options, words):
    recipe.write_text(recipe.read_text().replace("lr: 1.0e-2,", f"lr: 1.0e-2, {options},"))
    assert words in "\n".join(plan_recipe(load_recipe(recipe)).conflicts)


@pytest.mark.parametrize(("frozen", "shared"), [("blocks.0.mlp", True), ("blocks.[01].mlp", False)])
def test_a_parameter_that_others_train_is_not_frozen_in_silence(recipe, frozen, shared):
    text = recipe.read_text().replace("  - adapters: {width: 2}\n", "").replace("head_norm", "multiplex: {share: 2}")
    text = text.replace("depth': 3", "depth': 4")
    recipe.write_text(text.replace("lr: 1.0e-2,", f"lr: 1.0e-2, frozen: ['{frozen}'],"))
    message = (
        "frozen: blocks.0.mlp.fc1.weight is shared with blocks.1.mlp.fc1.weight, which is to be trained; freeze the"
    )
    conflicts = plan_recipe(load_recipe(recipe)).conflicts
    assert [message in text for text in conflicts] == [True] * shared, conflicts
