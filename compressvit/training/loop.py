"""The training loop of every phase: `Trainer`. Start reading at `Trainer.run`.

CPU and GPU use one code path. The randomness of an epoch is seeded from the run's seed, the phase and the epoch, so a resumed run ends
with the same weights as an uninterrupted one (bit for bit on a CPU). A step does not wait for the device: values stay there until they are
logged. After the first loss or gradient that is not finite, the device skips updates and restores buffers, until the loop reads and stops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from compressvit import processes
from compressvit.data.input import Side
from compressvit.log import RunLog
from compressvit.model import ties
from compressvit.tasks.base import Task, task_of
from compressvit.training import optimisation as opt
from compressvit.training.batch import to_device
from compressvit.training.best import Best
from compressvit.training.cache.cache import Kept, answers_of
from compressvit.training.meters import Meters
from compressvit.training.nonfinite import Skips, require_finite, where_to_look
from compressvit.training.phase import Phase
from compressvit.training.sharding import divided as sharding
from compressvit.training.sharding.optimised import optimised
from compressvit.training.spec import Training
from compressvit.training.state import Moments, TrainedState, restoring, taken_up, write_checkpoint
from compressvit.training.step import Pass, Step
from compressvit.training.stopping import Interrupted, StopRequest
from compressvit.training.terms import Term
from compressvit.training.watch import Watch

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    student: Side,
    spec: Training,
    phase: Phase,
    terms: Sequence[Term],
    loader: Any,
    *,
    batch_size: int,
    device: torch.device,
    log: RunLog,
    evaluate: Callable[[nn.Module], dict[str, Any]],
    task: Task | None = None,
    teacher: Side | None = None,
    cache: Kept | None = None,
    start: dict[str, Any] | None = None,
    moments: Moments | None = None,
    watches: Sequence[Watch] = (),
    measure: Callable[[nn.Module, int, bool], None] = lambda model, epoch, last: None,
) -> dict[str, Any]:
    """Train the model of `student` in place until the end of the phase, resuming from its checkpoint if there is one.

    Args:
        student: on `device`; batches are normalised for this model.
        spec: the phase's options.
        terms: the loss terms; their weighted sum is minimised.
        loader: yields batches (images, targets) of `batch_size` images and has a length; its order depends on the global generators.
        evaluate: called every `evaluate_every` epochs with the model (or its weight average); the result is logged.
        task: what the outputs mean; None: classes if the model has a classifier, else features.
        teacher: required if a term reads it; runs in eval mode without gradient, and is never part of a checkpoint.
        cache: has or takes the teacher's answers, or the model's features; `loader` then shows views (`Loader.show`).
        start: the result of `evaluate` for the initial model, if it is already known.
        moments: initial optimiser state by parameter name, possibly empty; the final state is then returned too. If it is not empty,
            the model was trained and then changed, so `start` does not apply to it.
        watches: diagnostics that observe every step.
        measure: called with (model or its average, epochs done, whether this was the last) before the first and after every epoch, with
            the weights that `evaluate` uses. A resumed phase calls it again for the epoch it resumes from.

    Returns:
        `start`, the evaluation of the initial model (None if there was none), and `kept_epoch`, the epoch whose weights the model has
        at the end (0: the initial ones); also `moments` if they were passed.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGUSR1 was received; a checkpoint was written after the last optimiser step.
        UserError: the loss or the gradient is not finite, which is detected up to `log_every` steps later. The last good checkpoint is
            kept, and the model has the weights and buffers from before that step.
    """
    warm = None if moments is None else Moments(moments)
    others = (task or task_of(student.model), teacher, start, warm, watches, measure, cache)
    return Trainer(student, spec, phase, terms, loader, batch_size, device, log, evaluate, *others).run()


@dataclass(eq=False)
class Trainer:
    """The state of one phase: first the arguments of `train`, then what changes during training."""

    student: Side
    spec: Training
    phase: Phase
    terms: Sequence[Term]
    loader: Any
    batch_size: int
    device: torch.device
    log: RunLog
    evaluate: Callable[[nn.Module], dict[str, Any]]
    task: Task
    teacher: Side | None
    start: dict[str, Any] | None
    warm: Moments | None
    watches: Sequence[Watch]
    measure: Callable[[nn.Module, int, bool], None]
    cache: Kept | None = None
    epoch: int = 0  # done
    batch_index: int = 0  # batches done in the next epoch
    steps: int = 0  # optimiser steps done
    best: Best | None = None
    meters: Meters = field(default_factory=Meters)
    random_state: dict[str, Any] | None = None  # random state of a resumed, unfinished epoch

    def __post_init__(self) -> None:
        spec, device = self.spec, self.device
        self.model = model = self.student.model
        steps_per_epoch = opt.steps_per_epoch(len(self.loader), spec.accumulate)
        self.total_steps = int(min(spec.epochs * steps_per_epoch, spec.max_steps or math.inf))
        opt.set_drop_path(model, spec.drop_path)
        self.frozen = opt.Frozen(opt.frozen_modules(model, spec), opt.frozen_norms(model))
        self.optimizer = opt.build_optimizer(model, spec, self.batch_size * processes.count(), device)
        self.schedule = opt.build_schedule(self.optimizer, spec, steps_per_epoch)
        self.mixing = opt.build_mixing(spec, self.task, getattr(model, "num_classes", 0))
        self.average = opt.build_average(model, spec.ema)
        self.autocast = torch.autocast(device.type, _AUTOCAST.get(spec.precision), enabled=spec.precision != "fp32")
        self.scaler = torch.amp.GradScaler(device.type, enabled=spec.precision == "fp16")
        self.state = TrainedState(model)
        self.buffers = opt.Buffers(model)
        self.optimised = optimised(self.optimizer, model, self.average, self.teacher, device, divided=spec.sharded)
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # every loss and gradient but of skipped steps
        self.skips = Skips(spec.skip_nonfinite)

    def run(self) -> dict[str, Any]:
        """Run the whole phase; returns the result of `train`."""
        with self.optimised.ending():
            if processes.told(self.phase.begun):
                if (ended := self.resume()) is not None:
                    self.frozen.release()
                    return ended
            else:
                self.begin()
            if not self.batch_index:
                self.catch_up(False)
            self.connect()
            try:
                with (
                    StopRequest() as self.stop,
                    self.log.progress(self.phase.name, self.total_steps, self.steps) as self.advance,
                ):
                    while not self.is_over():
                        self.train_epoch()
                        self.close_epoch()
            finally:
                self.disconnect()
        self.model.eval()
        ended = {"start": self.start, "kept_epoch": self.kept_epoch()}
        return ended if self.warm is None else {**ended, "moments": Moments.of(self.model, self.optimizer)}

    def begin(self) -> None:
        """Start the phase from its beginning, with the given optimiser moments and the first candidate of `keep: best`."""
        if self.average is not None and (note := self.average.note(self.total_steps)):
            self.log.say(f"{self.phase.name}: {note}")
        if self.warm:
            self.start = None
            self.warm.give(self.model, self.optimizer)
        if self.spec.keep != "best":
            return
        if self.warm is not None:  # adapters that have just lost neurons are not a candidate
            self.best = {"score": -math.inf, "epoch": 0, "model": None}
            return
        if self.start is None:
            self.start = self.evaluate(self.model)
        self.best = {"score": self.task.score(self.start), "epoch": 0, "model": self.state.copied(self.model)}

    def resume(self) -> dict[str, Any] | None:
        """Continue from the checkpoint. If the phase is already complete, return the result of `train`."""
        path, saved, told = processes.first(lambda: taken_up(self.phase, self.model, len(self.loader)))
        if told:
            self.log.say(f"{self.phase.name}: {told}")
        self.state.load(saved, self.model, path)
        if (steps := saved.get("steps")) is not None:  # of a finished phase an old one need not have them
            self.log.forget(self.phase.name, steps)
        self.start, self.best = saved.get("start"), saved.get("best")
        if saved["done"]:
            kept = saved.get("kept_epoch", saved.get("epoch"))
            if kept == saved.get("epoch"):  # the weights of an earlier epoch are not the ones to measure
                self.epoch, self.steps = saved["epoch"], saved["steps"]
                self.model.eval()
                self.catch_up(True)
            ended = {"start": self.start, "kept_epoch": kept}
            return ended if self.warm is None else {**ended, "moments": Moments(saved["moments"])}
        with restoring(path):
            self.optimised.load(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            if self.average is not None:
                self.average.load(saved)
            self.random_state = saved.get("random_states", [saved["random_state"]])[processes.rank()]
        self.epoch, self.batch_index, self.steps = saved["epoch"], saved["batch_index"], saved["steps"]
        self.meters, self.skips.count = Meters(**saved["meters"]), saved.get("skipped", 0)
        self.log.say(f"{self.phase.name}: resumed at epoch {self.epoch + 1}, step {self.steps} of {self.total_steps}")
        return None

    def connect(self) -> None:
        """Make student, teacher and loss one step, in which the processes of a run take part."""
        answers = answers_of(self.teacher, self.student.input, self.terms, self.device, self.spec.compile, self.cache)
        features = None if self.cache is None else self.cache.within(self.model)
        self.compute = Step(Pass(self.student, answers, self.terms, self.task, self.autocast, self.spec, features))

    def disconnect(self) -> None:
        self.frozen.release()
        self.compute.close()

    def is_over(self) -> bool:
        return self.epoch >= self.spec.epochs or self.steps >= self.total_steps

    def train_epoch(self) -> None:
        """Train until the epoch or the phase ends. Raises as `train` does."""
        self.model.train()
        self.frozen.keep()
        self.optimizer.zero_grad(set_to_none=True)
        for images, targets in self.batches():
            self.backward(images, targets)
            if self.batch_index % self.spec.accumulate and self.batch_index < len(self.loader):
                continue
            self.step()
            if self.steps % self.spec.log_every == 0 or self.steps == self.total_steps:
                self.read()
                self.log.scalars(self.phase.name, "train", self.steps, {"epoch": self.epoch, **self.meters.last})
                self.advance(self.meters.details(self.task.qualities))
            else:
                self.advance()
            if self.steps >= self.total_steps:
                return
            if self.stop.agreed():
                self.read()
                self.checkpoint(False, opt.random_state())
                raise self.interrupted()

    def batches(self) -> Iterator[tuple[torch.Tensor, Any]]:
        """The remaining batches of the epoch, on the CPU, with the epoch's own random state."""
        rank = processes.rank()
        others = [rank] if rank else []  # draw for themselves; the leader draws what a single process does
        opt.seed_everything(self.phase.seed, self.phase.number, self.epoch, *others)
        if self.cache is not None:
            self.loader.show(self.cache.view(self.epoch))
        batches = iter(self.loader)
        for _ in range(self.batch_index):  # batches that the interrupted epoch had already processed
            next(batches)
        if self.random_state is not None:
            with restoring(self.phase.checkpoint):
                opt.restore_random_state(self.random_state)
            self.random_state = None
        return batches

    def backward(self, images: torch.Tensor, targets: Any) -> None:
        """Forward and backward pass of one batch; its gradient is accumulated."""
        shown = None if self.cache is None else self.cache.shown(self.loader, self.epoch, self.batch_index)
        images, targets, labels, shown = to_device(images, targets, self.device, self.task, self.mixing, shown)
        for watch in self.watches:
            watch.before(self.steps)
        if self.batch_index % self.spec.accumulate == 0:
            self.buffers.remember()
        left = len(self.loader) - self.batch_index // self.spec.accumulate * self.spec.accumulate
        parts = min(self.spec.accumulate, left)  # the last step of an epoch may accumulate fewer batches
        last = self.batch_index % self.spec.accumulate == parts - 1
        loss, terms, figures = self.compute(
            images, targets, labels, lambda loss: self.scaler.scale(loss / parts).backward(), last=last, shown=shown
        )
        self.finite = self.finite & torch.isfinite(loss)
        self.batch_index += 1
        self.meters.add(self.steps + 1, loss, terms, figures)

    def step(self) -> None:
        """One optimiser step with the accumulated gradient, left out if any loss or gradient so far was not finite."""
        self.schedule.step_update(self.steps)
        self.optimised.collect()
        self.scaler.unscale_(self.optimizer)
        for watch in self.watches:
            watch.after(self.steps + 1, self.epoch, self.scaler.get_scale())
        norm = self.optimised.clip(self.spec.clip_grad or math.inf)
        # The scaler itself skips a step with a non-finite gradient, and continues with a smaller scale.
        if not self.scaler.is_enabled():
            self.finite = self.finite & torch.isfinite(norm)
        self.finite = processes.everywhere(self.finite)
        if skipped := self.skips.take(self.finite):
            self.log.say(f"{self.phase.name}: {self.skips.words(self.meters.drop(self.steps + 1))}")
        else:
            opt.step_if(self.finite, self.optimizer, self.scaler, self.optimised.parameters)
        self.buffers.put_back_unless(self.finite)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model)
        self.steps += 1
        self.finite = self.finite | skipped
        group = self.optimizer.param_groups[0]  # of a layer or backbone, `lr` is a part of the whole one
        self.meters.add_update(self.steps, norm, group["lr"] / group.get("lr_scale", 1.0))

    def read(self) -> None:
        """Wait for the device and read the values of the batches since the last call. Raises as `require_finite`."""
        look = partial(where_to_look, self.student, self.teacher, self.loader, self.optimised.end)
        require_finite(self.phase, self.meters.read(), look, gradients=not self.scaler.is_enabled())

    def close_epoch(self) -> None:
        """Log, evaluate, keep the best weights, run diagnostics, and write a checkpoint."""
        self.read()
        self.epoch, self.batch_index = self.epoch + 1, 0
        last = self.is_over()
        averaged = () if self.average is None else self.average.module.buffers()
        processes.alike([*self.model.buffers(), *averaged])  # the leader's: each process has seen other images
        self.log.scalars(self.phase.name, "epoch", self.steps, {"epoch": self.epoch, **self.meters.means()})
        if last and self.average is not None:
            sharding.load(self.model, ties.unique_state(self.average.module))
        if self.best is None:
            self.checkpoint(last)  # first, so that an error in the evaluation loses no training
        if last or self.epoch % self.spec.evaluate_every == 0:
            self.judge()
        if last:
            self.take_best()
        self.measure(self.judged(), self.epoch, last)
        if self.best is not None:
            self.checkpoint(last)
        self.meters = Meters()
        if self.stop.agreed():  # requested during the last step or the evaluation
            raise self.interrupted()

    def interrupted(self) -> Interrupted:
        assert self.stop.signum is not None, "somebody asked for it"
        return Interrupted(self.stop.signum, self.phase.checkpoint.parents[1], f"{self.phase.checkpoint} was written")

    def judged(self) -> nn.Module:
        """The model to evaluate: the weight average, if there is one, until it is copied into the model at the end."""
        return self.model if self.average is None or self.is_over() else self.average.module

    def catch_up(self, last: bool) -> None:
        """Evaluate and measure at the present epoch, where a run was killed after its checkpoint, before that was recorded."""
        due = self.epoch and (last or self.epoch % self.spec.evaluate_every == 0)
        if due and not processes.told(self.log.recorded(self.phase.name, "evaluate", self.steps)):
            self.judge()
        self.measure(self.judged(), self.epoch, last)

    def judge(self) -> None:
        """Evaluate, and keep the weights if no earlier evaluation was better."""
        result = self.evaluate(judged := self.judged())
        self.log.scalars(self.phase.name, "evaluate", self.steps, {"epoch": self.epoch, **result})
        found = f"{self.meters.text(self.task)}  {self.task.progress(result)}"
        self.log.say(f"{self.phase.name} {self.epoch}/{self.spec.epochs}  {found}")
        if self.best is not None and (score := self.task.score(result)) >= self.best["score"]:
            self.best = {"score": score, "epoch": self.epoch, "model": self.state.copied(judged)}

    def take_best(self) -> None:
        """With `keep: best`, load the weights of the best evaluation."""
        if (best := self.best) is None or best["model"] is None or best["epoch"] == self.epoch:
            return
        sharding.load(self.model, best["model"])
        kept = f"epoch {best['epoch']}" if best["epoch"] else "the start"
        self.log.say(f"{self.phase.name}: kept the weights of {kept}, which were best")

    def kept_epoch(self) -> int:
        return self.epoch if self.best is None else self.best["epoch"]

    def checkpoint(self, done: bool, random_state: dict[str, Any] | None = None) -> None:
        """Write a checkpoint; in the middle of an epoch with its `random_state`, that of every process, and meters."""
        if self.cache is not None:
            self.cache.sync()  # what steps before a checkpoint have asked is not asked again
        states = processes.gathered(random_state)
        content: dict[str, Any] = {
            "done": done,
            "model": sharding.whole_in_leader(self.state.of(self.model)),
            "frozen": self.state.frozen_hash,
            "steps": self.steps,
            "epoch": self.epoch,
            "start": self.start,
        }
        if done:
            content["kept_epoch"] = self.kept_epoch()
            if self.warm is not None:
                content["moments"] = dict(Moments.of(self.model, self.optimizer))
        else:
            content |= {
                "optimizer": self.optimised.state(),
                "scaler": self.scaler.state_dict(),
                "batch_index": self.batch_index,
                "skipped": self.skips.count,
                "random_state": states[0],
                **({"random_states": states} if len(states) > 1 else {}),
                "meters": self.meters.state() if random_state else {},
                "best": self.best and {**self.best, "model": sharding.whole_in_leader(self.best["model"])},
            }
            if self.average is not None:
                average = sharding.whole_in_leader(self.state.of(self.average.module))
                content |= {"average": average, "n_averaged": self.average.updates, "average_rises": self.average.rises}
        write_checkpoint(self.phase, content)
