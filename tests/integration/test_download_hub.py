"""Downloads from a hub over real HTTP: each byte once, resumed, checked, and refused in words that help."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.hub_server import COMMIT, HubServer
from support.waiting import until
from tpmodel_worker.supervisor import fetch
from tpmodel_worker.supervisor.configuration import ConfigurationError
from tpmodel_worker.supervisor.download import Download
from tpmodel_worker.supervisor.download_state import CancelledError, DownloadFailedError
from tpmodel_worker.supervisor.fetch import Space
from tpmodel_worker.supervisor.hub import Hub, ModelSource

BIG = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def repository_files() -> dict[str, bytes]:
    noise = random.Random(1)
    return {
        "config.json": b'{"model_type": "qwen3"}',
        "tokenizer.json": b"{}" * 100,
        "chat_template.jinja": b"{{ messages }}",
        INDEX: json.dumps({"weight_map": {"a": BIG, "b": SECOND}}).encode(),
        BIG: noise.randbytes(900_000),
        SECOND: noise.randbytes(300_000),
        # What nobody needs: other formats, the weights a second time, papers.
        "consolidated.safetensors": noise.randbytes(1_000_000),
        "pytorch_model.bin": noise.randbytes(1000),
        "README.md": b"about",
        "original/params.json": b"{}",
    }


NEEDED = {"config.json", "tokenizer.json", "chat_template.jinja", INDEX, BIG, SECOND}


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer("org/model", repository_files()) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_LONGEST_PAUSE_SECONDS", 0.05)
    for module in ("fetch", "download"):
        monkeypatch.setattr(f"tpmodel_worker.supervisor.{module}.FIRST_PAUSE_SECONDS", 0.05)


def download(server: HubServer, cache: Path, *, revision: str = "main", token: str = "", **options: object) -> Download:
    settings: dict[str, object] = {"owner": f"pod {random.random()}"} | options
    source = ModelSource("org", "model", revision)
    return Download(source, cache, Hub(server.endpoint, token), **settings)  # pyright: ignore[reportArgumentType]


def assert_complete(folder: Path, server: HubServer, names: set[str] = NEEDED) -> None:
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: server.files[name] for name in names}


def test_the_needed_files_are_fetched_into_a_folder_named_by_the_commit(server: HubServer, tmp_path: Path) -> None:
    folder = download(server, tmp_path).run()

    assert folder == tmp_path / "models" / "org--model" / COMMIT
    assert_complete(folder, server)
    assert server.sent == {name: len(server.files[name]) for name in NEEDED}
    assert sorted(path.name for path in folder.parent.iterdir()) == [COMMIT], "nothing is left beside it"


def test_a_second_download_fetches_nothing(server: HubServer, tmp_path: Path) -> None:
    folder = download(server, tmp_path).run()
    before = dict(server.sent)
    assert download(server, tmp_path).run() == folder
    assert server.sent == before


def test_a_commit_that_is_there_needs_no_hub(server: HubServer, tmp_path: Path) -> None:
    folder = download(server, tmp_path).run()
    server.refuse = 503
    asked = len(server.requests)
    assert download(server, tmp_path, revision=COMMIT).run() == folder
    assert len(server.requests) == asked


def test_without_weights_only_configuration_and_tokenizer_are_fetched_into_a_folder_of_their_own(
    server: HubServer, tmp_path: Path
) -> None:
    small = {"config.json", "tokenizer.json", "chat_template.jinja"}
    folder = download(server, tmp_path, with_weights=False).run()
    assert_complete(folder, server, small)
    assert download(server, tmp_path).run() != folder


def test_a_single_file_of_weights_wins_over_stray_ones(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"w" * 1000, "adapter.safetensors": b"a" * 500}
    with HubServer("org/model", files) as server:
        folder = download(server, tmp_path).run()
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_many_pods_with_one_cache_fetch_each_byte_once(server: HubServer, tmp_path: Path) -> None:
    server.pause_per_chunk = 0.02
    downloads = [download(server, tmp_path, owner=f"pod {index}") for index in range(6)]
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda each=each: folders.append(each.run())) for each in downloads]
    for thread in threads:
        thread.start()

    def waiting() -> list[Download]:
        return [each for each in downloads if "which fetches into the same cache" in each.progress.waiting_for]

    until(waiting, "somebody waits", 30)
    for thread in threads:
        thread.join(30)
    assert len(set(folders)) == 1
    assert len(folders) == 6
    assert server.sent == {name: len(server.files[name]) for name in NEEDED}


def test_a_broken_connection_is_resumed_where_it_broke(server: HubServer, tmp_path: Path) -> None:
    server.break_after[BIG] = 500_000
    assert_complete(download(server, tmp_path).run(), server)
    assert server.sent[BIG] == len(server.files[BIG])


def test_a_server_that_knows_no_ranges_is_read_from_the_start_again(server: HubServer, tmp_path: Path) -> None:
    server.ignore_ranges = True
    server.break_after[BIG] = 500_000
    assert_complete(download(server, tmp_path).run(), server)
    assert server.sent[BIG] > len(server.files[BIG])


@pytest.mark.parametrize("name", [BIG, "tokenizer.json"], ids=["sha256", "git sha1"])
def test_a_corrupt_byte_is_found_and_the_file_fetched_again(
    server: HubServer, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.corrupt_next[name] = 1
    assert_complete(download(server, tmp_path).run(), server)
    assert server.sent[name] == 2 * len(server.files[name])
    assert f"{name}: " in caplog.text
    assert "fetching it again" in caplog.text


def test_a_file_that_stays_corrupt_fails_the_download(server: HubServer, tmp_path: Path) -> None:
    server.corrupt_next[BIG] = 99
    with pytest.raises(DownloadFailedError, match=rf"{BIG}: sha256 \w+ instead of \w+, 3 times"):
        download(server, tmp_path).run()
    assert not (tmp_path / "models" / "org--model" / COMMIT).exists()


def test_a_busy_hub_is_asked_again(server: HubServer, tmp_path: Path) -> None:
    server.fail_next = [503, 429, 500]
    assert_complete(download(server, tmp_path).run(), server)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(401, "HF_TOKEN holds a token that may read it"), (403, "HF_TOKEN"), (404, "check name and revision")],
)
def test_what_no_retry_helps_is_said_with_a_remedy(server: HubServer, tmp_path: Path, code: int, remedy: str) -> None:
    server.refuse = code
    with pytest.raises(ConfigurationError, match=rf"hf://org/model@main: \S+ answers {code}.*{remedy}"):
        download(server, tmp_path).run()


def test_an_unknown_revision_is_said(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="hf://org/model@v9"):
        download(server, tmp_path, revision="v9").run()


def test_a_repository_that_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with HubServer("org/model", {"README.md": b"x"}) as server:
        with pytest.raises(ConfigurationError, match=r"has no config\.json"):
            download(server, tmp_path).run()
    with HubServer("org/model", {"config.json": b"{}", "pytorch_model.bin": b"x"}) as server:
        with pytest.raises(ConfigurationError, match="has no safetensors files"):
            download(server, tmp_path).run()


def test_the_token_is_sent_to_the_hub(server: HubServer, tmp_path: Path) -> None:
    download(server, tmp_path, token="hf_secret").run()
    assert set(server.tokens) == {"Bearer hf_secret"}


def test_a_download_that_is_told_to_stop_stops_and_gives_the_lock_back(server: HubServer, tmp_path: Path) -> None:
    server.pause_per_chunk = 0.05
    running = download(server, tmp_path)
    ended: list[BaseException] = []

    def run() -> None:
        try:
            running.run()
        except CancelledError as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while running.progress.done_bytes < 100_000:
        time.sleep(0.01)
    running.cancel()
    thread.join(10)
    assert ended
    sent = server.sent[BIG]
    server.pause_per_chunk = 0
    assert_complete(download(server, tmp_path).run(), server)
    assert server.sent[BIG] <= len(server.files[BIG]) + 2 * 64 * 1024, f"{sent} bytes were there"


def test_a_volume_that_is_too_small_is_refused_with_both_numbers(server: HubServer, tmp_path: Path) -> None:
    needed = sum(len(server.files[name]) for name in NEEDED - {INDEX})
    small = download(server, tmp_path, space=lambda _: Space(1_000_000, 900_000))
    with pytest.raises(ConfigurationError, match=f"{needed} bytes are needed, 900000 are free of 1000000 in all"):
        small.run()


def test_a_full_volume_is_waited_for_until_there_is_room(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_ROOM_SECONDS", 0.02)
    free = [1000]
    waiting = download(server, tmp_path, space=lambda _: Space(10**9, free[0]))
    folders: list[Path] = []
    thread = threading.Thread(target=lambda: folders.append(waiting.run()))
    thread.start()
    while not waiting.progress.room_missing:
        time.sleep(0.005)
    assert "bytes are needed, 1000 are free" in waiting.progress.waiting_for
    assert server.sent[BIG] == 0
    free[0] = 10**9
    thread.join(10)
    assert_complete(folders[0], server)


def test_a_cache_that_cannot_be_written_is_said(server: HubServer) -> None:
    # Where not even root may make a folder.
    with pytest.raises(ConfigurationError, match=r"/sys/models.*: the cache must be writable for user \d+"):
        download(server, Path("/sys")).run()
