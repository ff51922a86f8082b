"""Which version of the weights a new world loads."""

from __future__ import annotations

import pytest

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.engine.weight_choice import choose_version, own_load


def rank(*memory: int, files: tuple[int, ...] = ()) -> pb.WeightUpdateOk:
    """What a rank answers that has these sets in memory, the one in use first."""
    first, second = (*memory, None, None)[:2]
    return pb.WeightUpdateOk(persisted_versions=files, held_version=first, second_version=second)


@pytest.mark.parametrize(
    ("ranks", "refused", "version"),
    [
        ([rank(files=(3, 5)), rank(files=(3, 5))], set(), 5),
        ([rank(files=(3, 5)), rank(files=(3,))], set(), 3),
        ([rank(files=(3, 5)), rank(files=(3, 5))], {5}, 3),
        ([rank(files=(3, 5)), rank()], set(), 0),
        ([rank(), rank()], set(), 0),
        # What is in memory is not read from files.
        ([rank(5, files=(3,)), rank(files=(3, 5))], set(), 5),
        ([rank(0, files=(5,)), rank(0, files=(5,))], set(), 0),
        ([rank(5, files=(3, 5)), rank(files=(3,))], set(), None),
    ],
)
def test_the_newest_version_that_all_ranks_can_have_is_loaded(
    ranks: list[pb.WeightUpdateOk], refused: set[int], version: int | None
) -> None:
    """E46."""
    assert choose_version(ranks, refused=refused) == version


@pytest.mark.parametrize(
    ("ranks", "known", "version"),
    [
        pytest.param([rank(3, 4), rank(3, 4)], 3, 3, id="undecided"),
        pytest.param([rank(3, 4), rank(3)], 3, 3, id="undecided, one rank not prepared"),
        pytest.param([rank(0, 1)], 0, 0, id="undecided, the checkpoint before"),
        pytest.param([rank(3, 4), rank(3, 4)], 0, 3, id="undecided, by an engine that knows nothing"),
        pytest.param([rank(3, 4), rank(3, 4)], 4, 4, id="decided, by an engine that knows"),
        pytest.param([rank(3, 4), rank(4)], 3, 4, id="decided, since a rank was told to give the old one back"),
        pytest.param([rank(4), rank(3, 4)], 0, 4, id="decided, for an engine that knows nothing"),
        pytest.param([rank(3, 4), rank(files=(3,))], 3, 3, id="a rank lost, the old one in its file"),
        pytest.param([rank(3, 4), rank()], 3, None, id="a rank lost for good"),
        pytest.param([rank(4, 4), rank(4)], 3, 4, id="a confirmation that was broken off"),
    ],
)
def test_of_two_sets_the_old_one_is_served_unless_the_new_one_was_decided_on(
    ranks: list[pb.WeightUpdateOk], known: int, version: int | None
) -> None:
    """E46, U35."""
    assert choose_version(ranks, known=known) == version


@pytest.mark.parametrize(
    ("found", "version", "held", "persisted"),
    [
        (rank(3, 4), 3, 3, 0),
        (rank(3, 4), 4, 4, 0),
        (rank(0, 1), 0, 0, 0),
        (rank(files=(3,)), 3, None, 3),
        (rank(files=(3,)), None, None, 0),
        # There is no common one: what the rank has stays as it is, for the message and for a full set to replace.
        (rank(3, 4, files=(2,)), None, None, 0),
    ],
)
def test_a_rank_is_told_which_set_to_load(
    found: pb.WeightUpdateOk, version: int | None, held: int | None, persisted: int
) -> None:
    request = own_load(pb.LoadDenseShardRequest(model_id="m"), found, version)
    assert request.model_id == "m"
    assert (request.held_version if request.HasField("held_version") else None) == held
    assert request.persisted_version == persisted
