"""`kubectl tpmodel logs`: what the pods of a model's gangs write, each line with its pod's name."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import Empty, Queue

import click

from tpmodel.kubectl import problems
from tpmodel.kubectl.connection import connection_options
from tpmodel.kubectl.interrupts import until_interrupted
from tpmodel.kubectl.kubectl import Kubectl, with_kubectl
from tpmodel.kubectl.lookup import choose_gang, find_model
from tpmodel.kubectl.names import CONTAINER
from tpmodel.kubectl.pods import PodView
from tpmodel.kubectl.problems import KubectlError
from tpmodel.kubectl.view import ModelView

LOOK_SECONDS = 2.0
MOST_FOLLOWED = 64
"""Each is a kubectl process and a connection."""

_NO_PREVIOUS = "previous terminated container"
ALL_LINES = "--tail=-1"

Life = tuple[str, int]
"""A container's run: its pod's UID, and how often it was started again before."""


@click.command()
@click.argument("model")
@click.option("--gang", default=None, metavar="N", help="Of this gang only, by number or name.")
@click.option("--pod", default=None, metavar="I", help="Of these pods only: 0 is each gang's leader pod.", type=int)
@click.option("-f", "--follow", is_flag=True, help="Go on until Ctrl-C, also with pods that come later.")
@click.option("-p", "--previous", is_flag=True, help="Of the containers before their last restart.")
@click.option("--tail", type=click.IntRange(min=0), default=None, metavar="LINES", help="Only the last of each pod.")
@connection_options
@with_kubectl
def logs(
    kubectl: Kubectl,
    model: str,
    gang: str | None,
    pod: int | None,
    follow: bool,
    previous: bool,
    tail: int | None,
) -> None:
    """Print what the pods of MODEL write, each line with its pod's name."""
    if follow and previous:
        raise click.UsageError("--previous ends by itself: leave --follow out")
    options = [ALL_LINES if tail is None else f"--tail={tail}", *(["--previous"] if previous else [])]

    def look() -> list[PodView]:
        return chosen(find_model(kubectl, model), gang=gang, index=pod)

    if not follow:
        print_once(kubectl, look(), options)
        return
    with until_interrupted():
        Follower(kubectl, look, options).run()


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a pod's log, or what is to be said about it."""

    pod: str
    text: str
    is_complaint: bool = False
    is_failure: bool = False
    """The complaint is about a log that should be there."""

    def print(self) -> None:
        """With the pod's name."""
        click.echo(
            f"{self.pod}: {self.text}" if self.is_complaint else f"[{self.pod}] {self.text}", err=self.is_complaint
        )


def chosen(model: ModelView, *, gang: str | None, index: int | None) -> list[PodView]:
    """The pods that the options name.

    Raises:
        KubectlError: there is none.
    """
    one = choose_gang(model, gang)
    pods = [
        pod
        for candidate in (model.gangs if one is None else (one,))
        for pod in candidate.pods
        if index is None or pod.index == index
    ]
    if not pods:
        what = f"pod {index}" if index is not None else "pods"
        where = f"gang {one.index} of {model.full_name}" if one is not None else model.full_name
        why = f": {model.problem}" if model.problem else ""
        raise KubectlError(f"{where} has no {what}{why}")
    return pods


def print_once(kubectl: Kubectl, pods: Iterable[PodView], options: list[str]) -> None:
    """One pod after the other. Those without such a log are named; it is an error only if all are.

    Raises:
        KubectlError: no pod has such a log, or one that should be there cannot be read.
    """
    pods = list(pods)
    complaints: list[Line] = []
    for pod in pods:
        lines = read(pod, _open(kubectl, pod, options)) if pod.started else [_no_log(pod)]
        for line in lines:
            line.print()
            if line.is_complaint:
                complaints.append(line)
    if len(complaints) == len(pods):
        raise KubectlError("no pod has such a log")
    if any(line.is_failure for line in complaints):
        raise KubectlError("not all logs could be read")


def _no_log(pod: PodView) -> Line:
    return Line(pod.name, f"its container has not started: {pod.state}", is_complaint=True)


class Follower:
    """Follows the logs of all pods that there are, and of those that come."""

    def __init__(self, kubectl: Kubectl, look: Callable[[], list[PodView]], options: list[str]) -> None:
        """look: the pods as they are now. options: for the logs of the first look's pods."""
        self._kubectl = kubectl
        self._look = look
        self._options = options
        self._followed: set[Life] = set()
        self._running: list[subprocess.Popen[str]] = []
        self._lines: Queue[Line] = Queue()

    def run(self, *, look_seconds: float = LOOK_SECONDS) -> None:
        """Until it is interrupted.

        Raises:
            KubectlError: the first look fails, or sees too many pods.
        """
        pods = self._look()
        if len(pods) > MOST_FOLLOWED:
            raise KubectlError(f"{len(pods)} pods are too many to follow: give --gang or --pod")
        try:
            self._attach(pods, self._options)
            while True:
                self._print_for(look_seconds)
                try:
                    self._attach(self._look(), [ALL_LINES])
                except KubectlError as error:
                    click.echo(f"Error: {error.message}", err=True)
        finally:
            for process in self._running:
                process.terminate()

    def _attach(self, pods: list[PodView], options: list[str]) -> None:
        """To containers that are new; without room for all of them, to the others once there is."""
        self._running = [process for process in self._running if process.poll() is None]
        new = [pod for pod in pods if pod.started and (pod.uid, pod.restarts) not in self._followed]
        for pod in new[: MOST_FOLLOWED - len(self._running)]:
            self._followed.add((pod.uid, pod.restarts))
            process = _open(self._kubectl, pod, [*options, "--follow"])
            self._running.append(process)
            threading.Thread(target=self._read, args=(pod, process), daemon=True).start()

    def _read(self, pod: PodView, process: subprocess.Popen[str]) -> None:
        for line in read(pod, process):
            self._lines.put(line)

    def _print_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(Empty):
                self._lines.get(timeout=left).print()


def read(pod: PodView, process: subprocess.Popen[str]) -> Iterator[Line]:
    """What `kubectl logs` writes, then its complaint, if it has one."""
    assert process.stdout is not None
    assert process.stderr is not None
    errors: list[str] = []
    # Beside it, since a full pipe would stop kubectl.
    reader = threading.Thread(target=errors.extend, args=(process.stderr,), daemon=True)
    reader.start()
    for text in process.stdout:
        yield Line(pod.name, text.rstrip("\n"))
    code = process.wait()
    reader.join(5)
    if code > 0:
        message = problems.explain("".join(errors)).message
        yield Line(pod.name, message, is_complaint=True, is_failure=_NO_PREVIOUS not in message)


def _open(kubectl: Kubectl, pod: PodView, options: list[str]) -> subprocess.Popen[str]:
    return kubectl.open("logs", pod.name, f"--container={CONTAINER}", *options)
