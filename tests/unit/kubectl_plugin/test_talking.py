"""generate and port-forward, with a stand-in for kubectl and a real gRPC server where the pod would be."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner, Result

from support import operator_cluster
from support.operator_cluster import Cluster
from support.plugin_objects import model_json, pods_json, view
from support.stand_in_kubectl import StandInKubectl
from support.tls_certificates import IssuedCertificate, issue
from tpmodel.kubectl import commands
from tpmodel.kubectl.connection import Connection
from tpmodel.kubectl.forward import forwarding
from tpmodel.kubectl.kubectl import Kubectl
from tpmodel.kubectl.lookup import Leader, choose_leader
from tpmodel.kubectl.port_forward import is_there, keep_forwarding, next_leader
from tpmodel.kubectl.problems import KubectlError
from tpmodel.v1 import inference_pb2 as pb

KEY = "secret"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(commands, list(arguments), catch_exceptions=False)


@contextmanager
def a_model(*, key: str = "", tls: IssuedCertificate | None = None) -> Iterator[int]:
    """Answers every prompt with its token ids, backwards; yields its port."""

    def generate(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        if key and ("authorization", f"Bearer {key}") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the API key is missing or wrong")
        ids = list(reversed(request.token_ids.ids)) or [1]
        text = request.text[::-1]
        started = pb.GenerateStarted(request_id="r", seed=1, weight_version=1, prompt_tokens=1)
        yield pb.GenerateResponse(chunk=pb.GenerateChunk(started=started))
        yield pb.GenerateResponse(chunk=pb.GenerateChunk(token_ids=ids, text=text))
        sample = pb.SampleCompletion(finish_reason=pb.FINISH_REASON_LENGTH, completion_tokens=len(ids))
        completion = pb.GenerateCompletion(samples=[sample], usage=pb.Usage(), weight_versions=[1])
        yield pb.GenerateResponse(completion=completion)

    server = grpc.server(futures.ThreadPoolExecutor(2))
    method = grpc.unary_stream_rpc_method_handler(
        generate, pb.GenerateRequest.FromString, pb.GenerateResponse.SerializeToString
    )
    handlers = grpc.method_handlers_generic_handler("tpmodel.v1.InferenceService", {"Generate": method})
    server.add_generic_rpc_handlers((handlers,))
    if tls is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(tls.key, tls.certificate)]))
    server.start()
    try:
        yield port
    finally:
        server.stop(None)


def reach(kubectl: StandInKubectl, cluster: Cluster, port: int) -> None:
    """A port-forward to any pod leads to the port."""
    kubectl.has(model_json(cluster), pods_json(cluster))
    kubectl.answer("port-forward", output=f"Forwarding from 127.0.0.1:{port} -> 9000\n", stays=True)


def reach_with_tls(kubectl: StandInKubectl, cluster: Cluster, port: int) -> None:
    reach(kubectl, cluster, port)
    pods = pods_json(cluster)
    for pod in pods:
        pod["spec"]["volumes"] = [{"name": "tls"}]
    kubectl.answer("get", "pods", output={"items": pods})


def forwarded(kubectl: StandInKubectl) -> list[str]:
    return [word for call in kubectl.calls for word in call if word.startswith("pod/")]


def test_generate_streams_the_answer_of_a_ready_leader_pod(kubectl: StandInKubectl) -> None:
    cluster = operator_cluster.serving()
    with a_model() as port:
        reach(kubectl, cluster, port)
        result = run("generate", "m", "olleh")
    assert (result.exit_code, result.stdout) == (0, "hello\n")
    assert forwarded(kubectl) == [f"pod/{cluster.pod(0).name}"]


def test_generate_takes_token_ids(kubectl: StandInKubectl) -> None:
    with a_model() as port:
        reach(kubectl, operator_cluster.serving(), port)
        result = run("generate", "m", "--token-ids=3,2,1", "--json")
    assert '"token_ids": [1, 2, 3]' in result.stdout


def test_generate_asks_the_gang_that_is_named(kubectl: StandInKubectl) -> None:
    cluster = operator_cluster.serving(replicas=2)
    with a_model() as port:
        reach(kubectl, cluster, port)
        assert run("generate", "m", "x", "--gang=1").exit_code == 0
    assert forwarded(kubectl) == [f"pod/{cluster.pod(0, 1).name}"]


def test_generate_refuses_a_question_that_is_none_before_anything_runs(kubectl: StandInKubectl) -> None:
    assert run("generate", "m").exit_code == 2
    assert kubectl.calls == []


def test_a_missing_key_says_where_the_key_is(kubectl: StandInKubectl) -> None:
    cluster = operator_cluster.serving(auth={"apiKey": {"name": "keys", "key": "token"}})
    with a_model(key=KEY) as port:
        reach(kubectl, cluster, port)
        refused = run("generate", "m", "x")
        accepted = run("generate", "m", "x", "--api-key", KEY)
    assert refused.exit_code == 1
    assert "give --api-key or set TPMODEL_API_KEY: the key is key token of Secret keys" in refused.output
    assert accepted.exit_code == 0


@pytest.mark.parametrize("name", ["chat.default.svc", "*.default.svc"])
def test_generate_speaks_tls_with_a_pod_that_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Nobody has to give a certificate: the tunnel ends in the right pod."""
    certificate = issue(tmp_path, name)
    kubectl = StandInKubectl(tmp_path, monkeypatch)
    with a_model(tls=certificate) as port:
        reach_with_tls(kubectl, operator_cluster.serving(), port)
        result = run("generate", "m", "olleh")
    assert (result.exit_code, result.stdout) == (0, "hello\n")


