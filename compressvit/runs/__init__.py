"""Running a recipe: plan, apply, evaluate, and every file of a run folder."""
