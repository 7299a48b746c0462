"""`merge` as the last step of a recipe, as a Python name, and of adapters that become dense instead of going away."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from helpers.contract import same_values, structure, values
from helpers.models import build, images_for, outputs, randomise
from helpers.runs import done, refused, run
from rich.console import Console

import compressvit
from compressvit.artifacts import artifact
from compressvit.artifacts.merge import merged_copy
from compressvit.errors import UserError
from compressvit.model import surgery, ties
from compressvit.recipe.recipe import Merge, Recipe
from compressvit.recipe.words import step
from compressvit.transforms import LORS, PHM, VPT, Adapters, AdaptFormer, Compacter, LoRA, Multiplex, RepAdapter
from compressvit.transforms.applying import compress, materialise
from compressvit.transforms.bottleneck import AdapterLinear
from compressvit.transforms.phm import PHMLinear
from compressvit.transforms.record import compression_of, trained_names

RECIPE = """
teacher:
  model: vit_tiny_patch16_224
  args: {img_size: 8, patch_size: 2, in_chans: 1, embed_dim: 24, depth: 2, num_heads: 2}
  weights: train
  finetune: {epochs: 1}
student: {head: new}
data: {name: digits, batch_size: 64, eval_batch_size: 90, limit_train: 64, limit_val: 90}
steps:
  - STEP
  - finetune: {epochs: 1, lr: 1.0e-2}
  - merge
