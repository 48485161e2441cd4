"""The C++ kernels take the instructions that are recorded, and a kernel that takes more is found."""

from __future__ import annotations

import pytest

from bench.guards import instructions
from cibr_kernels.dispatch import backends

RECORDED = {"avx2": {"dot": 1000, "critic": 2000}, "generic": {"dot": 4000}}


@pytest.mark.slow
def test_kernels_take_the_instructions_recorded():
    try:
        counts = instructions.count()
    except instructions.Uncountable as reason:
        pytest.skip(str(reason))
    changed, against = instructions.check(counts, backends.compiled().compiler, instructions.read())
    hint = "if it is meant: python bench/ instructions --update"
    assert not changed, "\n".join([against, *changed, hint])


@pytest.mark.parametrize("factor, says", [(1.05, "1000 -> 1050 instructions (+5.0%)"), (0.9, "(-10.0%)"), (1.01, None)])
def test_five_percent_more_or_less_is_found_and_named(factor, says):
    now = {"avx2": {**RECORDED["avx2"], "dot": int(1000 * factor)}, "generic": RECORDED["generic"]}
    changed, against = instructions.check(now, "gcc 12.2.0", {"gcc 12.2.0": RECORDED})
    assert "margin 2%" in against
    assert len(changed) == (says is not None) and all("avx2 dot" in line and says in line for line in changed)


def test_the_most_grown_kernel_comes_first_and_a_new_one_is_named():
    now = {"avx2": {"dot": 1100, "critic": 3000, "new": 1}}
    changed = instructions.compare(now, RECORDED, 0.02)
    assert [line.split(":")[0] for line in changed] == ["avx2 critic", "avx2 dot", "avx2 new"]
    assert changed[-1].endswith("not recorded")


def test_another_compiler_is_said_and_compared_more_widely():
    now = {"avx2": {"dot": 1250, "critic": 2000}, "generic": {"dot": 6000}}
    changed, against = instructions.check(now, "gcc 14.1.0", {"gcc 12.2.0": RECORDED})
    assert "recorded with gcc 12.2.0, this is gcc 14.1.0: margin 30%" in against
    assert changed == ["generic dot: 4000 -> 6000 instructions (+50.0%)"]
    assert instructions.check(now, "gcc 14.1.0", {})[0] == ["nothing is recorded"]


def test_the_cost_of_a_call_is_read_with_what_it_called():
    profile = """desc: Trigger: --dump-after=ck::avx2::dot(ck::Dot const&)
fn=(1) main
0 7
cfn=(12) ck::avx2::dot(ck::Dot const&)
calls=1 0
0 1103510

fn=(12)
0 10
cfn=(13) ck::avx2::dot(ck::Dot const&) [clone ._omp_fn.0]
calls=2 0
0 500
"""
    assert instructions.inclusive(profile, "ck::avx2::dot(ck::Dot const&)") == 1103510
