"""What a plan says of the memory of losses: in proportion to images and tokens, never to the square of these."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from compressvit.recipe.recipe import parse_recipe
from compressvit.runs.plan import plan_recipe

VIT = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 4, "num_heads": 2}
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}


def loss_bytes(args: dict, batch: int = 2, **distill) -> dict[str, int]:
    losses = {"hidden_relation": {"form": distill.pop("form", "cosine_mse"), "weight": 1}}
    content = {
        "teacher": {"model": distill.pop("model", "vit_tiny_patch16_224"), "weights": "train", "args": args},
        "data": {"name": "digits", "batch_size": batch},
        "steps": [{"distill": {"losses": losses}}],
    }
    plan = plan_recipe(parse_recipe(json.dumps(content)))
    assert plan.conflicts == []
    return plan.steps[-1].loss_bytes


@pytest.mark.wide_unless(lambda form: form == "softmax_ce")
@pytest.mark.parametrize("form", ["cosine_mse", "softmax_ce"])
def test_relation_losses_do_not_grow_with_the_square_of_the_tokens(form):
    # N = 65, 145 and 257 tokens of width C = 16: an N×N matrix is 4, 9 and 16 taps
    plans = {
        n: loss_bytes({**VIT, "depth": 1, "img_size": side}, form=form) for n, side in ((65, 32), (145, 48), (257, 64))
    }
    for term in ("hidden_relation", "attention_relation"):
        for tokens, plan in plans.items():
            assert plan[term] <= 4 * 4 * 2 * tokens * 16, term  # four taps
    if form == "cosine_mse":
        grown = [(plans[b]["hidden_relation"] - plans[a]["hidden_relation"]) / (b - a) for a, b in pairwise(plans)]
        assert grown[0] == pytest.approx(grown[1], rel=0.01)  # bytes per token
        assert grown[0] > 0


def test_the_hidden_relation_grows_linearly_in_tokens_on_swin():
    plans = [loss_bytes({**SWIN, "img_size": side}, model="swin_tiny_patch4_window7_224") for side in (16, 32, 64)]
    for small, large in pairwise(plan["hidden_relation"] for plan in plans):
        assert small < large < 4.5 * small


def test_memory_is_proportional_to_the_batch():
    one, four = loss_bytes(VIT, batch=4), loss_bytes(VIT, batch=16)
    assert one.keys() == four.keys() == {"prediction", "attention_relation", "hidden_relation", "teacher taps"}
    for name, size in one.items():
        assert four[name] == pytest.approx(4 * size, rel=0.05), name
