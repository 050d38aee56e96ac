"""Latency as counts per bucket: small, addable, and good enough for percentiles. Standard library only.

Buckets are whole microseconds up to 31, then sixteen equal steps to each doubling: a bucket is at most 6.25 %
wide, so an estimate inside it is off by less than that. Bucket ``NONE`` counts calls without a latency worth
measuring (refused before they were admitted).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

NONE = -1
STEPS = 16
SLOT_S = 10
"""Calls are counted per this many seconds of the clock; a window is a whole number of slots."""


def bucket(nanoseconds: int) -> int:
    """The bucket of a latency; negative times (a clock that was set back) count as 0.

    >>> bucket(31_000), bucket(32_000), bucket(1_000_000)
    (31, 32, 111)
    """
    micros = nanoseconds // 1000
    if micros < 2 * STEPS:
        return max(micros, 0)
    shift = micros.bit_length() - 5
    return (shift << 4) + (micros >> shift)


def edges(index: int) -> tuple[int, int]:
    """The microseconds a bucket holds: ``low <= latency < high``.

    >>> edges(111)
    (992, 1024)
    """
    if index < 2 * STEPS:
        return index, index + 1
    shift = (index >> 4) - 1
    low = (index - (shift << 4)) << shift
    return low, low + (1 << shift)


def percentile(counts: Mapping[int, int], share: float) -> float | None:
    """The latency in milliseconds that ``share`` (0-1) of the calls did not exceed, interpolated inside its
    bucket; None when there is nothing to estimate from.

    >>> percentile({bucket(1_000_000): 100}, 0.5)
    1.008
    """
    measured = sorted((index, n) for index, n in counts.items() if index != NONE and n > 0)
    total = sum(n for _, n in measured)
    if not total:
        return None
    wanted, seen = share * total, 0
    for index, n in measured:
        if seen + n >= wanted:
            low, high = edges(index)
            return round((low + (high - low) * max(wanted - seen, 0) / n) / 1000, 6)
        seen += n
    return edges(measured[-1][0])[1] / 1000


def percentiles(counts: Mapping[int, int], shares: Sequence[float] = (0.5, 0.9, 0.99)) -> dict[str, float | None]:
    """``{"p50": …, "p90": …, "p99": …}`` in milliseconds."""
    return {f"p{round(share * 100)}": percentile(counts, share) for share in shares}


def slot(nanoseconds: int) -> int:
    """The start of the slot that a moment (``time.time_ns``) lies in, in seconds since the epoch."""
    seconds = nanoseconds // 1_000_000_000
    return seconds - seconds % SLOT_S
