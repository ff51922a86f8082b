"""Command line of an api process."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path

from tpmodel_worker import logs
from tpmodel_worker.api.metrics import use_metrics_dir
from tpmodel_worker.api.model import ServedModel
from tpmodel_worker.exit_codes import ExitCode
from tpmodel_worker.models.config import ConfigError
from tpmodel_worker.settings import ServeSettings

logger = logging.getLogger(__name__)


def main() -> None:
    """Serves until SIGTERM or SIGINT; exits with 0, or with 64 for a checkpoint that no retry helps."""
    parser = argparse.ArgumentParser(prog="python -m tpmodel_worker.api")
    parser.add_argument("--settings-file", type=Path, required=True)
    parser.add_argument("--index", type=int, required=True, help="which of the pod's api processes this is, from 0")
    arguments = parser.parse_args()
    settings = ServeSettings.from_json(arguments.settings_file.read_text(encoding="utf-8"))
    name = f"api {arguments.index}"
    logs.configure(name, settings.log_format)
    try:
        model = ServedModel.load(settings)
    except ConfigError as error:
        logger.error("%s", error)
        sys.exit(ExitCode.CONFIGURATION)

    # Its imports load prometheus_client, which reads its environment at that moment.
    use_metrics_dir(settings.metrics_dir)
    from tpmodel_worker.api.server import serve

    asyncio.run(serve(model, name))
