"""Which transform works on which architecture: each is tried on a small model of every family, and docs/matrix.md says how far it came.

For each pair a setting is planned and applied, a batch goes forward and backward, the student is saved and loaded, merged, and made a graph
(`torch.export`) whose outputs are compared with the student's. Takes about a quarter of an hour on one core.

    python benchmarks/support_matrix.py                  # writes docs/matrix.md
    python benchmarks/support_matrix.py --models cvt     # tries one model anew, and leaves the other columns as they are
    python benchmarks/support_matrix.py --check          # plans alone, and says where the page is another
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from compressvit.artifacts import artifact
from compressvit.artifacts.export import exported
from compressvit.artifacts.merge import merge
from compressvit.errors import UserError
from compressvit.files import write_text
from compressvit.model.backbone import model_name
from compressvit.model.surgery import skeleton
from compressvit.testing.cases import examples_of, lacking, with_files
from compressvit.testing.models import build, examples, images_for, is_detector, outputs
from compressvit.transforms import TRANSFORMS, Transform
from compressvit.transforms.applying import apply_plans, compress
from compressvit.transforms.record import compression_of

PAGE = Path(__file__).parents[1] / "docs" / "matrix.md"
TOLERANCE = 1e-4  # of the largest output
HEAD = """# Which transform works on which architecture

Every transform (`Transform.examples`) on a small model of every family (`Family.examples`), as
`python benchmarks/support_matrix.py` found it: planned, applied, a batch forward and backward, saved and loaded to the
bit, merged, and made a graph by `torch.export` whose outputs are the student's. *yes*: all of it. *no*: the plan refuses
the model. Another word is the one stage that is refused; the others work. Numbers are those of the sentences below. Laws
for each of these pairs, and for every two transforms, are in the tests (`tests/contract`).
"""


Refused = tuple[tuple[str, str], ...]  # the stages that are, each with a sentence


def models() -> list[str]:
    """Small models, by name, without detectors, whose transforms are those of their backbones."""
    return [name for name in examples() if not is_detector(build(name))]


def transforms() -> dict[str, type[Transform]]:
    """By word, without those that need a detector's decoder."""
    return {name: kind for name, kind in sorted(TRANSFORMS.items()) if "decoder" not in kind.needs}


def setting(kind: type[Transform], name: str) -> Transform:
    """The first example of a transform whose needs a model meets, or the first of all."""
    found = examples_of(kind)
    return next((spec for spec in found if lacking(spec, name) is None), found[0])


def planned(kind: type[Transform], name: str) -> Refused:
    """Whether the plan refuses the model; nothing is computed."""
    spec, model = setting(kind, name), build(name)
    try:
        apply_plans(skeleton(model), [with_files(spec, name).plan(model)])
    except UserError as error:
        return (("plan", _sentence(error, spec, model)),)
    return ()


def tried(kind: type[Transform], name: str) -> Refused:
    """How far a transform comes on a model.

    Raises:
        AssertionError: the student that is loaded, merged or exported computes something else.
    """
    if first := planned(kind, name):
        return first
    spec = setting(kind, name)
    teacher = build(name)
    images = images_for(teacher)
    torch.manual_seed(0)
    student = compress(teacher, [with_files(spec, name)])
    wanted = outputs(student, images)
    refused = []
    if compression_of(student).plans[-1].last:
        refused.append(("training", "it is the last step, after which nothing is trained"))
    else:
        student(images).square().sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in student.parameters()), (
            f"{spec.name}, {name}: no gradient"
        )
        student.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        again = artifact.load(artifact.save(student, Path(folder) / "student"))
        assert torch.equal(outputs(again, images), wanted), f"{spec.name}, {name}: another model is loaded"
    for stage, make in (("merge", merge), ("export", lambda model: exported(model, images).program.module())):
        try:
            made = make(student.eval())
        except UserError as error:
            refused.append((stage, _sentence(error, spec, teacher)))
            continue
        found = made(images) if stage == "export" else outputs(made, images)
        difference = (found - wanted).abs().max().item() / wanted.abs().max().item()
        assert difference < TOLERANCE, f"{spec.name}, {name}: {stage} gives others by {difference:.1e}"
    return tuple(refused)


def _sentence(error: Exception, spec: Transform, model: nn.Module) -> str:
    """The reason of a refusal without the names of the small model and the transform, and without the way out."""
    text = str(error).replace(model_name(model), "the model").partition("; ")[0].partition("\n")[0].partition(". ")[0]
    text = re.sub(r"\b(blocks|stages|layers)(\.\d+)+(\.blocks)?(\.\d+)*", "a block", text)
    return re.sub(rf"^{spec.name}\b:? ?", "it ", text).replace("it the", "the")


def page(found: dict[tuple[str, str], Refused], columns: Sequence[str]) -> str:
    """docs/matrix.md."""
    notes: dict[str, int] = {}
    rows = []
    for step in transforms():
        cells = []
        for name in columns:
            refused = found[step, name]
            words = [
                f"{'no' if stage == 'plan' else stage} {notes.setdefault(why, len(notes) + 1)}"
                for stage, why in refused
            ]
            cells.append(", ".join(words) or "yes")
        rows.append(f"| `{step}` | {' | '.join(cells)} |")
    titles = [f"{name}<br>`{examples()[name].model}`" for name in columns]
    table = [f"| | {' | '.join(titles)} |", f"| --- |{' --- |' * len(columns)}", *rows]
    return "\n".join([HEAD, *table, "", *(f"{number}. {why}" for why, number in notes.items())]) + "\n"


def told(text: str) -> dict[tuple[str, str], Refused]:
    """What a page says of every pair."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    columns = [cell.strip().partition("<br>")[0] for cell in lines[0].strip("|").split("|")[1:]]
    notes = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    result = {}
    for line in lines[2:]:
        step, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for name, cell in zip(columns, cells, strict=True):
            words = [word.split(" ") for word in cell.split(", ") if cell != "yes"]
            stages = [("plan" if stage == "no" else stage, notes.get(number, "")) for stage, number in words]
            result[step.strip("`"), name] = tuple(stages)
    return result


def refusals(text: str) -> dict[tuple[str, str], bool]:
    """What a page says of every pair: whether its plan is refused."""
    return {pair: any(stage == "plan" for stage, _ in refused) for pair, refused in told(text).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    columns = models()
    parser.add_argument("--models", nargs="+", choices=columns, default=columns, metavar="MODEL")
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true", help="plan alone, and compare with the page")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    if arguments.check:
        said = refusals(PAGE.read_text(encoding="utf-8"))
        pairs = {
            (step, name): bool(planned(kind, name)) for step, kind in transforms().items() for name in arguments.models
        }
        wrong = [pair for pair, refused in pairs.items() if said.get(pair) != refused]
        console.print(*[f"{step} on {name} is another than in {PAGE.name}" for step, name in wrong], sep="\n")
        return 1 if wrong else 0
    found = told(PAGE.read_text(encoding="utf-8")) if arguments.models != columns else {}
    for name in arguments.models:
        for step, kind in transforms().items():
            found[step, name] = tried(kind, name)
        console.print(
            f"{name}: {sum(not found[step, name] for step in transforms())} of {len(transforms())} without a refusal"
        )
    write_text(arguments.output, page(found, columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
