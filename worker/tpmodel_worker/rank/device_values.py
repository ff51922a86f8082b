"""Host numbers to the device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def device_values(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A 1-D tensor of the values on the device. The copy is queued on the current stream, and nothing waits for it."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cpu":
        return tensor
    # Copies out of pageable memory would wait for all that is queued.
    return tensor.pin_memory().to(device, non_blocking=True)
