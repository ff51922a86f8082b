"""Refuses what cannot work before any process starts, and resolves what the model's configuration decides."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType

import pynvml

from tpmodel.token_files import TokenFileError, read_token
from tpmodel_worker.addresses import split_host_port
from tpmodel_worker.models.config import ConfigError, read_model_config
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor import linux

Flags = Mapping[str, str]
"""What the command line calls a setting, for messages that say what to change."""

SERVE_FLAGS: Flags = MappingProxyType(
    {
        "world_size": "--tp",
        "api_processes": "--api-processes",
        "communicator": "--communicator",
        "drain_timeout": "--drain-timeout",
        "device": "--device",
        "share_devices": "--share-devices",
        "max_model_len": "--max-model-len",
        "persist_updates": "--persist-updates",
    }
)
"""Those of `tpmodel serve`."""

_COMMUNICATORS = {"cpu": ("shared_memory", "gloo"), "cuda": ("nccl",)}
# NCCL refuses two ranks on one GPU.
_SHARED_DEVICES = "gloo"
_LEAST_CONTEXT = 2
"""Tokens: one of a prompt and one of an answer."""

_log = logging.getLogger(__name__)


class ConfigurationError(Exception):
    """The settings cannot work; the message names option and values."""


def check_options(
    settings: ServeSettings, flags: Flags = SERVE_FLAGS, *, count_devices: Callable[[], int] | None = None
) -> ServeSettings:
    """Checks what needs no model; the settings with what terminal and devices decide filled in.

    Raises:
        ConfigurationError: no retry helps.
    """
    if settings.world_size < 1:
        raise ConfigurationError(f"{flags['world_size']} {settings.world_size}: at least 1 rank is needed")
    if settings.api_processes < 1:
        raise ConfigurationError(f"{flags['api_processes']} {settings.api_processes}: at least 1 is needed")
    if not 0 <= settings.drain_timeout < math.inf:
        raise ConfigurationError(f"{flags['drain_timeout']} {settings.drain_timeout}: a number of seconds is needed")
    for flag, targets in (("--kv-from", settings.kv_sources), ("--weights-from", settings.weights_from)):
        for target in targets:
            try:
                split_host_port(target)
            except ValueError as error:
                raise ConfigurationError(f"{flag} {error}, another gang's control port") from error
    _check_trainer_token(settings)
    _check_communicator(settings, flags)
    if check_devices(settings, flags, count_devices=count_devices):
        settings = _share_devices(settings, flags)
    log_format = settings.log_format
    if log_format == "auto":
        # Decided here, since the other processes write to pipes.
        log_format = "text" if sys.stderr.isatty() else "json"
    return dataclasses.replace(settings, log_format=log_format)


def check_model(settings: ServeSettings, flags: Flags = SERVE_FLAGS) -> ServeSettings:
    """Reads the checkpoint's config.json; the settings with what it decides filled in.

    Raises:
        ConfigurationError: no retry helps.
    """
    try:
        model = read_model_config(
            settings.model_path,
            world_size=settings.world_size,
            max_model_len=settings.max_model_len,
            expert_parallel=settings.expert_parallel,
        )
    except ConfigError as error:
        raise ConfigurationError(f"{settings.model_path}: {error}") from error
    if model.max_model_len < _LEAST_CONTEXT:
        flag = flags["max_model_len"]
        raise ConfigurationError(f"{flag} {model.max_model_len}: a prompt and an answer need at least 2")
    return dataclasses.replace(settings, max_model_len=model.max_model_len)


def _check_trainer_token(settings: ServeSettings) -> None:
    """It is read anew for each call; what is wrong with it is said before anything starts."""
    file = settings.trainer_token_file
    if not file:
        if settings.weights_from:
            raise ConfigurationError("--weights-from: --trainer-token-file is needed, by which gangs know each other")
        return
    try:
        token = read_token(file)
    except TokenFileError as error:
        raise ConfigurationError(f"--trainer-token-file {error}") from error
    for others, other in (("the gang's own token", settings.token), ("the clients' API key", settings.api_key)):
        if token == other:
            raise ConfigurationError(f"--trainer-token-file {file}: it holds {others} as well: give trainers another")


def _check_communicator(settings: ServeSettings, flags: Flags) -> None:
    chosen, flag = settings.communicator, flags["communicator"]
    works = _COMMUNICATORS[settings.device]
    if settings.device == "cuda" and settings.share_devices:
        works = (*works, _SHARED_DEVICES)
    if settings.pods > 1:
        works = tuple(name for name in works if name != "shared_memory")
    if chosen not in ("auto", *works):
        where = f"{flags['device']} {settings.device}"
        where += f" with {settings.pods} pods" if settings.pods > 1 else ""
        raise ConfigurationError(f"{flag} {chosen}: {where} has {', '.join(works)}")


def check_devices(
    settings: ServeSettings, flags: Flags = SERVE_FLAGS, *, count_devices: Callable[[], int] | None = None
) -> bool:
    """Whether ranks have to share CUDA devices; warns of more ranks than cores.

    Raises:
        ConfigurationError: there are more ranks than CUDA devices, and sharing them was not asked for.
    """
    ranks = len(settings.ranks_here)
    if settings.device == "cpu":
        cores = linux.available_cores()
        if ranks > cores:
            _log.warning("%d ranks share %d cores: they will wait for each other", ranks, cores)
        return False
    devices = (count_devices or count_cuda_devices)()
    if ranks <= devices:
        return False
    if settings.share_devices and devices > 0:
        return True
    flag = flags["ranks_per_pod" if settings.pods > 1 else "world_size"]
    message = f"{flag} {ranks}: more ranks than the {devices} CUDA devices here"
    if devices > 0 and "share_devices" in flags:
        message += f"; {flags['share_devices']} lets them share (slow, for development)"
    raise ConfigurationError(message)


def _share_devices(settings: ServeSettings, flags: Flags) -> ServeSettings:
    if settings.communicator not in ("auto", _SHARED_DEVICES):
        flag, sharing = flags["communicator"], flags["share_devices"]
        raise ConfigurationError(
            f"{flag} {settings.communicator}: it takes one rank on a GPU; with {sharing} write {flag} {_SHARED_DEVICES}"
        )
    _log.warning("ranks share CUDA devices, and all they exchange goes through host memory: this is slow")
    return dataclasses.replace(settings, communicator=_SHARED_DEVICES)


def count_cuda_devices() -> int:
    """CUDA devices that a process started from here sees; makes no CUDA context.

    Raises:
        ConfigurationError: there is no usable NVIDIA driver.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise ConfigurationError(f"--device cuda: no usable NVIDIA driver on this machine ({error})") from error
    try:
        present = int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    return min(present, len([entry for entry in chosen.split(",") if entry.strip() not in ("", "-1")]))
