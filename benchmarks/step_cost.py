"""What weight distillation adds to a training step, and what multiplexed students take beside the models they are made of.

    python benchmarks/step_cost.py --rounds 5
    python benchmarks/step_cost.py --parts students --student-batches 64 1

Two programs take turns in one process, and a ratio is that of one round; the median of the ratios is printed between the smallest and the
largest, once of wall time and once of CPU time of the process, which work on other cores disturbs less. Weights are random.

- step: the whole step of the training loop (both forward passes, losses, backward pass, clipping, AdamW) of Mini-Swin-T with a Swin-S as
  its teacher and the six layer pairs of MiniViT's recipe, all three losses against the prediction alone;
- memory: of the same two steps the peak of the bytes in all tensor storages that an operator created and that are still alive, seen by a
  dispatch mode (`LiveBytes` of hidden_relation.py): activations, gradients, taps and what losses keep; weights, moments of the optimiser
  and scratch space inside an operator are not in it;
- relations: `attention_relation` of DeiT-B's queries, keys and values at 224² and 384² (197 and 577 tokens, twelve relation heads, two
  images), forward and backward, against the plain form with its token-by-token matrices: time and the peak of live tensors;
- students: forward passes in inference mode of multiplexed ViT-S/16 (mixes of heads alone, and with a 7×7 convolution) and Swin-T, their
  mixes moved off the identity, where they would be left out, against timm's models.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import timm
import torch
from hidden_relation import MIB, LiveBytes
from rich.console import Console
from torch import nn

from compressvit import Multiplex, compress
from compressvit.data.input import Side
from compressvit.data.spec import Data
from compressvit.log import RunLog
from compressvit.tasks.base import task_of
from compressvit.training.loop import Trainer
from compressvit.training.losses import attention_relation
from compressvit.training.pairs import match_layers
from compressvit.training.phase import Phase
from compressvit.training.phases.distill import Distill

Losses = Mapping[str, Mapping[str, float]]

CPU = torch.device("cpu")
STUDENT, TEACHER = "swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224"
PAIRS = ((1, 1), (3, 3), (5, 9), (7, 15), (9, 21), (11, 23))
MINI_SWIN = Multiplex(share=(2, 2, 6, 2), mixing_bias=True, mlp_conv=7)
ALONE = {name: {"weight": 0} for name in ("attention_relation", "hidden_relation")}
RELATIONS = {197: 12, 577: 12}  # tokens: relation heads
STUDENTS = {
    "ViT-S/16, mixes": ("vit_small_patch16_224", Multiplex(share=2)),
    "ViT-S/16, mixes and convolution": ("vit_small_patch16_224", Multiplex(share=2, mlp_conv=7)),
    "Swin-T": (STUDENT, MINI_SWIN),
}


def trainer(losses: Losses, folder: Path) -> Trainer:
    """A phase of Mini-Swin-T with its teacher, ready for its first step."""
    torch.manual_seed(0)
    student, teacher = compress(timm.create_model(STUDENT), [MINI_SWIN]), timm.create_model(TEACHER)
    return begun(student, teacher, Distill(losses=losses, layers=PAIRS, lr=1e-6, clip_grad=5.0), 4, folder)


def begun(student: nn.Module, teacher: nn.Module, spec: Distill, batch: int, folder: Path) -> Trainer:
    """A phase of a multiplexed student with its teacher and layer pairs, ready for its first step."""
    off_identity(student)
    assert isinstance(spec.layers, tuple)
    terms = spec.terms(student, match_layers(student, teacher, spec.layers)[0], teacher=teacher)
    sides = [Side.of(model, Data(name="images")) for model in (student, teacher)]
    phase, log = Phase("step", 1, 0, folder / "step.pt"), RunLog(None, Console(file=io.StringIO()))
    made = Trainer(
        *(sides[0], spec, phase, terms, range(10**6), batch, CPU, log, lambda model: {}, task_of(student)),
        *(sides[1], None, None, (), lambda model, epoch, last: None),
    )
    made.connect()
    student.train()
    made.optimizer.zero_grad(set_to_none=True)
    return made


def off_identity(model: nn.Module) -> None:
    """Move what mixes heads off the identity, and convolutions off zero, as training does."""
    for name, parameter in model.named_parameters():
        if "_mix." in name or "mlp_conv.conv" in name:
            with torch.no_grad():
                parameter.add_(0.02 * torch.randn_like(parameter))


def step(made: Trainer, images: torch.Tensor, targets: torch.Tensor) -> None:
    made.backward(images, targets)
    made.step()


def in_pairs(calls: Sequence[Callable[[], object]], rounds: int) -> tuple[list[float], list[float]]:
    """Of every round the ratio of the second call to the first, of wall and of CPU time; the order changes from round to round."""
    wall, processor = [], []
    for call in calls:
        call()
    for number in range(rounds):
        taken = {}
        for i in (0, 1) if number % 2 == 0 else (1, 0):
            start = time.perf_counter(), time.process_time()
            calls[i]()
            taken[i] = time.perf_counter() - start[0], time.process_time() - start[1]
        wall.append(taken[1][0] / taken[0][0])
        processor.append(taken[1][1] / taken[0][1])
    return wall, processor


def told(name: str, ratios: tuple[list[float], list[float]]) -> None:
    texts = [
        f"{what} {statistics.median(found):.3f} ({min(found):.3f}-{max(found):.3f})"
        for what, found in zip(("wall", "CPU"), ratios, strict=True)
    ]
    print(f"{name}: {', '.join(texts)} in {len(ratios[0])} rounds", flush=True)


def peak(call: Callable[[], object]) -> int:
    with LiveBytes() as counter:
        call()
    return counter.peak


def steps(parts: Sequence[str], batch: int, rounds: int) -> None:
    """The parts `step` and `memory`."""
    images, targets = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    with tempfile.TemporaryDirectory() as folder:
        both = [trainer(losses, Path(folder)) for losses in (ALONE, {})]
        calls = [partial(step, made, images, targets) for made in both]
        for call in calls:
            call()
        if "memory" in parts:
            alone, whole = (peak(call) for call in calls)
            print(
                f"live tensors at the peak: {whole / MIB:.0f} / {alone / MIB:.0f} MiB = {whole / alone:.3f}", flush=True
            )
        if "step" in parts:
            told("step, all three losses / prediction alone", in_pairs(calls, rounds))
        for made in both:
            made.disconnect()
            made.log.close()


def plain(student: torch.Tensor, teacher: torch.Tensor, heads: int) -> torch.Tensor:
    """The nine cross-entropies of the attention relation, (B, N, 3·C) each, as they are written down."""
    values = []
    sides = [[x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1)] for qkv in (student, teacher)]
    for i, j in itertools.product(range(3), repeat=2):
        ours, theirs = (side[i] @ side[j].mT * side[i].shape[-1] ** -0.5 for side in sides)
        values.append(-(theirs.softmax(-1) * ours.log_softmax(-1)).sum(-1).mean())
    return torch.stack(values).mean()


def ours(student: torch.Tensor, teacher: torch.Tensor, heads: int) -> torch.Tensor:
    return attention_relation(student.chunk(3, dim=-1), teacher.chunk(3, dim=-1), heads)


def relations(rounds: int) -> None:
    """The part `relations`."""
    for tokens, heads in RELATIONS.items():
        student, teacher = torch.randn(2, tokens, 3 * 768).requires_grad_(), torch.randn(2, tokens, 3 * 768)
        calls = [partial(gradient_of, form, student, teacher, heads) for form in (plain, ours)]
        for_plain, for_ours = (peak(call) for call in calls)
        share = f"{for_ours / MIB:.0f} / {for_plain / MIB:.0f} MiB = {for_ours / for_plain:.3f}"
        told(f"attention_relation, {tokens} tokens, {heads} heads: live tensors {share}; time", in_pairs(calls, rounds))


def gradient_of(form: Callable[..., torch.Tensor], student: torch.Tensor, teacher: torch.Tensor, heads: int) -> None:
    torch.autograd.grad(form(student, teacher, heads), student)


def students(batches: Sequence[int], rounds: int) -> None:
    """The part `students`."""
    for name, (model_name, multiplex) in STUDENTS.items():
        torch.manual_seed(0)
        teacher = timm.create_model(model_name).eval()
        student = compress(teacher, [multiplex]).eval()
        off_identity(student)
        for batch in batches:
            images = torch.randn(batch, 3, 224, 224)
            many = rounds if batch > 8 else 4 * rounds
            with torch.inference_mode():
                told(f"{name}, batch {batch}", in_pairs([partial(teacher, images), partial(student, images)], many))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ("step", "memory", "relations", "students")
    parser.add_argument("--parts", nargs="+", choices=known, default=known)
    parser.add_argument("--batch", type=int, default=4, help="images of a training step (default: %(default)s)")
    parser.add_argument("--student-batches", type=int, nargs="+", default=[64, 1], help="default: 64 1")
    parser.add_argument(
        "--rounds", type=int, default=5, help="of small batches four times as many (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"
    print(f"torch {torch.__version__}, float32, {arguments.threads} threads, {load}", flush=True)
    if {"step", "memory"} & set(arguments.parts):
        steps(arguments.parts, arguments.batch, arguments.rounds)
    if "relations" in arguments.parts:
        relations(arguments.rounds)
    if "students" in arguments.parts:
        students(arguments.student_batches, arguments.rounds)


if __name__ == "__main__":
    main()
