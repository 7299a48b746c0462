"""Building models: by name, with values from another model, and as a recipe asks for them."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.models import SWIN, VIT, build, outputs
from helpers.recipes import build_teacher
from torch import nn

from compressvit import Align, BitFit, Freeze, Multiplex
from compressvit.artifacts import artifact
from compressvit.errors import UserError
from compressvit.model import weights
from compressvit.recipe.recipe import Recipe, parse_recipe
from compressvit.runs.models import build_student, load_teacher, require_student_file, trains_teacher
from compressvit.runs.plan import plan_recipe
from compressvit.transforms.applying import compress

# ------------------------------------------------------------------------------------------------------------- building


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (
            "vit_tiny_patch16_242",
            {},
            r"timm .* has no model 'vit_tiny_patch16_242'; did you mean 'vit_tiny_patch16_224'\?",
        ),
        ("quux", {}, r"has no model 'quux'; timm\.list_models\(\) lists them"),
        ("", {}, "has no model ''"),
        (
            "vit_tiny_patch16_224.augreg_in1k",
            {},
            r"no pretrained weights 'vit_tiny_.*augreg_in1k'.*\(known: augreg_in21k",
        ),
        ("vit_tiny_patch16_224", {"depht": 3}, r"timm cannot build vit_tiny_patch16_224 with depht=3: .*depht"),
        ("vit_tiny_patch16_224", {"num_heads": 5}, "with num_heads=5: .*divisible"),
        ("vit_tiny_patch16_224", {"embed_dim": -3}, "timm cannot build .* with embed_dim=-3"),
        ("vit_tiny_patch16_224", {"patch_size": 0}, "timm cannot build .* with patch_size=0"),
        ("vit_tiny_patch16_224", {"img_size": "big"}, "timm cannot build .* with img_size='big'"),
    ],
)
@pytest.mark.parametrize("device", [None, "meta"])
def test_models_that_cannot_be_built(name, args, message, device):
    with pytest.raises(UserError, match=message):
        weights.build(name, device=device, **args)


def test_detectors_are_near_names_before_timm_knows_them(monkeypatch):
    monkeypatch.setattr(timm, "list_models", lambda: ["fasternet_s", "resnet18"])
    with pytest.raises(UserError, match=r"has no model 'fastrcnn'; did you mean 'faster_rcnn'\?"):
        weights.require_known("fastrcnn")


def test_models_that_can():
    assert {p.device.type for p in weights.build("vit_tiny_patch16_224", device="meta").parameters()} == {"meta"}
    model = weights.build("swin_tiny_patch4_window7_224.ms_in1k", **SWIN)
    assert model.num_classes == 5
    assert model.pretrained_cfg["tag"] == "ms_in1k"


# -------------------------------------------------------------------------------------------------- values from a model


def without(model: nn.Module, *words: str) -> dict[str, torch.Tensor]:
    return {n: t for n, t in model.state_dict().items() if not n.startswith(words)}


def test_the_class_token_may_go():
    teacher = build("vit")
    args = {**VIT, "class_token": False, "global_pool": "avg", "fc_norm": False}
    student = timm.create_model("vit_tiny_patch16_224", **args)
    assert weights.copy_matching(student, teacher) == ["cls_token"]
    assert torch.equal(student.pos_embed, teacher.pos_embed[:, 1:])
    rest = without(teacher, "cls_token", "pos_embed")
    assert without(student, "pos_embed").keys() == rest.keys()
    assert all(torch.equal(t, rest[n]) for n, t in without(student, "pos_embed").items())


def test_the_distillation_token_may_go_and_the_class_token_keeps_its_row():
    teacher, student = build("deit_distilled"), build("vit", seed=5)
    assert sorted(weights.copy_matching(student, teacher)) == ["dist_token", "head_dist.bias", "head_dist.weight"]
    assert torch.equal(student.pos_embed[:, :1], teacher.pos_embed[:, :1])
    assert torch.equal(student.pos_embed[:, 1:], teacher.pos_embed[:, 2:])


def test_an_equal_model_is_copied_whole():
    teacher, student = build("swin"), build("swin", seed=5)
    assert weights.copy_matching(student, teacher) == []
    assert torch.equal(outputs(student), outputs(teacher))


@pytest.mark.parametrize(
    "args", [{"embed_dim": 96}, {"img_size": 64}, {"depth": 5}, {"class_token": False, "global_pool": "avg"}], ids=str
)
def test_a_student_that_does_not_match(args):
    student = timm.create_model("vit_tiny_patch16_224", **{**VIT, **args})
    before = {n: t.clone() for n, t in student.state_dict().items()}
    with pytest.raises(
        UserError,
        match=r"no counterpart in the teacher, first \S+ \(.*student \(.*\)\)\. Use `student",
    ):
        weights.copy_matching(student, build("vit"))
    assert all(torch.equal(t, before[n]) for n, t in student.state_dict().items())


# ----------------------------------------------------------------------------------------------- what a recipe asks for

ARGS = "{img_size: 8, patch_size: 2, in_chans: 1, embed_dim: 48, depth: 2, num_heads: 4}"


def recipe_of(teacher: str, student: str = "") -> Recipe:
    return parse_recipe(
        f"teacher: {{model: vit_tiny_patch16_224, args: {ARGS}, {teacher}}}\n"
        f"student: {{{student}}}\ndata: {{name: digits}}\nsteps: [{{multiplex: {{share: 2}}}}]"
    )


def test_a_student_is_a_copy_of_its_teacher():
    recipe = recipe_of("weights: train")
    teacher = build_teacher(recipe)
    assert teacher.num_classes == 10, "the data's classes, because the teacher is trained"
    student = build_student(recipe, teacher)
    assert student is not teacher
    assert all(torch.equal(t, teacher.state_dict()[n]) for n, t in student.state_dict().items())
    meta = build_student(recipe, build_teacher(recipe, device="meta"), meta=True)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert {n: t.shape for n, t in meta.state_dict().items()} == {n: t.shape for n, t in student.state_dict().items()}


def test_a_random_teacher_is_the_beginning_of_its_student():
    recipe = recipe_of("weights: random")
    assert not trains_teacher(recipe)
    teacher = build_teacher(recipe)
    assert teacher.num_classes == 10
    notes = load_teacher(recipe, teacher)  # which log, report and results.json show
    assert [note.what for note in notes] == ["untrained_teacher"]
    assert load_teacher(recipe_of("weights: train"), teacher) == []
    student = build_student(recipe, teacher)
    assert all(torch.equal(t, teacher.state_dict()[n]) for n, t in student.state_dict().items())
    assert [note.text for note in plan_recipe(recipe).weights] == [notes[0].text]
    assert "the teacher is untrained" in notes[0].text
    assert not any("there is no random" in note for note in plan_recipe(recipe).notes)
    with pytest.raises(UserError, match="weights: random leaves the teacher untrained; give weights: train"):
        recipe_of("weights: random, finetune: {epochs: 1}")


def test_a_student_with_arguments_of_its_own():
    arguments = "args: {class_token: false, global_pool: avg, fc_norm: false}, weights: WEIGHTS"
    recipe = recipe_of("weights: train", arguments.replace("WEIGHTS", "teacher"))
    teacher = build_teacher(recipe)
    student = build_student(recipe, teacher)
    assert student.cls_token is None
    assert torch.equal(student.blocks[1].mlp.fc1.weight, teacher.blocks[1].mlp.fc1.weight)
    fresh = build_student(recipe_of("weights: train", arguments.replace("WEIGHTS", "random")), teacher)
    assert fresh.cls_token is None
    assert not torch.equal(fresh.blocks[1].mlp.fc1.weight, teacher.blocks[1].mlp.fc1.weight)


def test_an_artifact_says_what_the_recipe_does_not_of_its_teacher(tmp_path):
    recipe = recipe_of("weights: train")
    made = build_teacher(recipe, classes=3)
    made.reset_classifier(3)
    folder = artifact.save(made, tmp_path / "teacher")
    named = Recipe.model_validate(
        {**recipe.model_dump(), "teacher": {"model": recipe.teacher.model, "weights": str(folder)}}
    )
    for device in ("meta", None):
        assert outline(build_teacher(named, device=device)) == outline(made)
    teacher = build_teacher(named)
    load_teacher(named, teacher)
    assert all(torch.equal(t, teacher.state_dict()[n]) for n, t in made.state_dict().items())
    section = {**named.teacher.model_dump(), "args": {"depth": 1}, "num_classes": 7}
    other = build_teacher(Recipe.model_validate({**named.model_dump(), "teacher": section}))
    assert (len(other.blocks), other.num_classes) == (1, 7), "what the recipe says counts more"
    strange = {"mean": [0.1], "std": [0.2], "interpolation": "nearest", "crop_pct": 0.5, "input_size": [1, 8, 8]}
    artifact.save(made, folder, input_config=strange)
    config = build_teacher(named).pretrained_cfg
    assert (config["mean"], config["std"], config["interpolation"], config["crop_pct"]) == (
        (0.1,),
        (0.2,),
        "nearest",
        0.5,
    )
    asked = {**named.model_dump(), "student": {"args": {"global_pool": "avg"}, "weights": "random"}}
    assert len(build_student(Recipe.model_validate(asked), teacher).blocks) == len(made.blocks)


def test_an_artifact_of_another_model_is_no_teacher(tmp_path):
    recipe = recipe_of("weights: train")
    folder = artifact.save(build("swin"), tmp_path / "swin")
    section = {**recipe.teacher.model_dump(), "weights": str(folder), "finetune": None}
    with pytest.raises(
        UserError, match=r"is a swin_tiny_patch4_window7_224, and teacher.model says vit_tiny_patch16_224"
    ):
        build_teacher(Recipe.model_validate({**recipe.model_dump(), "teacher": section}))
    student = artifact.save(compress(build_teacher(recipe), [Multiplex(share=2)]), tmp_path / "student")
    for steps in ([Freeze(train="mlp")], [BitFit()], [Align(share=2)]):  # these change nothing but values
        section["weights"] = str(artifact.save(compress(build_teacher(recipe), steps), tmp_path / "plain"))
        build_teacher(Recipe.model_validate({**recipe.model_dump(), "teacher": section}))
    section["weights"] = "~nobody-of-this-name/teacher"
    with pytest.raises(UserError, match=r"teacher\.weights: ~nobody.* somebody who has none here"):
        build_teacher(Recipe.model_validate({**recipe.model_dump(), "teacher": section}))
    section["weights"] = str(student)
    with pytest.raises(
        UserError, match=r"the result of multiplex on a vit_tiny_patch16_224, .*Give the teacher of that run"
    ):
        build_teacher(Recipe.model_validate({**recipe.model_dump(), "teacher": section}))


def outline(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_student_weights_that_do_not_fit_are_found_before_the_teacher_is_trained(tmp_path):
    file = tmp_path / "w.pth"
    torch.save(build_teacher(recipe_of("weights: train")).state_dict(), file)
    teacher = build_teacher(recipe_of("weights: train"))
    require_student_file(recipe_of("weights: train", f"weights: {file}"), teacher)
    require_student_file(recipe_of("weights: train"), teacher)
    with pytest.raises(UserError, match=r"student\.weights: .*w\.pth does not fit"):
        require_student_file(recipe_of("weights: train", f"weights: {file}, args: {{depth: 3}}"), teacher)
    with pytest.raises(UserError, match=r"student\.weights: there is no file .*gone\.pth"):
        require_student_file(recipe_of("weights: train", f"weights: {tmp_path / 'gone.pth'}"), teacher)


def test_the_home_folder_may_be_written_short(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    source = build_teacher(recipe_of("weights: train"))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    recipe = recipe_of("weights: ~/w.pth, num_classes: 10", "weights: ~/w.pth")
    teacher = build_teacher(recipe)
    load_teacher(recipe, teacher)
    require_student_file(recipe, teacher)
    for model in (teacher, build_student(recipe, build_teacher(recipe))):
        assert torch.equal(model.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)


def test_a_teacher_and_a_student_from_files(tmp_path):
    file = tmp_path / "w.pth"
    student = f"model: vit_tiny_patch16_224, weights: {file}, args: {ARGS}"
    recipe = recipe_of(f"weights: {file}, num_classes: 10", student)
    source = build_teacher(recipe)
    torch.save(source.state_dict(), file)
    teacher = build_teacher(recipe)
    load_teacher(recipe, teacher)
    student = build_student(recipe, teacher)
    for model in (teacher, student):
        assert all(torch.equal(t, source.state_dict()[n]) for n, t in model.state_dict().items())
    wrong = recipe_of(f"weights: {file}, num_classes: 3")
    with pytest.raises(UserError, match=r"teacher\.weights: .* classifier of 10 classes and the model one of 3"):
        load_teacher(wrong, build_teacher(wrong))
    retrained = recipe_of(f"weights: {file}, num_classes: 3, finetune: {{}}")
    load_teacher(retrained, build_teacher(retrained))


def test_an_artifact_names_the_teachers_model(tmp_path):
    made = build_teacher(recipe_of("weights: train, num_classes: 4"))
    artifact.save(made, tmp_path / "teacher")
    text = "teacher: {weights: WEIGHTS}\ndata: {name: digits}\nsteps: [distill]\n"
    recipe = parse_recipe(text.replace("WEIGHTS", str(tmp_path / "teacher")))
    assert recipe.teacher.model == "vit_tiny_patch16_224"
    assert outline(build_teacher(recipe)) == outline(made)
    for other in (tmp_path, tmp_path / "gone", "pretrained"):
        with pytest.raises(UserError, match=r"teacher\.model: missing"):
            parse_recipe(text.replace("WEIGHTS", str(other)))
