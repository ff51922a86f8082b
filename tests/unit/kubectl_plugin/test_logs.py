"""`kubectl tpmodel logs`, with a stand-in for kubectl."""

from __future__ import annotations

import pytest
from click.testing import CliRunner, Result

from support import operator_cluster
from support.operator_cluster import Cluster
from support.plugin_objects import model_json, pods_json, view
from support.stand_in_kubectl import StandInKubectl
from tpmodel.kubectl import commands
from tpmodel.kubectl.connection import Connection
from tpmodel.kubectl.kubectl import Kubectl
from tpmodel.kubectl.logs import ALL_LINES, Follower, chosen
from tpmodel.kubectl.pods import PodView
from tpmodel.kubectl.problems import KubectlError

NO_PREVIOUS = 'Error from server (BadRequest): previous terminated container "worker" in pod "p" not found\n'


@pytest.fixture
def cluster(kubectl: StandInKubectl) -> Cluster:
    """Two gangs of two pods, each of which has logged one line."""
    cluster = operator_cluster.serving(replicas=2)
    kubectl.has(model_json(cluster), pods_json(cluster))
    for pod in cluster.pods.values():
        kubectl.answer("logs", pod.name, output=f"line of {pod.name}\n")
    return cluster


def run(*arguments: str) -> Result:
    return CliRunner().invoke(commands, ["logs", "m", *arguments], catch_exceptions=False)


def names(cluster: Cluster, *places: tuple[int, int]) -> list[str]:
    return [cluster.pod(index, gang).name for gang, index in places]


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ([], [(0, 0), (0, 1), (1, 0), (1, 1)]),
        (["--gang", "1"], [(1, 0), (1, 1)]),
        (["--pod", "0"], [(0, 0), (1, 0)]),
        (["--gang=0", "--pod=1"], [(0, 1)]),
    ],
)
def test_each_line_has_its_pods_name(cluster: Cluster, options: list[str], places: list[tuple[int, int]]) -> None:
    result = run(*options)
    assert result.stdout.splitlines() == [f"[{name}] line of {name}" for name in names(cluster, *places)]


def test_a_gang_may_be_named_by_its_name(cluster: Cluster) -> None:
    (name,) = names(cluster, (1, 0))
    assert run("--gang", name.rpartition("-")[0], "--pod=0").stdout == f"[{name}] line of {name}\n"


def test_a_gang_that_is_not_there_names_those_that_are(cluster: Cluster) -> None:
    result = run("--gang", "7")
    assert result.exit_code == 1
    gangs = ", ".join(f"{gang.index} ({gang.name})" for gang in cluster.status.gangs)
    assert result.output == f"Error: space/m has no gang 7; there are: {gangs}\n"


def test_the_log_is_the_workers_whole_one(cluster: Cluster, kubectl: StandInKubectl) -> None:
    run("--gang=0", "--pod=0")
    assert kubectl.calls[-1][1:] == [*names(cluster, (0, 0)), "--container=worker", "--tail=-1"]


def test_tail_and_previous_are_kubectls(cluster: Cluster, kubectl: StandInKubectl) -> None:
    run("--gang=0", "--pod=0", "--tail=5", "--previous")
    assert kubectl.calls[-1][-2:] == ["--tail=5", "--previous"]


def test_a_pod_without_such_a_log_is_named_and_the_others_are_printed(
    cluster: Cluster, kubectl: StandInKubectl
) -> None:
    first, second = names(cluster, (0, 0), (0, 1))
    kubectl.answer("logs", first, errors=NO_PREVIOUS, code=1)
    result = run("--gang=0", "--previous")
    assert result.exit_code == 0
    assert result.stdout == f"[{second}] line of {second}\n"
    assert result.stderr.startswith(f"{first}: kubectl: previous terminated container")


def test_a_log_that_cannot_be_read_is_an_error(cluster: Cluster, kubectl: StandInKubectl) -> None:
    first, second = names(cluster, (0, 0), (0, 1))
    kubectl.answer("logs", first, errors="Error from server: Get https://node: dial tcp: i/o timeout\n", code=1)
    result = run("--gang=0")
    assert result.exit_code == 1
    assert result.stdout == f"[{second}] line of {second}\n"
    assert result.stderr.endswith("Error: not all logs could be read\n")


