"""The moving average of the weights: what is evaluated and kept, and how its decay rises."""

from __future__ import annotations

from helpers.images import side
from helpers.training import CPU, Heard, distance, largest_difference, random_batches, tiny_vit, values

from compressvit.files import load_checkpoint
from compressvit.training.loop import Phase, train
from compressvit.training.phases.finetune import Finetune
from compressvit.training.terms import labels_term
from compressvit.transforms.applying import compress
from compressvit.transforms.multiplex import Multiplex


def test_the_average_is_what_is_evaluated_and_kept(tmp_path):
    model = compress(tiny_vit(), [Multiplex(share=2)])  # a shared tensor must count once a step, not once a use
    decay, expected, evaluated = 0.7, {}, []

    class Watching(Heard):
        def scalars(self, phase, kind, step, line):
            super().scalars(phase, kind, step, line)
            if kind == "train":
                now = values(model)
                rate = min(decay, (1 + len(steps)) / (10 + len(steps))) if steps else 0.0  # 0, 2/11, 3/12, …
                for name, tensor in now.items():
                    expected.setdefault(name, tensor)
                    expected[name] = rate * expected[name] + (1 - rate) * tensor
                steps.append(now)

    steps = []
    log = Watching()
    train(
        side(model),
        Finetune(epochs=2, lr=1e-2, ema=decay, log_every=1),
        Phase("phase", 1, 0, tmp_path / "phase.pt"),
        [labels_term(1.0, 0.0)],
        random_batches(3, 4),
        batch_size=4,
        device=CPU,
        log=log,
        evaluate=lambda m: evaluated.append((m is model, largest_difference(values(m), expected))) or {},
    )
    log.close()
    assert len(steps) == 6
    assert [own for own, _ in evaluated] == [False, True]
    assert max(difference for _, difference in evaluated) < 1e-6  # measured 2e-7
    kept = load_checkpoint(tmp_path / "phase.pt")["model"]
    assert largest_difference(values(model), expected) < 1e-6
    assert largest_difference(kept, values(model)) == 0
    assert largest_difference(kept, steps[-1]) > 5e-4  # not the weights of the last step; measured 9e-4
    assert model.blocks[0].attn.qkv.weight is model.blocks[1].attn.qkv.weight


def test_an_average_of_few_steps_is_near_the_weights(tmp_path):
    """The decay rises with the updates: with a constant 0.9999 the average of 40 steps would still be the first step's weights."""
    model, start = tiny_vit(), values(tiny_vit())
    steps = []

    class Watching(Heard):
        def scalars(self, phase, kind, step, line):
            super().scalars(phase, kind, step, line)
            if kind == "train":
                steps.append(values(model))

    log = Watching()
    spec = Finetune(epochs=10, lr=1e-3, ema=0.9999, log_every=1)
    loader = random_batches(4, 4)
    phase = Phase("phase", 1, 0, tmp_path / "phase.pt")
    train(
        side(model),
        spec,
        phase,
        [labels_term(1.0, 0.0)],
        loader,
        batch_size=4,
        device=CPU,
        log=log,
        evaluate=lambda m: {},
    )
    log.close()
    assert len(steps) == 40
    moved = distance(steps[-1], start)
    assert distance(values(model), steps[-1]) < 0.2 * moved
    text = " ".join(log.console.file.getvalue().split())
    assert (
        "40 updates are few for an average of the weights with ema 0.9999; its decay rises with them, to 0.82" in text
    )
