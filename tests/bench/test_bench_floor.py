"""The floor of the critic family: what is read from machine code, the issue rate, and the arithmetic on them."""

from __future__ import annotations

import functools
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cibr_kernels as ck
from bench import critic_code, disassembly, floor, measure, report
from bench.cases import Case
from bench.measure import Row
from cibr_kernels.dispatch import backends

LISTING = """
0000000000001000 <_ZN2ck6avx51212_GLOBAL__N_16Kinked6scoresEv>:
    1000:\tvmovups (%rax),%zmm0
    1006:\tvbroadcastss (%rcx),%zmm1
    100c:\tvmaxps %zmm0,%zmm1,%zmm2
    1012:\tvfmadd231ps %zmm2,%zmm3,%zmm4
    1018:\tvmaxps %zmm5,%zmm1,%zmm2
    101e:\tvfmadd231ps %zmm2,%zmm3,%zmm6
    1024:\tadd    $0x40,%rax
    1028:\tcmp    %rax,%rdx
    102b:\tjne    1006 <_ZN2ck6avx51212_GLOBAL__N_16Kinked6scoresEv+0x6>
    1031:\tjmp    1000 <_ZN2ck6avx51212_GLOBAL__N_16Kinked6scoresEv>

0000000000002000 <_ZN2ck6avx51212_GLOBAL__N_16Kinked9gradientsEv>:
    2000:\tvbroadcastss (%rcx),%zmm1
    2006:\tvpcmpgtd %zmm0,%zmm2,%k1
    200c:\tvaddps %zmm1,%zmm3,%zmm3{%k1}
    2012:\tvaddps %zmm1,%zmm4,%zmm4{%k1}
    2018:\tjne    2000 <_ZN2ck6avx51212_GLOBAL__N_16Kinked9gradientsEv>

0000000000003000 <_ZN2ck4avx212_GLOBAL__N_16Kinked6scoresEv>:
    3000:\tvmaxps %ymm0,%ymm1,%ymm2
    3006:\tjne    3000 <_ZN2ck4avx212_GLOBAL__N_16Kinked6scoresEv>
"""


def test_the_critics_hot_loops_are_read_from_a_listing():
    code = disassembly.functions(LISTING, "2ck6avx512", "6scores")
    assert [name for name, _ in code] == ["_ZN2ck6avx51212_GLOBAL__N_16Kinked6scoresEv"]
    (loop,) = disassembly.innermost_loops(code[0][1])  # the outer one, 1000 to 1031, is not
    assert [i.address for i in loop] == [0x1006, 0x100C, 0x1012, 0x1018, 0x101E, 0x1024, 0x1028, 0x102B]
    read = critic_code.sweep(LISTING, "avx512")
    assert read.scores == critic_code.Cost(instructions=8 / 2, arithmetic=2.0, floats=16)
    assert read.gradients == critic_code.Cost(instructions=5.0, arithmetic=3.0, floats=16)
    with pytest.raises(disassembly.Unreadable, match="no loop of scores"):
        critic_code.sweep(LISTING, "avx2")  # a maximum without its multiply-add is something else


@functools.cache
def _module_text(namespace: str, part: str) -> str:
    """The listing of a namespace's functions with `part` in their names: of the module's million lines few are read."""
    if not ck.native_available():
        pytest.skip("the compiled kernels are not built")
    try:
        functions = disassembly.listing(Path(backends.compiled().__file__)).split("\n\n")
    except disassembly.Unreadable as reason:
        pytest.skip(str(reason))
    parts = f"2ck{len(namespace)}{namespace}", part
    return "\n\n".join(text for text in functions if all(p in text.partition("\n")[0] for p in parts))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the reading is of x86-64")
@pytest.mark.parametrize("namespace, floats", [("avx512", 16), ("avx2", 8), ("generic", 4)])
def test_the_critics_hot_loops_are_found_in_the_module(namespace, floats):
    read = critic_code.sweep(_module_text(namespace, "6Kinked"), namespace)
    assert read.scores.floats == read.gradients.floats == floats
    if namespace != "generic":  # where a multiply-add is one instruction and a broadcast is none that computes
        assert read.scores.arithmetic == 2 and 3 <= read.gradients.arithmetic <= 4
    for cost in (read.scores, read.gradients):
        assert cost.arithmetic < cost.instructions < 4 * cost.arithmetic


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the reading is of x86-64")
@pytest.mark.parametrize("namespace, floats", [("avx512", 16), ("avx2", 8)])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "elu", "softplus", "tanh"])
def test_a_smooth_critics_hot_loops_are_found_in_the_module(activation, namespace, floats):
    read = critic_code.sweep(_module_text(namespace, "6Smooth"), namespace, activation)
    assert read.scores.floats == read.gradients.floats == floats
    # at least: t or e^t, phi, w; three sums.  At most: gelu's exponential, reciprocal and polynomial; silu's slope
    assert 5 <= read.scores.arithmetic <= 45 and 3 <= read.gradients.arithmetic <= 15
    for cost in (read.scores, read.gradients):
        assert cost.arithmetic < cost.instructions < 3 * cost.arithmetic


SMOOTH = """
0000000000001000 <_ZNK2ck6avx51212_GLOBAL__N_16SmoothINS1_12FactoredTanhEE6scoresILb1EEEvv>:
    1000:\tvfmadd231ps %zmm2,%zmm3,%zmm4
    1006:\tvmovaps %zmm4,(%rax)
    100c:\tjne    1000 <_ZNK>

0000000000002000 <_ZNK2ck6avx51212_GLOBAL__N_16SmoothINS1_12FactoredTanhEE9gradientsILb1ELb1EEEvv>:
    2000:\tvfmadd231ps %zmm2,%zmm3,%zmm4
    2006:\tjne    2000 <_ZNK>
"""


