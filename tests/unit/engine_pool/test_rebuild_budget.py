"""How many rebuilds are allowed, how long they wait, and what is remembered of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpmodel_worker.engine.budget import LONGEST_PAUSE_SECONDS, RebuildBudget


def budget(folder: Path, *, attempt: int = 1, limit: int = 3) -> RebuildBudget:
    return RebuildBudget(folder / "rebuilds.json", attempt=attempt, limit=limit, stability_window=100.0)


def test_the_first_rebuild_comes_at_once_and_others_in_a_row_later_and_later(tmp_path: Path) -> None:
    counting = budget(tmp_path, limit=20)
    pauses = [counting.spend(0.0) for _ in range(10)]
    assert pauses[:4] == [0.0, 0.25, 0.5, 1.0]
    assert pauses[-1] == LONGEST_PAUSE_SECONDS


def test_a_rebuild_after_progress_comes_at_once(tmp_path: Path) -> None:
    counting = budget(tmp_path)
    counting.spend(0.0)
    counting.serving(1.0)
    counting.progress()
    assert counting.spend(2.0) == 0.0


def test_past_the_limit_there_is_none(tmp_path: Path) -> None:
    counting = budget(tmp_path, limit=2)
    assert [counting.spend(now) is None for now in (0.0, 1.0, 2.0, 3.0)] == [False, False, True, True]
    assert counting.left == 0


def test_a_limit_of_none_allows_none(tmp_path: Path) -> None:
    assert budget(tmp_path, limit=0).spend(0.0) is None


@pytest.mark.parametrize(("served", "left"), [(99.0, 1), (100.0, 2)])
def test_serving_for_the_stability_window_gives_the_budget_back(tmp_path: Path, served: float, left: int) -> None:
    counting = budget(tmp_path)
    counting.spend(0.0)
    counting.serving(1.0)
    counting.spend(1.0 + served)
    assert counting.left == left


def test_time_without_a_world_is_not_stability(tmp_path: Path) -> None:
    counting = budget(tmp_path)
    counting.spend(0.0)
    counting.spend(1000.0)
    assert counting.left == 1


def test_another_process_goes_on_counting_and_knows_that_a_world_was_lost(tmp_path: Path) -> None:
    first = budget(tmp_path)
    assert not first.world_was_lost
    first.spend(0.0)
    first.serving(1.0)
    second = budget(tmp_path)
    assert (second.left, second.world_was_lost) == (2, True)
    second.spend(2.0)
    assert not budget(tmp_path).world_was_lost


@pytest.mark.parametrize("content", ["", "{", "[]", '{"attempt": 1}', '{"attempt": 1, "spent": null}'])
def test_an_unreadable_count_is_none(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rebuilds.json").write_text(content)
    assert budget(tmp_path).left == 3
    assert "counts no rebuilds" in caplog.text


def test_the_count_of_another_attempt_does_not_matter(tmp_path: Path) -> None:
    budget(tmp_path).spend(0.0)
    assert budget(tmp_path, attempt=2).left == 3


def test_a_folder_that_takes_no_file_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    counting = RebuildBudget(tmp_path / "nowhere" / "rebuilds.json", attempt=1, limit=3, stability_window=1.0)
    assert counting.spend(0.0) == 0.0
    assert "the count of rebuilds is not kept" in caplog.text
