"""A classifier made smaller without training, over several domains: accuracy before and after, and agreement, at 75, 50 and 30 %.

The folder has train/ and val/ with a folder per class, over all domains, and for each domain `DOMAIN_test.txt`, a list of `PATH LABEL`
lines as DomainNet's are, with labels in the order of the classes. The student is fitted to images of train/ of all domains, without
labels, and judged on every list. A finished size is a JSON file and is not made again; `--hours` as in `shrink_dinov2.py`.

    python benchmarks/shrink_classifiers.py --data FOLDER --weights FILE --model NAME --output runs/shrink_clip
    python benchmarks/shrink_classifiers.py --output runs/shrink_clip --table-only
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from resumable import finished, require_same, run
from shrink_cells import TOGETHER, TOKENS, Cell
from shrink_dinov2 import LATENCIES, accuracy, ratios, shares, student_of, with_interval
from shrink_measures import CPU, costs, latency, mean_and_interval
from torch import nn

from compressvit import Shrink
from compressvit.data.input import input_config
from compressvit.data.loaders import calibration_batches, eval_loader
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.files import write_text
from compressvit.model.weights import build, classes_in_file, hash_tensors, load_file

CELLS = {
    f"all_{percent}": Cell(
        TOGETHER, f"{percent} %", Shrink(budget={"parameters": percent / 100, "macs": percent / 100}), tokens=TOKENS
    )
    for percent in (75, 50, 30)
}
LIST = "_test.txt"


class Benchmark:
    """Students of one classifier.

    Args:
        arguments: of the program.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.output: Path = arguments.output
        self.root, self.rounds, self.crops = Path(arguments.data), arguments.rounds, arguments.crops
        self.options = {"root": arguments.data, "batch_size": 32, "crop_pct": arguments.crop_pct}
        self.data = Data(name="folder", **self.options)
        self.datasets = open_data(self.data)
        args = {} if arguments.size is None else {"img_size": arguments.size}
        classes = classes_in_file(build(arguments.model, args, device="meta"), Path(arguments.weights), "--weights")
        if classes != self.datasets.num_classes:
            raise UserError(
                f"--weights {arguments.weights} has a classifier of {classes} classes, and {self.root} {self.datasets.num_classes} class "
                "folders; give a classifier of these classes"
            )
        self.teacher = build(arguments.model, args, num_classes=classes).eval()
        load_file(self.teacher, arguments.weights, "--weights")
        self.domains = [file.name.removesuffix(LIST) for file in sorted(self.root.glob(f"*{LIST}"))]
        if not self.domains:
            raise UserError(f"{self.root} has no DOMAIN{LIST}; give a list of the test images of each domain")
        self._theirs: dict[str, tuple[list[int], list[int]]] = {}
        settings = {
            "model": arguments.model,
            "size": arguments.size,
            "weights": hash_tensors(self.teacher.state_dict()),
            "images": [self.datasets.fingerprint(), arguments.crops, arguments.crop_pct],
            "domains": self.domains,
        }
        require_same(self.output, settings)

    def crops_of(self, name: str) -> int:
        """How many images the student of a cell is fitted to: all there are, if these are fewer."""
        return min(self.crops, len(self.datasets.train))

    def run(self, name: str) -> dict[str, Any]:
        """Make and judge the student of a cell."""
        crops, config = self.crops_of(name), input_config(self.teacher, self.data)
        images = partial(calibration_batches, self.datasets, self.data, config, CPU, images=crops, seed=0)
        student, took, note = student_of(CELLS[name], self.teacher, images)
        found = {domain: self.judged(student, domain) for domain in self.domains}
        figures = {**costs(student, self.teacher), **latency(student, self.teacher, self.rounds)}
        return {"cell": name, "crops": crops, "note": note, "fit": took, "domains": found, **figures}

    def judged(self, student: nn.Module, domain: str) -> dict[str, list[bool]]:
        """Of every test image of a domain: whether the student is right, whether the teacher is, and whether they agree."""
        if domain not in self._theirs:
            self._theirs[domain] = self._classified(self.teacher, domain)
        (ours, truth), (theirs, _) = self._classified(student, domain), self._theirs[domain]
        own, teachers, label = (torch.tensor(numbers) for numbers in (ours, theirs, truth))
        same = {"right": own == label, "teacher_right": teachers == label, "agrees": own == teachers}
        return {key: found.tolist() for key, found in same.items()}

    @torch.inference_mode()
    def _classified(self, model: nn.Module, domain: str) -> tuple[list[int], list[int]]:
        """The classes that a model gives, and those of the list."""
        split = f"{domain}{LIST}".removesuffix(".txt")
        # the list of the test images is both: images to train on are not read
        names = {"train_split": split, "val_split": split, "num_classes": self.datasets.num_classes}
        data = Data(name="lists", **self.options, **names)
        found: list[int] = []
        truth: list[int] = []
        for images, labels in eval_loader(open_data(data), data, input_config(model, data), CPU):
            found += model.eval()(images).argmax(dim=1).tolist()
            truth += labels.tolist()
        return found, truth

    def words(self, content: Mapping[str, Any]) -> str:
        """Accuracy over all domains."""
        whole = _all_domains(content)
        return f"accuracy {accuracy(whole['right'], whole['teacher_right'])}"

    def write_tables(self) -> None:
        """Of what is finished."""
        write_tables(self.output)


