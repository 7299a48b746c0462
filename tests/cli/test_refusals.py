"""Faults that a reader found: each was a stack trace, a silent change or a lost file once."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
import torch
from helpers.models import build, images_for
from helpers.runs import done, refused, run
from PIL import Image

import compressvit
from compressvit import Multiplex
from compressvit.artifacts import artifact
from compressvit.data.image_transform import image_transform
from compressvit.data.input import InputConfig
from compressvit.data.spec import Augment
from compressvit.errors import UserError, command_line
from compressvit.files import disk_faults
from compressvit.model.positions import resample_positions
from compressvit.recipe.recipe import parse_recipe
from compressvit.recipe.shipped import find_recipe
from compressvit.runs.folder import RunFolder
from compressvit.runs.job import pick_device, refuse_own_inputs
from compressvit.transforms import LoadWeights


def test_the_policy_of_the_imagenet_recipes_takes_every_magnitude():
    config = InputConfig(3, 16, 16, (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
    transform = image_transform(config, Augment(auto_augment="rand-m10-n8-mstd3-inc1"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    torch.manual_seed(0)
    seen = [transform(image) for _ in range(300)]
    assert len(seen) == 300


def test_weights_of_other_transforms_are_not_loaded(tmp_path):
    teacher = build("vit")
    artifact = compressvit.save(
        compressvit.compress(teacher, [Multiplex(share=2, mlp_conv=3, form="reference")]), tmp_path / "a"
    )
    with pytest.raises(UserError, match=r"multiplex\.form is reference there, identity here"):
        compressvit.compress(teacher, [Multiplex(share=2, mlp_conv=3), LoadWeights(artifact=str(artifact))])
    other_start = Multiplex(share=2, mlp_conv=3, form="reference", init="first")
    same = compressvit.compress(teacher, [other_start, LoadWeights(artifact=str(artifact))])
    images = images_for(teacher)
    with torch.inference_mode():
        assert torch.equal(same(images), compressvit.load(artifact)(images))


def write_onto_a_full_disk() -> None:
    """As torch does: the system's error is only in the background of its own."""
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc:664]")  # noqa: B904


def write_and_fail_otherwise() -> None:
    raise RuntimeError("something else")


def test_a_full_disk_is_recognised_behind_other_errors(tmp_path):
    for write, kind, words in (
        (write_onto_a_full_disk, UserError, "no space left"),
        (write_and_fail_otherwise, RuntimeError, "something else"),
    ):
        guarded = disk_faults(tmp_path / "x")(write)
        with pytest.raises(kind, match=words):
            guarded()


@pytest.mark.parametrize(
    ("backbone", "name", "tensor"),
    [
        ("vit", "pos_embed", torch.zeros(1, 60, 48)),
        ("vit", "pos_embed", torch.zeros(17, 48)),
        ("swin", "layers.1.blocks.9.attn.relative_position_bias_table", torch.zeros(49, 4)),
    ],
)
def test_weights_that_timm_cannot_convert_are_a_sentence(backbone, name, tensor):
    model = build(backbone)
    with pytest.raises(UserError, match="do not fit"):
        resample_positions({**model.state_dict(), name: tensor}, model)


@pytest.mark.parametrize("name", ["meta", "hpu", "lazy", "nonsense"])
def test_a_device_that_cannot_train_is_refused(name):
    with pytest.raises(
        UserError, match=f"device='{name}' (is none of cpu|cannot be used: .*; device='cpu' always can)"
    ):
        pick_device(name)
    with (
        command_line(),
        pytest.raises(UserError, match=f"--device {name} (is none of cpu|cannot be used: .*; --device cpu always can)"),
    ):
        pick_device(name)


def test_a_missing_path_does_not_run_a_shipped_recipe():
    assert find_recipe("recipes/quickstart.yaml").is_file()
    with pytest.raises(UserError, match="there is no recipe"):
        find_recipe("/nowhere/recipes/quickstart.yaml")


def test_a_student_that_is_not_finite_is_no_success(tmp_path):
    student = compressvit.compress(build("vit"), [Multiplex(share=2)])
    with torch.no_grad():
        student.norm.weight.fill_(float("nan"))
    path = compressvit.save(student, tmp_path / "a")
    with pytest.raises(UserError, match="not finite"):
        artifact.read_back_difference(path, student, (3, 32, 32))


def test_overwrite_keeps_a_data_folder_that_is_the_run_folder(tmp_path):
    text = f"teacher: {{model: vit_tiny_patch16_224}}\ndata: {{name: images, root: {tmp_path}}}\nsteps: [distill]"
    with pytest.raises(UserError, match=r"would delete .* which data\.root reads"):
        refuse_own_inputs(parse_recipe(text), RunFolder(tmp_path))
    refuse_own_inputs(parse_recipe(text), RunFolder(tmp_path / "run"))


@pytest.mark.parametrize("verb", ["evaluate", "report", "compare", "merge", "apply", "plan"])
def test_a_path_that_is_too_long_is_a_sentence(verb, tmp_path):
    words = ["quickstart", "--output"] if verb == "apply" else []
    message = refused(verb, *words, tmp_path / ("x" * 5000))
    assert "too long for the path" in message or "is not a recipe" in message or "no recipe" in message
    assert len(message) < 2500


def test_a_verb_that_is_none():
    for word, hint in (
        ("aply", "there is no verb 'aply'; did you mean 'apply'? (known: shrink, apply, "),
        ("mine.yaml", "there is no verb 'mine.yaml'; to run a recipe: compressvit apply mine.yaml"),
        ("my own.yaml", "to run a recipe: compressvit apply 'my own.yaml'"),
        ("\x1b[31m.yaml", "to run a recipe: compressvit apply '\\x1b[31m.yaml'"),
    ):
        code, _, err = run(word, "quickstart")
        assert (code, hint in err) == (2, True), err


def test_a_cache_that_is_damaged_on_the_way(tmp_path):
    index = {"images": 3, "bytes": 4, "identity": {"features": 5}}
    (tmp_path / "cache.json").write_text(json.dumps(index))
    assert "0 features of a model: 0 views of 3 images" in done("cache", "verify", tmp_path)
    (tmp_path / "view-00000.bin").mkdir()
    assert "view-00000.bin cannot be read: it is a folder" in refused("cache", "verify", tmp_path)


def test_a_setting_that_is_written_as_an_option():
    for words, hint in (
        (
            ["plan", "quickstart", "--seed", "1"],
            "--seed 1; settings of the recipe are written without dashes: seed=VALUE",
        ),
        (["apply", "quickstart", "--data.batch-size=3"], "written without dashes: data.batch_size=3"),
        (["plan", "quickstart", "--nonsense"], "unrecognized arguments: --nonsense"),
        (
            ["apply", "quickstart", "--ouput", "x"],
            "compressvit apply: error: unrecognized arguments: --ouput x; did you mean '--output'?",
        ),
        (["compare", "runs", "--seed", "1"], "unrecognized arguments: --seed 1"),
    ):
        code, _, err = run(*words)
        assert (code, err.endswith(hint)) == (2, True), err
