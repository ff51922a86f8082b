"""The `tpmodel` command."""

from __future__ import annotations

import click

from tpmodel.cli.bench import bench
from tpmodel.cli.chat import chat
from tpmodel.cli.generate import generate
from tpmodel.cli.rebuild import rebuild
from tpmodel.cli.serve import serve
from tpmodel.cli.status import status


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tpmodel")
def main() -> None:
    """Serve a large language model over several GPUs, and talk to it."""


for command in (serve, generate, chat, status, rebuild, bench):
    main.add_command(command)
