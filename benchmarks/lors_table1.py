"""LORS's table 1 and the decoder's parameters, counted in the modules of the recipe `adamixer_lors`.

Table 1 has the weights of one stage's share as a part of those of a stage of its own: of the generator of the matrices that mix points, for
each number K of terms, and of the projection after the mixing. Nothing is trained, and no data or weights are read.

    python benchmarks/lors_table1.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from compressvit.model import surgery, ties
from compressvit.model.weights import build
from compressvit.recipe.recipe import load_recipe
from compressvit.transforms import Transform
from compressvit.transforms.applying import apply_plans

RECIPE = "adamixer_lors"
POINTS = 1  # of the two matrices that a generator makes, the second mixes points


@dataclass(frozen=True)
class Counts:
    """Weights of all stages of a decoder; factors and cores are private, `shared` has one for all or one per stage.

    Attributes:
        generator, terms: of the matrices that mix points: of the generators, and of the private terms by stage.
        projection, low_rank: of the projection, and of its private terms.
        mixing, decoder: all parameters of the mixing modules, and of the decoder.
    """

    generator: int
    terms: list[int]
    projection: int
    low_rank: int
    mixing: int
    decoder: int


def counts(model: Any) -> Counts:
    """Count the tensors of a decoder, each once."""
    mixings = [stage.mixing for stage in model.decoder.stages]
    rows, columns = mixings[0].matrices[POINTS]
    made = mixings[0].groups * rows * columns  # numbers that a generator makes for the points
    return Counts(
        generator=sum(weight.shape[1] * made for weight in _each_once(m.generator.weight for m in mixings)),
        terms=[_of_terms(m.generator) for m in mixings],
        projection=sum(weight.numel() for weight in _each_once(m.projection.weight for m in mixings)),
        low_rank=sum(
            ties.count_parameters(m.projection.low_rank) for m in mixings if hasattr(m.projection, "low_rank")
        ),
        mixing=ties.count_parameters(nn.ModuleList(mixings)),
        decoder=ties.count_parameters(model.decoder),
    )


def _each_once(tensors: Any) -> list[Any]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _of_terms(generator: Any) -> int:
    terms = getattr(generator, "terms", None)
    if terms is None:
        return 0
    core = terms.core.weight.numel() // len(terms.up)  # each matrix has as much of it
    return core + terms.up[POINTS].numel() + terms.down[POINTS].numel()


def decoders() -> tuple[nn.Module, nn.Module]:
    """The recipe's detector, dense and after the transforms, without values."""
    recipe = load_recipe(RECIPE)
    dense = build(recipe.teacher.model, recipe.teacher.args, device="meta", num_classes=recipe.teacher.num_classes)
    made = surgery.skeleton(dense)
    for spec in (step.spec for step in recipe.steps):
        if isinstance(spec, Transform):
            apply_plans(made, [spec.plan(made)])
    return dense, made


def main() -> None:
    """Print both tables."""
    dense, made = map(counts, decoders())
    stages = len(made.terms)
    print("| of the dense form | terms | share |\n| --- | --- | --- |")
    for number, terms in sorted(dict(zip(load_recipe(RECIPE).steps[0].spec.terms, made.terms, strict=True)).items()):
        print(f"| mixing of points | {number} | {100 * (made.generator + stages * terms) / dense.generator:.1f} % |")
    print(f"| projection | 1 | {100 * (made.projection + made.low_rank) / dense.projection:.1f} % |")
    print(f"\nmixing {dense.mixing:,} → {made.mixing:,}, decoder {dense.decoder:,} → {made.decoder:,}")


if __name__ == "__main__":
    main()
