"""Launching Triton kernels at less cost on the host.

Triton looks at its settings, binds arguments by name and describes each of them anew at every launch, which takes tens
of microseconds; a step of few tokens has hundreds of launches. Here a kernel that was launched before is found by what
its machine code depends on, and its launcher is called as Triton calls it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

Argument = torch.Tensor | int | float

_ALIGNMENT = 16
"""Triton compiles a kernel anew where an address or a whole number is no multiple of it."""
_INT32_END = 1 << 31


class KernelLauncher:
    """Put over triton.jit, where a kernel's constants (tl.constexpr) are its last parameters."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._launchers: dict[Hashable, tuple[Any, Any, Any]] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        *arguments: Argument,
        constants: tuple[int | bool, ...],
        warps: int = 4,
        stages: int = 3,
    ) -> None:
        """Launches on the current stream of the first argument's device, a tensor.

        Args:
            grid: programs, in up to three dimensions.
            arguments: in the order of the kernel's parameters; tensors, whole numbers and real ones.
            constants: the values of the parameters after them.
            warps: num_warps.
            stages: num_stages.
        """
        device = arguments[0].device.index  # pyright: ignore[reportAttributeAccessIssue]
        kinds: list[Hashable] = [device, constants, warps, stages]
        values: list[int | float] = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                # The launcher would ask the driver about a tensor's address; a plain one it takes as it is.
                argument, dtype = argument.data_ptr(), argument.dtype
                kinds += (dtype, argument % _ALIGNMENT == 0)
            elif isinstance(argument, int):
                kinds.append((argument == 1, argument % _ALIGNMENT == 0, -_INT32_END <= argument < _INT32_END))
            values.append(argument)
        key = tuple(kinds)
        launcher = self._launchers.get(key)
        if launcher is None:
            compiled = self._kernel[grid](*arguments, *constants, num_warps=warps, num_stages=stages)
            if compiled is not None:
                self._launchers[key] = (compiled.run, compiled.function, compiled.packed_metadata)
            return
        run, function, metadata = launcher
        first, second, third = (*grid, 1, 1)[:3]
        stream = torch._C._cuda_getCurrentRawStream(device)
        # No metadata and no hooks: those are for profilers.
        run(first, second, third, stream, function, metadata, None, None, None, *values, *constants)


def power_of_two(size: int) -> int:
    """The least one that is not below size, as Triton's ranges need."""
    return 1 << (size - 1).bit_length()


def tiles(size: int, tile: int) -> int:
    """How many tiles cover a size."""
    return -(-size // tile)