def test_a_smooth_loop_that_stores_too_little_is_not_taken_for_one():
    product, stored = "    2000:\tvfmadd231ps %zmm2,%zmm3,%zmm4\n", "    2006:\tvmovaps %zmm4,(%rax)\n"
    tile = SMOOTH.replace(product, 3 * 16 * product + (4 + 4 + 1) * stored)  # three products a pair of a 4 x 4 tile
    scores = "".join(SMOOTH.splitlines(True)[2:4])
    with pytest.raises(disassembly.Unreadable, match="no loop of gradients"):
        critic_code.sweep(SMOOTH, "avx512", "tanh")
    with pytest.raises(disassembly.Unreadable, match="no loop of scores"):
        critic_code.sweep(tile.replace(scores, 15 * scores), "avx512", "tanh")
    assert critic_code.sweep(tile.replace(scores, 16 * scores), "avx512", "tanh").scores.arithmetic == 1
    with pytest.raises(disassembly.Unreadable, match="no loop of gradients"):
        critic_code.sweep(tile, "avx512", "gelu")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the reading is of x86-64")
@pytest.mark.parametrize("namespace", ["avx512", "avx2", "generic"])
def test_the_issue_rate_counts_the_instructions_of_its_loop(namespace):
    """And nothing else is in it: a spilled accumulator once made it half as fast."""
    code = disassembly.functions(_module_text(namespace, "spin"), "spin")
    code = code or disassembly.functions(_module_text(namespace, "issue_rate"), "issue_rate", "_omp_fn")
    (loop,) = (loop for _, body in code for loop in disassembly.innermost_loops(body))
    params = backends.compiled().IssueRate()
    issued = torch.zeros(1, dtype=torch.int64)
    params.iterations, params.threads, params.issued = 1000, 1, issued.data_ptr()
    backends.compiled().issue_rate(params)
    assert sum(i.arithmetic for i in loop) == issued.item() / 1000
    assert len(loop) - sum(i.arithmetic for i in loop) <= 3  # count, compare, jump


def test_the_critics_floor_is_instructions_over_the_issue_rate():
    cost = critic_code.Cost(instructions=4.0, arithmetic=2.0, floats=16)
    read = critic_code.Sweep(cost, replace(cost, instructions=5.0, arithmetic=3.0))
    assert floor.sweep_seconds(read, 100, 100, 64, True, 1e9) == pytest.approx(9 * 100 * 100 * 64 / 16 / 1e9)
    assert floor.sweep_seconds(read, 100, 100, 64, False, 1e9) == pytest.approx(4 * 100 * 100 * 64 / 16 / 1e9)
    assert floor.sweep_seconds(read, 100, 100, 64, True, 1e9, arithmetic=True) == pytest.approx(5 * 4e4 / 1e9)


def test_a_critic_without_a_floor_says_why(monkeypatch):
    monkeypatch.setattr(disassembly.shutil, "which", lambda name: None)
    critic_code.chosen_sweep.cache_clear()
    disassembly.listing.cache_clear()
    if not ck.native_available():
        pytest.skip("the compiled kernels are not built")
    for case, says in (
        (Case("critic_moments", 64, 32), "objdump (binutils) is not installed"),
        (Case("critic_moments", 64, 32, activation="gelu"), "objdump (binutils) is not installed"),
    ):
        result = measure.Result(case, [Row("fused", [1.0], 10)], (1e9, 1e3), "issue")
        measure.add_floor(result)
        assert result.rows[0].floor_percent is None and says in report.table(result)


def test_cibr_loss_has_the_floor_of_its_matmuls_and_its_critics():
    case = Case("cibr_loss", 64, 32)
    unit = floor.gauge(case)
    if unit is None:
        pytest.skip("the critic's machine code cannot be read here")
    *matmuls, (issue, instructions) = unit.sweeps.parts
    assert issue.what == "issue"
    assert [flops for _, flops in matmuls] == 3 * [2 * 64 * 64 * 32]  # X Y^T, G Y and G^T X: the stash fits
    gemm, flops = matmuls[0]
    sweep = critic_code.chosen_sweep("relu")
    assert instructions == 4 * floor.sweep_seconds(sweep, 64, 64, 256, True, 1.0)
    rate, of_projections = unit.rates()
    assert 0 < rate < min(gemm.rate() * 100 / flops, issue.rate() * 100 / instructions) and of_projections > 0

    class Steady(floor.Gauge):
        def rate(self):
            return self.work

    parts = (Steady(4.0, print, ""), 8.0), (Steady(10.0, print, ""), 30.0)
    assert floor.Together(parts).rate() == 1 / (2 + 3)

    rows = [Row("fused", seconds=[12.0, 10.0, 15.0]), Row("eager", seconds=[50.0])]
    result = measure.Result(case, rows, (0.4, 0.4), unit.what)
    measure.add_floor(result)
    assert result.rows[0].floor_percent == 50.0 and result.rows[1].floor_percent is None
    assert "3 matmuls" in result.floor_note and "matmuls 2.5e+03 ms; without those 25 %" in result.floor_note


@pytest.mark.parametrize("backward", [True, False])
def test_critics_matmuls_are_those_of_x_and_z_and_of_the_gradients_that_are_asked_for(backward):
    n, h = 64, 256

    def flops(op, width):
        return sum(work for _, work in floor.projections(Case(op, n, width, backward=backward)).parts)

    assert flops("critic_moments", 32) == (6 if backward else 2) * 2 * n * 32 * 32
    inputs, features = 2 * (768 + 512), 4 * 32  # of the four critics; data gets no gradient
    assert flops("cibr_loss", 32) == 2 * n * h * ((2 if backward else 1) * inputs + (3 if backward else 1) * features)
