"""Small integer arrays on their way to the device, and tensors on their way back, without making the host wait."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """1-D int64 arrays as tensors on the device, in one copy.

    On the CPU the tensors share the arrays' memory where they are contiguous.
    """
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    # torch's allocator of pinned memory hands a buffer out again only after the copy out of it is done.
    buffer = torch.empty(sum(len(array) for array in arrays), dtype=torch.int64, pin_memory=True)
    np.concatenate(arrays, out=buffer.numpy())
    return list(buffer.to(device, non_blocking=True).split([len(array) for array in arrays]))


class HostCopy:
    """A tensor's copy in host memory, under way since construction."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cpu":
            self._host = tensor
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        # blocking: the waiting thread sleeps, instead of taking a core from the one that launches.
        self._event = torch.cuda.Event(blocking=True)
        self._event.record()

    def wait(self) -> np.ndarray:
        """The values, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()
