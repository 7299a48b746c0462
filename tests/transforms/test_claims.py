"""The table of claims: where two meet, who gives way, and that its sentences are whole."""

from __future__ import annotations

import re

import pytest

from compressvit.transforms.claims import (
    RULES,
    Claim,
    adds_tokens,
    conflict,
    drops,
    grid,
    narrows,
    noise,
    orders,
    regroups,
    slot,
    tie,
    values,
    weight,
)

AB = tie(["blocks.0.attn", "blocks.1.attn"])
ONE_OF_EACH = {
    "weight": weight("blocks.0.attn.qkv"),
    "tie": AB,
    "slot": slot("blocks.0.attn", "x"),
    "grid": grid("blocks.0.attn"),
    "tokens": adds_tokens("blocks.0.attn"),
    "drop": drops(["blocks.0.attn.qkv.weight"])[0],
    "order": orders("blocks.0"),
    "narrow": narrows("blocks.0.attn.qkv"),
    "regroup": regroups("", "chooses"),
    "noise": noise("", "first.init", "first.init=mean"),
    "values": values("blocks.0.attn.qkv", "second.init", "second.init=scratch"),
}


@pytest.mark.parametrize(("kinds"), RULES, ids="-".join)
def test_every_sentence_names_both_and_a_way_out(kinds):
    earlier, later = (ONE_OF_EACH[kind] for kind in kinds)
    if kinds == ("tie", "tie"):
        later = tie(["blocks.0.attn", "blocks.2.attn"])
    text = conflict([("first", earlier)], "second", [later])
    assert text is not None
    assert "{" not in text
    for name, claim in (("first", earlier), ("second", later)):
        assert (claim.by or name) in text, text
    assert re.search(r"; \w", text), "a way out"


@pytest.mark.parametrize(
    ("names", "meets"),
    [
        (["blocks.0.attn", "blocks.1.attn"], False),
        (["blocks.1.attn.qkv.weight", "blocks.0.attn.qkv.weight"], False),
        (["blocks.2.attn", "blocks.3.attn"], False),
        (["blocks.0.mlp", "blocks.2.mlp"], False),
        (["blocks.0.attn.qkv.weight", "blocks.2.attn.qkv.weight"], True),
        (["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"], True),
        (["blocks.1.attn", "blocks.2.attn"], True),
        (["blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight"], True),
    ],
)
def test_ties_meet_where_they_share_otherwise(names, meets):
    for first, second in ((AB, tie(names)), (tie(names), AB)):
        assert (conflict([("first", first)], "second", [second]) is not None) == meets


def test_paths_are_whole_names():
    assert conflict([("first", slot("blocks.1.attn", "x"))], "second", [orders("blocks.11")]) is None
    assert conflict([("first", slot("blocks.11.attn", "x"))], "second", [orders("blocks.1")]) is None
    assert conflict([("first", slot("blocks.1.attn", "x"))], "second", [orders("blocks.1")]) is not None


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        (slot("blocks.0.attn", "x"), slot("blocks.0.attn", "y")),
        (slot("blocks.0.attn", "x"), slot("blocks.1.attn", "x")),
        (grid("blocks.0.mlp"), adds_tokens("blocks.0.attn")),
        (orders("blocks.0"), AB),
        (values("blocks.0.attn.qkv", "b", "c"), noise("", "a", "d")),
    ],
)
def test_what_does_not_meet_composes(earlier: Claim, later: Claim):
    assert conflict([("first", earlier)], "second", [later]) is None


def test_the_same_step_twice_is_said_so():
    text = conflict([("lors", weight("a"))], "lors", [weight("a")]) or ""
    assert text.startswith("lors is applied twice: a has a low-rank term already; give the two steps different targets")