def test_tls_that_does_not_come_about_is_explained(kubectl: StandInKubectl) -> None:
    with a_model() as port:
        reach_with_tls(kubectl, operator_cluster.serving(), port)
        result = run("generate", "m", "x")
    assert result.exit_code == 1
    assert "the pod's TLS cannot be used: " in result.output


def test_a_pod_that_cannot_be_reached_is_named(kubectl: StandInKubectl) -> None:
    cluster = operator_cluster.serving()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    reach(kubectl, cluster, port)
    result = run("generate", "m", "x", "--wait=0.1")
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: gang 0 of space/m (pod {cluster.pod(0).name}): ")


def leader(cluster: Cluster, wanted: str | None = None) -> Leader:
    return choose_leader(view(cluster), wanted, hint="HINT")


def test_a_gang_whose_leader_pod_is_not_ready_is_passed_over() -> None:
    cluster = operator_cluster.serving(replicas=2)
    cluster.change(cluster.pod(0, 0), ready=False)
    assert leader(cluster).gang.index == 1


def test_a_leader_pod_that_is_ending_takes_no_requests() -> None:
    cluster = operator_cluster.serving(replicas=2)
    cluster.delete_pod(cluster.pod(0, 0).uid)
    assert leader(cluster).gang.index == 1


def test_no_ready_gang_is_explained_by_the_conditions() -> None:
    cluster = operator_cluster.serving()
    cluster.end_container(cluster.pod(0), 64, "no config.json")
    cluster.reconcile()
    with pytest.raises(KubectlError) as raised:
        leader(cluster)
    assert "space/m has no gang that takes requests: ConfigurationRefused: gang" in raised.value.message
    assert "no config.json; see: HINT" in raised.value.message


def test_a_named_gang_that_is_not_ready_says_what_it_is_up_to() -> None:
    cluster = operator_cluster.serving(replicas=2)
    cluster.end_container(cluster.pod(1, 1), 75)
    cluster.reconcile()
    with pytest.raises(KubectlError, match="gang 1 of space/m takes no requests, it is Restarting; see: HINT"):
        leader(cluster, "1")


def test_a_model_scaled_to_zero_says_how_to_scale_it_up() -> None:
    cluster = operator_cluster.serving()
    cluster.edit(replicas=0)
    cluster.settle()
    with pytest.raises(KubectlError, match="scaled to zero: kubectl scale tpmodel m -n space --replicas=1"):
        leader(cluster)


def test_the_hint_reaches_the_same_cluster(kubectl: StandInKubectl) -> None:
    cluster = operator_cluster.serving()
    cluster.change(cluster.pod(0), ready=False)
    kubectl.has(model_json(cluster), pods_json(cluster))
    result = run("generate", "m", "x", "-n", "space")
    assert "see: kubectl tpmodel status m --namespace=space" in result.output


