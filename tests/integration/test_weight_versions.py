"""A gang whose memory is gone, and which knows from the operator alone that it has served more than the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from support.gang_pods import MODEL, GangPod, running_gang
from support.trainer import TOKEN
from tpmodel import Client, TpmodelError
from tpmodel.trainer import connect

VERSION = 3


def test_what_the_operator_knows_of_keeps_the_checkpoint_from_being_served(tmp_path: Path) -> None:
    """E46: WeightsLost until a full set of a higher version has come, then what that says."""
    token = tmp_path / "trainer-token"
    token.write_text(TOKEN)
    with running_gang(tmp_path, ranks=1, options=[f"--trainer-token-file={token}"]) as gang:
        gang.word["weights_version"] = f"{VERSION}\n"
        pod = gang.start(0)
        pod.eventually(lambda: pod.gang_status().engine.weights_condition == "WeightsLost", "the loss is noticed")
        check_lost(pod)
        with connect(f"{pod.ip}:9001", token=TOKEN) as trainer:
            assert trainer.versions() == [None]
            trainer.send_weights(load_file(MODEL / "model.safetensors"), version=VERSION + 1)
        pod.wait_ready()
        with Client(pod.target) as client:
            completion = client.complete("Tell me", max_tokens=4, temperature=0).completion
        assert completion.weight_versions == (VERSION + 1,)
        assert pod.gang_status().engine.weights_condition == ""


def check_lost(pod: GangPod) -> None:
    engine = pod.gang_status().engine
    assert f"version {VERSION} is lost, the ranks have 0" in engine.weights_message
    assert not pod.health()
    with Client(pod.target) as client, pytest.raises(TpmodelError) as refused:
        client.complete("Tell me", max_tokens=1, timeout=5)
    assert refused.value.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
