"""What the processes of a launcher do together, and what they are told."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from helpers.runs import run
from helpers.together import together
from helpers.training import tiny_vit

from compressvit import processes
from compressvit.data.input import input_config
from compressvit.data.loaders import eval_loader, train_loader
from compressvit.data.opening import open_data
from compressvit.data.spec import Data

CPU = torch.device("cpu")


def test_batches_of_all_together_are_those_of_one():
    data = Data(name="digits", batch_size=10, limit_train=45, limit_val=23)
    half = data.model_copy(update={"batch_size": 5})

    def batches(data):
        with processes.joined():
            torch.manual_seed(0)
            datasets = open_data(data)
            config = input_config(tiny_vit(), data)
            train = [set(map(bytes, images.numpy())) for images, _ in train_loader(datasets, data, config, CPU)]
            divided = processes.count() > 1
            held_out = [len(images) for images, _ in eval_loader(datasets, data, config, CPU, distributed=divided)]
            return train, held_out

    whole, counts = batches(data)
    (one, first), (two, second) = together(2, batches, half)
    assert len(whole) == len(one) == len(two) == 4
    assert all(a | b == both and not a & b for both, a, b in zip(whole, one, two, strict=True))
    assert (counts, first, second) == ([10, 10, 3], [5, 5, 3], [5, 5])


def test_what_the_leader_does_alone_reaches_all():
    def calls():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
        with processes.joined():
            seen = []
            value = processes.led(lambda: seen.append(processes.count()) or {"of": processes.place()})
            mine = processes.led_for(lambda: "made", "given")
            firsts = processes.first(lambda: processes.count())
            with pytest.raises(ValueError if processes.leads() else processes.ToldElsewhere):
                processes.led(lambda: [].index(0))
            with pytest.raises(KeyboardInterrupt) as stop:
                processes.led(lambda: os.kill(os.getpid(), signal.SIGINT) or signal.sigwait([]))
            return seen, value, mine, firsts, stop.value.args, processes.gathered(processes.rank())

    one, two = together(2, calls)
    assert one == ([1], {"of": 0}, "made", 1, (), [0, 1])
    assert two == ([], {"of": 0}, "given", 1, (signal.SIGINT,), [0, 1])


def test_sums_and_signals_are_of_all():
    def calls():
        with processes.joined():
            rank = processes.rank()
            true = torch.tensor(rank != 1)
            buffer = torch.tensor([float(rank)])
            processes.alike([buffer])
            rows = [{"loss": 2.0 * rank}, {"loss": 1.0, **({"top1": 50.0} if rank == 1 else {})}]
            return processes.means(rows), processes.any_of(rank), bool(processes.everywhere(true)), buffer.item()

    # a value that only some have, e.g. the accuracy where others' batches have no label, is the mean of those
    assert together(3, calls) == [([{"loss": 2.0}, {"loss": 1.0, "top1": 50.0}], 2, False, 0.0)] * 3


@pytest.mark.parametrize(
    ("set_", "lacking"), [({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT"), ({"WORLD_SIZE": "two"}, "no number")]
)
def test_a_launcher_that_tells_too_little(set_, lacking, monkeypatch, tmp_path):
    for name, value in set_.items():
        monkeypatch.setenv(name, value)
    code, _, err = run("apply", "quickstart", "--output", tmp_path / "run")
    assert code == 2
    assert lacking in err
    assert not (tmp_path / "run").exists()
