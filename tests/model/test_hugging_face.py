"""Folders and tensors of Hugging Face's transformers become timm's models.

`models_of_transformers.json` has what transformers 5.24 writes of small models: parts of config.json, names and shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressvit.errors import UserError
from compressvit.model.hugging_face import in_timms_names
from compressvit.model.hugging_face_config import input_of, label_names, timms_model
from compressvit.model.local_dir import read_local_dir
from compressvit.model.weights import build, load_file

MODELS = json.loads((Path(__file__).parent / "models_of_transformers.json").read_text(encoding="utf-8"))
SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0, "patch_size": 8, "img_size": 32}


def tensors_of(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator) * 0.1 for name, shape in MODELS[kind]["tensors"].items()}


@pytest.fixture
def folder(tmp_path):
    """A function that writes the folder of one of the models, with changes to its configuration."""

    def write(kind, **changes):
        (tmp_path / "config.json").write_text(json.dumps({**MODELS[kind]["config"], **changes}))
        save_file(tensors_of(kind), tmp_path / "model.safetensors")
        return tmp_path

    return write


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_is_a_model_of_timms(kind, folder):
    path = folder(kind)
    known = read_local_dir(path)
    assert known is not None
    model = build(known.architecture, known.args)
    load_file(model, path, "teacher.weights")  # every tensor of the model is in the file, or it is refused
    given, own = tensors_of(kind), model.state_dict()
    for part in ("weight", "bias"):
        found = [
            next((given[n] for n in sorted(given) if "0" in n and _is(n, p) and n.endswith(part)), None) for p in "qkv"
        ]
        parts = [tensor for tensor in found if tensor is not None]
        names = [f"attn.{p}_bias" for p in "qv"] if len(parts) == 2 else [f"attn.qkv.{part}"]  # no bias of keys
        qkv = [next(tensor for name, tensor in own.items() if name.endswith(end)) for end in names]
        assert torch.cat(qkv).equal(torch.cat(parts))
    assert model(torch.zeros(2, 3, 32, 32)).isfinite().all()


def _is(name: str, part: str) -> bool:
    return any(f".{word}." in name for word in (f"{part}_proj", {"q": "query", "k": "key", "v": "value"}[part]))


@pytest.mark.parametrize("kind", MODELS)
def test_it_computes_what_transformers_does(kind, folder):
    transformers = pytest.importorskip("transformers")
    path = folder(kind, layer_norm_eps=1e-5 if kind.startswith(("swin", "clip", "dinov3")) else 1e-6)  # as timm has it
    known = read_local_dir(path)
    assert known is not None
    model = build(known.architecture, known.args).eval()
    load_file(model, path, "teacher.weights")
    theirs = getattr(transformers, MODELS[kind]["config"]["architectures"][0]).from_pretrained(path).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = theirs(images)
        if kind == "dinov2, classifier":  # its own classifier reads more than timm's
            ours, found = model.forward_features(images), theirs.dinov2(images).last_hidden_state
        elif "last_hidden_state" in found and "image_embeds" not in found and kind != "siglip":
            ours, found = model.forward_features(images), found.last_hidden_state
        else:
            word = next(word for word in ("image_embeds", "logits", "pooler_output") if word in found)
            ours, found = model(images), found[word]
    assert ours.sub(found).abs().max() < 1e-5 * found.abs().max()  # measured at most 8e-7


@pytest.mark.parametrize(
    ("config", "name", "args"),
    [
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "vit_base_patch16_224", {"num_classes": 0}),
        ({"model_type": "vit", "image_size": 384}, "vit_base_patch16_384", {"img_size": 384}),
        ({"model_type": "vit", "hidden_size": 384, "num_attention_heads": 6}, "vit_small_patch16_224", {}),
        ({"model_type": "deit"}, "deit_base_distilled_patch16_224", {}),
        (
            {"model_type": "dinov2", "hidden_size": 384, "num_attention_heads": 6, "patch_size": 14, "image_size": 518},
            "vit_small_patch14_dinov2",
            {"img_size": 518, "num_classes": 0},
        ),
        ({"model_type": "dinov2_with_registers", "patch_size": 14}, "vit_base_patch14_reg4_dinov2", {}),
        (
            {"model_type": "dinov3_vit", "num_register_tokens": 4},
            "vit_small_patch16_dinov3_qkvb",
            {"num_classes": 0, "global_pool": "token"},
        ),
        (
            {
                "model_type": "dinov3_vit",
                **{"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "intermediate_size": 5120},
                **{"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
                **{"query_bias": False, "value_bias": False},
            },
            "vit_huge_plus_patch16_dinov3",
            {"img_size": 224},
        ),
        (
            {"model_type": "clip", "architectures": ["CLIPModel"]},
            "vit_base_patch32_clip_quickgelu_224",
            {"num_classes": 512},
        ),
        (
            {"model_type": "clip", "vision_config": {"patch_size": 16, "hidden_act": "gelu"}},
            "vit_base_patch16_clip_224",
            {"num_classes": 0},
        ),
        (
            {"model_type": "siglip", "vision_config": {"hidden_act": "gelu_pytorch_tanh", "image_size": 384}},
            "vit_base_patch16_siglip_384",
            {"act_layer": "gelu_tanh"},
        ),
        (
            {
                "model_type": "swin",
                "embed_dim": 128,
                "depths": [2, 2, 18, 2],
                "num_heads": [4, 8, 16, 32],
                "window_size": 12,
                "image_size": 384,
            },
            "swin_base_patch4_window12_384",
            {},
        ),
        ({"model_type": "vit", "num_channels": 1}, "vit_base_patch16_224", {"in_chans": 1}),
        (
            {
                "model_type": "vit",
                "architectures": ["ViTForImageClassification"],
                "id2label": {"0": "a", "1": "b", "2": "c"},
            },
            "vit_base_patch16_224",
            {"num_classes": 3},
        ),
    ],
)
def test_configurations_have_timms_names(config, name, args):
    found = timms_model(config)
    assert found is not None
    assert found[0] == name
    assert args.items() <= found[1].items()
    assert "embed_dim" not in found[1], "the name says it"


def test_a_size_without_a_name_is_said_by_arguments():
    found = timms_model(MODELS["vit"]["config"])
    assert found is not None
    assert found == ("vit_base_patch16_224", {**SMALL, "num_classes": 5})
    swin = timms_model(MODELS["swin"]["config"])
    assert swin is not None
    assert swin[1]["depths"] == (2, 2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"hidden_act": "relu"},
            "hidden_act is 'relu', and of transformers' models those with gelu, quick_gelu, gelu_pytorch_tanh are",
        ),
        ({"hidden_size": "many"}, "hidden_size is 'many', where transformers has e.g. 768"),
        ({"hidden_size": True}, "hidden_size is True, where"),
        ({"model_type": "dinov2", "use_swiglu_ffn": True}, "a DINOv2 with SwiGLU of another size than ViT-g"),
        ({"model_type": "dinov3_vit", "key_bias": True}, "a DINOv3 with biases at query, key, value, proj, mlp alone"),
        (
            {"model_type": "dinov3_vit", "use_gated_mlp": True},
            "its MLPs have gates of 'gelu', and those of timm's model of",
        ),
        ({"model_type": "swin", "depths": "2222"}, "depths is '2222', where transformers has e.g."),
    ],
)
def test_what_timm_has_not_is_refused(changes, text, folder):
    path = folder("vit", **changes)
    with pytest.raises(UserError, match=f"config.json: .*{text}"):
        read_local_dir(path)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "swin", "siglip_vision_model"])
def test_an_activation_that_timms_model_has_not_is_an_argument(kind):
    found = timms_model({"model_type": kind, "hidden_act": "quick_gelu"})
    assert found is not None
    assert found[1]["act_layer"] == "quick_gelu"
    clip = timms_model({"model_type": "clip_vision_model", "hidden_act": "quick_gelu"})
    assert clip is not None
    assert "act_layer" not in clip[1], "the name says it"


def test_what_a_configuration_leaves_out_is_what_transformers_has():
    siglip = timms_model({"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}})
    assert siglip == ("vit_base_patch16_siglip_224", {"img_size": 224, "num_classes": 0, "act_layer": "gelu_tanh"})
    assert timms_model({"model_type": "dinov2"}) == ("vit_base_patch14_dinov2", {"img_size": 224, "num_classes": 0})


@pytest.mark.parametrize(
    "changes",
    [{"architectures": 5}, {"architectures": [5]}, {"architectures": {}}, {"id2label": 5}, {"id2label": "xxxxx"}],
)
def test_nonsense_beside_the_sizes_is_as_if_it_were_not_there(changes):
    usual = {**MODELS["vit"]["config"], "architectures": ["ViTForImageClassification"], "id2label": {}}
    found = timms_model({**usual, **changes})
    assert found is not None
    assert found[1]["num_classes"] == (0 if "architectures" in changes else 2)
    assert timms_model({**usual, "model_type": ["vit"]}) is None
    assert input_of({"resample": [1], "image_mean": ["a"], "size": [3], "crop_size": "x", "do_center_crop": True}) == {}
    assert input_of({"do_center_crop": True, "size": 1, "crop_size": 10**6})["crop_pct"] == 1.0
    assert input_of({"do_normalize": False})["mean"] == [0.0] * 3


def test_of_another_kind_nothing_is_known(folder, tmp_path):
    assert timms_model({"model_type": "bert"}) is None
    assert timms_model({}) is None
    path = folder("vit", model_type="bert")
    with pytest.raises(
        UserError,
        match=r"neither timm's 'architecture' nor a 'model_type' of transformers that is known \(vit, deit, dinov2, ",
    ):
        read_local_dir(path)


PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def in_parts(folder):
    """The folder of a ViT whose tensors are in two files, and the index of these."""
    path = folder("vit")
    tensors = tensors_of("vit")
    half = len(tensors) // 2
    places = {name: PARTS[i >= half] for i, name in enumerate(tensors)}
    for part in PARTS:
        save_file({name: tensor for name, tensor in tensors.items() if places[name] == part}, path / part)
    (path / "model.safetensors").unlink()
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path, index


def test_a_model_in_several_files_is_read_by_its_index(in_parts, tmp_path):
    path, index = in_parts
    known = read_local_dir(path)
    assert known is not None
    found = []
    for source in (path, index):
        model = build(known.architecture, known.args)
        notes = load_file(model, source, "teacher.weights")
        assert any("the tensors were read from 2 files" in note.text for note in notes)
        found.append(model.state_dict())
    save_file(tensors_of("vit"), path / "model.safetensors")
    whole = build(known.architecture, known.args)
    load_file(whole, path, "teacher.weights")
    for state in found:
        assert all(tensor.equal(state[name]) for name, tensor in whole.state_dict().items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path, index: (path / PARTS[1]).unlink(), "lists 2 files, and 1 of them are not there"),
        (lambda path, index: index.write_text("{}"), "does not say which tensors are in which file"),
        (
            lambda path, index: index.write_text('{"weight_map": {"a": "../x"}}'),
            r"names \.\./x, which is no file of tensors beside it",
        ),
        (
            lambda path, index: index.write_text(json.dumps({"weight_map": {"a": index.name, "b": "b.bin"}})),
            "is no file of",
        ),
        (lambda path, index: save_file(tensors_of("vit"), path / PARTS[1]), "is in more than one of the model's files"),
    ],
)
def test_parts_that_are_no_model(in_parts, spoil, message):
    path, index = in_parts
    model = build("vit_tiny_patch16_224")
    spoil(path, index)
    with pytest.raises(UserError, match=message):
        load_file(model, path, "teacher.weights")


def test_what_timm_has_not_is_left_out_and_told():
    tensors = {"text_model.embeddings.token_embedding.weight": torch.zeros(2, 2), "logit_scale": torch.zeros(())}
    found, (note,) = in_timms_names({**tensors_of("clip, with projection"), **tensors}, {}, "here")
    assert (
        "2 were left out that timm's model has not (text_model.embeddings.token_embedding.weight, logit_scale)"
        in note.text
    )
    assert note.count == len(found)
    assert found["head.bias"].equal(torch.zeros(16))


def test_a_classifier_that_timm_cannot_have_is_refused(tmp_path):
    model = build("vit_base_patch14_dinov2", {**SMALL, "num_classes": 5})
    save_file(tensors_of("dinov2, classifier"), tmp_path / "a.safetensors")
    with pytest.raises(
        UserError, match=r"reads the class token beside the mean of the patch tokens.*set num_classes=0"
    ):
        load_file(model, tmp_path / "a.safetensors", "teacher.weights")
    headless = build("vit_base_patch14_dinov2", {**SMALL, "num_classes": 0})
    notes = load_file(headless, tmp_path / "a.safetensors", "teacher.weights")
    assert any("the file's classifier was left out" in note.text for note in notes)


def test_tensors_of_another_size_are_refused(tmp_path):
    save_file(tensors_of("vit"), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"does not fit vit_base_patch16_224: .* of another shape"):
        load_file(
            build("vit_base_patch16_224", {**SMALL, "num_classes": 5, "embed_dim": 24}),
            tmp_path / "a.safetensors",
            "here",
        )


def test_images_are_as_the_preprocessor_says(folder):
    path = folder("vit", id2label={"0": "cat", "1": "dog", "2": "eel", "3": "fox", "4": "gnu"})
    crop = {
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "size": {"shortest_edge": 256},
        "resample": 3,
    }
    (path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2], **crop})
    )
    known = read_local_dir(path)
    assert known is not None
    assert known.input == {"mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "crop_pct": 0.875}
    assert known.label_names == ["cat", "dog", "eel", "fox", "gnu"]
    assert input_of({"size": 224, "resample": 2}) == {
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    assert input_of({}) == {}
    assert label_names({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}) is None
