"""From a recipe to a run folder: plan, apply, evaluate, and every file of the folder."""
