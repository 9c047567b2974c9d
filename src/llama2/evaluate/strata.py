"""A random sample of a task's items for `--limit`, spread over its subjects or classes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence


def sample(n: int, limit: int, seed: int, strata: Sequence[str] | None = None) -> list[int]:
    """Sorted indices of at most `limit` of `n` items, drawn without replacement, the same for the same seed.

    `strata` names the stratum of each item. Each stratum gets its share of the sample by largest remainders, and at
    least one item if `limit` allows one of each. Items are ranked by a hash of seed and index. So the draw depends on
    no library, and a larger sample of one stratum contains a smaller.
    """
    if limit >= n:
        return list(range(n))
    members: dict[str, list[int]] = {}
    for index, stratum in enumerate(strata if strata is not None else [""] * n):
        members.setdefault(stratum, []).append(index)
    seats = apportion({name: len(each) for name, each in members.items()}, limit, seed)
    drawn = (sorted(each, key=lambda index: _rank(seed, str(index)))[: seats[name]] for name, each in members.items())
    return sorted(index for each in drawn for index in each)


def apportion(sizes: Mapping[str, int], limit: int, seed: int) -> dict[str, int]:
    """How many items of each stratum a sample of `limit` has, by largest remainders; equal ones go by the seed.

    A stratum whose share is below one gets one, and the rest share what is left, if `limit` is at least their number.
    """
    seats: dict[str, int] = {}
    rest = dict(sizes)
    while limit >= len(sizes):
        left, total = limit - len(seats), sum(rest.values())
        small = [name for name, size in rest.items() if size * left < total]
        if not small:
            break
        for name in small:
            seats[name] = 1
            del rest[name]
    left, total = limit - len(seats), sum(rest.values())
    seats |= {name: size * left // total for name, size in rest.items()}
    by_remainder = sorted(rest, key=lambda name: (-(rest[name] * left % total), _rank(seed, name)))
    for name in by_remainder[: limit - sum(seats.values())]:
        seats[name] += 1
    return seats


def _rank(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()
