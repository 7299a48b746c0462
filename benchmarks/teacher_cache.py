"""What it costs to read a teacher's answers, beside a student's own training and beside asking the teacher, and what it does to a student;
and what it costs to read the features of a frozen backbone, beside computing them.

    python benchmarks/teacher_cache.py --threads 1 --rounds 7
    python benchmarks/teacher_cache.py --threads 1 --parts accuracy --seeds 0 1 2
    python benchmarks/teacher_cache.py --threads 1 --parts features --rounds 7

- epochs: a ViT of width 128 and six blocks on digits at 32² (64 patches and a class token), batches of 64, AdamW. An epoch of it is trained
  in several ways that take turns in one process: with labels alone (its own step), by a teacher that is asked, and by answers that are all
  in files; the last two also with `attention_relation` and `hidden_relation`, whose tensors are kept in bf16 or int8. A ratio is that of
  one round; the median stands before the smallest and the largest, of the CPU time of the process, which work on other cores disturbs
  less than wall time. Teachers: one of the student's size, and one of 14 blocks, whose forward pass has 2.3 times its multiplications.
- accuracy: the recipe `quickstart`, whose teacher is trained once; its student is distilled with a teacher that is asked, with a view for
  every epoch, and with two views, for several seeds.
- features: epochs, with loading and augmentation, of a model whose backbone is frozen, which computes its features or reads them, in turns
  as above. A linear probe: that ViT, whose classifier alone is trained. A segmenter: ViT-S/14 at 168² with a linear head on 32 pictures of
  256², as the recipe `segmentation_dinov2_s` has it, in batches of 16, with its augmentation; values are random.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import compressvit
from compressvit.data.input import Side
from compressvit.data.loaders import train_loader
from compressvit.data.opening import open_data
from compressvit.data.spec import Augment, Data
from compressvit.log import RunLog
from compressvit.model.cost import macs
from compressvit.tasks.base import task_of
from compressvit.training.cache.cache import open_cache
from compressvit.training.cache.features import open_features
from compressvit.training.cache.spec import Cache, Features
from compressvit.training.loop import Trainer
from compressvit.training.pairs import match_layers
from compressvit.training.phase import Phase
from compressvit.training.phases.distill import Distill
from compressvit.training.phases.finetune import Finetune
from compressvit.training.terms import labels_term

CPU = torch.device("cpu")
PARTS = ("epochs", "accuracy", "features")
DEPTH, TEACHERS = 6, {"a teacher of the student's size": 6, "a teacher of 14 blocks": 14}
ALONE = {name: {"weight": 0} for name in ("attention_relation", "hidden_relation")}
RELATIONS = {"attention_relation": {"weight": 1}, "hidden_relation": {"weight": 1}}
DATA = Data(name="digits", batch_size=64, limit_train=256, augment=Augment(translate=2))
BRIEF = ["teacher.finetune.epochs=10", "steps.1.distill.epochs=6", "data.augment.translate=1"]


def vit(depth: int) -> nn.Module:
    torch.manual_seed(depth)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=4,
        in_chans=1,
        embed_dim=128,
        depth=depth,
        num_heads=4,
        num_classes=10,
    )
    return model


def trainer(way: str, depth: int, folder: Path) -> Trainer:
    """A phase of a new student, in one of the `ways`, ready for its first step."""
    student, teacher = (Side.of(vit(of), DATA) for of in (DEPTH, depth))
    spec = Distill(losses=RELATIONS if "relations" in way else ALONE, layers=((2, 2), (5, 5)), lr=1e-6)
    loader = train_loader(open_data(DATA), DATA, student.input, CPU)
    pairs = match_layers(student.model, teacher.model, spec.layers)[0]
    terms = spec.terms(student.model, pairs, task_of(student.model), teacher.model)
    cache = None
    if "read" in way:
        kept = Cache(views=1, dtype="int8" if "int8" in way else "bf16")
        cache = open_cache(
            kept, spec, loader, teacher, student.input, terms, task_of(student.model), 1.0, folder / "run"
        )
    if way == "own":
        terms = [labels_term(1.0, 0.0)]
    phase, log = Phase("step", 1, 0, folder / "step.pt"), RunLog(None, Console(file=io.StringIO()))
    made = Trainer(
        *(student, spec, phase, terms, loader, DATA.batch_size, CPU, log, lambda model: {}, task_of(student.model)),
        *(None if way == "own" else teacher, None, None, (), lambda model, epoch, last: None, cache),
    )
    made.connect()
    student.model.train()
    made.optimizer.zero_grad(set_to_none=True)
    return made


def epoch(made: Trainer) -> None:
    made.batch_index = 0
    for images, targets in made.batches():
        made.backward(images, targets)
        made.step()


def in_turn(calls: dict[str, Callable[[], None]], rounds: int) -> list[dict[str, float]]:
    """CPU seconds of every call in every round, after one that is not counted; another one begins each time."""
    found: list[dict[str, float]] = []
    names = list(calls)
    for call in calls.values():
        call()
    for number in range(rounds):
        taken = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.process_time()
            calls[name]()
            taken[name] = time.process_time() - start
        found.append(taken)
    return found


def pictures(root: Path) -> None:
    """32 pictures of noise with masks of two classes."""
    generator = np.random.default_rng(0)
    for split, count in (("training", 32), ("validation", 1)):
        for part in ("images", "annotations"):
            (root / part / split).mkdir(parents=True)
        for number in range(count):
            coarse = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((256, 256), Image.Resampling.BILINEAR)
            picture.save(root / "images" / split / f"{number}.jpg")
            mask = (np.asarray(picture)[..., 0] > 128).astype(np.uint8)
            Image.fromarray(mask).save(root / "annotations" / split / f"{number}.png")


def frozen(kind: str, dtype: str | None, folder: Path) -> Trainer:
    """A phase of a model on a frozen backbone, which keeps its features in a `dtype`, or computes them (None)."""
    data = DATA
    if kind == "segmenter":
        root = folder / "pictures"
        if not root.exists():
            pictures(root)
        augment = Augment(scale=(0.5, 1.0), hflip=0.5)
        data = Data(name="segmentation", root=str(root), num_classes=2, batch_size=16, augment=augment)
        torch.manual_seed(0)
        backbone = {"backbone": "vit_small_patch14_dinov2.lvd142m", "head": "linear", "img_size": 168}
        model: nn.Module = timm.create_model("segmenter", num_classes=2, **backbone)
        model.get_submodule("backbone").requires_grad_(False)
    else:
        model = vit(DEPTH).requires_grad_(False)
        model.get_submodule("head").requires_grad_(True)
    side, task = Side.of(model, data), task_of(model)
    spec = Finetune(lr=1e-6, cache=None if dtype is None else Features(views=1, dtype=dtype))
    loader = train_loader(open_data(data), data, side.input, CPU)
    cache = None if spec.cache is None else open_features(spec.cache, spec, loader, side, folder / "run")
    phase, log = Phase("step", 1, 0, folder / "step.pt"), RunLog(None, Console(file=io.StringIO()))
    made = Trainer(
        *(side, spec, phase, [labels_term(1.0, 0.0, task)], loader, data.batch_size, CPU, log, lambda model: {}, task),
        *(None, None, None, (), lambda model, epoch, last: None, cache),
    )
    made.connect()
    model.train()
    made.frozen.keep()
    made.optimizer.zero_grad(set_to_none=True)
    return made


def features(rounds: int) -> None:
    """The part `features`."""
    for kind in ("linear probe", "segmenter"):
        with tempfile.TemporaryDirectory() as folder:
            ways = {"computed": None, "fp32": "fp32", "bf16": "bf16", "int8": "int8"}
            made = {way: frozen(kind, dtype, Path(folder)) for way, dtype in ways.items()}
            found = in_turn({way: (lambda one=one: epoch(one)) for way, one in made.items()}, rounds)
            for one in made.values():
                if one.cache is not None:
                    assert one.cache.asked == len(one.loader.dataset), "only the first epoch computes"
                one.disconnect()
                one.log.close()
            sizes = {way: one.cache.form.bytes for way, one in made.items() if one.cache is not None}
        print(f"{kind}, bytes an image: {sizes}, {rounds} rounds", flush=True)
        for way in sizes:
            told(f"computing / reading {way}", [taken["computed"] / taken[way] for taken in found])


def told(text: str, ratios: Sequence[float]) -> None:
    print(f"  {text}: {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})", flush=True)


def epochs(rounds: int) -> None:
    """The part `epochs`."""
    for title, depth in TEACHERS.items():
        share = macs(vit(depth), (1, 32, 32)) / macs(vit(DEPTH), (1, 32, 32))
        print(f"{title}, {share:.2f} times its multiplications, {rounds} rounds", flush=True)
        ways = ("own", "asked", "read", "asked, relations", "read, relations", "read, relations, int8")
        with tempfile.TemporaryDirectory() as folder:
            made = {way: trainer(way, depth, Path(folder)) for way in ways}
            found = in_turn({way: (lambda one=one: epoch(one)) for way, one in made.items()}, rounds)
            for one in made.values():
                if one.cache is not None:
                    assert one.cache.asked == DATA.limit_train, "only the first epoch asks"
                one.disconnect()
                one.log.close()
        for text, first, second in (
            ("prediction: reading / the student's own epoch", "read", "own"),
            ("prediction: asking / reading", "asked", "read"),
            ("with relations: asking / reading bf16", "asked, relations", "read, relations"),
            ("with relations: asking / reading int8", "asked, relations", "read, relations, int8"),
        ):
            told(text, [taken[first] / taken[second] for taken in found])


def accuracy(seeds: Sequence[int]) -> None:
    """The part `accuracy`."""
    quiet = Console(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        first = compressvit.apply(
            "quickstart", Path(folder) / "teacher", overrides=[*BRIEF, "steps.1.distill.epochs=1"], console=quiet
        )
        weights = [f"teacher.weights={first.folder / 'teacher'}", "teacher.finetune=null"]
        for text, more in (
            ("asked", []),
            ("a view for every epoch", ["steps.1.distill.cache={}"]),
            ("two views", ["steps.1.distill.cache.views=2"]),
        ):
            top1 = []
            for seed in seeds:
                run = compressvit.apply(
                    "quickstart",
                    Path(folder) / f"{text} {seed}",
                    overrides=[*BRIEF, *weights, *more, f"seed={seed}"],
                    console=quiet,
                )
                top1.append(run.results.student.top1)
            figures = ", ".join(f"{value:.2f}" for value in top1)
            print(f"{text}: top-1 {statistics.mean(top1):.2f} % ({figures})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"
    print(f"torch {torch.__version__}, float32, {arguments.threads} threads, {load}", flush=True)
    if "epochs" in arguments.parts:
        epochs(arguments.rounds)
    if "accuracy" in arguments.parts:
        accuracy(arguments.seeds)
    if "features" in arguments.parts:
        features(arguments.rounds)


if __name__ == "__main__":
    main()
