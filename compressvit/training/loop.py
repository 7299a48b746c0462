"""The training loop of every phase, to be read top to bottom.

One code path for CPU and GPU. An epoch's randomness is seeded from the run's seed, the phase and the epoch, so a run that was
stopped and resumed ends with the weights of one that was not (to the bit on a CPU).
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from timm.data import Mixup
from torch import nn

from compressvit.errors import UserError
from compressvit.files import load_checkpoint, require_keys, save_checkpoint
from compressvit.log import RunLog
from compressvit.model import ties
from compressvit.model.old import current_checkpoint
from compressvit.model.taps import Taps
from compressvit.training import optimisation as opt
from compressvit.training.meters import Meters, result_text
from compressvit.training.spec import Training
from compressvit.training.state import TrainedState
from compressvit.training.terms import Batch, Term
from compressvit.training.watch import Watch

_UNFINISHED = ("epoch", "batch_index", "steps", "optimizer", "scaler", "random_state", "meters")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Interrupted(Exception):
    """The user stopped the run; a checkpoint was written first."""

    def __init__(self, signum: int, checkpoint: Path):
        super().__init__(
            f"stopped by {signal.Signals(signum).name}; {checkpoint} was written. "
            f"Go on with: compressvit apply {checkpoint.parents[1]} --resume"
        )
        self.signum = signum


@dataclass(frozen=True)
class Teacher:
    """The teacher of a distillation, and what its images must look like."""

    model: nn.Module
    input: Callable[[torch.Tensor], torch.Tensor] = lambda images: images


@dataclass(frozen=True)
class Phase:
    """Where a phase stands in its run: its name, its number (part of the seed), the run's seed, and its checkpoint file."""

    name: str
    number: int
    seed: int
    checkpoint: Path


class _StopRequest:
    """Turns SIGINT and SIGTERM into a request that the loop answers at the end of an optimiser step."""

    def __enter__(self) -> _StopRequest:
        self.signum: int | None = None
        self._old: dict[int, Any] = {}
        for signum in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # not in the main thread: whoever runs us there handles signals
                self._old[signum] = signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:  # asked twice: do not insist on a tidy end
            raise KeyboardInterrupt
        self.signum = signum

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)


