"""`tpmodel-operator`: the command that runs in the operator's pods."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from typing import Literal, NoReturn

import click

from tpmodel_operator import logs
from tpmodel_operator.kube import Kube
from tpmodel_operator.lease import Leadership
from tpmodel_operator.metrics import Metrics
from tpmodel_operator.probes import Health, serving
from tpmodel_operator.runtime import Runtime
from tpmodel_operator.settings import OperatorSettings

logger = logging.getLogger(__name__)

FINISH_SECONDS = 20.0
"""For passes under way, when the process is asked to stop."""

OK = 0
FAILED = 1


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--default-image", default="", help="Worker image of TPModels that name none.")
@click.option("--allowed-host-path", multiple=True, help="Prefix under which TPModels may name a hostPath; repeatable.")
@click.option("--watch-namespace", multiple=True, help="Serve only this namespace; repeatable. Default: all.")
@click.option("--monitoring-namespace", multiple=True, help="May reach pods' metrics and health ports; repeatable.")
@click.option("--namespace", envvar="POD_NAMESPACE", default="default", help="Where the operator runs.")
@click.option("--pod-name", envvar="POD_NAME", help="Identity in the leader election; unique. Default: made up.")
@click.option("--health-port", default=8080, show_default=True, help="/healthz and /readyz.")
@click.option("--metrics-port", default=8081, show_default=True, help="/metrics.")
@click.option("--log-format", type=click.Choice(["auto", "json", "text"]), default="auto", show_default=True)
@click.option("--resync-seconds", default=600.0, show_default=True, help="Longest time between passes of a TPModel.")
@click.option("--workers", default=16, show_default=True, help="Passes at once.")
@click.version_option(package_name="tpmodel")
def main(
    *,
    default_image: str,
    allowed_host_path: tuple[str, ...],
    watch_namespace: tuple[str, ...],
    monitoring_namespace: tuple[str, ...],
    namespace: str,
    pod_name: str | None,
    health_port: int,
    metrics_port: int,
    log_format: Literal["auto", "json", "text"],
    resync_seconds: float,
    workers: int,
) -> None:
    """Turns TPModels into gangs of pods and keeps them so. Run two: one works, the other takes over."""
    logs.configure(log_format)
    settings = OperatorSettings(
        default_image=default_image,
        namespace=namespace,
        pod_name=pod_name or f"{socket.gethostname()}-{os.getpid()}",
        allowed_host_paths=allowed_host_path,
        watch_namespaces=watch_namespace,
        monitoring_namespaces=monitoring_namespace,
        health_port=health_port,
        metrics_port=metrics_port,
        resync_seconds=resync_seconds,
        workers=workers,
    )
    raise SystemExit(asyncio.run(run(settings)))


async def run(settings: OperatorSettings) -> int:
    """The whole life of the process; returns its exit code."""
    metrics, health = Metrics(), Health()
    kube = await Kube.connect(metrics)
    stop = asyncio.Event()
    _take_signals(stop)
    ports = {"health_port": settings.health_port, "metrics_port": settings.metrics_port}
    async with serving(health, metrics, **ports):
        try:
            return await _elect_and_lead(kube, settings, metrics=metrics, health=health, stop=stop)
        finally:
            await kube.close()


async def _elect_and_lead(
    kube: Kube, settings: OperatorSettings, *, metrics: Metrics, health: Health, stop: asyncio.Event
) -> int:
    leadership = Leadership(kube, namespace=settings.namespace, identity=settings.pod_name)
    stopped = asyncio.create_task(stop.wait(), name="signal")
    election = asyncio.create_task(leadership.acquire(), name="election")
    await asyncio.wait([stopped, election], return_when=asyncio.FIRST_COMPLETED)
    if not election.done():
        election.cancel()
        return OK
    await election
    metrics.leader.set(1)
    keeping = asyncio.create_task(leadership.keep(), name="Lease")
    runtime = Runtime(
        kube,
        settings,
        metrics=metrics,
        health=health,
        permit=leadership.check,
        take_signals=lambda: _take_signals(stop),
    )
    running = asyncio.create_task(runtime.run(), name="operator")
    await asyncio.wait([stopped, keeping, running], return_when=asyncio.FIRST_COMPLETED)
    if keeping.done():
        _die(keeping)
    failure = running.exception() if running.done() else None
    graceful = failure is None
    if not graceful:
        logger.error("stopping, since a part has ended", exc_info=failure)
    await runtime.finish_passes(FINISH_SECONDS if graceful else 0)
    keeping.cancel()
    await leadership.release()
    metrics.leader.set(0)
    logger.info("stopped")
    running.cancel()
    await runtime.close()
    return OK if graceful else FAILED


def _take_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


def _die(keeping: asyncio.Task[NoReturn]) -> NoReturn:
    """At once: a request that is sent from here on might undo what the new leader does."""
    logger.critical("the Lease is lost: %s", keeping.exception())
    os._exit(FAILED)
