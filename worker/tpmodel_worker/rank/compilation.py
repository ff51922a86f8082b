"""Makes Ping say that the rank compiles a kernel, which extends the step deadline."""

from __future__ import annotations

from typing import Any

from tpmodel_worker.rank.status import StatusBoard

_LONGEST_SECONDS = 120.0


def announce_compilations(status: StatusBoard) -> None:
    """From now on every compilation by Triton in this process shows as busy. Needs Triton, so a CUDA device."""
    from triton import knobs

    def begins(**compilation: Any) -> bool:
        status.busy(f"compiling {compilation['fn'].name}", _LONGEST_SECONDS)
        return False  # True would skip the compilation.

    def ended(**_compilation: Any) -> None:
        status.not_busy()

    knobs.runtime.jit_cache_hook = begins
    knobs.runtime.jit_post_compile_hook = ended
