"""What may be committed: everything below the lowest unfinished record, and never more."""

from __future__ import annotations

import random

import pytest

from modelyard.adapters.bus_kafka_lane import Lane


@pytest.mark.parametrize("seed", range(200))
def test_the_commit_is_the_lowest_unfinished_offset_whatever_the_order(seed: int) -> None:
    """Takes, hands out and finishes at random, with gaps between offsets, against the plain definition."""
    dice = random.Random(seed)
    lane, first = Lane("t", 0), dice.choice([0, 1, 7, 1000])
    taken: list[int] = []
    finished: set[int] = set()
    stored, offset = first, first
    for _ in range(300):
        step = dice.random()
        if step < 0.4 or not taken:
            assert lane.take(offset)
            taken.append(offset)
            offset += dice.choice([1, 1, 1, 2, 5])
        elif step < 0.5:
            assert not lane.take(dice.choice(taken)), "taken twice"
        elif step < 0.9 and (waiting := [o for o in taken if o not in finished]):
            one = dice.choice(waiting)
            lane.hand(one)
            assert lane.finish(one)
            assert not lane.finish(one), "finished twice"
            finished.add(one)
        unfinished = [o for o in taken if o not in finished]
        assert lane.waiting() == len(unfinished)
        expected = min(unfinished) if unfinished else taken[-1] + 1
        assert lane.due() == (expected if expected != stored else None)
        if dice.random() < 0.2 and (due := lane.due()) is not None:
            assert due >= stored, "a commit never goes back"
            lane.stored = stored = due


def test_what_was_not_handed_out_cannot_be_finished() -> None:
    lane = Lane("t", 0)
    lane.take(3)
    assert not lane.finish(3)
    assert lane.due() is None


def test_a_lane_that_is_given_up_finishes_nothing() -> None:
    lane = Lane("t", 0)
    lane.take(3)
    lane.hand(3)
    lane.drop()
    assert not lane.finish(3)
    assert lane.due() is None


def test_an_untouched_lane_has_nothing_to_commit() -> None:
    assert Lane("t", 0).due() is None
