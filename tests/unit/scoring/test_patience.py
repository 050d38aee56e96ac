"""A lane lets calls come in where that brings any, and begins at once where it does not."""

from modelyard.scoring.patience import MISSES, PROBE, TURNS, Patience

MOST = 64


def turns(patience: Patience, arrivals: list[int]) -> tuple[int, int]:
    """(turns until the lane begins, calls it begins with); ``arrivals``: how many come in each turn."""
    queued, coming = arrivals[0], iter(arrivals[1:])
    patience.begin(queued)
    for turn in range(1_000):
        if patience.enough(queued, MOST):
            return turn, queued
        queued += next(coming, 0)
    raise AssertionError("it never begins")


def test_calls_that_come_one_by_one_are_begun_together() -> None:
    patience = Patience()
    for _ in range(20):
        assert turns(patience, [1, 0, 0, 1, 0, 0, 0, 0, 0, 1]) == (9 + TURNS, 3)


def test_a_full_batch_does_not_wait() -> None:
    assert turns(Patience(), [MOST]) == (0, MOST)
    assert turns(Patience(), [MOST - 2, 1, 1, 1]) == (2, MOST)


def test_whoever_calls_alone_soon_does_not_wait_and_seldom_ever_after() -> None:
    patience = Patience()
    waited = [turns(patience, [1])[0] for _ in range(MISSES + 3 * PROBE)]
    assert waited[:MISSES] == [TURNS - 1] * MISSES
    assert waited[MISSES:MISSES + PROBE] == [0] * PROBE
    assert 1 <= sum(map(bool, waited[MISSES:])) <= 3


def test_it_is_found_out_again_when_more_come() -> None:
    patience = Patience()
    for _ in range(MISSES + 5):
        turns(patience, [1])
    begun = [turns(patience, [1, 1, 1])[1] for _ in range(2 * PROBE)]
    assert begun[0] == 1
    assert begun[-1] == 3


def test_calls_that_all_arrive_at_once_are_not_waited_for_either() -> None:
    patience = Patience()
    assert [turns(patience, [40])[0] for _ in range(MISSES + 1)][-1] == 0
