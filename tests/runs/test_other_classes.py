"""A compressed model goes on in another run, with a new classifier for other classes."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.runs import done, refused

from compressvit import LoadWeights, Multiplex, compress, load, save
from compressvit.errors import UserError

ARGS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
RECIPE = """\
teacher: {model: vit_tiny_patch16_224, weights: TEACHER}
student: {head: new}
data: {name: digits, batch_size: 8, limit_train: 32, limit_val: 16}
steps:
  - multiplex: {share: 2, mlp_conv: 3}
  - load_weights: {artifact: STUDENT, head: new}
  - finetune: {epochs: 1, lr: 1.0e-3}
"""


def test_a_multiplexed_student_of_five_classes_learns_ten(tmp_path):
    torch.manual_seed(0)
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=5, **ARGS)
    first = compress(teacher, [Multiplex(share=2, mlp_conv=3)])
    text = RECIPE.replace("TEACHER", str(save(teacher, tmp_path / "teacher")))
    text = text.replace("STUDENT", str(save(first, tmp_path / "student")))
    recipe = tmp_path / "other.yaml"
    recipe.write_text(text)
    planned = " ".join(done("plan", recipe).split())
    assert "is left out; the student keeps its own, which later phases train" in planned
    done("apply", "--no-report", recipe, "--output", tmp_path / "run", "steps.2.finetune.lr=1e-30")
    made = load(tmp_path / "run" / "student")
    assert made.num_classes == 10
    before, after = first.state_dict(), made.state_dict()
    body = [name for name in after if not name.startswith("head.")]
    assert len(body) > 20
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in body), "but for the rate of nothing"
    done("apply", "--no-report", recipe, "--output", tmp_path / "trained")
    moved = load(tmp_path / "trained" / "student").state_dict()
    assert not torch.equal(moved["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])


def test_without_the_option_another_size_is_refused_with_it(tmp_path):
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=5, **ARGS)
    text = RECIPE.replace("TEACHER", str(save(teacher, tmp_path / "teacher")))
    made = compress(teacher, [Multiplex(share=2, mlp_conv=3)])
    text = text.replace("STUDENT", str(save(made, tmp_path / "student"))).replace(
        ", head: new}\n  - fine", "}\n  - fine"
    )
    (tmp_path / "other.yaml").write_text(text)
    message = refused("apply", tmp_path / "other.yaml", "--output", tmp_path / "run")
    assert "give load_weights.head=new and student.head=new" in message


def test_a_student_as_a_teacher_is_refused_with_the_way_to_go_on(tmp_path):
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=5, **ARGS)
    made = save(compress(teacher, [Multiplex(share=2)]), tmp_path / "student")
    (tmp_path / "other.yaml").write_text(RECIPE.replace("TEACHER", str(made)).replace("STUDENT", str(made)))
    message = refused("apply", tmp_path / "other.yaml", "--output", tmp_path / "run")
    assert "repeat its transforms as steps, and then `load_weights`" in message


def test_a_damaged_artifact_is_not_loaded(tmp_path):
    torch.manual_seed(0)
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=5, **ARGS)
    made = save(compress(teacher, [Multiplex(share=2)]), tmp_path / "student")
    compress(teacher, [Multiplex(share=2), LoadWeights(artifact=str(made))])
    file = made / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 0x40
    file.write_bytes(content)
    with pytest.raises(UserError, match="is damaged: the checksum of "):
        compress(teacher, [Multiplex(share=2), LoadWeights(artifact=str(made))])
