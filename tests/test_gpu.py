"""What differs on a CUDA device. `pytest -m gpu` runs all of it there; the same tests on the CPU are of the fast suite and of `-m wide`.

No GPU has run them yet: the tolerances between devices are not measured.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers.images import GRAY, side
from helpers.models import build, outputs
from helpers.runs import EPOCH, RECIPE, done, run
from helpers.training import CPU, Heard, fit, largest_difference, random_batches, tiny_vit, values

import compressvit
from compressvit import LowRank
from compressvit.cli import main
from compressvit.data.loaders import train_loader
from compressvit.data.opening import open_data
from compressvit.data.spec import Data
from compressvit.errors import UserError
from compressvit.runs.resources import resource_faults
from compressvit.tasks.base import task_of
from compressvit.training.loop import Phase, Trainer
from compressvit.training.optimisation import build_optimizer
from compressvit.training.pairs import match_layers
from compressvit.training.phases.distill import Distill
from compressvit.training.phases.finetune import Finetune
from compressvit.training.stopping import StopRequest

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = pytest.param("cuda", marks=GPU)
LOSSES = {"prediction": {"weight": 1}, "hidden_relation": {"weight": 1}, "attention_relation": {"weight": 1}}
ACROSS = 1e-4  # between devices, of weights of about 1 after 4 steps of SGD in float32; a guess, see above


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return torch.device(request.param)


def distilled(folder, device, **settings):
    """A student's weights, on the CPU, after 4 steps of distillation on a device."""
    folder.mkdir()
    student, teacher = tiny_vit().to(device), tiny_vit(seed=1).to(device)
    spec = Distill(epochs=2, optimizer="sgd", lr=1e-2, schedule="constant", **{"losses": LOSSES, **settings})
    terms = spec.terms(student, match_layers(student, teacher, "matched")[0])
    fit(student, spec, random_batches(2, 8), folder, terms=terms, teacher=side(teacher), device=device)
    return {name: value.cpu() for name, value in values(student).items()}


def test_relations_are_those_of_the_cpu(tmp_path, device):
    start = {name: value.cpu() for name, value in values(tiny_vit()).items()}
    there, here = distilled(tmp_path / "there", device), distilled(tmp_path / "here", CPU)
    assert largest_difference(there, here) < ACROSS
    assert largest_difference(there, start) > 10 * ACROSS


def test_activation_checkpointing_changes_no_weight(tmp_path, device):
    plain = distilled(tmp_path / "plain", device)
    again = distilled(tmp_path / "again", device, activation_checkpointing=True)
    assert largest_difference(plain, again) < (1e-6 if device.type == "cuda" else 1e-12)  # 0 on a CPU


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.wide), CUDA])
def test_compiled_it_learns_the_same(tmp_path, device, monkeypatch):
    if device == "cpu":  # where not every machine has a compiler of C++
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    plain = distilled(tmp_path / "plain", torch.device(device))
    compiled = distilled(tmp_path / "compiled", torch.device(device), compile=True)
    assert largest_difference(plain, compiled) < ACROSS


@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.wide)])
def test_layers_compute_in_the_precision_of_the_phase(tmp_path, device, precision):
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("float16 is trained on GPUs")
    model, seen = tiny_vit().to(device), set()
    model.blocks[0].mlp.fc1.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    fit(model, Finetune(epochs=1, precision=precision), random_batches(2, 8), tmp_path, device=device)
    assert seen == {{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_optimisers_are_fused_on_gpus(device, optimizer):
    made = build_optimizer(tiny_vit().to(device), Finetune(optimizer=optimizer), 8, device)
    assert bool(made.param_groups[0].get("fused")) is (device.type == "cuda")


def test_batches_are_pinned_for_gpus(device):
    data = Data(name="digits", batch_size=8, limit_train=24, limit_val=16)
    loader = train_loader(open_data(data), data, GRAY, device)
    assert loader.loader.pin_memory is (device.type == "cuda")
    images, targets = next(iter(loader))
    assert images.device.type == targets.device.type == device.type


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_does_not_wait_for_the_device(tmp_path, device, precision):
    student, teacher = tiny_vit().to(device), tiny_vit(seed=1).to(device)
    spec = Distill(epochs=3, log_every=100, precision=precision, losses={**LOSSES, "labels": {"weight": 1}})
    terms = spec.terms(student, match_layers(student, teacher, "matched")[0])
    phase, told = Phase("phase", 1, 0, tmp_path / "phase.pt"), []
    trainer = Trainer(
        *(
            side(student),
            spec,
            phase,
            terms,
            random_batches(5, 8),
            8,
            device,
            Heard(),
            lambda model: {},
            task_of(student),
        ),
        *(side(teacher), None, None, (), lambda model, epoch, last: None),
    )
    trainer.stop, trainer.advance = StopRequest(), lambda *text: told.append(text)
    trainer.connect()
    trainer.train_epoch()  # the first one chooses kernels
    trainer.epoch, trainer.batch_index = 1, 0
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_epoch()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert len(told) == 10


def test_layers_are_fitted_as_on_the_cpu(device):
    def low_rank(where):
        model = build("vit").to(where)
        images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(where)
        return outputs(compressvit.compress(model, [LowRank(rank=3)], [images]).cpu())

    assert (low_rank(device) - low_rank(CPU)).abs().max() < ACROSS


def test_a_lack_of_memory_is_told(device):
    fits = lambda: "batch 3 would fit. "  # noqa: E731
    with pytest.raises(UserError, match=r"memory ran out: .*batch 3 would fit\. Give a smaller data\.batch_size"):  # noqa: SIM117
        with resource_faults(Data(name="digits"), fits):
            torch.empty(2**46, device=device)


def test_a_stopped_run_goes_on(tmp_path, device, monkeypatch):
    from compressvit.training import step

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    words = ("apply", "--no-report", recipe, "--device", device, "--output")
    done(*words, tmp_path / "whole")
    batches, total = [], step.total_of

    def counted(*arguments, **options):
        batches.append(1)
        if len(batches) == 2 * EPOCH + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return total(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(step, "total_of", counted)
        assert run(*words, tmp_path / "run")[0] == 128 + signal.SIGTERM
    done(*words, tmp_path / "run", "--resume")
    students = [compressvit.load(tmp_path / name / "student").cpu() for name in ("whole", "run")]
    assert largest_difference(*map(values, students)) <= (ACROSS if device.type == "cuda" else 0)


def test_a_student_is_exported_from_its_device(tmp_path, device):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    done("apply", "--no-report", recipe, "--device", device, "--output", tmp_path / "run")
    assert "pt2" in done("export", tmp_path / "run", "--to", "pt2", "--device", device)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_quickstart_on_a_gpu(tmp_path, precision):
    options = ["teacher.finetune.epochs=12", "steps.1.distill.epochs=6", f"steps.1.distill.precision={precision}"]
    assert main(["apply", "quickstart", "--device", "cuda", "--output", str(tmp_path / "run"), *options]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["student"]["top1"] > 50
    assert results["read_back_difference"] < 1e-4


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.wide),
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no 2 GPUs for NCCL")],
        ),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes(tmp_path, device, sharded):
    """NCCL between two GPUs, gloo on the CPU; each with whole models, or with a part of them."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("distill: {", f"distill: {{sharded: {str(sharded).lower()}, keep: best, "))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["-m", "compressvit", "apply", recipe, "--device", device, "--no-report", "--output", tmp_path / "run"]
    answer = subprocess.run([*launcher, *map(str, words)], capture_output=True, text=True, check=False, timeout=250)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["processes"] == 2
