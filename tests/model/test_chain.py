"""What a forward pass without values tells of a model, and that a model is fitted by it as by what its family knows."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer

from compressvit import LowRank, Narrow, Quantise, compress
from compressvit.errors import UserError
from compressvit.model import backbone
from compressvit.model.backbone import describe
from compressvit.model.chain import chain_of
from compressvit.testing.models import build, examples, family_of

IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit() -> nn.Module:
    """torchvision's ViT, whose attention is torch's own."""
    torch.manual_seed(0)
    return of_32(VisionTransformer(32, 8, 3, 4, 32, 64, num_classes=5))


def swin() -> nn.Module:
    torch.manual_seed(0)
    return of_32(SwinTransformer([4, 4], 16, [2, 2], [2, 4], [2, 2], num_classes=5))


def of_32(model: nn.Module) -> nn.Module:
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def test_the_layers_of_torchs_attention_are_not_called():
    chain = chain_of(vit())
    layers = [f"encoder.layers.encoder_layer_{i}" for i in range(3)]
    assert chain.links == tuple(layers)
    assert chain.layers == tuple(f"{layer}.mlp.{name}" for layer in layers for name in (0, 3))
    assert chain.uncalled == tuple(f"{layer}.self_attention.out_proj" for layer in layers)
    assert chain.classifier == ("heads.head",)
    assert chain.ends == {f"{layer}.mlp.3": (f"{layer}.ln_2", "") for layer in layers}
    assert not chain.channels_last


def test_stages_of_maps_are_one_chain():
    chain = chain_of(swin())
    assert chain.links == ("features.1.0", "features.1.1", "features.2", "features.3.0", "features.3.1")
    assert chain.channels_last
    assert chain.outside == ()


@pytest.mark.wide_unless(lambda name: name in ("vit", "swin", "hiera"))
@pytest.mark.parametrize("name", [name for name in examples() if family_of(name).branches])
def test_residual_branches_are_those_that_the_family_knows(name):
    model, family = build(name), family_of(name)
    known = {
        f"{info.path}.{layer}": (
            f"{info.path}.{branch.norm}",
            f"{info.path}.{branch.scale}" if branch.gamma(model.get_submodule(info.path)) is not None else "",
        )
        for info in describe(model).blocks
        for layer, branch in family.branches.items()
    }
    ends = chain_of(model).ends
    found = {path: (norm, scale.removesuffix(".gamma")) for path, (norm, scale) in ends.items() if path in known}
    assert found.items() <= known.items()
    if family.layout == "sequence":  # windows are made and undone between attention and sum
        assert found == known


@pytest.mark.wide_unless(lambda name, step: name == "vit" and step.name == "narrow")
@pytest.mark.parametrize("step", [LowRank(rank=8), Narrow(neurons=0.5)], ids=lambda step: step.name)
@pytest.mark.parametrize("name", ["vit", "eva02"])
def test_a_model_is_fitted_by_its_chain_as_by_its_family(name, step, monkeypatch):
    model = build(name)
    wanted = compress(model, [step], calibration=IMAGES)
    monkeypatch.setattr(backbone, "family_of", lambda model: None)
    if step.name == "narrow" and name == "eva02":
        with pytest.raises(UserError, match="no block that can be made narrower"):  # gated, in two layers
            compress(model, [step], calibration=IMAGES)
        return
    found = compress(model, [step], calibration=IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(found(IMAGES), wanted(IMAGES), rtol=0, atol=1e-4)  # seen: 0


class Odd(nn.Module):
    """Reads a weight without a call, changes a stream in place, calls a layer twice, and has one that sees no image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3))
        self.read, self.often, self.places = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(2, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).mT
        x = self.blocks[1](self.blocks[0](x))
        x += self.places(torch.ones(len(x), 1, 2, device=x.device))
        x = x + self.blocks[2](x)
        x = self.read(x) * self.read.weight.norm()
        return self.head(self.often(self.often(x)).mean(dim=1))


def test_what_cannot_be_replaced_is_left_out():
    chain = chain_of(of_32(Odd()))
    assert chain.links == ("blocks.0", "blocks.1")  # what is added in place is another tensor
    assert chain.layers == tuple(f"blocks.{i}.{j}" for i in (0, 1) for j in (0, 2))
    assert chain.outside == ("blocks.2.0", "blocks.2.2")
    assert chain.uncalled == ("read", "often", "places")
    assert chain.changed == {"blocks.1.2"}


@pytest.mark.parametrize(
    "steps",
    [
        [LowRank(rank=6), LowRank(rank=14)],
        [Narrow(neurons=0.5, multiple=1), Narrow(neurons=0.9, multiple=1)],
        [Quantise(bits=3), Quantise(bits=8)],
    ],
    ids=lambda steps: steps[0].name,
)
@pytest.mark.wide_unless(lambda model: model not in (vit, swin))
@pytest.mark.parametrize("model", [vit, swin, lambda: of_32(Odd())], ids=["vit", "swin", "odd"])
def test_the_error_falls_with_the_size(model, steps):
    teacher = model()
    with torch.no_grad():
        wanted = teacher(IMAGES)
        students = [compress(teacher, [step], calibration=IMAGES) for step in steps]
        errors = [(student(IMAGES) - wanted).norm().item() for student in students]
    assert errors[1] < 0.8 * errors[0]  # seen: at most 0.5