"""
DENSE = "the Kronecker products became dense matrices; the adapters keep their activation"


def recipe_with(folder, text: str):
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("STEP", text))
    return path


def adapted(model, *steps):
    """With random values in everything that was added."""
    torch.manual_seed(3)
    made = compress(model, steps)
    added = surgery.added_parameters(made)
    randomise(torch.nn.ParameterList(p for n, p in made.named_parameters() if n in added))
    return made


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# ------------------------------------------------------------------------------------------------------------- the step


def test_a_run_ends_with_what_the_verb_writes(tmp_path):
    folder = tmp_path / "run"
    out = done("apply", "--no-report", recipe_with(tmp_path, "repadapter: {width: 4, scale: 0.5}"), "--output", folder)
    assert f"timm.create_model('local-dir:{folder / 'merged'}', pretrained=True)" in out
    assert "read back by timm alone: 0.0e+00" in (folder / "run.log").read_text()
    told = json.loads((folder / "merged" / "merge.json").read_text())
    assert set(told["differences"]) == {"random", "the run's own", "photograph-like"}
    assert told["left"] == []
    merged = timm.create_model(f"local-dir:{folder / 'merged'}", pretrained=True).eval()
    student = artifact.load(folder / "student")
    images = torch.randn(3, 1, 8, 8)
    assert gap(outputs(merged, images), outputs(student, images)) < 1e-5  # measured 2e-7
    assert set(merged.state_dict()) < set(student.state_dict())
    # the verb does the same again, and so does a run that is resumed without its merge
    weights = (folder / "merged" / "model.safetensors").read_bytes()
    done("merge", folder, "--overwrite")
    assert (folder / "merged" / "model.safetensors").read_bytes() == weights
    (folder / "merged" / "merge.json").write_text("{}")  # as if it had been interrupted
    assert "nothing to do" not in done("apply", "--no-report", folder, "--resume")
    assert (folder / "merged" / "model.safetensors").read_bytes() == weights
    assert "nothing to do" in done("apply", "--no-report", folder, "--resume")
    found = compressvit.apply(folder / "resolved.yaml", folder, resume=True, console=Console(quiet=True)).merged
    assert found["merged"] == str(folder / "merged")
    assert found["differences"] == json.loads((folder / "merged" / "merge.json").read_text())["differences"]


def test_a_flipped_bit_in_a_merged_model_is_noticed(tmp_path):
    folder = tmp_path / "run"
    done("apply", "--no-report", recipe_with(tmp_path, "repadapter: {width: 4, scale: 0.5}"), "--output", folder)
    file = folder / "merged" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    told = refused("evaluate", folder / "merged", "data.name=digits")
    assert f"{file} is damaged: " in told
    assert "is not what was written, by its checksum (1 of " in told


@pytest.mark.wide
def test_a_merged_model_can_be_compressed_by_another_recipe(tmp_path):
    """What the refusal of a step behind `merge` says."""
    folder = tmp_path / "run"
    done("apply", "--no-report", recipe_with(tmp_path, "lora: {rank: 2}"), "--output", folder)
    second = tmp_path / "second.yaml"
    text = (
        RECIPE.replace("STEP", "multiplex: {share: 2}").replace("  - merge\n", "").replace("student: {head: new}\n", "")
    )
    text = text.replace("  finetune: {epochs: 1}\nd", "d").replace(
        "weights: train", "weights: WEIGHTS\n  num_classes: 10"
    )
    second.write_text(text.replace("WEIGHTS", str(folder / "merged" / "model.safetensors")))
    done("apply", "--no-report", second, "--output", tmp_path / "second")
    told = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "second")]
    assert told[1]["teacher"]["top1"] == told[0]["student"]["top1"]


@pytest.mark.wide_unless(lambda words: words in ("multiplex cannot be folded", "irpe cannot be folded"))
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("adapters: {width: 2}", "adapters cannot be folded: the activation between the two projections"),
        ("adaptformer: {width: 2}", "adaptformer cannot be folded: its branch has a ReLU and runs parallel"),
        ("vpt: {prompts: 2}", "vpt cannot be folded: how much a token attends to a prompt depends on the token"),
        ("multiplex: {share: 2}", "multiplex cannot be folded"),
        ("lora: {rank: 2}\n  - lors: {share: 2, rank: 2}\n  - irpe", "irpe cannot be folded"),
        ("align: {share: 2}\n  - adapters: {width: 2}", "adapters cannot be folded"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_found_in_the_plan(text, words, tmp_path):
    recipe = recipe_with(tmp_path, text)
    code, out, _ = run("plan", recipe)
    assert code == 2
    assert f".merge: {words}" in out
    message = refused("apply", recipe, "--output", tmp_path / "run")
    assert f".merge: {words}" in message
    assert not (tmp_path / "run").exists()


def test_a_tied_weight_and_a_missing_bias_are_found_in_the_plan(tmp_path):
    """By the merge itself, on a model without values."""
    recipe = recipe_with(tmp_path, "load_weights: {artifact: x}\n  - repadapter: {width: 4}")
    code, out, _ = run("plan", recipe, "teacher.args.qkv_bias=false")
    assert code == 2
    assert "blocks.0.attn.qkv has no bias to take in its shift" in out
    assert "qkv_bias=True" in out
    shared = surgery.skeleton(compress(build("vit"), [Multiplex(share=2, head_mixing=False), RepAdapter(width=4)]))
    shared._compression.plans.pop(0)
    with pytest.raises(UserError, match=r"is shared by 2 layers.* Keep it unmerged, merge it before sharing, or untie"):
        merged_copy(shared)


def test_the_plan_says_what_the_merge_leaves(tmp_path):
    args = {
        "img_size": 8,
        "patch_size": 2,
        "in_chans": 1,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 10,
    }
    plain = ties.count_parameters(timm.create_model("vit_tiny_patch16_224", **args))
    dense = plain + 4 * (2 * 24 * 3 + 24 + 3)
    for text, words in (
        ("ssf", f"merged/, {plain:,} parameters: a plain timm model"),
        ("phm: {n: 3}", f"merged/, {dense:,} parameters: {DENSE}"),
    ):
        out = done("plan", recipe_with(tmp_path, text))
        assert words in out
        assert "no step trains the student" not in out
    assert "no step trains the student after steps[0].ssf" in done(
        "plan", tmp_path / "recipe.yaml", "steps=[ssf,merge]"
    )


def test_merge_is_the_last_step(tmp_path):
    recipe = recipe_with(tmp_path, "lora\n  - merge")
    message = refused("plan", recipe)
    assert (
        "merge writes the model that the recipe ends with, so it is the last step, and finetune comes after it"
        in message
    )
    assert "teacher.weights=RUN/merged/model.safetensors" in message
    code, out, _ = run("plan", recipe, "steps=[merge]")
    assert (code, "there is nothing to merge: no transform has changed the model" in out) == (2, True)
    teacher = {"model": "vit_tiny_patch16_224"}
    built = Recipe(teacher=teacher, data={"name": "digits"}, steps=(step(LoRA()), step(Merge())))
    assert built.merges
    assert "- merge: {}" in built.to_yaml()


# ---------------------------------------------------------------------------------------------------------- in Python


@pytest.mark.wide_unless(lambda dtype: dtype is torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_gives_a_plain_model(dtype):
    plain = build("swin")
    made = adapted(plain, RepAdapter(width=4)).to(dtype).train()
    before, shape = values(made), structure(made)
    merged = compressvit.merge(made)
    assert structure(merged.float()) == structure(plain)
    assert not merged.training
    images = images_for(plain)
    expected = outputs(copy.deepcopy(made).eval().float(), images)
    assert gap(outputs(merged.float(), images), expected) < (1e-5 if dtype == torch.float32 else 0.03)  # 4e-7, 0.008
    assert gap(outputs(plain, images), expected) > 0.05
    assert (structure(made), same_values(values(made), before), made.training) == (shape, True, True)


def test_merge_raises_when_the_outputs_differ(monkeypatch):
    made = adapted(build("vit"), LoRA(rank=2))

    def wrong(model):
        merged = materialise(model)
        with torch.no_grad():
            merged.head.weight.mul_(1.001)
        return merged

    monkeypatch.setattr("compressvit.artifacts.merge.materialise", wrong)
    with pytest.raises(UserError, match=r"the merged model differs on random images by .*, so none is made"):
        compressvit.merge(made)


@pytest.mark.parametrize("spec", [Adapters(width=2), AdaptFormer(width=2), VPT(prompts=2), Multiplex(share=2)])
def test_merge_refuses_what_cannot_be_folded(spec):
    with pytest.raises(UserError, match=f"{spec.name} cannot be folded"):
        compressvit.merge(compress(build("vit"), [spec]))
    with pytest.raises(UserError, match="there is nothing to merge"):
        compressvit.merge(build("vit"))


# ------------------------------------------------------------------------------------------- Kronecker products, dense


@pytest.mark.wide_unless(lambda backbone, spec: (backbone, spec.name) == ("vit", "phm"))
@pytest.mark.parametrize("backbone", ["vit", "swin", "convnext_conv_mlp"])
@pytest.mark.parametrize(
    "spec", [PHM(n=2, ratio=0.25), Compacter(n=2, ratio=0.25, act="relu")], ids=["phm", "compacter"]
)
def test_kronecker_products_become_dense_adapters(spec, backbone, tmp_path):
    plain = build(backbone)
    made = adapted(plain, spec)
    images = images_for(plain)
    expected = outputs(made, images)
    assert gap(outputs(plain, images), expected) > 0.01
    merged = compressvit.merge(made)
    assert gap(outputs(merged, images), expected) < 1e-5  # measured 0
    dense = compress(plain, [Adapters(ratio=0.25, bias=True, act=spec.act)])
    assert structure(merged) == structure(dense)
    assert compression_of(merged).plans == compression_of(dense).plans
    assert not any(isinstance(module, PHMLinear) for module in merged.modules())
    assert sum(isinstance(module, AdapterLinear) for module in merged.modules()) > 0
    assert {n for n, p in merged.named_parameters() if p.requires_grad} == trained_names(merged) == trained_names(dense)
    again = artifact.load(artifact.save(merged, tmp_path / "merged"))
    assert torch.equal(outputs(again, images), outputs(merged, images))


def test_others_merge_beside_kronecker_products(tmp_path):
    plain = build("vit")
    made = adapted(plain, LORS(share=2, rank=2, metric="weights"), PHM(n=2, ratio=0.25), RepAdapter(width=4))
    merged = compressvit.merge(made)
    assert gap(outputs(merged), outputs(made)) < 1e-5  # measured 6e-7
    assert [plan.transform for plan in compression_of(merged).plans] == ["adapters"]
    again = artifact.load(artifact.save(merged, tmp_path / "merged"))
    assert torch.equal(outputs(again), outputs(merged))


def test_a_run_with_kronecker_products_leaves_an_artifact(tmp_path):
    folder = tmp_path / "run"
    out = done("apply", "--no-report", recipe_with(tmp_path, "compacter: {n: 3}"), "--output", folder)
    assert f"{DENSE}, so this is an artifact with dense `adapters`, not a plain timm model" in out
    assert f"compressvit.load('{folder / 'merged'}')" in out
    told = json.loads((folder / "merged" / "merge.json").read_text())
    assert told["left"] == ["adapters"]
    assert told["read_back"] == 0
    assert max(told["differences"].values()) < 1e-5  # measured 0
    student, merged = (artifact.load(folder / name) for name in ("student", "merged"))
    images = torch.randn(3, 1, 8, 8)
    assert gap(outputs(merged, images), outputs(student, images)) < 1e-5
    assert sorted(p.name for p in (folder / "merged").iterdir()) == [
        "compressvit.json",
        "merge.json",
        "model.safetensors",
    ]


@pytest.mark.wide
def test_another_kind_of_merge_in_its_place_leaves_nothing_of_it(tmp_path):
    folder = tmp_path / "run"
    done("apply", "--no-report", recipe_with(tmp_path, "compacter: {n: 3}"), "--output", folder)
    assert (folder / "merged" / "compressvit.json").is_file()
    done("apply", "--no-report", recipe_with(tmp_path, "lora: {rank: 2}"), "--output", tmp_path / "lora")
    done("merge", tmp_path / "lora", "--output", folder / "merged", "--overwrite")
    assert sorted(p.name for p in (folder / "merged").iterdir()) == ["config.json", "merge.json", "model.safetensors"]