def train(
    model: nn.Module,
    spec: Training,
    phase: Phase,
    terms: Sequence[Term],
    loader: Any,
    *,
    batch_size: int,
    device: torch.device,
    log: RunLog,
    evaluate: Callable[[nn.Module], dict[str, Any]],
    teacher: Teacher | None = None,
    start: dict[str, Any] | None = None,
    moments: dict[str, dict[str, Any]] | None = None,
    watches: Sequence[Watch] = (),
    measure: Callable[[nn.Module, int, bool], None] = lambda model, epoch, last: None,
) -> dict[str, Any]:
    """Train `model` in place until the phase is done, from its checkpoint if there is one.

    Args:
        model: on `device`.
        spec: the phase's options.
        terms: the loss terms; their weighted sum is minimised.
        loader: batches of (images, targets), with a length, of `batch_size` images; its order follows the global generators.
        evaluate: called every `evaluate_every` epochs with the model (its average, if there is one); what it returns is logged.
        teacher: needed when a term reads it; runs in eval mode without gradient, and is never part of a checkpoint.
        start: what `evaluate` says of the model as it is given, where that is known.
        moments: the optimiser's state by parameter name to begin with, possibly empty; its state at the end is then returned too.
            Where there is any, the model was trained and then changed, so `start` says nothing of it.
        watches: diagnostics that look on at every step.
        measure: diagnostics of (model or its average, epochs done, whether they are the last), before the first epoch and behind every
            one; of the weights that `evaluate` sees. A resumed phase asks again for where it is.

    Returns:
        `start`, the evaluation of the model as it was given (None if nobody asked), and `kept_epoch`, the epoch whose weights it
        ends with (0: those it was given); with `moments` given also `moments`.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written at the last optimiser step.
        UserError: the loss or the gradient is not finite; the last good checkpoint is kept.
    """
    steps_per_epoch = opt.steps_per_epoch(len(loader), spec.accumulate)
    total_steps = min(spec.epochs * steps_per_epoch, spec.max_steps or math.inf)
    opt.set_drop_path(model, spec.drop_path)
    optimizer = opt.build_optimizer(model, spec, batch_size, device)
    schedule = opt.build_schedule(optimizer, spec, steps_per_epoch)
    mixup = opt.build_mixup(spec, getattr(model, "num_classes", 0))
    average = opt.build_average(model, spec.ema)
    if moments:
        start = None
        _give_moments(model, optimizer, moments)
    autocast = torch.autocast(device.type, _AUTOCAST.get(spec.precision), enabled=spec.precision != "fp32")
    scaler = torch.amp.GradScaler(device.type, enabled=spec.precision == "fp16")
    parameters = [p for p in model.parameters() if p.requires_grad]
    state = TrainedState(model)

    epoch = batch_index = steps = 0
    best: dict[str, Any] | None = None  # with `keep: best`: the score, epoch and weights of the best evaluation
    resumed_random_state = None
    resumed_meters: dict[str, Any] = {}
    if phase.checkpoint.is_file():
        saved = current_checkpoint(load_checkpoint(phase.checkpoint), model.state_dict().keys())
        require_keys(saved, ("done",), phase.checkpoint)
        if not saved["done"]:
            require_keys(saved, _UNFINISHED, phase.checkpoint)
        state.load(saved, model, phase.checkpoint)
        start, best = saved.get("start"), saved.get("best")
        if saved["done"]:
            kept = {"start": start, "kept_epoch": saved.get("kept_epoch", saved.get("epoch"))}
            if kept["kept_epoch"] == saved.get("epoch"):  # those of an earlier epoch are not what was to be measured
                measure(model.eval(), saved["epoch"], True)
            return kept if moments is None else kept | {"moments": saved["moments"]}
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        if average is not None:
            average.module.load_state_dict(saved["average"], strict=False)
            average.n_averaged.fill_(saved["n_averaged"])
        epoch, batch_index, steps = saved["epoch"], saved["batch_index"], saved["steps"]
        resumed_random_state, resumed_meters = saved["random_state"], saved["meters"]
        log.say(f"{phase.name}: resumed at epoch {epoch + 1}, step {steps} of {total_steps}")

    elif spec.keep == "best" and moments is not None:  # adapters that have just lost neurons are no candidate
        best = {"score": -math.inf, "epoch": 0, "model": None}
    elif spec.keep == "best":
        if start is None:
            start = evaluate(model)
        best = {"score": _score(start), "epoch": 0, "model": state.copied(model)}

    if not batch_index:
        measure(model if average is None else average.module, epoch, False)

    def checkpoint(done: bool, random_state: dict | None = None) -> None:
        content: dict[str, Any] = {
            "done": done,
            "model": state.of(model),
            "frozen": state.frozen_hash,
            "steps": steps,
            "epoch": epoch,
            "start": start,
        }
        if done:
            content["kept_epoch"] = best["epoch"] if best else epoch
            if moments is not None:
                content["moments"] = _moments(model, optimizer)
        else:
            content |= {
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "batch_index": batch_index,
                "random_state": random_state,
                "meters": meters.state() if random_state else {},
                "best": best,
            }
            if average is not None:
                content |= {"average": state.of(average.module), "n_averaged": int(average.n_averaged)}
        save_checkpoint(phase.checkpoint, content)

    student_taps = Taps(model, [tap for term in terms for tap in term.student_taps], device)
    teacher_taps = (
        Taps(teacher.model, [tap for term in terms for tap in term.teacher_taps], device) if teacher else None
    )
    # Hooks first: the compiled graph must contain them.
    run_student = torch.compile(model) if spec.compile else model
    run_teacher = torch.compile(teacher.model) if teacher and spec.compile else (teacher.model if teacher else None)
    if teacher:
        teacher.model.eval()

    with _StopRequest() as stop, log.progress(phase.name, int(total_steps), steps) as advance:
        while epoch < spec.epochs and steps < total_steps:
            model.train()
            opt.seed_everything(phase.seed, phase.number, epoch)
            batches = iter(loader)
            for _ in range(batch_index):  # what the interrupted epoch had done already
                next(batches)
            if resumed_random_state is not None:
                opt.restore_random_state(resumed_random_state)
                resumed_random_state = None
            meters = Meters(**resumed_meters)
            resumed_meters = {}
            optimizer.zero_grad(set_to_none=True)

            for images, targets in batches:
                images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
                labelled = bool((targets >= 0).any())
                if mixup is not None:
                    images, targets = _mix(mixup, images, targets)
                for watch in watches:
                    watch.before(steps)
                with autocast:
                    logits = run_student(images)
                    teacher_logits = None
                    if run_teacher is not None:
                        with torch.no_grad():
                            teacher_logits = run_teacher(teacher.input(images))  # type: ignore[union-attr]
                    batch = Batch(
                        logits, teacher_logits, student_taps.pop(), teacher_taps.pop() if teacher_taps else {}, targets
                    )
                    loss, parts = _total(terms, batch)
                if not torch.isfinite(loss):
                    raise UserError(_diverged(phase, steps, f"the loss is {loss.item()}", parts))
                # The last step of an epoch may have fewer batches to add up.
                left = len(loader) - batch_index // spec.accumulate * spec.accumulate
                scaler.scale(loss / min(spec.accumulate, left)).backward()
                batch_index += 1
                scored = getattr(model, "num_classes", 0)  # pooled features are no scores
                meters.add(parts, logits, teacher_logits, targets if scored and labelled else None)
                if batch_index % spec.accumulate and batch_index < len(loader):
                    continue

                schedule.step_update(steps)
                scaler.unscale_(optimizer)
                for watch in watches:
                    watch.after(steps + 1, epoch, scaler.get_scale())
                norm = torch.nn.utils.clip_grad_norm_(parameters, spec.clip_grad or math.inf)
                if not torch.isfinite(norm) and not scaler.is_enabled():  # the scaler skips such a step itself
                    raise UserError(_diverged(phase, steps, f"the gradient's norm is {norm.item()}", parts))
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                if average is not None:
                    average.update_parameters(model)
                steps += 1

                meters.last |= {"gradient_norm": norm.item(), "lr": optimizer.param_groups[0]["lr"]}
                advance(meters.details())
                if steps % spec.log_every == 0 or steps == total_steps:
                    log.scalars(phase.name, "train", steps, {"epoch": epoch, **meters.last})
                if steps >= total_steps:
                    break
                if stop.signum is not None:
                    checkpoint(False, opt.random_state())
                    raise Interrupted(stop.signum, phase.checkpoint)

            epoch, batch_index = epoch + 1, 0
            last = epoch >= spec.epochs or steps >= total_steps
            log.scalars(phase.name, "epoch", steps, {"epoch": epoch, **meters.means()})
            if last and average is not None:
                model.load_state_dict(ties.unique_state(average.module), strict=False)
            if best is None:
                checkpoint(last)  # first, so that a fault in the evaluation costs nothing
            if last or epoch % spec.evaluate_every == 0:
                judged = model if last or average is None else average.module
                result = evaluate(judged)
                log.scalars(phase.name, "evaluate", steps, {"epoch": epoch, **result})
                log.say(f"{phase.name} {epoch}/{spec.epochs}  {meters.text()}  {result_text(result)}")
                if best is not None and _score(result) >= best["score"]:
                    best = {"score": _score(result), "epoch": epoch, "model": state.copied(judged)}
            if best is not None and last and best["epoch"] != epoch:
                model.load_state_dict(best["model"], strict=False)
                log.say(f"{phase.name}: kept the weights of {_kept(best['epoch'])}, which did best")
            measure(model if last or average is None else average.module, epoch, last)
            if best is not None:
                checkpoint(last)
            if stop.signum is not None:  # during the last step or the evaluation
                raise Interrupted(stop.signum, phase.checkpoint)
    student_taps.close()
    if teacher_taps:
        teacher_taps.close()
    model.eval()
    result = {"start": start, "kept_epoch": best["epoch"] if best else epoch}
    return result if moments is None else result | {"moments": _moments(model, optimizer)}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The optimiser's state by name of a trained parameter."""
    return {name: dict(optimizer.state.get(p, {})) for name, p in model.named_parameters() if p.requires_grad}


