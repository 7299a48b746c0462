"""Several processes of one run, as a launcher starts them, forked from this one so that nothing is imported again."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# The first backward pass of a process starts threads for the devices that torch knows, after a torch.export also without a GPU; a forked
# process could then have no backward pass. Here, when tests are collected, no program has been exported yet.
torch.ones((), requires_grad=True).backward()

_WAIT = 120  # seconds, after which processes are said to hang


def together(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What a function returns in each of `count` processes, None of one that has left. An exception there fails the test."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        running = [
            fork.Process(target=_process, args=(rank, count, port, Path(folder), function, args))
            for rank in range(count)
        ]
        free.close()
        for process in running:
            process.start()
        for process in running:
            process.join(_WAIT)
        hanging = [rank for rank, process in enumerate(running) if process.is_alive()]
        for process in running:
            process.kill()
            process.join()
        assert not hanging, f"processes {hanging} of {count} hang"
        assert not any(process.exitcode for process in running), "one of them failed, and printed why"
        files = [Path(folder) / str(rank) for rank in range(count)]
        return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _process(
    rank: int, count: int, port: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launcher.items()})
    torch.save(function(*args), folder / str(rank))
