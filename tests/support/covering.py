"""Covering arrays: cases that have every pair of values of every two factors, in place of their product.

Most faults show in one factor or in two together; the product of five factors repeats each pair hundreds of times.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

Pair = tuple[int, int, int, int]  # factor i has its value a, factor j > i its value b


def each_pair(**factors: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrises a test by its arguments' values, so that every pair of values of two arguments is a test."""
    return pytest.mark.parametrize(list(factors), pairs(*factors.values()), ids=str)


def pairs(*factors: Sequence[Any], starts: Iterable[Sequence[Any]] = ()) -> list[tuple[Any, ...]]:
    """Rows of one value of each factor that have every pair of values of two: greedy, the same rows each time.

    A row starts from one of `starts`, values of the first factors, and then from the first pair that no row has yet;
    each other factor takes the value that adds most new pairs, of several the one that was used least.
    """
    sizes = [len(f) for f in factors]
    if len(factors) == 1:
        return [(value,) for value in factors[0]]
    used = [[0] * size for size in sizes]
    missing = {
        (i, a, j, b)
        for (i, p), (j, q) in itertools.combinations(enumerate(sizes), 2)
        for a, b in itertools.product(range(p), range(q))
    }
    begun = [{k: factors[k].index(value) for k, value in enumerate(start)} for start in starts]
    rows = []
    while begun or missing:
        if begun:
            row = begun.pop(0)
            missing.difference_update((i, row[i], j, row[j]) for i, j in itertools.combinations(row, 2))
        else:
            i, a, j, b = min(missing)
            row = {i: a, j: b}
        for k in range(len(sizes)):
            if k not in row:
                news = [len(missing.intersection(_between(row, k, value))) for value in range(sizes[k])]
                row[k] = max(range(sizes[k]), key=lambda value, k=k, news=news: (news[value], -used[k][value]))
        missing.difference_update(*(_between(row, k, row[k]) for k in row))
        for k, value in row.items():
            used[k][value] += 1
        rows.append(tuple(factor[row[k]] for k, factor in enumerate(factors)))
    return rows


def _between(row: dict[int, int], k: int, value: int) -> Iterable[Pair]:
    """The pairs of factor k's value with the values that a row has already."""
    return [(i, a, k, value) if i < k else (k, value, i, a) for i, a in row.items() if i != k]
