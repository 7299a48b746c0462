"""Other ways to make a ViT smaller without training, for `shrink_dinov2.py`: each a function of the teacher and of calibration images.

Each gives a student with at most half of the teacher's parameters, of timm's own layers with fewer outputs and inputs.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from compressvit.errors import UserError
from compressvit.fitting.reference import Reference
from compressvit.model.backbone import describe, input_size
from compressvit.model.ties import count_parameters
from compressvit.tasks.base import task_of
from compressvit.transforms import Narrow
from compressvit.transforms.applying import apply_plans

Images = Callable[[], Iterable[Any]]
SHARE = 0.5  # of the parameters
LEAST = 8  # neurons of an MLP
_STEPS = 200  # shares that Torch-Pruning is asked for


def variance(teacher: nn.Module, images: Images) -> nn.Module:
    """Keep the neurons whose activation varies most, in all MLPs together, and fold the mean of the others into the bias that follows.

    The rule of Variance-Based Pruning (https://arxiv.org/abs/2507.12988), before its fine-tuning.
    """
    paths = _mlps(teacher)
    found = Reference(copy.deepcopy(teacher), images).moments([f"{path}.fc2" for path in paths], outputs=False)
    means = {path: found[f"{path}.fc2"].mean for path in paths}
    scores = {path: found[f"{path}.fc2"].inputs.diagonal() - means[path].square() for path in paths}
    always = torch.cat([score >= score.topk(min(LEAST, len(score))).values[-1] for score in scores.values()])
    ranked = torch.cat(list(scores.values())).masked_fill(always, torch.inf)
    kept = torch.zeros(len(ranked), dtype=torch.bool)
    kept[ranked.topk(_neurons_to_keep(teacher, paths)).indices] = True
    rows = dict(zip(paths, kept.split([len(score) for score in scores.values()]), strict=True))
    return _narrowed(teacher, {path: row.nonzero().flatten() for path, row in rows.items()}, means)


def magnitude(teacher: nn.Module, images: Images) -> nn.Module:
    """Keep the neurons with the largest product of the norms of their weights, as many in every MLP, and compensate nothing."""
    paths = _mlps(teacher)
    width = _neurons_to_keep(teacher, paths) // len(paths)
    kept = {}
    for path in paths:
        mlp: Any = teacher.get_submodule(path)
        score = mlp.fc1.weight.detach().norm(dim=1) * mlp.fc2.weight.detach().norm(dim=0)
        kept[path] = score.topk(width).indices.sort().values
    return _narrowed(teacher, kept)


def torch_pruning_magnitude(teacher: nn.Module, images: Images) -> nn.Module:
    """Torch-Pruning's `GroupMagnitudeImportance`."""
    tp = torch_pruning()
    return _torch_pruned(teacher, tp.importance.GroupMagnitudeImportance())


def torch_pruning_taylor(teacher: nn.Module, images: Images) -> nn.Module:
    """Torch-Pruning's `GroupTaylorImportance`. There are no labels, and a loss against the teacher has no gradient at the teacher, so the
    gradients are those of the output in random directions, as in the metric of outputs of `low_rank` and `shrink`."""
    tp = torch_pruning()
    model, generator = copy.deepcopy(teacher), torch.Generator().manual_seed(0)
    for batch in images():
        task_of(model).output_distance(model, batch[0], generator).backward()
    return _torch_pruned(model, tp.importance.GroupTaylorImportance())


PEERS: dict[str, Callable[[nn.Module, Images], nn.Module]] = {
    function.__name__: function for function in (variance, magnitude, torch_pruning_magnitude, torch_pruning_taylor)
}


def torch_pruning() -> Any:
    """The package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import torch_pruning as package
    except ImportError as error:
        raise UserError(
            "Torch-Pruning is not installed, which this cell compares with: pip install torch-pruning"
        ) from error
    return package


def _torch_pruned(model: nn.Module, importance: Any) -> nn.Module:
    """The model with one share fewer neurons in every MLP and dimensions in every head; all heads stay, and so does the width of the
    stream, without which the outputs could not be compared. The least share that leaves few enough parameters, in steps of 0.5 %."""
    tp = torch_pruning()
    family, image = describe(model).family, torch.randn(1, *input_size(model))
    blocks = [model.get_submodule(info.path) for info in describe(model).blocks]
    inner = sum(count_parameters(part) for block in blocks for part in (block.attn, block.mlp))
    least = math.ceil(_STEPS * (1 - SHARE) * count_parameters(model) / inner)
    for step in range(least - 4, _STEPS):  # it rounds widths down
        student = _with_gradients(model)
        blocks = [student.get_submodule(info.path) for info in describe(student).blocks]
        narrowed = {layer for block in blocks for layer in (block.attn.qkv, block.mlp.fc1)}
        layers = [module for module in student.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unwrapped parameters")  # of the stream, whose width stays
            pruner = tp.pruner.BasePruner(
                student,
                image,
                importance=importance,
                pruning_ratio=step / _STEPS,
                ignored_layers=[layer for layer in layers if layer not in narrowed],
                num_heads={block.attn.qkv: block.attn.num_heads for block in blocks},
                prune_head_dims=True,
                prune_num_heads=False,
            )
        pruner.step()
        for block in blocks:
            heads = pruner.num_heads[block.attn.qkv]
            family.set_heads(block.attn, heads, block.attn.qkv.out_features // (3 * heads))
        if count_parameters(student) <= SHARE * count_parameters(model):
            return student
    raise UserError(f"Torch-Pruning does not reach {SHARE:.0%} of the parameters")


def _with_gradients(model: nn.Module) -> nn.Module:
    """A copy that has the gradients, too."""
    found = copy.deepcopy(model)
    for ours, theirs in zip(found.parameters(), model.parameters(), strict=True):
        ours.grad = None if theirs.grad is None else theirs.grad.clone()
    return found


def _mlps(model: nn.Module) -> list[str]:
    return [f"{info.path}.mlp" for info in describe(model).blocks]


def _neurons_to_keep(model: nn.Module, paths: list[str]) -> int:
    """Of all MLPs together, so that the model has its share of the parameters."""
    first: Any = model.get_submodule(paths[0])
    each = first.fc1.in_features + first.fc2.out_features + (first.fc1.bias is not None)
    whole = sum(model.get_submodule(path).fc2.in_features for path in paths)
    left = whole - -(-int((1 - SHARE) * count_parameters(model)) // each) - 1
    if left < LEAST * len(paths):
        raise UserError(f"with no neuron left the model would have more than {SHARE:.0%} of its parameters")
    return left


@torch.no_grad()
def _narrowed(
    teacher: nn.Module, kept: Mapping[str, torch.Tensor], means: Mapping[str, torch.Tensor] | None = None
) -> nn.Module:
    """A copy with these neurons of every MLP.

    Args:
        kept: their indices by the path of the MLP.
        means: of all activations, which those that go leave in the bias; None: nothing stands in for them.
    """
    student = copy.deepcopy(teacher)
    step = Narrow(neurons=tuple(len(rows) for rows in kept.values()), metric="weights")
    apply_plans(student, [step.plan(student)])
    for path, rows in kept.items():
        ours, theirs = student.get_submodule(path), teacher.get_submodule(path)
        ours.fc1.weight.copy_(theirs.fc1.weight[rows])
        ours.fc1.bias.copy_(theirs.fc1.bias[rows])
        ours.fc2.weight.copy_(theirs.fc2.weight[:, rows])
        if means is not None:
            gone = means[path].clone()
            gone[rows] = 0
            ours.fc2.bias.copy_(theirs.fc2.bias + theirs.fc2.weight.double() @ gone)
    return student
