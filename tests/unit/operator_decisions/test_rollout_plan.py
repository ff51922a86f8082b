"""The set of gangs, one step at a time: which are made, which are removed."""

import pytest

from tpmodel_operator.api import Rollout
from tpmodel_operator.rollout import Member, Plan, plan


def members(*kinds: str) -> list[Member]:
    """Gangs by kind, with their place as index: `old`, `new`; `-` not Ready; `!` stuck; `~` leaving."""
    return [
        Member(
            name=f"{index}",
            index=index,
            updated=kind.startswith("new"),
            ready=not kind.endswith(("-", "!", "~")),
            stuck=kind.endswith("!"),
            leaving=kind.endswith("~"),
        )
        for index, kind in enumerate(kinds)
    ]


def step(*kinds: str, wanted: int, unavailable: int = 1, surge: int = 0) -> Plan:
    return plan(members(*kinds), wanted=wanted, rollout=Rollout(max_unavailable=unavailable, max_surge=surge))


def test_without_outdated_gangs_all_that_are_missing_are_made():
    assert step(wanted=3) == Plan(create=(0, 1, 2))
    assert step("new", "new-", wanted=5) == Plan(create=(2, 3, 4))


def test_what_is_wanted_stays():
    assert step("new", "new-", "new!", wanted=3) == Plan()


def test_indices_in_use_are_not_given_again_until_their_pods_are_gone():
    assert step("new", "old~", "new", wanted=4, surge=0).create == (3,)


def test_the_lowest_free_index_is_taken():
    existing = [member for member in members("new", "new", "new") if member.index != 1]
    assert plan(existing, wanted=3, rollout=Rollout()).create == (1,)


@pytest.mark.parametrize(
    ("kinds", "removed"),
    [
        (("new", "new", "new"), ("2",)),
        (("new", "new-", "new"), ("1",)),
        (("new-", "new-", "new"), ("1",)),
    ],
)
def test_scaling_down_removes_not_ready_ones_first_then_the_highest_index(
    kinds: tuple[str, ...], removed: tuple[str, ...]
):
    assert step(*kinds, wanted=2).remove == removed


def test_scaling_down_in_a_rollout_removes_outdated_ones_first():
    assert step("new", "old", "new-", "new", wanted=3).remove == ("1",)


def test_scaling_to_zero_removes_everything():
    assert set(step("old", "new", "new-", wanted=0).remove) == {"0", "1", "2"}


def test_without_surge_a_gang_is_removed_before_its_replacement_is_made():
    assert step("old", "old", "old", wanted=3) == Plan(remove=("2",))


def test_the_replacement_is_not_made_while_pods_of_the_old_gang_are_left():
    assert step("old", "old", "old~", wanted=3) == Plan()
    assert step("old", "old", wanted=3) == Plan(create=(2,))


def test_the_next_gang_is_not_replaced_before_the_new_one_is_ready():
    assert step("old", "old", "new-", wanted=3) == Plan()
    assert step("old", "old", "new", wanted=3) == Plan(remove=("1",))


def test_with_surge_a_gang_is_made_before_one_is_removed():
    assert step("old", "old", wanted=2, unavailable=0, surge=1) == Plan(create=(2,))
    assert step("old", "old", "new-", wanted=2, unavailable=0, surge=1) == Plan()
    assert step("old", "old", "new", wanted=2, unavailable=0, surge=1) == Plan(remove=("1",))


def test_a_surge_does_not_grow_while_an_old_gang_drains():
    assert step("old", "old~", "new", wanted=2, unavailable=0, surge=1) == Plan()


def test_surge_and_unavailability_add_up():
    assert step("old", "old", "old", wanted=3, unavailable=1, surge=1) == Plan(create=(3,), remove=("2",))


def test_an_old_gang_that_is_not_ready_goes_first_and_costs_no_availability():
    assert step("old-", "old", "old", wanted=3) == Plan(remove=("0",))
    assert step("old-", "old", "old", "new", wanted=3, unavailable=0, surge=1).remove == ("0",)


def test_old_gangs_that_are_not_ready_never_block_a_rollout():
    assert step("old-", "old-", wanted=2).remove == ("1",)
    assert step("old-", "new", wanted=1, unavailable=0, surge=1).remove == ("0",)


def test_an_old_gang_that_may_be_back_soon_is_kept_until_its_replacement_is_ready():
    assert step("old-", wanted=1, unavailable=0, surge=1) == Plan(create=(1,))
    assert step("old-", "new-", wanted=1, unavailable=0, surge=1) == Plan()


def test_not_all_old_gangs_that_are_not_ready_are_given_up_at_once():
    assert len(step("old-", "old-", "old-", "old-", wanted=4, unavailable=2).remove) == 2


def test_several_gangs_may_be_away_where_the_spec_says_so():
    assert step("old", "old", "old", "old", wanted=4, unavailable=2).remove == ("3", "2")
    assert step("old", "old", wanted=4, unavailable=2).create == (2, 3)


def test_a_gang_that_restarts_counts_as_unavailable():
    assert step("old", "old-", "old", "new-", wanted=4) == Plan()


def test_a_new_gang_that_is_stuck_stops_the_rollout():
    assert step("old", "old", "new!", wanted=3, unavailable=3) == Plan(stalled=True)
    assert step("old", "old", "old", "new!", wanted=3, unavailable=0, surge=2) == Plan(stalled=True)


def test_a_stuck_gang_stops_nothing_where_nothing_is_replaced():
    assert step("new", "new!", wanted=3) == Plan(create=(2,))


def test_an_old_gang_that_is_stuck_is_no_reason_to_stop():
    assert step("old!", "old", "new", wanted=3).remove == ("0",)


def test_a_stalled_rollout_still_scales_down():
    assert step("old", "old", "old", "new!", wanted=2, unavailable=1).remove == ("2", "1")


def test_a_stalled_rollout_makes_no_gangs_that_would_fail_alike():
    assert step("old", "new!", wanted=4, unavailable=4).create == ()


def test_going_back_keeps_the_gangs_that_are_left_and_removes_the_failed_one():
    """The spec set back: what was old is new again."""
    assert step("new", "new", "old!", wanted=3) == Plan(remove=("2",))


def test_scaling_up_in_a_rollout_makes_gangs_of_the_new_revision_only_as_fast_as_the_rollout():
    assert step("old", "old", wanted=5) == Plan(create=(2,))
