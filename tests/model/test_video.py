"""Video models: tubelets against the image model, positions by hand, values of images, and that transforms work on the backbone inside."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from safetensors.torch import save_file

from compressvit.artifacts import artifact
from compressvit.artifacts.adapter import load_adapter, save_adapter
from compressvit.artifacts.merge import merged_copy
from compressvit.errors import UserError
from compressvit.model.backbone import describe, input_size
from compressvit.model.cost import macs
from compressvit.model.ties import count_parameters
from compressvit.model.video.tubelets import sincos
from compressvit.model.weights import build, load_file
from compressvit.testing.cases import examples_of
from compressvit.transforms import TRANSFORMS
from compressvit.transforms.applying import compress
from compressvit.transforms.multiplex import TokenConv
from compressvit.transforms.record import compression_of, only_adapted

INSIDE = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
SMALL = {"backbone": "vit_tiny_patch16_224", "backbone_args": INSIDE, "frames": 4, "img_size": 32, "num_classes": 5}
CLIPS = torch.randn(2, 12, 32, 32, generator=torch.Generator().manual_seed(1))
STILL = CLIPS[:, :3].repeat(1, 4, 1, 1)  # one frame, four times


def video(**options):
    torch.manual_seed(0)
    model = build("video", SMALL | options).eval()
    with torch.no_grad():
        model.head.weight.normal_()
    return model


def image_model(**options):
    torch.manual_seed(1)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **(INSIDE | options)).eval()


@pytest.fixture
def images(tmp_path):
    """An image model, and the file of its weights."""
    model = image_model()
    save_file(model.state_dict(), tmp_path / "images.safetensors")
    return model, tmp_path / "images.safetensors"


@pytest.mark.parametrize("tubelet", [1, 2, 4])
def test_a_clip_in_which_nothing_moves_has_the_images_embedding(images, tubelet):
    model = video(tubelet=tubelet)
    load_file(model.backbone, images[1], "teacher.backbone", new_head=True)
    tokens = model.backbone.patch_embed(STILL.unflatten(1, (4, 3)).transpose(1, 2))
    expected = images[0].patch_embed(STILL[:, :3])
    assert tokens.shape == (2, 4 // tubelet, 16, 32)
    for step in tokens.unbind(1):
        assert torch.allclose(step, expected, atol=1e-5)  # measured 1.7e-6


def test_a_clip_of_one_frame_without_positions_in_time_is_the_image(images):
    model = video(frames=1, tubelet=1, pool="token", temporal_scale=0.0)
    load_file(model.backbone, images[1], "teacher.backbone", new_head=True)
    features = model.backbone.forward_features(CLIPS[:, :3, None])
    assert torch.allclose(features, images[0].forward_features(CLIPS[:, :3]), atol=1e-5)  # measured 0


def test_frames_come_one_after_the_other():
    """The tubelets of the second half of a clip are those that change with its frames."""
    embed = video().backbone.patch_embed
    other = CLIPS.clone()
    other[:, 9:] += 1  # the last frame
    same = (embed(CLIPS.unflatten(1, (4, 3)).transpose(1, 2)) == embed(other.unflatten(1, (4, 3)).transpose(1, 2))).all(
        3
    )
    assert same[:, 0].all()
    assert not same[:, 1].any()


def test_positions_are_the_images_in_space_and_sines_and_cosines_in_time():
    model = video(temporal_scale=0.25).backbone
    empty = torch.zeros(1, 2, 16, 32)
    found = model._pos_embed(empty)
    assert torch.allclose(found[:, 0], model.cls_token[:, 0] + model.pos_embed[:, 0])
    for step in range(2):
        angle = [step / 10000 ** (2 * (i // 2) / 32) for i in range(32)]
        in_time = torch.tensor([math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(angle)])
        expected = model.pos_embed[:, 1:] + 0.25 * in_time
        assert torch.allclose(found[:, 1 + 16 * step :][:, :16], expected, atol=1e-6)  # measured 0


def test_videomaes_positions_count_all_tubelets_through():
    model = video(positions="sincos", backbone_args={**INSIDE, "class_token": False, "global_pool": "avg"}).backbone
    assert model.pos_embed is None
    assert torch.equal(model._pos_embed(torch.zeros(1, 2, 16, 32))[0], sincos(32, 32))


def test_positions_of_another_size_are_resampled_as_timm_does(images):
    model = video(img_size=48)
    load_file(model.backbone, images[1], "teacher.backbone", new_head=True)
    larger = timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=0, **INSIDE)
    load_file(larger, images[1], "teacher.weights")
    assert torch.equal(model.backbone.pos_embed, larger.pos_embed)


def test_several_clips_beside_one_another_have_the_mean_of_their_logits():
    model = video()
    first, second = CLIPS, CLIPS.flip(1)
    expected = (model(first) + model(second)) / 2
    assert torch.allclose(model(torch.cat([first, second], dim=1)), expected, atol=1e-6)  # measured 0
    assert not torch.allclose(model(first), model(second), atol=1e-2)


def test_clips_with_a_dimension_for_frames_are_taken():
    assert torch.equal(video()(CLIPS.unflatten(1, (4, 3))), video()(CLIPS))


def test_pooling():
    tokens = torch.randn(2, 33, 32)
    for pool, expected in (("avg", tokens[:, 1:].mean(1)), ("token", tokens[:, 0])):
        assert torch.allclose(video(pool=pool).backbone.forward_head(tokens, pre_logits=True), expected)


def test_its_input_and_its_cost_are_those_of_clips():
    """Twice the frames are twice the tokens: products of tokens with weights double, and of tokens with tokens become four times."""
    args = {**INSIDE, "class_token": False, "global_pool": "avg"}
    short, long = (video(frames=frames, backbone_args=args) for frames in (4, 8))
    assert input_size(long) == (24, 32, 32)
    assert long.pretrained_cfg["mean"] == (0.5,) * 24  # of vit_tiny
    tokens, width, depth = 32, 32, 2
    attention = 2 * tokens**2 * width * depth
    head = 32 + 32 * 5  # and the norm of what is pooled
    twice = 2 * (macs(short, input_size(short)) - attention - head)
    assert macs(long, input_size(long)) == twice + 4 * attention + head


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"frames": 3}, "frames=3 is no multiple of tubelet=2"),
        ({"frames": 0}, "frames=0 is no multiple"),
        (
            {"backbone": "swin_tiny_patch4_window7_224", "backbone_args": {}},
            "is a SwinTransformer, and clips are taken by",
        ),
        ({"backbone_args": {**INSIDE, "dynamic_img_size": True}}, "dynamic_img_size: a clip's frames are of one size"),
        ({"pool": "mean"}, "pool='mean' is none that it has"),
        ({"pool": "map"}, "has no attention that pools; set pool=avg"),
        ({"backbone_args": {**INSIDE, "global_pool": "map"}}, "would be left out; set pool=map"),
        ({"pool": "token", "backbone_args": {**INSIDE, "class_token": False, "global_pool": "avg"}}, "no class token"),
        ({"positions": "sin"}, "positions='sin' are none that it has; did you mean 'sincos'"),
        ({"in_chans": 1}, "a frame has 3 channels"),
        ({"temporal_scale": float("nan")}, "nan"),
    ],
)
def test_what_cannot_be_built_is_refused(options, text):
    with pytest.raises(UserError, match=text):
        build("video", SMALL | options)


def test_other_numbers_of_frames_are_refused():
    with pytest.raises(
        UserError, match="takes 4 frames of 3 channels, 12 in all, or several such clips, and got 9 channels"
    ):
        video()(CLIPS[:, :9])


SPECS = {
    name: examples_of(kind)[0] for name, kind in TRANSFORMS.items() if name not in ("adaptive_lors", "load_weights")
}


@pytest.mark.wide_unless(
    lambda name: name in ("repadapter", "lora", "adaptformer", "vpt", "low_rank", "narrow", "multiplex", "shrink")
)
@pytest.mark.parametrize("name", SPECS)
def test_transforms_work_on_the_backbone_inside(name, tmp_path):
    """Compressed, saved, loaded, and as an adapter's file on the plain model."""
    teacher = video()
    student = compress(teacher, [SPECS[name]])
    assert {path for path, _ in teacher.named_modules()} <= {path for path, _ in student.named_modules()}
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    expected = student(CLIPS)
    assert not torch.allclose(expected, teacher(CLIPS), atol=1e-3)
    loaded = artifact.load(artifact.save(student, tmp_path / "student"))
    assert torch.equal(loaded(CLIPS), expected)
    if only_adapted(student):
        plain = video()
        load_adapter(plain, save_adapter(student, tmp_path / "adapter.safetensors"))
        assert torch.equal(plain(CLIPS), expected)


