"""Storage and inference of every adapter on a backbone: parameters, megabytes a task, multiply-accumulates; nothing is computed.

`GFLOPs` are 2 × the multiply-accumulates of linear layers and convolutions alone, the convention of the MiMi paper, with what adapters add
to them; `GMACs` include attention products and norms. A method that merges costs what the backbone costs. MiMi's rows are of pruning every
adapter alike; another allocation of as many neurons costs more where early stages keep them, whose neurons see more tokens. The methods,
what they train and the figures of the MiMi paper are read from published.yaml beside this file; a count that differs is an error.

    python benchmarks/adapter_costs.py                          # Swin-T and the 345 classes of DomainNet
    python benchmarks/adapter_costs.py --model vit_base_patch16_224 --classes 100
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from torch import nn

from compressvit.model import cost, surgery
from compressvit.model.backbone import input_size
from compressvit.training.phases.prune.neurons import cycles, prices, prunable_plan, select, shrink_
from compressvit.training.phases.prune.spec import Prune, PruneTarget
from compressvit.transforms import TRANSFORMS, Adapters
from compressvit.transforms.applying import apply_plans
from compressvit.transforms.fact import FacTTerm
from compressvit.transforms.lora import LoRATerm
from compressvit.transforms.phm import PHMLinear
from compressvit.transforms.record import compression_of, trained_parameters
from compressvit.transforms.repadapter import RepBottleneck

PUBLISHED: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
PRUNINGS = range(1, 6)  # of half of MiMi's neurons each


def linear_and_convolution_macs(model: nn.Module) -> int:
    """Multiply-accumulates of one image in linear layers and convolutions, by hooks on a skeleton."""
    empty = surgery.skeleton(model).eval()
    total = 0

    def count(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal total
        tokens = inputs[0].numel() // inputs[0].shape[-1]
        if isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()
        elif isinstance(module, PHMLinear):
            total += tokens * module.dense().numel()
        elif isinstance(module, RepBottleneck):
            total += tokens * module.up_weight.numel()
        elif isinstance(module, LoRATerm):
            total += tokens * (module.down.numel() + module.up.numel())
        elif isinstance(module, FacTTerm):
            slots = (module.mix if module.tucker else module.sigma).shape[0]
            ends = (slots, 1) if module.on_inputs else (1, slots)
            total += tokens * (ends[0] * module.u.numel() + slots * len(module.u) ** 2 + ends[1] * module.v.numel())
        else:
            total += tokens * module.weight.numel()

    for module in empty.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, PHMLinear, RepBottleneck, LoRATerm, FacTTerm)):
            module.register_forward_hook(count)
    with torch.no_grad():
        empty(torch.empty(1, *input_size(model), device="meta"))
    return total


def row(label: str, model: nn.Module, published: float | None = None) -> str:
    """A line of the table; `published` are the paper's GFLOPs."""
    plans = compression_of(model).plans
    trained = trained_parameters(model)
    both = trained["trained_adapter"] + trained["trained_head"]
    added = bool(surgery.added_parameters(model))
    merges = added and all(plan.foldable for plan in plans)
    size = input_size(model)
    gflops, macs = 2 * linear_and_convolution_macs(model) / 1e9, cost.macs(model, size) / 1e9
    cells = [f"{trained['trained_adapter']:,}", f"{both:,}", f"{4 * both / 1e6:.2f}", f"{gflops:.2f}"]
    cells += [f"{published:.2f}" if published else "", f"{macs:.2f}"]
    return f"| {label} | {' | '.join(cells)} | {'yes' if merges else 'no' if added else '–'} |"


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--classes", type=int, default=345)
    arguments = parser.parse_args()

    def fresh() -> nn.Module:
        with torch.device("meta"):
            return timm.create_model(arguments.model, num_classes=arguments.classes)

    backbone = next((key for key, name in PUBLISHED["backbones"].items() if name == arguments.model), None)
    print("| method | trained | + classifier | MB a task | GFLOPs unmerged | the paper's | GMACs unmerged | merges |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for entry in PUBLISHED["trained"]:
        model, label = fresh(), entry["label"]
        try:
            for name, options in (entry["step"] or {}).items():
                apply_plans(model, [TRANSFORMS[name](**options).plan(model)])
        except ValueError as error:
            print(f"| {label} | not defined here: {str(error).split(';')[0]} | | | | | | |")
            continue
        trained = trained_parameters(model)["trained_adapter"]
        if backbone and trained != entry[backbone]:
            raise SystemExit(f"{label} trains {trained:,} parameters here, and {entry[backbone]:,} by published.yaml")
        print(row(label, model, entry.get("gflops") if backbone == "swin_t" else None))
    for prunings in PRUNINGS:
        model = fresh()
        apply_plans(model, [Adapters(ratio=0.5).plan(model)])
        plan = prunable_plan(model)
        start, price = dict(plan.widths), prices(model, plan)
        spec = Prune(target=PruneTarget(neurons=0.5**prunings), scope="local")
        done = cycles(spec.target, spec.rate, start, price)
        shrink_(model, select({p: torch.zeros(h) for p, h in start.items()}, done or 0, spec, start, price))
        published = PUBLISHED["pruned_gflops"].get(prunings) if backbone == "swin_t" else None
        print(row(f"MiMi, M/2 pruned {prunings} time{'s' * (prunings > 1)}", model, published))


if __name__ == "__main__":
    main()
