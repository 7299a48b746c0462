"""A file of three channels in a model of another number of them, against what timm's own `pretrained` does."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.models import build, examples

from compressvit.artifacts import artifact
from compressvit.errors import UserError
from compressvit.model import weights

WHERE = "teacher.weights"


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
@pytest.mark.parametrize("name", ["vit", "swin", "hiera", "convnext", "eva02", "davit"])
def test_the_first_convolution_is_timms(name, channels, tmp_path):
    example, file = examples()[name], tmp_path / "weights.safetensors"
    artifact.save_file(build(name).state_dict(), file)
    of_file = {"file": str(file), "num_classes": 5}
    wanted = timm.create_model(
        example.model, pretrained=True, pretrained_cfg_overlay=of_file, in_chans=channels, **example.args
    )
    model = timm.create_model(example.model, in_chans=channels, **example.args)
    found = {note.what: note.text for note in weights.load_file(model, file, WHERE)}
    assert model.state_dict().keys() == wanted.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted.state_dict()[key]), key
    said = "summed to 1" if channels == 1 else f"repeated in turn to {channels}, and scaled by 3/{channels}"
    assert said in found.pop("channels")
    assert found == {}


def test_three_channels_stay_and_others_are_refused(tmp_path):
    example = examples()["vit"]
    artifact.save_file(build("vit").state_dict(), tmp_path / "w.safetensors")
    assert weights.load_file(build("vit", seed=1), tmp_path / "w.safetensors", WHERE) == []
    one = timm.create_model(example.model, in_chans=1, **example.args)
    artifact.save_file(one.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"of another shape, first patch_embed.proj.weight \(file \(48, 1, 8, 8\)"):
        weights.load_file(build("vit"), tmp_path / "w.safetensors", WHERE)
