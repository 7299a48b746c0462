"""What a plan knows of the caches of a recipe once the images are counted."""

from __future__ import annotations

from compressvit.data.order import refuse_views
from compressvit.recipe.recipe import Recipe
from compressvit.runs.files import RecipePlan
from compressvit.training.cache.spec import Cache, Features
from compressvit.training.cache.store import refuse_size


def caches(recipe: Recipe) -> dict[str, Cache | Features]:
    """The caches of a recipe's phases, by the step."""
    found = {where: getattr(phase, "cache", None) for where, phase in recipe.phases().items()}
    return {where: cache for where, cache in found.items() if isinstance(cache, (Cache, Features))}


def refuse_cached_data(recipe: Recipe) -> None:
    """Raise a `UserError` where a cache is asked for, and images have no places by which to know them."""
    if caches(recipe):
        refuse_views(recipe.data)


def count_answers(recipe: Recipe, plan: RecipePlan) -> None:
    """Complete the plan with the number of images, and raise a `UserError` where what is kept would take too much."""
    asked = caches(recipe)
    for step in plan.steps:
        if step.cache is not None and plan.data is not None:
            step.cache.images = plan.data.train
            step.cache.bytes = step.cache.views * plan.data.train * step.cache.answer_bytes
            refuse_size(asked[step.step], step.cache.views, plan.data.train, step.cache.answer_bytes)
            images = plan.data.validation * recipe.data.clip.shown
            held_out = (step.cache.held_out_bytes or 0) * images
            if step.cache.bytes + held_out > asked[step.step].limit_gb * 1e9:
                step.cache.held_out_bytes = None
            elif held_out:
                step.cache.held_out = images
