"""fla-core's kernel for whole chunks of the gated delta rule, where it is installed.

fla-core times some sixty variants of its kernels at the first call with each shape, which takes a minute or two while a
prompt waits. One of each that suits Hopper and Ampere GPUs is chosen here instead.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

_LOGGER = logging.getLogger(__name__)

_VARIANTS: Mapping[tuple[str, str], Mapping[str, int]] = MappingProxyType(
    {
        ("fla.ops.common.chunk_delta_h", "chunk_gated_delta_rule_fwd_kernel_h_blockdim64"): {
            "BV": 32,
            "num_warps": 4,
            "num_stages": 2,
        },
        ("fla.ops.common.chunk_o", "chunk_fwd_kernel_o"): {"BK": 64, "BV": 64, "num_warps": 4},
        ("fla.ops.gated_delta_rule.chunk_fwd", "chunk_gated_delta_rule_fwd_kkt_solve_kernel"): {
            "BK": 64,
            "num_warps": 2,
        },
        ("fla.ops.gated_delta_rule.wy_fast", "recompute_w_u_fwd_kernel"): {"num_warps": 4, "num_stages": 3},
        ("fla.ops.utils.cumsum", "chunk_local_cumsum_scalar_kernel"): {"num_warps": 2},
        ("fla.modules.norm.l2norm", "l2norm_fwd_kernel"): {"BT": 16, "num_warps": 4},
    }
)
"""For each kernel that a prompt runs, by module and name: the variant, as its configuration says."""


@functools.cache
def chunk_kernel() -> Callable[..., Any] | None:
    """fla-core's chunk_gated_delta_rule; None, and a line in the log, where it is not installed."""
    try:
        module = importlib.import_module("fla.ops.gated_delta_rule")
    except ModuleNotFoundError as error:
        _LOGGER.warning(
            "prompts of linear-attention layers are computed in plain torch, which is slower: %s; install fla-core as "
            "requirements/torch.txt has it",
            error,
        )
        return None
    for (module_name, kernel_name), wanted in _VARIANTS.items():
        kernel = getattr(importlib.import_module(module_name), kernel_name)
        # What chooses among variants is wrapped in what derives constants from arguments.
        while not hasattr(kernel, "configs"):
            kernel = kernel.fn
        kernel.configs = [_variant(kernel.configs, wanted)]
    return module.chunk_gated_delta_rule


def _variant(configurations: list[Any], wanted: Mapping[str, int]) -> Any:
    """The wanted one; the first, if there is none like that for this GPU."""
    for configuration in configurations:
        if all(configuration.all_kwargs().get(name) == value for name, value in wanted.items()):
            return configuration
    return configurations[0]