def test_it_is_an_error_if_no_pod_has_such_a_log(cluster: Cluster, kubectl: StandInKubectl) -> None:
    kubectl.answer("logs", errors=NO_PREVIOUS, code=1)
    result = run("--previous")
    assert result.exit_code == 1
    assert result.stderr.endswith("Error: no pod has such a log\n")


def test_a_container_that_has_not_started_says_what_it_waits_for(kubectl: StandInKubectl) -> None:
    cluster = Cluster()
    cluster.reconcile()
    cluster.statefulset_controller()
    cluster.change(cluster.pod(0), waiting_reason="ImagePullBackOff")
    kubectl.has(model_json(cluster), pods_json(cluster))
    result = run("--pod=0")
    assert f"{cluster.pod(0).name}: its container has not started: waits: ImagePullBackOff" in result.stderr
    assert not any("logs" in call for call in kubectl.calls)


def test_without_pods_it_says_why_there_are_none() -> None:
    cluster = Cluster(spec=operator_cluster.spec_with(model={"uri": "pvc://gone"}))
    cluster.reconcile()
    with pytest.raises(KubectlError, match="space/m has no pods: ClaimNotFound"):
        chosen(view(cluster), gang=None, index=None)


def test_follow_and_previous_do_not_go_together(kubectl: StandInKubectl) -> None:
    assert run("--follow", "--previous").exit_code == 2


class Watched:
    """Follows pods that change from look to look, and presses Ctrl-C when enough lines have been printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *states: list[PodView], lines: int) -> None:
        self._capsys = capsys
        self._states = list(states)
        self._lines = lines
        self.output: list[str] = []
        self.errors: list[str] = []

    def follow(self, options: list[str]) -> None:
        with pytest.raises(KeyboardInterrupt):
            Follower(Kubectl(Connection()), self._look, options).run(look_seconds=0.1)
        self._read()

    def _look(self) -> list[PodView]:
        self._read()
        if len(self._states) == 1 and len(self.output) + len(self.errors) >= self._lines:
            raise KeyboardInterrupt
        return self._states.pop(0) if len(self._states) > 1 else self._states[0]

    def _read(self) -> None:
        read = self._capsys.readouterr()
        self.output += read.out.splitlines()
        self.errors += read.err.splitlines()


def test_following_goes_on_with_pods_that_come_later(
    cluster: Cluster, kubectl: StandInKubectl, capsys: pytest.CaptureFixture[str]
) -> None:
    before = chosen(view(cluster), gang="0", index=None)
    cluster.end_container(cluster.pod(1), 75)
    cluster.settle()
    after = chosen(view(cluster), gang="0", index=None)
    assert {pod.uid for pod in before}.isdisjoint(pod.uid for pod in after)
    watched = Watched(capsys, before, before, after, lines=4)
    watched.follow(["--tail=3"])
    assert sorted(watched.output) == sorted(f"[{pod.name}] line of {pod.name}" for pod in [*before, *after])
    tails = [[word for word in call if word.startswith("--tail")] for call in kubectl.calls]
    assert sorted(tails) == [[ALL_LINES], [ALL_LINES], ["--tail=3"], ["--tail=3"]]


def test_following_a_container_that_started_again_shows_its_new_log(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    before = chosen(view(cluster), gang="0", index=1)
    cluster.end_container(cluster.pod(1), 0)
    cluster.restart_container(cluster.pod(1))
    after = chosen(view(cluster), gang="0", index=1)
    watched = Watched(capsys, before, after, lines=2)
    watched.follow([ALL_LINES])
    assert len(watched.output) == 2


def test_a_follow_that_fails_says_so(
    cluster: Cluster, kubectl: StandInKubectl, capsys: pytest.CaptureFixture[str]
) -> None:
    pods = chosen(view(cluster), gang="0", index=0)
    kubectl.answer("logs", errors='Error from server (Forbidden): pods "p" is forbidden\n', code=1)
    watched = Watched(capsys, pods, lines=1)
    watched.follow([ALL_LINES])
    (error,) = watched.errors
    assert error.startswith(f'{pods[0].name}: pods "p" is forbidden; ask for a role')


def test_more_pods_than_can_be_followed_are_refused(cluster: Cluster) -> None:
    pods = chosen(view(cluster), gang=None, index=None) * 20
    with pytest.raises(KubectlError, match="80 pods are too many to follow: give --gang or --pod"):
        Follower(Kubectl(Connection()), lambda: pods, [ALL_LINES]).run()
