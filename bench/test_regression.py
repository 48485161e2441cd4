"""No fused op loses what it once had over its strongest baseline: ratios.py says how, and how far to trust it.

pytest bench/                     compare
pytest bench/ --update-ratios     record
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import report
from bench.cases import Case
from bench.guards import ratios
from cibr_kernels.dispatch import backends


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", ratios.cases(), ids=lambda case: case.name)
def test_ratio_to_the_strongest_baseline(
    case: Case, benchmark: BenchmarkFixture, request: pytest.FixtureRequest
) -> None:
    if not backends.native_available():
        pytest.skip("the compiled kernels are not built")
    race, record, update = ratios.Race(case), ratios.read(), request.config.getoption("--update-ratios")
    needed = ratios.least(record, case.name)
    if needed is None and not update:
        pytest.skip(f"nothing is recorded for {ratios.instruction_set()}: pytest bench/ --update-ratios")
    race.forget()
    benchmark.pedantic(race.run_fused, setup=race.run_baselines, rounds=race.rounds)
    found = [race.ratio()]
    if update:
        found += [race.attempt() for _ in range(ratios.RECORDED_ATTEMPTS - 1)]
        record.setdefault(ratios.key(), {})[case.name] = round(median(found), 3)
        report.write(ratios.RECORD, record)
    else:
        assert needed is not None
        found = ratios.attempts(found[0], race.attempt, needed)
        assert max(found) >= needed, (
            f"{case.name} must be {needed:.2f} times as fast as its strongest baseline on {ratios.key()}, and is "
            f"{', '.join(f'{ratio:.2f}' for ratio in found)} times as fast as {race.strongest()}"
        )
    benchmark.extra_info |= {"ratio": max(found), "needed": needed, "baseline": race.strongest()}