def test_port_forward_goes_on_with_the_next_leader_at_the_same_ports(
    kubectl: StandInKubectl, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = operator_cluster.serving(replicas=2)
    first, second = leader(cluster, "0"), leader(cluster, "1")
    lines = "Forwarding from 127.0.0.1:19000 -> 9000\nForwarding from 127.0.0.1:18000 -> 8000\n"
    kubectl.answer("port-forward", output=lines, errors="error: lost connection to pod\n", code=1)
    kubectl.answer("port-forward", f"pod/{second.pod.name}", errors="Unable to listen on port 19000: why\n", code=1)
    leaders = [first, second]
    with pytest.raises(KubectlError, match="port 19000 of this machine is taken"):
        keep_forwarding(Kubectl(Connection()), lambda: leaders.pop(0), {9000: 0, 8000: 0}, lambda _: None)
    printed = capsys.readouterr()
    assert printed.out == f"127.0.0.1:19000 (gRPC) and http://127.0.0.1:18000 lead to {first.described}\n"
    assert printed.err == (
        f"{first.described} is gone (lost connection to pod): looking for a gang that takes requests\n"
    )
    assert [call[-2:] for call in kubectl.calls] == [[":9000", ":8000"], ["19000:9000", "18000:8000"]]


@pytest.mark.parametrize("replaced", [False, True])
def test_port_forward_leaves_a_pod_that_is_gone(
    kubectl: StandInKubectl, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """kubectl goes on listening."""
    monkeypatch.setattr(sys.modules["tpmodel.kubectl.port_forward"], "LOOK_SECONDS", 0.1)
    cluster = operator_cluster.serving()
    lines = "Forwarding from 127.0.0.1:19000 -> 9000\nForwarding from 127.0.0.1:18000 -> 8000\n"
    kubectl.answer("port-forward", output=lines, stays=True)
    if replaced:
        kubectl.answer("get", "pods", output={"metadata": {"uid": "another"}})
    else:
        kubectl.answer("get", "pods", errors='Error from server (NotFound): pods "p" not found\n', code=1)
    leaders = [leader(cluster)]
    with pytest.raises(IndexError):
        keep_forwarding(Kubectl(Connection()), lambda: leaders.pop(0), {9000: 0, 8000: 0}, lambda _: None)
    assert "is gone (its pod has been deleted): looking for a gang" in capsys.readouterr().err


def test_port_forward_stays_while_nobody_can_tell(kubectl: StandInKubectl) -> None:
    kubectl.answer("get", "pods", errors="Unable to connect to the server: dial tcp: i/o timeout\n", code=1)
    assert is_there(Kubectl(Connection()), leader(operator_cluster.serving()).pod)


def test_port_forward_takes_the_ports_that_it_is_given(kubectl: StandInKubectl) -> None:
    cluster = operator_cluster.serving()
    kubectl.has(model_json(cluster), pods_json(cluster))
    kubectl.answer("port-forward", errors="Unable to listen on port 7000: why\n", code=1)
    result = run("port-forward", "m", "--port=7000", "--http-port=0")
    assert result.exit_code == 1
    assert kubectl.calls[-1][1:] == ["--address=127.0.0.1", f"pod/{cluster.pod(0).name}", "7000:9000", ":8000"]


def test_the_next_leader_is_asked_for_until_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = operator_cluster.serving()
    found = leader(cluster)
    answers: list[Leader | KubectlError] = [KubectlError("none yet"), KubectlError("none yet"), found]

    def find() -> Leader:
        answer = answers.pop(0)
        if isinstance(answer, KubectlError):
            raise answer
        return answer

    assert next_leader(find, lambda _: None) is found
    assert capsys.readouterr().err == "none yet\n"


def test_a_port_forward_that_kubectl_refuses_is_explained(kubectl: StandInKubectl) -> None:
    kubectl.answer(
        "port-forward", errors='Error from server (Forbidden): pods "p" is forbidden: no portforward\n', code=1
    )
    with pytest.raises(KubectlError, match="no portforward; ask for a role"):
        with forwarding(Kubectl(Connection()), "p", {9000: 0}):
            pass


def test_kubectl_ends_with_the_block(kubectl: StandInKubectl) -> None:
    kubectl.answer("port-forward", output="Forwarding from 127.0.0.1:19000 -> 9000\n", stays=True)
    with forwarding(Kubectl(Connection()), "p", {9000: 0}) as forward:
        assert forward.local_port(9000) == 19000
        assert forward.ended == ""
    assert forward.ended