def _give_moments(model: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, dict[str, Any]]) -> None:
    """Put them where the optimiser keeps its own, on the devices of the parameters (a checkpoint's are on the CPU)."""
    names = {id(p): name for name, p in model.named_parameters()}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    known = {i: moments[names[id(p)]] for i, p in enumerate(ordered) if moments.get(names[id(p)])}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": known})


def _score(result: dict[str, Any]) -> float:
    """What `keep: best` compares: the first of top-1, agreement and cosine that the data and the model allow."""
    for name in ("top1", "agreement", "cosine"):
        if result.get(name) is not None:
            return result[name]
    raise UserError(
        "keep=best has nothing to compare: there are no labels, and the outputs of student and teacher differ in width; use keep=last"
    )


def _kept(epoch: int) -> str:
    return f"epoch {epoch}" if epoch else "the start"


def _mix(mixup: Mixup, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """timm's mixup or cutmix on a batch; the targets become (B, classes).

    It pairs images, so an odd one is left out, and a batch of one stays as it is. Images without a label (target −1) are
    left out of a batch that has labels, because they have none to mix; a batch without any label keeps its targets.
    """
    labelled = targets >= 0
    if not labelled.any():
        even = len(images) // 2 * 2
        return (mixup(images[:even], targets[:even].clamp(min=0))[0], targets[:even]) if even else (images, targets)
    images, targets = images[labelled], targets[labelled]
    even = len(images) // 2 * 2
    return mixup(images[:even], targets[:even]) if even else (images, targets)


def _total(terms: Sequence[Term], batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """The weighted sum of the terms, and every term after weighting by name."""
    total: torch.Tensor | None = None
    parts: dict[str, float] = {}
    for term in terms:
        value, extra = term.function(batch)
        weighted = term.weight * value
        total = weighted if total is None else total + weighted
        parts[term.name] = weighted.item()
        parts |= {name: extra_value.item() for name, extra_value in extra.items()}
    assert total is not None, "a phase has at least one term"
    return total, {"loss": total.item(), **parts}


def _diverged(phase: Phase, steps: int, what: str, parts: dict[str, float]) -> str:
    terms = ", ".join(f"{k} {v:.4g}" for k, v in parts.items() if k != "loss")
    kept = (
        f"the last good checkpoint is kept: {phase.checkpoint}"
        if phase.checkpoint.is_file()
        else "no checkpoint had been written"
    )
    return (
        f"{phase.name}: {what} at step {steps + 1} ({terms}); stopped, and {kept}. "
        "Try a smaller lr, a longer warm-up, clip_grad, or precision: fp32"
    )
