"""The hash of tensors tells apart everything that makes two models different."""

from __future__ import annotations

import pytest
import torch

from compressvit.model.weights import hash_tensors

BASE = {"a": torch.arange(6, dtype=torch.float32), "b": torch.ones(2)}

OTHERS = {
    "value": BASE | {"a": BASE["a"] + torch.tensor([0, 0, 0, 0, 0, 1e-6])},
    "name": {"c": BASE["a"], "b": BASE["b"]},
    "shape": BASE | {"a": BASE["a"].reshape(2, 3)},
    "turned shape": BASE | {"a": BASE["a"].reshape(3, 2)},
    "type": BASE | {"a": BASE["a"].view(torch.int32)},  # the same bytes
    "half": BASE | {"a": BASE["a"].half()},
    "one less": {"a": BASE["a"]},
    "exchanged": {"a": BASE["b"], "b": BASE["a"]},
    "split elsewhere": {"a": BASE["a"][:4], "b": torch.cat([BASE["a"][4:], BASE["b"]])},
}


def test_no_two_of_them_have_one_hash():
    hashes = {name: hash_tensors(tensors) for name, tensors in {"base": BASE, **OTHERS}.items()}
    assert len(set(hashes.values())) == 1 + len(OTHERS), hashes


@pytest.mark.parametrize(
    "same",
    [
        dict(reversed(BASE.items())),
        {name: tensor.clone().requires_grad_() for name, tensor in BASE.items()},
        BASE | {"a": torch.stack([BASE["a"], BASE["a"]], dim=1)[:, 0]},
    ],
    ids=["order", "gradient", "strides"],
)
def test_order_gradients_and_strides_do_not_matter(same):
    assert hash_tensors(same) == hash_tensors(BASE)