def test_prompts_that_travel_are_refused_with_the_way_out():
    with pytest.raises(UserError, match=r"vpt.deep=true"):
        compress(video(), [TRANSFORMS["vpt"](prompts=2, deep=False)])


def test_the_convolution_of_multiplex_stays_within_a_frame():
    torch.manual_seed(0)
    convolution = TokenConv(6, 3, (8, 4), num_prefix_tokens=1, grids=2)
    tokens = torch.randn(1, 33, 6)
    other = tokens.clone()
    other[:, 17:] += torch.randn(1, 16, 6)  # the second time
    same = (convolution(tokens) == convolution(other)).all(2)[0]
    assert same[:17].all()
    assert not same[17:].any()


@pytest.mark.parametrize(("name", "settings"), [("repadapter", {"width": 8}), ("lora", {"rank": 4})])
def test_adapters_are_merged_to_plain_layers(name, settings):
    student = compress(video(), [TRANSFORMS[name](**settings)])
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    merged = merged_copy(student)
    assert not compression_of(merged).plans
    assert count_parameters(merged) == count_parameters(video())
    assert not torch.allclose(student(CLIPS), video()(CLIPS), atol=1e-2)
    difference = (merged(CLIPS) - student(CLIPS)).abs().max() / student(CLIPS).abs().max()
    assert difference < 1e-5  # measured 1.4e-7


def test_blocks_lie_under_the_paths_of_timm():
    assert [info.path for info in describe(video()).blocks] == ["backbone.blocks.0", "backbone.blocks.1"]
    assert set(image_model().state_dict()) == set(video().backbone.state_dict())