def test_a_layer_that_nothing_calls_is_refused_by_name():
    with pytest.raises(
        UserError, match=r"something reads the weight of encoder\.layers\.encoder_layer_0\.self_att.*\.out_proj without"
    ):
        compress(vit(), [LowRank(rank=2, metric="weights", targets=("out_proj",))])
    with pytest.raises(
        UserError, match=r"'mlp\.fc1' matches no linear layer of VisionTransformer that can be replaced; .*mlp\.0"
    ):
        compress(vit(), [LowRank(rank=2, metric="weights", targets=("mlp.fc1",))])


def test_layers_are_named_by_the_end_of_their_path():
    student = compress(vit(), [LowRank(rank=2, metric="weights", targets=("mlp.0",))])
    assert [path for path, module in student.named_modules() if hasattr(module, "effective_weight")] == [
        f"encoder.layers.encoder_layer_{i}.mlp.0" for i in range(3)
    ]


def test_a_model_that_needs_values_to_run_is_refused():
    class Careful(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if x.sum().item() else x + 1)

    model = Careful(nn.Flatten(), nn.Linear(3072, 4))
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    with pytest.raises(
        UserError, match=r"Careful is of no family .*cannot be run without values, on images of 3×32×32, .*input_size"
    ):
        compress(model, [LowRank(rank=2, metric="weights")])


def test_a_transform_for_known_blocks_says_what_works():
    model = timm.create_model("resnet18", num_classes=5)
    with pytest.raises(
        UserError, match=r"multiplex needs blocks that it knows, and resnet18 is a ResNet, .*\(low_rank, quantise, and"
    ):
        describe(model, "attention", asker="multiplex")


class Residual(nn.Module):
    """Blocks x → `rule(x, branch(norm(x)))`, or of another order."""

    def __init__(self, rule, post: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(3))
        self.scales = nn.ParameterList(torch.full((16,), 2.0) for _ in range(2))
        self.head, self.rule, self.post = nn.Linear(16, 5), rule, post

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).mT
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = norm(self.rule(self, x, block(x))) if self.post else self.rule(self, x, block(norm(x)))
        return self.head(x.mean(dim=1))


RULES = {
    "sum": (lambda m, x, y: x + y, True),
    "scaled": (lambda m, x, y: x + y * m.scales[0], True),
    "scaled twice": (lambda m, x, y: x + y * m.scales[0] * m.scales[1], False),
    "alpha": (lambda m, x, y: torch.add(x, y, alpha=3), False),
    "used elsewhere": (lambda m, x, y: x + y + 3 * y.tanh(), False),
    "of another shape": (lambda m, x, y: x + y.mean(dim=1, keepdim=True), False),
    "added twice": (lambda m, x, y: (x + y) + y, False),
}


@pytest.mark.parametrize("name", RULES)
def test_an_end_is_added_once_as_it_is_or_scaled_once(name):
    rule, ends = RULES[name]
    found = chain_of(of_32(Residual(rule))).ends
    assert bool(found) is ends
    if ends:
        assert found["blocks.1.2"] == ("norms.1", "scales.0" if name == "scaled" else "")


def test_a_stream_that_a_layer_reads_is_none_that_can_be_seen_apart():
    def rule(model, x, y):
        return x + y

    model = of_32(Residual(rule, post=True))
    assert chain_of(model).ends == {}
    for step in (LowRank(rank=4), Quantise(bits=4)):
        compress(model, [step], calibration=IMAGES)


def test_torchs_own_encoder_reads_its_layers_in_evaluation():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.Flatten(2), nn.TransformerEncoder(layer, 2), nn.Linear(16, 16))
    model = of_32(model)
    assert "2.layers.0.linear1" in chain_of(model).uncalled
    assert chain_of(model).layers == ()
    with pytest.raises(UserError, match="Sequential calls no linear layer that another could replace"):
        compress(model, [LowRank(rank=4)], calibration=IMAGES)


def test_a_layer_of_a_class_of_its_own_stays():
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = Residual(lambda m, x, y: x + y)
    model.blocks[1][0] = Doubled(16, 16)
    assert "blocks.1.0" in chain_of(of_32(model)).uncalled
    compress(model, [LowRank(rank=4)], calibration=IMAGES)
    with pytest.raises(
        UserError, match=r"'blocks\.1\.0' matches no linear layer .* can be replaced; .*of a class of its own"
    ):
        compress(model, [LowRank(rank=4, targets=("blocks.1.0",))], calibration=IMAGES)


def test_other_images_and_outputs_are_noticed():
    model = of_32(Residual(lambda m, x, y: x + y))
    before = chain_of(model)
    assert chain_of(model) is before
    model.pretrained_cfg = {"input_size": (3, 64, 64)}
    assert chain_of(model) is not before
    again = chain_of(model)
    model.blocks[0][1] = nn.SiLU()
    assert chain_of(model) is not again

    class Two(nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    pair = nn.Sequential(nn.Flatten(), Two(3072, 3072))
    pair.pretrained_cfg = {"input_size": (3, 32, 32)}
    with pytest.raises(UserError, match="Sequential gives a tuple"):
        compress(pair, [LowRank(rank=2, metric="weights")])
