"""Reading and writing recipes as YAML; every error is reported with its file, line, path, value and a suggestion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.model.names import COMPOSED
from compressvit.model.old import current_recipe, is_of_a_run, lacks_what_is_new
from compressvit.model.weights import require_known
from compressvit.reading import MAX_YAML, Unreadable, read_text
from compressvit.recipe.parts import Part, parts_of
from compressvit.recipe.shipped import find_recipe
from compressvit.recipe.words import LISTS, Entry, Merge, Step, packages_of
from compressvit.recipe.yaml import Document, dumped, override, parse
from compressvit.spec import Spec, existing, faults, spec_at, written
from compressvit.tasks.base import find_task
from compressvit.training.phases import PhaseSpec
from compressvit.training.phases.finetune import Finetune
from compressvit.training.spec import AFTER_A_FIT
from compressvit.transforms import Transform


class RecipeError(UserError):
    """A recipe that cannot be used; the message lists its errors, one per line."""


_SHOWN = 100  # errors of one recipe


class Teacher(Spec):
    """The model to compress, from which the student learns."""

    model: str = Field(
        description="A timm name, with or without a tag, e.g. swin_base_patch4_window7_224.ms_in22k_ft_in1k."
    )
    weights: str = Field(
        "pretrained",
        description="pretrained (timm's, downloaded or from its cache), train (from random initialisation, by `finetune`), random "
        "(untrained: the steps train a model from its beginning), or the path of a file, of an artifact (e.g. RUN/teacher) or of a folder "
        "that timm or Hugging Face's transformers wrote (which also record args and num_classes), or hf-hub:ORG/NAME.",
    )
    backbone: str | None = Field(
        None,
        description="Of a detector or segmenter with `weights: train` or `random`: what its backbone starts from, pretrained (timm's) or "
        "the path of a file or artifact. Null: random.",
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of timm.create_model, e.g. {img_size: 384}."
    )
    adapter: str | None = Field(
        None,
        description="Folder of LoRA that Hugging Face's PEFT wrote, merged into `weights`, which must be those that it was trained on. "
        "Null: none.",
    )
    num_classes: int | None = Field(
        None,
        ge=0,
        description="Size of the classifier; 0 for none. Null: the data's if the teacher is trained, otherwise the adapter's or timm's.",
    )
    finetune: Finetune | None = Field(
        None,
        description="Train the teacher on the data first. With `weights: train` this is always done, with defaults if not given.",
    )

    @model_validator(mode="after")
    def _backbone_of_one_to_train(self) -> Teacher:
        if self.backbone is not None and self.weights not in ("train", "random"):
            raise ValueError(
                f"backbone is for weights: train or random; weights: {self.weights} has the backbone's values, too"
            )
        return self

    @model_validator(mode="after")
    def _adapter_of_trained_weights(self) -> Teacher:
        if self.adapter is not None and self.weights in ("train", "random"):
            raise ValueError(
                f"adapter needs the weights that it was trained on, and weights: {self.weights} are random"
            )
        return self

    @model_validator(mode="after")
    def _random_is_not_trained(self) -> Teacher:
        if self.finetune is not None and self.weights == "random":
            raise ValueError("weights: random leaves the teacher untrained; give weights: train, or leave finetune out")
        return self


class Student(Spec):
    """The model that the transforms start from, if it is not a copy of the teacher."""

    model: str | None = Field(None, description="A timm name; null for the teacher's.")
    weights: str = Field(
        "teacher",
        description="teacher (copied name by name), pretrained, random, the path of a file, or an artifact, e.g. RUN/student: the student "
        "of an earlier run, its transforms included, which further steps go on with.",
    )
    backbone: str | None = Field(
        None,
        description="Of a detector or segmenter with `weights: random`: what its backbone starts from, as in `teacher.backbone`. Null: "
        "random.",
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of timm.create_model, added to the teacher's."
    )
    head: Literal["teacher", "new"] = Field(
        "teacher",
        description="The classifier: the teacher's, or a new one for the data's classes, to adapt a pretrained backbone to another task.",
    )

    @model_validator(mode="after")
    def _backbone_of_a_random_one(self) -> Student:
        if self.backbone is not None and self.weights != "random":
            raise ValueError(f"backbone is for weights: random; weights: {self.weights} has the backbone's values, too")
        return self


class Calibration(Spec):
    """Training images, without labels, on which transforms measure the error of an approximation."""

    images: int = Field(
        256,
        ge=1,
        description="Number of images, drawn by the seed, without augmentation, of as many photographs as possible (data.group_by). A few "
        "hundred are enough.",
    )
    tokens: int | None = Field(
        None,
        ge=1,
        description="Sum up so many tokens of every image, drawn anew in every image, besides its class and register tokens; null for all. "
        "Tokens of one image repeat each other, so 48 tokens of four times as many images tell more in the same time.",
    )


class Recipe(Spec):
    """What to do, from top to bottom. Nothing else is done."""

    model_config = ConfigDict(defer_build=True)  # completed when the words of its lists are known

    description: str = Field("", description="One sentence, shown by `compressvit recipes list`.")
    seed: int = Field(0, ge=0, description="Seed of all random numbers: initial weights, order, augmentation, dropout.")
    teacher: Teacher
    student: Student = Student()
    data: Data
    calibration: Calibration = Calibration()
    steps: tuple[Step, ...] = Field(min_length=1, description="Transforms and phases, in order.")
    diagnostics: tuple[Entry, ...] = Field(
        (), description="Diagnostics to record in every phase; none of them changes the result."
    )

    @field_validator("diagnostics")
    @classmethod
    def _each_once(cls, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        names = [entry.name for entry in entries]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(
                f"{twice} is listed twice; its findings would overwrite each other, so put all options into one entry"
            )
        return entries

    @field_validator("steps")
    @classmethod
    def _merge_comes_last(cls, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        for i, entry in enumerate(steps[:-1]):
            if entry.name == Merge.name:
                raise ValueError(
                    f"merge writes the model that the recipe ends with, so it is the last step, and {steps[i + 1].name} comes after it; "
                    f"move it to the end. To go on from a merged model, give another recipe teacher.weights=RUN/merged/model.safetensors"
                )
        return steps

    @field_validator("steps")
    @classmethod
    def _fit_the_task(cls, steps: tuple[Step, ...], info: ValidationInfo) -> tuple[Step, ...]:
        data: Data | None = info.data.get("data")  # missing if it has errors of its own
        if data is None:
            return steps
        for i, entry in enumerate(steps):
            if isinstance(entry.spec, PhaseSpec) and (fault := entry.spec.unfit_for(find_task(data.usual_task))):
                raise ValueError(f"steps[{i}].{entry.name}.{fault}")
        return steps

    @field_validator("steps")
    @classmethod
    def _keep_a_good_start(cls, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        """Give a phase that trains a student which was fitted to its teacher the options of `AFTER_A_FIT` that it does not set."""
        fitted, found = False, []
        for entry in steps:
            spec = entry.spec
            if isinstance(spec, Transform):
                fitted = (fitted or spec.needs_images) and not spec.freezes
            elif fitted and isinstance(spec, PhaseSpec) and spec.name in ("distill", "finetune"):
                unset = {name: value for name, value in AFTER_A_FIT.items() if name not in spec.model_fields_set}
                entry = entry.model_copy(update={entry.name: spec.model_copy(update=unset)})
            found.append(entry)
        return tuple(found)

    @property
    def merges(self) -> bool:
        """Whether the recipe ends with a merge."""
        return self.steps[-1].name == Merge.name

    @property
    def packages(self) -> list[str]:
        """Other distributions that provide entries of the recipe."""
        return packages_of(entry.name for entry in (*self.steps, *self.diagnostics))

    def parts(self) -> list[Part]:
        """The parts that a run executes: consecutive transforms, then a phase. A final merge belongs to no part."""
        return parts_of([entry.spec for entry in self.steps])

    def phases(self) -> dict[str, PhaseSpec]:
        """Every phase by its path in the recipe; the teacher's training comes first if the recipe contains it."""
        first: dict[str, PhaseSpec] = {"teacher.finetune": self.teacher.finetune} if self.teacher.finetune else {}
        steps = {f"steps[{i}].{s.name}": s.spec for i, s in enumerate(self.steps)}
        return first | {where: spec for where, spec in steps.items() if isinstance(spec, PhaseSpec)}

    def to_yaml(self) -> str:
        """The recipe as YAML with every default written out."""
        content = self.model_dump(mode="json", exclude=set(LISTS))
        for key in LISTS:
            content[key] = [{entry.name: entry.spec.model_dump(mode="json")} for entry in getattr(self, key)]
        return dumped(content)


