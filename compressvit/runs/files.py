"""The JSON files of a run folder, with one class per file for both writing and reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compressvit.errors import UserError
from compressvit.reading import Unreadable, read_json

PREDICTIONS = "predictions.json"
PICTURES = "predictions"
MEASURED = "measured.jsonl"  # in `diagnostics`


class RunFile(BaseModel):
    """Base class with the fields that readers use. A file may have further fields; one of an earlier version may lack some."""

    model_config = ConfigDict(extra="allow")


class Costs(RunFile):
    """The costs of a model: `parameters` (a shared tensor counts once), `bytes` of its file, `macs` per image."""

    parameters: int
    bytes: int
    macs: int

    def value(self, key: str) -> float | None:
        """The figure of that name; None if there is none."""
        found = getattr(self, key, None)
        return found if isinstance(found, (int, float)) else None

    @property
    def figures(self) -> dict[str, Any]:
        """All figures by name."""
        return self.model_dump()

    @property
    def adapted(self) -> bool:
        """Whether a part of the model was frozen."""
        adapter, head = self.value("trained_adapter"), self.value("trained_head")
        return adapter is not None and adapter + (head or 0) < self.parameters


class Figures(Costs):
    """Costs and scores of the teacher or the student in `results.json`. Scores are in percent, except `loss` and the cosines; None if they
    are not available. `latency_ratio` has the median of student / teacher within a round of measurements, between the ends of its
    interval. `trained_adapter` is left out if no parameter is frozen.

    Attributes:
        latency_confidence: of the interval of `latency_ratio`; None in runs of earlier versions, which have the quartiles of the rounds.
        indexed: training images that `knn` searches in.
        intervals: 95 % intervals over images, of figures that have one (`Quality.interval`).
        differences: of the student, teacher − student in points, between the ends of its 95 % interval over images (`Quality.difference`);
            nothing where the two were judged on images of different preprocessing.
    """

    images: int | None = None
    latency_ms: float | None = None
    latency_ratio: tuple[float, float, float] | None = None
    latency_confidence: float | None = None
    top1: float | None = None
    top5: float | None = None
    loss: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    cosine_patches: float | None = None
    recall_1: float | None = None
    recall_10: float | None = None
    recall_self: float | None = None
    knn: float | None = None
    indexed: int | None = None
    intervals: dict[str, tuple[float, float]] = {}
    differences: dict[str, tuple[float, float, float]] = {}
    trained_adapter: int | None = None
    trained_head: int | None = None
    adapter_bytes: int | None = None

    @property
    def trained_body(self) -> int | None:
        """Number of trained parameters without the classifier; None if it is not known."""
        if self.trained_adapter is None and self.trained_head is not None:  # nothing is frozen
            return self.parameters - self.trained_head
        return self.trained_adapter


class LedgerRow(RunFile):
    """What a transform did to a module."""

    step: str
    path: str
    change: str
    before: int
    after: int
    weight_error: float | None = None
    output_error: float | None = None


class TriedRow(RunFile):
    """A size that a step tried, as a fraction of the teacher's, and what was measured of it (`compressvit.transforms.base.Tried`)."""

    size: float
    spent: float
    figures: dict[str, float]
    kept: bool
    chosen: bool
    intervals: dict[str, tuple[float, float]] = {}


class SizesRow(RunFile):
    """How a step came to the size of the student (`compressvit.transforms.base.Sizes`)."""

    step: str
    asked: str
    unit: Literal["parameters", "bytes", "macs", "latency"]
    where: str
    tried: list[TriedRow]


class PhaseReport(RunFile):
    """The scores before a phase, and the epoch whose weights it kept.

    Attributes:
        trainings: number of trainings of a phase with several; `widths`: those of the adapters after each training.
    """

    start: dict[str, int | float | None] | None = None
    kept_epoch: int | None = None
    trainings: int | None = None
    widths: list[dict[str, int]] = []


class Fitted(RunFile):
    """A student's cosine to its teacher on some of the images that it was fitted to, and on held-out ones, as it was fitted.

    Attributes:
        more_would_help: whether so much of the loss is that of images it was not fitted to that more of them would help
            (`compressvit.runs.generalisation`).
    """

    images: int
    cosine: float
    held_out: float | None = None
    more_would_help: bool = False

    @property
    def text(self) -> str:
        """As a sentence."""
        hint = ": more images would help" if self.more_would_help else ""
        return (
            f"as it was fitted, the student has a cosine of {self.cosine:.4f} on {self.images} of the images that it was fitted to, and of "
            f"{self.held_out or 0:.4f} on the held-out ones{hint}"
        )


class NoteRow(RunFile):
    """What was passed over, guessed or converted: a word for it, how often, and the sentence."""

    what: str
    count: int
    text: str


class Results(RunFile):
    """`results.json`. The figures are of the images `reported_on`: those of the test where there is one, on which nothing is chosen.

    Attributes:
        slower: why the student is slower than its teacher, if it is (`compressvit.runs.slowness`).
    """

    teacher: Figures
    student: Figures
    reported_on: Literal["validation", "test"] = "validation"
    phases: dict[str, PhaseReport] = {}
    ledger: list[LedgerRow] = []
    sizes: list[SizesRow] = []
    fitted: Fitted | None = None
    read_back_difference: float | None = None
    broken_images: int = 0
    data_notes: list[NoteRow] = []
    weights_notes: list[NoteRow] = []
    slower: str | None = None

    @property
    def slowdown(self) -> float | None:
        """The student's latency in those of its teacher, which was measured in turns with it."""
        if self.student.latency_ratio is not None:
            return self.student.latency_ratio[1]
        ours, theirs = self.student.latency_ms, self.teacher.latency_ms  # of an earlier version
        return ours / theirs if ours is not None and theirs else None


