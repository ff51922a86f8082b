"""`kubectl tpmodel`: a plugin of kubectl that shows TPModels as gangs of pods, and talks to them.

kubectl finds it as the program kubectl-tpmodel in PATH. It reaches the cluster by running kubectl itself.
"""

from __future__ import annotations

import signal
import sys

import click

from tpmodel.kubectl.connection import connection_options
from tpmodel.kubectl.generate import generate
from tpmodel.kubectl.listing import list_models
from tpmodel.kubectl.logs import logs
from tpmodel.kubectl.port_forward import port_forward
from tpmodel.kubectl.status import status


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tpmodel")
@connection_options
def commands() -> None:
    """Show TPModels with their gangs and pods, read their logs, and talk to them."""


for _command in (status, list_models, logs, generate, port_forward):
    commands.add_command(_command)


def main() -> None:
    """Entry point; ends the process."""
    # In order, so that no kubectl is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    commands(prog_name="kubectl tpmodel")
