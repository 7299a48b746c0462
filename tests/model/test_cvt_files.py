"""CvT: the files that it reads, Microsoft's and those of transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers.models import build, outputs, randomise
from safetensors.torch import save_file

from compressvit.errors import UserError
from compressvit.model import weights
from compressvit.model.families.cvt import SMALL
from compressvit.model.hugging_face import in_timms_names, place_in_timm
from compressvit.model.hugging_face_config import image_size, input_of, timms_model
from compressvit.model.local_dir import read_local_dir

ATTENTION = [
    *(
        f"conv_proj_{part}.{name}"
        for part in "qkv"
        for name in (
            "conv.weight",
            "bn.weight",
            "bn.bias",
            "bn.running_mean",
            "bn.running_var",
            "bn.num_batches_tracked",
        )
    ),
    *(f"{layer}.{kind}" for layer in ("proj_q", "proj_k", "proj_v", "proj") for kind in ("weight", "bias")),
]
BLOCK = [f"{layer}.{kind}" for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")]
BLOCK += [f"attn.{name}" for name in ATTENTION]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_released_file_fits_as_it_is(wrapped, tmp_path):
    model = build("cvt")
    names = {f"stage{s}.blocks.{i}.{name}" for s in (0, 1) for i in (0, 1) for name in BLOCK}
    names |= {
        f"stage{s}.patch_embed.{n}.{kind}" for s in (0, 1) for n in ("proj", "norm") for kind in ("weight", "bias")
    }
    names |= {"stage1.cls_token", "norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert model.state_dict().keys() == names
    torch.save({"model": model.state_dict()} if wrapped else model.state_dict(), tmp_path / "cvt.pth")
    other = weights.build("cvt_13", SMALL).eval()
    assert weights.load_file(other, tmp_path / "cvt.pth", "teacher.weights") == []
    assert torch.equal(outputs(other), outputs(model))
    headless = weights.build("cvt_13", {**SMALL, "num_classes": 0})
    (note,) = weights.load_file(headless, tmp_path / "cvt.pth", "teacher.weights")
    assert "the file's classifier was left out (head.weight, head.bias)" in note.text


IN_TRANSFORMERS = {
    "cvt.encoder.stages.0.embedding.convolution_embeddings.projection.weight": "stage0.patch_embed.proj.weight",
    "cvt.encoder.stages.2.embedding.convolution_embeddings.normalization.bias": "stage2.patch_embed.norm.bias",
    "cvt.encoder.stages.2.cls_token": "stage2.cls_token",
    "cvt.encoder.stages.1.layers.3.attention.attention.convolution_projection_query.convolution_projection.convolution.weight": (
        "stage1.blocks.3.attn.conv_proj_q.conv.weight"
    ),
    "cvt.encoder.stages.1.layers.3.attention.attention.convolution_projection_key.convolution_projection.normalization.running_var": (
        "stage1.blocks.3.attn.conv_proj_k.bn.running_var"
    ),
    "cvt.encoder.stages.1.layers.12.attention.attention.projection_value.bias": "stage1.blocks.12.attn.proj_v.bias",
    "cvt.encoder.stages.1.layers.12.attention.output.dense.weight": "stage1.blocks.12.attn.proj.weight",
    "cvt.encoder.stages.1.layers.0.intermediate.dense.weight": "stage1.blocks.0.mlp.fc1.weight",
    "cvt.encoder.stages.1.layers.0.output.dense.bias": "stage1.blocks.0.mlp.fc2.bias",
    "cvt.encoder.stages.1.layers.0.layernorm_before.weight": "stage1.blocks.0.norm1.weight",
    "cvt.encoder.stages.1.layers.0.layernorm_after.weight": "stage1.blocks.0.norm2.weight",
    "layernorm.weight": "norm.weight",
    "classifier.bias": "head.bias",
}


def test_names_of_transformers_become_the_released_ones():
    tensors = {name: torch.full((1,), float(i)) for i, name in enumerate([*IN_TRANSFORMERS, "cvt.pooler.weight"])}
    found, (note,) = in_timms_names(tensors, (), "teacher.weights")
    assert {name: tensor.item() for name, tensor in found.items()} == {
        new: float(i) for i, new in enumerate(IN_TRANSFORMERS.values())
    }
    assert note.text.endswith("of 13 tensors, and 1 were left out that timm's model has not (cvt.pooler.weight)")
    for theirs, ours in IN_TRANSFORMERS.items():
        assert place_in_timm(theirs) == (ours, None)


@torch.no_grad()
def test_it_computes_what_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    # its last stage has no fewer than 3 blocks: it takes stochastic depth of all blocks of a stage by the stage's number
    config = transformers.CvtConfig(embed_dim=[16, 24, 32], num_heads=[1, 2, 4], depth=[1, 2, 3], num_labels=7)
    theirs = transformers.CvtForImageClassification(config).eval()
    randomise(theirs, 0.1)
    for name, buffer in theirs.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2.0)
    theirs.save_pretrained(tmp_path)
    known = read_local_dir(tmp_path)
    assert known is not None
    ours = weights.build(known.architecture, known.args).eval()
    weights.load_file(ours, tmp_path, "teacher.weights")
    images = torch.randn(2, 3, 64, 96)
    wanted = theirs(images).logits
    assert (ours(images) - wanted).abs().max() < 1e-5 * wanted.abs().max()  # measured 5.3e-7
    other = weights.build(known.architecture, {**known.args, "act_layer": "quick_gelu"}).eval()
    weights.load_file(other, tmp_path, "teacher.weights")
    assert (other(images) - wanted).abs().max() > 1e-3 * wanted.abs().max(), "the activation is another"


def config_of(**changes: Any) -> dict[str, Any]:
    return {"model_type": "cvt", "architectures": ["CvtForImageClassification"], "id2label": {"0": "a"}, **changes}


@pytest.mark.parametrize(
    ("changes", "name", "args"),
    [
        ({}, "cvt_13", {}),
        ({"depth": [1, 4, 16]}, "cvt_21", {}),
        ({"depth": [2, 2, 20], "embed_dim": [192, 768, 1024], "num_heads": [3, 12, 16]}, "cvt_w24", {}),
        ({"depth": [1, 2, 4]}, "cvt_13", {"depths": (1, 2, 4)}),
        ({"num_channels": 1, "cls_token": [False, False, False]}, "cvt_13", {"in_chans": 1, "class_token": False}),
        ({"mlp_ratio": [4.0, 4.0, 2.0]}, "cvt_13", {"mlp_ratio": (4.0, 4.0, 2.0)}),
    ],
    ids=str,
)
def test_configurations_of_transformers_have_names(changes, name, args):
    assert timms_model(config_of(**changes)) == (name, {"act_layer": "gelu", "num_classes": 1, **args})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": "1"}, r"depth is '1', where transformers has e.g. \[1, 2, 10\]"),
        ({"qkv_projection_method": ["avg"] * 3}, "only a CvT with 'dw_bn' in every stage is known"),
        ({"kernel_qkv": [3, 3, 5]}, r"kernel_qkv is \[3, 3, 5\], and only a CvT with 3 in every stage"),
        ({"cls_token": [True, True, True]}, "only the last stage of a CvT that is known has a class token"),
    ],
    ids=str,
)
def test_a_cvt_that_is_not_known_is_refused(changes, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of(**changes)))
    with pytest.raises(UserError, match=rf"config\.json: .*{words}"):
        read_local_dir(tmp_path)


def test_a_folder_of_transformers_says_how_large_its_images_are(tmp_path):
    """Its config.json does not, and transformers prepares them as ConvNeXt's: cropped below 384, squashed from there on."""
    (tmp_path / "config.json").write_text(json.dumps(config_of()))
    save_file({"classifier.weight": torch.zeros(1, 384)}, tmp_path / "model.safetensors")
    for side, crop in ((224, {"crop_pct": 0.875}), (384, {"crop_pct": 1.0, "crop_mode": "squash"})):
        images = {"size": {"shortest_edge": side}, "crop_pct": 0.875, "resample": 3}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
        known = read_local_dir(tmp_path)
        assert known is not None
        assert known.args["img_size"] == side == image_size(images)
        assert known.input == input_of(images) == {"interpolation": "bicubic", **crop}
