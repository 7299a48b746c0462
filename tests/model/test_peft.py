"""LoRA that PEFT trained is merged into the weights of timm's models, and of those that came from transformers."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.models import build, images_for
from safetensors.torch import save_file

from compressvit.errors import UserError
from compressvit.model.peft import PREFIX, merge_peft_, read_peft
from compressvit.recipe.recipe import parse_recipe
from compressvit.runs.models import load_teacher, teacher_architecture
from compressvit.runs.plan import plan_recipe

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": ["qkv", "fc1"]}
WIDTH, HIDDEN = 48, 192  # of the small ViT


@pytest.fixture
def folder(tmp_path):
    """A function that writes an adapter as PEFT does: factors of layers by path, and other tensors."""

    def write(layers, other=None, **config):
        generator = torch.Generator().manual_seed(0)
        tensors = dict(other or {})
        for layer, (outputs, inputs) in layers.items():
            tensors[f"{PREFIX}{layer}.lora_A.weight"] = torch.randn(4, inputs, generator=generator) * 0.1
            tensors[f"{PREFIX}{layer}.lora_B.weight"] = torch.randn(outputs, 4, generator=generator) * 0.1
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
        return tmp_path, tensors

    return write


def product(tensors, layer):
    down, up = (tensors[f"{PREFIX}{layer}.lora_{part}.weight"] for part in "AB")
    return up @ down


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6.0),
        ({"alpha_pattern": {"attn.qkv": 2}}, 0.5),
        ({"alpha_pattern": {"tn.qkv": 2}}, 3.0),  # a whole part of a path matches, as in PEFT
        ({"alpha_pattern": {"qkv": 8, "attn.qkv": 2}}, 2.0),  # the first one
    ],
)
def test_the_product_is_added_with_its_scale(config, scale, folder):
    model, plain = build("vit"), build("vit").state_dict()
    layer = "blocks.1.attn.qkv"
    path, tensors = folder({layer: (3 * WIDTH, WIDTH)}, **config)
    (note,) = merge_peft_(model, path, "teacher.adapter")
    added = model.state_dict()[f"{layer}.weight"] - plain[f"{layer}.weight"]
    assert torch.allclose(added, scale * product(tensors, layer), atol=1e-6)  # measured 6e-8
    others = {name for name, value in model.state_dict().items() if not value.equal(plain[name])}
    assert others == {f"{layer}.weight"}
    assert "LoRA of 1 layers" in note.text


def test_transformers_queries_and_values_are_rows_of_qkv(folder):
    model, plain = build("vit"), build("vit").state_dict()
    layers = [f"vit.encoder.layer.1.attention.attention.{part}" for part in ("query", "value")]
    path, tensors = folder(dict.fromkeys(layers, (WIDTH, WIDTH)))
    merge_peft_(model, path, "teacher.adapter")
    name = "blocks.1.attn.qkv.weight"
    query, key, value = (model.state_dict()[name] - plain[name]).chunk(3)
    assert torch.allclose(query, 3 * product(tensors, layers[0]), atol=1e-6)
    assert torch.allclose(value, 3 * product(tensors, layers[1]), atol=1e-6)
    assert not key.any()


def test_a_teacher_has_the_classifier_and_classes_of_its_adapter(folder, tmp_path):
    backbone = with_classes(7)
    save_file(backbone.state_dict(), tmp_path / "backbone.safetensors")
    head = {f"{PREFIX}head.weight": torch.ones(4, WIDTH), f"{PREFIX}head.bias": torch.zeros(4)}
    path, _ = folder({"blocks.0.mlp.fc1": (HIDDEN, WIDTH)}, head)
    recipe = recipe_of(tmp_path / "backbone.safetensors", path)
    teacher = teacher_architecture(recipe).build()
    notes = load_teacher(recipe, teacher)
    assert teacher.num_classes == 4
    assert teacher.head.weight.eq(1).all()
    assert "2 tensors that were trained with it" in notes[-1].text
    assert not teacher.blocks[0].mlp.fc1.weight.equal(backbone.blocks[0].mlp.fc1.weight)


def test_a_classifier_that_nobody_trained_is_refused(folder, tmp_path):
    save_file(with_classes(7).state_dict(), tmp_path / "backbone.safetensors")
    path, _ = folder({"blocks.0.mlp.fc1": (HIDDEN, WIDTH)})
    recipe = recipe_of(tmp_path / "backbone.safetensors", path, ["teacher.num_classes=4"])
    with pytest.raises(UserError, match="a classifier of 7 classes and the model one of 4"):
        load_teacher(recipe, teacher_architecture(recipe).build())


def with_classes(count):
    model = build("vit")
    model.reset_classifier(count)
    return model


def recipe_of(weights, adapter, overrides=()):
    from compressvit.testing.models import examples

    model = examples()["vit"]
    text = json.dumps(
        {
            "teacher": {
                "model": model.model,
                "weights": str(weights),
                "adapter": str(adapter),
                "args": {name: value for name, value in model.args.items() if name != "num_classes"},
            },
            "data": {"name": "digits"},
            "steps": ["merge"],
        }
    )
    return parse_recipe(text, "recipe.yaml", list(overrides))


FC1 = "blocks.0.mlp.fc1"
LORA = {FC1: (HIDDEN, WIDTH)}


def factors(down, up, value=1.0):
    return {f"{PREFIX}{FC1}.lora_{part}.weight": torch.full(shape, value) for part, shape in (("A", down), ("B", up))}


@pytest.mark.parametrize(
    ("layers", "other", "config", "message"),
    [
        (LORA, {}, {"peft_type": "IA3"}, "of PEFT's method IA3, and LORA alone is read"),
        (LORA, {}, {"use_dora": True}, "made with use_dora, which is not read; merge it with PEFT"),
        ({"blocks.9.mlp.fc1": (HIDDEN, WIDTH)}, {}, {}, "is for blocks.9.mlp.fc1.weight, which .* has not"),
        ({"blocks.0.mlp.fc1": (HIDDEN, 32)}, {}, {}, r"fc1.weight of \(192, 32\), and .* one of \(192, 48\)"),
        (LORA, {f"{PREFIX}blocks.0.lora_magnitude_vector": torch.ones(1)}, {}, "has .*lora_magnitude_vector"),
        ({}, {f"{PREFIX}{FC1}.lora_A.weight": torch.ones(4, WIDTH)}, {}, f"{FC1} has one factor and not the other"),
        ({}, factors((4, WIDTH), (HIDDEN, 3)), {}, r"factors of \(4, 48\) and \(192, 3\), which have no product"),
        ({}, factors((0, WIDTH), (HIDDEN, 0)), {}, "which have no product"),
        ({}, factors((), ()), {}, "which have no product"),
        ({}, factors((4, WIDTH), (HIDDEN, 4), float("nan")), {}, "numbers that are not finite"),
        ({}, {f"{PREFIX}head.bias": torch.zeros(5)}, {}, "holds no LoRA"),
        (LORA, {f"{PREFIX}{FC1}.lora_A.second.weight": torch.ones(4, WIDTH)}, {}, "more than one adapter"),
        (LORA, {}, {"init_lora_weights": "pissa_niter_4"}, "which changed the weights that it was trained on"),
        (LORA, {}, {"lora_alpha": None}, "lora_alpha"),
        (LORA, {}, {"lora_alpha": "x"}, "lora_alpha"),
        (LORA, {}, {"alpha_pattern": ["fc1"]}, "alpha_pattern"),
        (LORA, {}, {"alpha_pattern": {"(a*)*b": 3}}, r"an alpha_pattern '\(a\*\)\*b', which is not read"),
        (LORA, {}, {"alpha_pattern": {"*": 3}}, "which is not read"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_changes_nothing(layers, other, config, message, folder):
    model, plain = build("vit"), build("vit").state_dict()
    path, _ = folder(layers, other, **config)
    with pytest.raises(UserError, match=message):
        merge_peft_(model, path, "teacher.adapter")
    assert all(value.equal(plain[name]) for name, value in model.state_dict().items())


def test_no_folder_of_peft(tmp_path):
    with pytest.raises(UserError, match=r"is no folder that PEFT wrote, which has an adapter_config\.json"):
        read_peft(tmp_path, "teacher.adapter")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors or adapter_model\.bin"):
        read_peft(tmp_path, "teacher.adapter")


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"fc1": 2}, "bias": "lora_only"}])
def test_it_is_what_peft_merges(options, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["qkv", "fc1", "proj"], modules_to_save=["head"], **options
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(build("vit"), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    theirs.save_pretrained(tmp_path)
    ours = build("vit")
    merge_peft_(ours, tmp_path, "teacher.adapter")
    images = images_for("vit")
    with torch.no_grad():
        found, wanted = ours.eval()(images), theirs.eval()(images)
    assert found.sub(wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert not found.equal(build("vit").eval()(images))


@pytest.mark.parametrize("classes", [[], ["teacher.num_classes=4"]])
def test_a_plan_tells_that_the_folder_is_not_there_yet(tmp_path, classes):
    recipe = recipe_of(tmp_path / "backbone.safetensors", tmp_path / "lora", classes)
    notes = plan_recipe(recipe).notes
    assert any(f"teacher.adapter: there is no {tmp_path / 'lora'}. It is needed" in note for note in notes)
    teacher = teacher_architecture(recipe).build()
    save_file(teacher.state_dict(), tmp_path / "backbone.safetensors")
    with pytest.raises(UserError, match="is no folder that PEFT wrote"):
        load_teacher(recipe, teacher)
