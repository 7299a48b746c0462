"""Adapters on their own: small files that go onto their backbone, are switched and removed, and refuse any other."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from helpers.contract import same_values, structure, values
from helpers.models import VIT, build, images_for, outputs, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compressvit.artifacts.adapter import load_adapter, remove_adapter, save_adapter
from compressvit.artifacts.merge import merge
from compressvit.errors import UserError
from compressvit.model import weights
from compressvit.transforms import (
    LORS,
    PHM,
    SSF,
    VPT,
    Adapters,
    AdaptFormer,
    BitFit,
    Compacter,
    FacT,
    Freeze,
    LoRA,
    Multiplex,
    RepAdapter,
)
from compressvit.transforms.applying import compress
from compressvit.transforms.record import compression_of, trained_names

TASKS = {
    "adapters": ([Adapters(ratio=0.25)], 3),
    "bitfit": ([BitFit()], 4),
    "compacter": ([Compacter(n=2, ratio=0.25)], 5),
    "attention": ([Freeze(train="attention")], 2),
    "repadapter and ssf": ([RepAdapter(width=4), SSF()], 7),
    "lora and adaptformer": ([LoRA(rank=2), AdaptFormer(width=3)], 5),
    "phm": ([PHM(n=2, ratio=0.25)], 6),
    "fact": ([FacT(rank=2)], 3),
    "vpt": ([VPT(prompts=3)], 3),
    "mlp": ([Freeze(train="mlp")], 3),
    "biases again": ([BitFit()], 6),
    "biases once more": ([BitFit()], 6),
}
FEW = [
    "adapters",
    "repadapter and ssf",
    "vpt",
    "mlp",
]  # what is added, what replaces layers, what joins tokens, what is there


@pytest.mark.parametrize("name", ["torchvision_swin_t", "faster_rcnn"])
def test_an_adapter_goes_onto_models_of_our_own_classes(name, tmp_path):
    """Whose classes are no specialisations that removing an adapter undoes."""
    args = {
        "torchvision_swin_t": {"num_classes": 3},
        "faster_rcnn": {
            "backbone": "swin_tiny_patch4_window7_224",
            "backbone_args": {"depths": (1, 1, 1, 1)},
            "img_size": 64,
        },
    }[name]
    torch.manual_seed(0)
    backbone = weights.build(name, args).eval()
    kind = type(backbone)
    model = compress(backbone, [BitFit()])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0.0)
    again = load_adapter(backbone, save_adapter(model, tmp_path / "adapter.safetensors"))
    assert same_values(values(again), values(model))
    assert type(remove_adapter(again)) is kind


def adapted(task: str, backbone: torch.nn.Module) -> torch.nn.Module:
    """A copy of the backbone with a trained adapter and classifier for a task."""
    specs, classes = TASKS[task]
    model = copy.deepcopy(backbone)
    model.reset_classifier(classes)
    model = compress(model, specs).eval()
    trained = trained_names(model)
    keep = {n: p.detach().clone() for n, p in model.named_parameters() if n not in trained}
    randomise(model, scale=0.1)
    model.load_state_dict(keep, strict=False)
    return model


@pytest.mark.wide_unless(lambda name, tasks: name == "vit" and tasks is FEW)
@pytest.mark.parametrize("tasks", [FEW, list(TASKS)], ids=["few", "all"])
@pytest.mark.parametrize("name", ["vit", "dinov2_registers", "swin"])
def test_adapters_are_loaded_switched_and_removed(name, tasks, tmp_path):
    backbone = build(name)
    images = images_for(backbone)
    files, expected = {}, {}
    for task in tasks:
        model = adapted(task, backbone)
        files[task] = save_adapter(model, tmp_path / f"{task}.safetensors")
        expected[task] = outputs(model, images)
        assert set(load_file(files[task])) <= trained_names(model)
    before, state, live = structure(backbone), values(backbone), copy.deepcopy(backbone)
    for task in [*tasks, *reversed(tasks)]:
        assert load_adapter(live, files[task]) is live
        assert torch.equal(outputs(live.eval(), images), expected[task])
        assert trained_names(live) == {n for n, p in live.named_parameters(remove_duplicate=False) if p.requires_grad}
    remove_adapter(live)
    assert structure(live) == before
    assert same_values(values(live), state)
    assert all(p.requires_grad for p in live.parameters())
    assert compression_of(live).plans == []


def test_a_file_holds_what_was_trained_and_nothing_else(tmp_path):
    model = adapted("adapters", build("vit"))
    file = save_adapter(model, tmp_path / "deep" / "adapter.safetensors")
    assert {n: tuple(t.shape) for n, t in load_file(file).items()} == {
        n: tuple(p.shape) for n, p in model.named_parameters() if n in trained_names(model)
    }
    header = json.loads(safe_open(file, framework="pt").metadata()["compressvit"])
    assert header["architecture"] == "vit_tiny_patch16_224"
    assert header["num_classes"] == 3


def test_another_backbone_is_refused_and_left_alone(tmp_path):
    backbone = build("vit")
    file = save_adapter(adapted("bitfit", backbone), tmp_path / "a.safetensors")
    for other, words in (
        (build("vit", seed=5), "was trained with another vit_tiny_patch16_224: its frozen weights .* differ"),
        (build("swin"), "was trained with a vit_tiny_patch16_224, and this is a swin_tiny_patch4_window7_224"),
        (
            compress(backbone, [Multiplex(share=2)]),
            "loaded onto a plain backbone, but this model was changed by multiplex",
        ),
    ):
        before, state = structure(other), values(other)
        with pytest.raises(UserError, match=words):
            load_adapter(other, file)
        assert structure(other) == before
        assert same_values(values(other), state)


def test_another_classifier_of_the_backbone_does_not_matter(tmp_path):
    backbone = build("vit")
    model = adapted("adapters", backbone)
    file = save_adapter(model, tmp_path / "a.safetensors")
    backbone.reset_classifier(11)
    images = images_for(backbone)
    before = outputs(backbone, images)
    assert torch.equal(outputs(load_adapter(backbone, file).eval(), images), outputs(model, images))
    assert torch.equal(outputs(remove_adapter(backbone), images), before)


def test_a_headless_backbone_takes_adapters_with_heads(tmp_path):
    backbone = build("headless")
    model = adapted("adapters", backbone)
    file = save_adapter(model, tmp_path / "a.safetensors")
    images = images_for(backbone)
    assert torch.equal(outputs(load_adapter(backbone, file).eval(), images), outputs(model, images))
    assert outputs(remove_adapter(backbone), images).shape == (2, 48)


def test_what_cannot_be_saved_alone_says_so(tmp_path):
    for specs, words in (
        ([Multiplex(share=2)], "multiplex changed the backbone itself; compressvit.save writes the whole model"),
        ([LORS(rank=2, metric="weights"), LoRA(rank=2)], "lors changed the backbone itself"),
        ([], "no transform has frozen anything"),
    ):
        with pytest.raises(UserError, match=words):
            save_adapter(compress(build("vit"), specs), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no adapter was loaded onto this model by load_adapter"):
        remove_adapter(build("vit"))


def rewritten(file, path, change) -> str:
    """A copy of an adapter file whose header was changed."""
    header = json.loads(safe_open(file, framework="pt").metadata()["compressvit"])
    change(header)
    save_file(load_file(file), path, metadata={"compressvit": json.dumps(header)})
    return str(path)


def test_damaged_old_and_foreign_files(tmp_path):
    backbone = build("vit")
    file = save_adapter(adapted("repadapter and ssf", backbone), tmp_path / "a.safetensors")
    old = rewritten(file, tmp_path / "old.safetensors", lambda h: h["transforms"][0]["plan"].pop("scale"))
    later = rewritten(file, tmp_path / "later.safetensors", lambda h: h.update(format=7))
    unknown = rewritten(
        file, tmp_path / "unknown.safetensors", lambda h: h["transforms"][0].update(transform="repadaptor")
    )
    other = rewritten(file, tmp_path / "other.safetensors", lambda h: h["transforms"][0]["plan"].update(width=6))
    (tmp_path / "half.safetensors").write_bytes(file.read_bytes()[:900])
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    for path, words in (
        (old, "the plan of 'repadapter' is not valid: scale: field required.*what is missing is not guessed"),
        (later, "is of format 7; this compressvit"),
        (unknown, "uses the transform 'repadaptor'.*did you mean 'repadapter'"),
        (other, "does not fit its own structure"),
        (tmp_path / "half.safetensors", "is not a complete safetensors file"),
        (tmp_path / "plain.safetensors", "is not an adapter file: its header does not say how it was made"),
        (tmp_path / "gone.safetensors", "there is no adapter file"),
    ):
        before, state = structure(backbone), values(backbone)
        with pytest.raises(UserError, match=words):
            load_adapter(backbone, path)
        assert structure(backbone) == before
        assert same_values(values(backbone), state)
    load_adapter(backbone, file)


def test_timm_can_build_the_backbone_anew(tmp_path):
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    model = adapted("lora and adaptformer", backbone)
    file = save_adapter(model, tmp_path / "a.safetensors")
    torch.manual_seed(0)
    again = timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    assert torch.equal(outputs(load_adapter(again, file)), outputs(model))


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path):
    backbone = build("vit")
    file = save_adapter(adapted("lora and adaptformer", backbone), tmp_path / "a.safetensors")
    tensors = load_file(file)
    del tensors["blocks.1.attn.qkv.lora.up"]
    header = safe_open(file, framework="pt").metadata()
    save_file(tensors, tmp_path / "less.safetensors", metadata=header)
    with pytest.raises(UserError, match=r"blocks.1.attn.qkv.lora.up is missing; the file was changed"):
        load_adapter(backbone, tmp_path / "less.safetensors")
    save_file(tensors, tmp_path / "list.safetensors", metadata={"compressvit": "[1]"})
    with pytest.raises(UserError, match="its header holds a list where it should say how it was made"):
        load_adapter(backbone, tmp_path / "list.safetensors")


def test_a_refused_switch_keeps_the_adapter_that_was_there(tmp_path):
    backbone = build("vit")
    good = save_adapter(adapted("adapters", backbone), tmp_path / "a.safetensors")
    bad = rewritten(
        good, tmp_path / "bad.safetensors", lambda h: h["transforms"][0]["plan"]["widths"].update({"blocks.9.mlp": 2})
    )
    load_adapter(backbone, good)
    before = outputs(backbone.eval())
    with pytest.raises(UserError, match="does not fit vit_tiny_patch16_224"):
        load_adapter(backbone, bad)
    assert torch.equal(outputs(backbone), before)


def test_adapted_models_can_be_pickled(tmp_path):
    model = adapted("repadapter and ssf", build("vit"))
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)  # our own file, of a moment ago
    assert torch.equal(outputs(again), outputs(model))
    assert structure(again) == structure(model)


def test_what_was_merged_has_no_adapter_to_remove(tmp_path):
    backbone = build("vit")
    load_adapter(backbone, save_adapter(adapted("repadapter and ssf", build("vit")), tmp_path / "task.safetensors"))
    merged = merge(backbone)
    with pytest.raises(UserError, match="no adapter was loaded onto this model"):
        remove_adapter(merged)
    remove_adapter(backbone)