def load_recipe(name_or_path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe by path, or by the name of one that ships with the package, and apply overrides before validating.

    Raises:
        UserError: there is no such recipe, or an override has an invalid path.
        RecipeError: the recipe is not YAML, is empty, or has errors; the message lists all of them.
    """
    return parse_recipe(read_recipe(name_or_path), str(name_or_path), overrides)


def read_recipe(name_or_path: str | Path) -> str:
    """The text of a recipe, unchanged. Raises as `load_recipe` does."""
    path = find_recipe(name_or_path)
    try:
        return read_text(path, most=MAX_YAML)
    except Unreadable as error:
        raise RecipeError(f"{path} cannot be read as text: {error.fault}") from error


def parse_recipe(text: str, name: str = "recipe", overrides: list[str] | None = None) -> Recipe:
    """Validate the text of a recipe; `name` is its name in messages, if possible its path. Raises as `load_recipe` does.

    Keys at the top that begin with `x-` are left out: they hold YAML anchors for the rest of the file.

    A file stored in a run folder may be from an earlier version; its keys are then translated to the current ones.
    """
    parsed = parse(text, name)
    if parsed.content is None:
        raise RecipeError(
            f"{name} is empty; a recipe needs at least teacher, data and steps (see `compressvit recipes show quickstart`)"
        )
    if not isinstance(parsed.content, dict):
        raise RecipeError(
            f"{name} holds a {type(parsed.content).__name__}, not a mapping; a recipe needs at least teacher, data and steps"
        )
    for key in [key for key in parsed.content if str(key).startswith("x-")]:
        del parsed.content[key]
    if is_of_a_run(Path(name)):
        parsed.content = current_recipe(parsed.content, complete=lacks_what_is_new(Path(name)))
    _spell_out(parsed.content)  # so that an override finds a mapping after a bare word
    override(parsed, overrides or [])
    _spell_out(parsed.content)
    _name_stored_model(parsed.content.get("teacher"))
    try:
        return _validated(parsed)
    except ValidationError as error:
        texts = [
            existing(f["loc"], parsed.content, missing=False) for f in error.errors() if f["type"] == "string_type"
        ]
        if [path for path in texts if parsed.take_text(path)]:  # data.root=2024 names a folder
            return _revalidated(parsed)
        raise RecipeError(_explain(error, parsed)) from None


def _validated(parsed: Document) -> Recipe:
    """Raises pydantic's error where it has faults."""
    try:
        # Via JSON, where pydantic's strict mode accepts lists as tuples; a number in quotes is still an error.
        document = json.dumps(parsed.content, default=str)
    except TypeError as error:
        raise RecipeError(
            f"{parsed.name} has a key that is neither text nor a number ({error}); put it in quotes"
        ) from None
    return Recipe.model_validate_json(document, strict=True)


def _revalidated(parsed: Document) -> Recipe:
    try:
        return _validated(parsed)
    except ValidationError as error:
        raise RecipeError(_explain(error, parsed)) from None


def require_known_models(recipe: Recipe, name: str = "recipe") -> None:
    """Check that timm knows the models that a recipe names; `name` is the recipe's name in messages.

    Raises:
        UserError: a model is unknown; the message suggests similar names.
    """
    for whose, given in (("teacher", recipe.teacher), ("student", recipe.student)):
        named: dict[str, Any] = {f"{whose}.model": given.model}
        if (given.model or recipe.teacher.model).partition(".")[0] in COMPOSED:
            named[f"{whose}.args.backbone"] = given.args.get("backbone")
        for key, model in named.items():
            try:
                if isinstance(model, str):
                    require_known(model)
            except UserError as error:
                raise UserError(f"{name}: {key}: {error}") from None


def _name_stored_model(teacher: Any) -> None:
    """Complete a teacher without `model` whose weights are an artifact or a folder of timm's, which name it."""
    given = teacher.get("weights") if isinstance(teacher, dict) and "model" not in teacher else None
    if not isinstance(given, str):
        return
    from compressvit.model.hub import weights_path
    from compressvit.model.local_dir import read_local_dir
    from compressvit.model.stored import is_artifact, read_manifest

    folder = weights_path(given, "teacher.weights")
    stored = read_manifest(folder) if is_artifact(folder) else read_local_dir(folder)
    if stored is not None:
        teacher["model"] = stored.architecture


def _spell_out(content: dict[str, Any]) -> None:
    """Turn an entry that is only a word, or a word with an empty value, into one with default options."""
    # Not a validator: pydantic would then check the steps as Python values, where its strict mode refuses lists for tuples.
    for key in LISTS:
        entries = content.get(key)
        if not isinstance(entries, list):
            continue
        for i, entry in enumerate(entries):
            if isinstance(entry, str):
                entries[i] = {entry: {}}
            elif isinstance(entry, dict):
                entries[i] = {k: {} if v is None else v for k, v in entry.items()}


def _explain(error: ValidationError, document: Document) -> str:
    rows = [
        (document.place(path), written(path) or "recipe", _misplaced(path) or text)
        for path, text in faults(Recipe, error, document.content)
    ]
    shown = rows[:_SHOWN]
    width = max(len(place) for place, _, _ in shown)
    lines = [f"  {place:<{width}}  {path}: {text}" for place, path, text in shown]
    lines += [f"  … and {len(rows) - _SHOWN:,} more"] * (len(rows) > _SHOWN)
    return f"{document.name}: {len(rows)} error{'s' * (len(rows) > 1)}\n" + "\n".join(lines)


def _misplaced(path: tuple[str | int, ...]) -> str | None:
    """The error message for an entry of a list that is given as a key elsewhere; None if the path is not one."""
    word = path[-1] if len(path) in (1, 3) else None
    for key, base in LISTS.items():
        section = spec_at(Recipe, path[:-1])
        if path[:1] != (key,) and word in base.completed().model_fields and word not in (section or Spec).model_fields:
            return f"unknown key; {word} is {base.indefinite}, so it belongs in the list `{key}` ({key}.0.{word} on the command line)"
    return None
