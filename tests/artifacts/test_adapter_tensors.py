"""An adapter file holds just the tensors of its structure, and a message says which one is wrong, and how."""

from __future__ import annotations

import pytest
import torch
from helpers.contract import same_values, values
from helpers.models import build
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compressvit.artifacts.adapter import load_adapter, save_adapter
from compressvit.errors import UserError
from compressvit.transforms import LoRA
from compressvit.transforms.applying import compress

SHAPE = "does not belong there, or has a different shape"


@pytest.mark.parametrize("case", ["missing", "of another shape", "one too many", "turned"])
def test_a_file_with_other_tensors_is_refused(case, tmp_path):
    file = save_adapter(compress(build("vit"), [LoRA(rank=2)]), tmp_path / "a.safetensors")
    tensors, header = load_file(file), safe_open(file, framework="pt").metadata()
    name = next(n for n in tensors if n.startswith("blocks.1"))
    if case == "missing":
        del tensors[name]
    elif case == "of another shape":
        tensors[name] = torch.cat([tensors[name], tensors[name]])
    elif case == "turned":
        tensors[name] = tensors[name].mT.contiguous()
    else:
        name = "blocks.1.attn.qkv.adapter.extra"
        tensors[name] = torch.zeros(2)
    save_file(tensors, file, metadata=header)
    model = build("vit")
    before = values(model)
    with pytest.raises(UserError) as refusal:
        load_adapter(model, file)
    assert f"{name} {'is missing' if case == 'missing' else SHAPE}" in str(refusal.value)
    assert same_values(values(model), before)