def _all_domains(content: Mapping[str, Any]) -> dict[str, list[bool]]:
    parts = content["domains"].values()
    return {key: [value for part in parts for value in part[key]] for key in ("right", "teacher_right", "agrees")}


def tables(done: Mapping[str, Mapping[str, Any]]) -> str:
    """The finished sizes in Markdown: what they cost, and accuracy by domain."""
    if not done:
        return ""
    first = next(iter(done.values()))
    heads = ["", "images to fit", "parameters", "MACs", "CPU s", "minutes", *LATENCIES]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name, content in done.items():
        took = [f"{content['fit']['cpu_seconds']:.0f}", f"{content['fit']['minutes']:.1f}"]
        lines.append(
            f"| {' | '.join([CELLS[name].text, str(content['crops']), *shares(content), *took, *ratios(content)])} |"
        )
    texts = [CELLS[name].text for name in done]
    heads = ["", "images", "teacher", *texts, *(f"agreement, {text}" for text in texts)]
    lines += ["", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for domain in [*first["domains"], None]:
        parts = [_all_domains(content) if domain is None else content["domains"][domain] for content in done.values()]
        teachers = parts[0]["teacher_right"]
        columns = ["all" if domain is None else domain, str(len(teachers)), _percent(teachers)]
        columns += [accuracy(part["right"], part["teacher_right"]) for part in parts]
        lines.append(f"| {' | '.join([*columns, *(_percent(part['agrees']) for part in parts)])} |")
    text = (
        "Percent. In brackets 95 % intervals over images, with the difference from the teacher's accuracy where a student's is given; of "
        f"latency, as a part of the teacher's measured in turns on {first['threads']} threads, the 99 % interval of the median."
    )
    return "\n".join([*lines, "", text, ""])


def _percent(values: Sequence[bool]) -> str:
    return with_interval([100 * value for value in mean_and_interval(values)], 1)


def write_tables(output: Path) -> str:
    """Write `table.md` of what is finished."""
    text = tables(finished(output, CELLS))
    write_text(output / "table.md", text)
    return text


def main(given: Sequence[str] | None = None) -> None:
    """Make, judge, and write tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a folder with train/, val/ and a list of the test images of each domain")
    parser.add_argument("--weights", help="a file of a classifier of its classes")
    parser.add_argument("--model", help="timm's name of the classifier")
    parser.add_argument("--size", type=int, help="height and width of the images; by default the model's")
    parser.add_argument("--crop-pct", type=float, help="part of the image that is kept; by default the model's")
    parser.add_argument("--crops", type=int, default=1024, help="images of train/ that a student is fitted to")
    parser.add_argument("--output", type=Path, default=Path("runs/shrink_classifiers"))
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL")
    parser.add_argument("--hours", type=float, default=10.0, help="end before the cell that would exceed them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30, help="of latency")
    parser.add_argument(
        "--table-only", action="store_true", help="write the tables of what is finished and run nothing"
    )
    arguments = parser.parse_args(given)
    if not arguments.table_only:
        if not (arguments.data and arguments.weights and arguments.model):
            parser.error("give --data, --weights and --model")
        torch.set_num_threads(arguments.threads)
        try:
            run(Benchmark(arguments), [name for name in CELLS if name in arguments.cells], arguments.hours)
        except UserError as error:
            parser.error(str(error))
    print(write_tables(arguments.output))


if __name__ == "__main__":
    main()