class PlannedTeacher(Costs):
    """The teacher in `plan.json`: its costs and the name of its model."""

    model: str = ""


class CachePlan(RunFile):
    """The files of a cache, `of` answers or features: at most `bytes`, which is None while the number of `images` is not known.

    Attributes:
        held_out_bytes: of each of the `held_out` images, in one view, which come on top; None where nothing of them is kept.
    """

    of: str = "the teacher's answers"
    views: int
    answer_bytes: int
    held_out_bytes: int | None = None
    images: int | None = None
    held_out: int | None = None
    bytes: int | None = None


class StepPlan(RunFile):
    """One step of a plan: the ledger of a transform, or the loss terms, layer pairs and memory of a phase.

    Attributes:
        layers: pairs of block indices, (student, teacher); `layers_rule` says how they were chosen.
        loss_bytes: bytes that each loss term keeps for the backward pass of a batch, in float32; `loss_bytes_total` is their sum.
    """

    step: str
    summary: str
    ledger: list[LedgerRow] = []
    layers: list[tuple[int, int]] = []
    layers_rule: str = ""
    loss_bytes: dict[str, int] = {}
    loss_bytes_total: int = 0
    cache: CachePlan | None = None

    @model_validator(mode="after")
    def _sum(self) -> StepPlan:
        self.loss_bytes_total = sum(self.loss_bytes.values())
        return self


class StagePlan(RunFile):
    """Parameters of one stage of the student; `shared` ones are used by more than one block and count once."""

    stage: str
    parameters: int
    shared: int
    private: int


class DataPlan(RunFile):
    """The opened data: how many images, what identifies their files (None for a stream), and what was passed over or guessed.

    Attributes:
        test: None where the figures at the end are of the images of `validation`.
    """

    train: int
    validation: int
    test: int | None = None
    classes: int | None = None
    fingerprint: str | None = None
    notes: list[NoteRow] = []


class RecipePlan(RunFile):
    """`plan.json`, and what `compressvit plan` prints.

    Attributes:
        recipe: name of the recipe in messages.
        input_size: (channels, height, width) of the student's images.
        inputs: what images are made into (`InputConfig.as_dict`, and `frames`), for the teacher and for the student.
        provisional: the steps that choose what the student becomes by what a run measures; its costs are those of what is assumed here.
        conflicts: empty if the recipe can run.
        diagnostics: a description of each diagnostic, by name.
        data: known once the data is opened.
        figures: what figures depend on beside the models, and which there are not, and why.
        weights: that the teacher is untrained; what was taken off or left out when weights files were read, known once they are.
    """

    recipe: str = ""
    teacher: PlannedTeacher
    student: Costs
    input_size: tuple[int, int, int] | None = None
    inputs: dict[str, dict[str, Any]] = {}
    stages: list[StagePlan] = []
    steps: list[StepPlan] = []
    notes: list[str] = []
    provisional: list[str] = []
    conflicts: list[str] = []
    diagnostics: dict[str, str] = {}
    data: DataPlan | None = None
    figures: list[str] = []
    weights: list[NoteRow] = []


class Environment(RunFile):
    """`environment.json`."""

    command: list[str]
    compressvit: str
    python: str
    platform: str
    cpu_count: int | None = None
    torch_threads: int | None = None
    processes: int = 1
    launch: str | None = None
    recipe_sha256: str | None = None  # of recipe.yaml, as the run began
    cuda: str | None = None
    gpus: list[str] = []
    versions: dict[str, str | None] = {}


class Answer(RunFile):
    """The most probable class of an image according to a model."""

    name: str = Field(alias="class")
    probability: float


class Example(RunFile):
    """An image shown in the report."""

    file: str
    value: float
    true: str | None = None
    teacher: Answer | str | None = None
    student: Answer | str | None = None


class ClassRow(RunFile):
    """Accuracy, or what `class_figure` says, in percent for one class."""

    name: str = Field(alias="class")
    images: int
    teacher: float | None = None
    student: float


class Confusion(RunFile):
    """How often images of one class are classified as another."""

    true: str
    answer: str
    teacher: int | None = None
    student: int


class PredictionsFile(RunFile):
    """`predictions.json`."""

    format: Literal[1]
    images: int
    compared: bool
    measure: str  # a key of the task's `measures`
    classes: list[ClassRow] | None
    class_figure: str = "accuracy"  # what `classes` have
    confusions: list[Confusion] | None
    confusions_in_all: int | None = None  # runs of earlier versions have none
    drawn: str | None = None  # what of the channels the pictures show, where these are bands
    examples: list[Example]


class MeasuredRow(BaseModel):
    """A row of `measured.jsonl`."""

    diagnostic: str
    phase: str
    epoch: int
    findings: list[str]
    seconds: float


def read_results(run: Path) -> Results:
    """The content of a run's `results.json`.

    Raises:
        UserError: it does not contain the results of teacher and student.
    """
    file = run / "results.json"
    fault = "it is no table of teacher and student"
    try:
        content = read_json(file)
        if isinstance(content, dict) and "phases" not in content:
            fault = "it has no 'phases'"
        else:
            found = Results.model_validate(content)
            if None not in (found.teacher.latency_ms, found.student.latency_ms):
                return found
    except ValidationError as error:
        missing = [f["loc"][-1] for f in error.errors() if f["type"] == "missing"]
        fault = f"it has no {missing[0]!r}" if missing else fault
    except Unreadable:
        pass
    raise UserError(f"{file} is not what `apply` writes: {fault}; leave the run out, or apply its recipe again")
