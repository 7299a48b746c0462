"""The memory that a model needs for inference."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


@torch.inference_mode()
def inference_memory(model: nn.Module, input_size: tuple[int, int, int], device: torch.device) -> int:
    """Bytes of a model's weights, and the most that the tensors of a forward pass of one image take at once.

    On CUDA, CUDA's own count of what is allocated. Elsewhere the tensors that operations return are counted, from when they are returned
    until they are freed. That is what torch's profiler sees of the CPU's allocator on ViT-S, ViT-B and Swin-T, to the byte; what an
    operation needs only within itself, and the library with its threads, is not in it.

    Args:
        model: on `device`, in eval mode.
        input_size: (C, H, W) of its image.
    """
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    image = torch.zeros(1, *input_size, device=device, dtype=dtype)
    if device.type == "cuda":
        model(image)  # libraries keep what they allocate for the first
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        model(image)
        return weights + torch.cuda.max_memory_allocated(device) - before
    with _Allocated([*tensors, image]) as allocated:
        model(image)
    return weights + allocated.most


class _Allocated(TorchDispatchMode):
    """Counts the bytes of tensors that operations return, each storage once.

    Args:
        known: tensors that are there before.
    """

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.most = self._now = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = operation(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(returned):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return returned

    def _see(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._now -= size
