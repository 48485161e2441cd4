"""covering.pairs: every pair is there, few rows are, and they are the same each time."""

from __future__ import annotations

import itertools

import pytest
from covering import pairs


@pytest.mark.parametrize("sizes", [(3,), (2, 5), (1, 4, 1), (5, 3, 4, 5, 4), (2, 2, 2, 2, 2, 2)], ids=str)
def test_every_pair_of_values_is_in_a_row(sizes):
    factors = [[f"{k}{value}" for value in range(size)] for k, size in enumerate(sizes)]
    rows = pairs(*factors)
    for one, other in itertools.combinations(factors, 2):
        for pair in itertools.product(one, other):
            assert any(set(pair) <= set(row) for row in rows)
    assert all(value in factor for row in rows for value, factor in zip(row, factors, strict=True))
    assert set(factors[0]) == {row[0] for row in rows}
    assert rows == pairs(*factors)


def test_rows_are_few():
    """At least the product of the two largest factors, and not many more."""
    assert 25 <= len(pairs(*[range(size) for size in (5, 3, 4, 5, 4)])) <= 32
    assert len(pairs(range(6), range(8), range(2), range(4))) <= 52


def test_rows_begin_with_what_is_asked_for():
    factors = range(4), range(3), "ab", "cdef"
    starts = list(itertools.product(*factors[:2]))
    rows = pairs(*factors, starts=starts)
    assert [row[:2] for row in rows[:12]] == starts and 16 <= len(rows) <= 20
    for one, other in itertools.combinations(range(4), 2):
        assert {(row[one], row[other]) for row in rows} == set(itertools.product(factors[one], factors[other]))
