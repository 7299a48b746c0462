"""DINOv3's published files under their own names, in timm's model."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.eva import checkpoint_filter_fn
from torch import nn

from compressvit.errors import UserError
from compressvit.model.weights import load_file

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": 32, "num_classes": 0}
GATED = {"swiglu_mlp": True, "swiglu_align_to": 8}


def build(biased: bool = True, **args) -> nn.Module:
    return timm.create_model(f"vit_small_patch16_dinov3{'_qkvb' * biased}", **SMALL, **args).eval()


def published(model: nn.Module, biases: float = 0.1) -> dict[str, torch.Tensor]:
    """What https://github.com/facebookresearch/dinov3 would save of a model of timm's with biases of queries and values."""
    generator = torch.Generator().manual_seed(0)
    words = {"reg_token": "storage_tokens", ".gamma_": ".ls", ".fc1_g.": ".w1.", ".fc1_x.": ".w2."}
    words |= {".fc2.": ".w3."} if any("fc1_g" in name for name in model.state_dict()) else {}
    found = {"mask_token": torch.randn(1, 48), "rope_embed.periods": torch.ones(4)}
    for own, tensor in model.state_dict().items():
        name = own
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        name += ".gamma" * (".ls" in name)
        value = torch.randn(tensor.shape, generator=generator)
        if name.endswith(".q_bias"):
            both = value * biases, torch.randn(tensor.shape, generator=generator) * biases
            attention = name.removesuffix("q_bias")
            found[f"{attention}qkv.bias"] = torch.cat([both[0], torch.zeros(48), both[1]])
            found[f"{attention}qkv.bias_mask"] = torch.ones(144).index_fill(0, torch.arange(48, 96), 0)
        elif not name.endswith("_bias"):
            found[name] = value
    return found


@pytest.mark.parametrize("args", [{}, GATED], ids=["mlp", "swiglu"])
def test_a_published_file_is_read_as_timm_reads_it(args, tmp_path):
    model, other = build(**args), build(**args)
    tensors = published(model)
    torch.save(tensors, tmp_path / "dinov3.pth")
    load_file(model, tmp_path / "dinov3.pth", "teacher.weights")
    other.load_state_dict(checkpoint_filter_fn(dict(tensors), other))
    assert {"q_bias", "v_bias"} < {name.rpartition(".")[2] for name in other.state_dict()}
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_biases_are_left_out_only_where_they_are_zero(tmp_path, capsys):
    model = build(biased=False)
    torch.save(published(build(), biases=0.0), tmp_path / "zero.pth")
    load_file(model, tmp_path / "zero.pth", "teacher.weights")
    torch.save(published(build()), tmp_path / "biased.pth")
    with pytest.raises(
        UserError, match=r"blocks\.0\.attn\.qkv\.bias is not zero, .* give the name .* vit_\*_dinov3_qkvb"
    ):
        load_file(model, tmp_path / "biased.pth", "teacher.weights")
    assert capsys.readouterr().out == ""
