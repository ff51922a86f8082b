"""Refuses what cannot work before any process starts, and resolves what the model's configuration decides."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
from collections.abc import Callable

import pynvml

from tpmodel_worker.models.config import ConfigError, read_model_config
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor import linux

_COMMUNICATORS = {"cpu": ("shared_memory", "gloo"), "cuda": ("nccl",)}
_LEAST_CONTEXT = 2
"""Tokens: one of a prompt and one of an answer."""

_log = logging.getLogger(__name__)


class ConfigurationError(Exception):
    """The settings cannot work; the message names option and values."""


def check_settings(settings: ServeSettings) -> ServeSettings:
    """The settings with what config.json and the terminal decide filled in.

    Raises:
        ConfigurationError: no retry helps.
    """
    if settings.world_size < 1:
        raise ConfigurationError(f"--tp {settings.world_size}: at least 1 rank is needed")
    if settings.api_processes < 1:
        raise ConfigurationError(f"{settings.api_processes} api processes: at least 1 is needed")
    if not 0 <= settings.drain_timeout < math.inf:
        raise ConfigurationError(f"--drain-timeout {settings.drain_timeout}: a number of seconds is needed")
    if settings.communicator not in ("auto", *_COMMUNICATORS[settings.device]):
        works = ", ".join(_COMMUNICATORS[settings.device])
        raise ConfigurationError(f"--communicator {settings.communicator}: --device {settings.device} has {works}")
    try:
        model = read_model_config(
            settings.model_path, world_size=settings.world_size, max_model_len=settings.max_model_len
        )
    except ConfigError as error:
        raise ConfigurationError(f"{settings.model_path}: {error}") from error
    if model.max_model_len < _LEAST_CONTEXT:
        raise ConfigurationError(f"--max-model-len {model.max_model_len}: a prompt and an answer need at least 2")
    check_devices(settings)
    log_format = settings.log_format
    if log_format == "auto":
        # Decided here, since the other processes write to pipes.
        log_format = "text" if sys.stderr.isatty() else "json"
    return dataclasses.replace(settings, max_model_len=model.max_model_len, log_format=log_format)


def check_devices(settings: ServeSettings, *, count_devices: Callable[[], int] | None = None) -> None:
    """Raises ConfigurationError when there are more ranks than CUDA devices; warns of more ranks than cores."""
    if settings.device == "cpu":
        cores = linux.available_cores()
        if settings.world_size > cores:
            _log.warning("%d ranks share %d cores: they will wait for each other", settings.world_size, cores)
        return
    devices = (count_devices or count_cuda_devices)()
    if settings.world_size > devices:
        raise ConfigurationError(f"--tp {settings.world_size}: more ranks than the {devices} CUDA devices here")


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
