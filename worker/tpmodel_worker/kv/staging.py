"""Memory for the tensors of a pipe, used again: fresh memory costs a page fault for every 4 KiB on the CPU."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

_KEPT = 4
"""Tensors that wait for their next use. No more than that are under way where the pipe's limits are well chosen."""


@dataclass(frozen=True, slots=True, eq=False)
class _Free:
    tensor: torch.Tensor
    used: torch.cuda.Event | None
    """The end of what its last user has launched on it."""


class Staging:
    """Tensors of one device. From any thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._free: list[_Free] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of undefined content, for work on the current stream of the device.

        Raises:
            RuntimeError: there is no memory for it.
        """
        with self._lock:
            fits = (free for free in self._free if free.tensor.shape == shape and free.tensor.dtype == dtype)
            found = next(fits, None)
            if found is not None:
                self._free.remove(found)
        if found is None:
            return torch.empty(shape, dtype=dtype, device=self._device)
        if found.used is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(found.used)
            # It may have been made for another stream, which it then outlives.
            found.tensor.record_stream(stream)
        return found.tensor

    def give_back(self, tensor: torch.Tensor, used: torch.cuda.Event | None) -> None:
        """Takes back what take gave. used: on CUDA, the end of all work that was launched on it."""
        with self._lock:
            self._free.append(_Free(tensor, used))
            del self._free[:-_KEPT]

    def clear(self) -> None:
        """Gives the memory back that nobody uses."""
        with self._lock:
            self._free.clear()


def now_on(device: torch.device) -> torch.cuda.Event | None:
    """What is launched on the current stream of a device so far; None on the CPU, where everything is done."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
