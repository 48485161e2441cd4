"""The static analysis tells the truth: known programs, NVIDIA's own calculators, and counts made another way."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")

import nvcc
import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import FlopCounterMode

from bench.cases import gpu_case
from bench.inputs import make_inputs
from bench.peers import IMPLEMENTATIONS
from bench.static import compiled, predict, record, sass, ttir
from bench.static.gpus import GPUS, blocks_per_processor
from cibr_kernels.dispatch import triton_call

LIVE = 40  # values that stay live through the loop of PTX
PTX = (
    """
.version 8.0
.target sm_80
.address_size 64
.visible .entry known(.param .u64 p, .param .u32 n)
{
  .shared .align 16 .b8 held[2048];
  .reg .f32 %f<64>; .reg .u32 %r<8>; .reg .u64 %d<4>; .reg .pred %q;
  ld.param.u64 %d1, [p]; ld.param.u32 %r1, [n];
  mov.u32 %r2, %tid.x; mul.wide.u32 %d2, %r2, 4; add.u64 %d1, %d1, %d2;
"""
    + "".join(f"  ld.global.f32 %f{i}, [%d1+{512 * i}];\n" for i in range(LIVE))
    + """
  mov.u32 %r3, 0; mov.u32 %r4, held;
outer:
  .pragma "nounroll";
  mov.u32 %r5, 0; st.shared.f32 [%r4], %f0; bar.sync 0;
inner:
  .pragma "nounroll";
  ex2.approx.ftz.f32 %f50, %f0; ex2.approx.ftz.f32 %f51, %f1; ex2.approx.ftz.f32 %f52, %f2;
  fma.rn.f32 %f0, %f50, %f51, %f3; fma.rn.f32 %f1, %f51, %f52, %f0; max.f32 %f2, %f52, %f1;
  add.u32 %r5, %r5, 1; setp.lt.u32 %q, %r5, %r1; @%q bra inner;
  add.u32 %r3, %r3, 1; setp.lt.u32 %q, %r3, %r1; @%q bra outer;
"""
    + "".join(f"  st.global.f32 [%d1+{512 * i}], %f{i};\n" for i in range(LIVE))
    + "  ret;\n}\n"
)


def assemble(folder: Path, *options: str) -> compiled.Compiled:
    text, cubin = folder / "known.ptx", folder / "known.cubin"
    text.write_text(PTX)
    sass.run(sass.tool("ptxas"), "-arch=sm_80", *options, str(text), "-o", str(cubin))
    return compiled.examine(cubin.read_bytes(), 80, threads=128, dynamic=1000)


def test_a_known_program(tmp_path):
    kernel = assemble(tmp_path)
    assert (kernel.name, kernel.shared, kernel.spills, kernel.stack) == ("known", 3048, 0, 0)
    assert LIVE <= kernel.registers <= LIVE + 24 and kernel.fits
    (outer,) = [loop for loop in sass.loops(kernel.code) if not sass.spins(kernel.code, loop)]
    (inner,) = outer.inner
    of_inner = sass.mix(kernel.code.instructions[i] for i in inner.own)
    of_outer = sass.mix(kernel.code.instructions[i] for i in outer.own)
    assert (of_inner["mufu"], of_inner["max"], of_inner["shared"]) == (3, 1, 0)
    assert sum(i.base == "FFMA" for i in (kernel.code.instructions[k] for k in inner.own)) == 2
    assert (of_outer["mufu"], of_outer["shared"], of_outer["shared bytes"]) == (0, 1, 128)
    hot = sass.hot_loop(kernel.code)
    assert hot is not None and hot.all == inner.all


def test_spills_are_seen(tmp_path):
    assert assemble(tmp_path, "--maxrregcount", "24").spills > 10
    assert not assemble(tmp_path, "--maxrregcount", "24").fits


def test_cycles_of_counted_instructions():
    count = {"mufu": 4, "fma": 8, "fma2": 2, "max": 1, "alu": 3, "shuffle": 2, "shared bytes": 512, "instructions": 20}
    clocks = sass.cycles(GPUS[90], count, warps=8, tensor_flops=2 * 128 * 128 * 64)
    assert clocks == {
        "tensor": 512,
        "exp": 4 * 256 / 16,
        "fma": 12 * 256 / 128,
        "alu": 4 * 256 / 64,
        "shared": 512 * 8 / 128 + 2 * 256 / 32,
        "issue": 20 * 8 / 4,
    }


LISTING = """
	.section	.text.k,"ax",@progbits
.L_x_0:
        /*0000*/                   MUFU.EX2 R0, R1 ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   FFMA R0, R1, R2, R3 ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
.L_x_2:
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0060*/              @!P0 BRA `(.L_x_2) ;
        /*0070*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);
"""


def test_code_moved_out_of_a_loop_belongs_to_it():
    """The compiler puts the waiting part of a loop behind the end; its jump back to the middle is no loop."""
    code = sass.parse(LISTING)["k"]
    assert [i.op for i in code.instructions][:2] == ["MUFU.EX2", "BRA"] and code.labels[".L_x_2"] == 5
    (loop,) = sass.loops(code)
    assert sorted(loop.all) == [0, 1, 2, 3, 5, 6, 7]
    (wait,) = loop.inner
    assert sorted(wait.all) == [5, 6] and sass.spins(code, wait) and not sass.spins(code, loop)


CALCULATED = [
    (capability, registers, threads, shared)
    for capability in GPUS
    for registers, threads, shared in itertools.product(
        (16, 32, 40, 72, 96, 128, 168, 255), (32, 96, 128, 256, 384, 512), (0, 999, 33000, 49152, 98304, 100352, 166912)
    )
    if shared <= GPUS[capability].shared_block and registers * threads <= 65536
]


def test_blocks_per_processor_are_those_of_nvidias_calculator(tmp_path):
    include = nvcc.include_directory()
    if include is None or not (include / "cuda_occupancy.h").exists():
        pytest.skip("the CUDA toolkit's headers are not here")
    program = tmp_path / "occ"
    subprocess.run(["g++", f"-I{include}", Path(__file__).with_name("occ.cpp"), "-o", program], check=True)
    lines = []
    for capability, registers, threads, shared in CALCULATED:
        gpu = GPUS[capability]
        limits = f"{gpu.shared} {gpu.shared_block} {32 * gpu.warps}"
        lines.append(f"{capability // 10} {capability % 10} {registers} {threads} {shared} {limits}")
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    answers = [int(word) for word in done.stdout.split()]
    ours = [blocks_per_processor(GPUS[c], r, s, t)[0] for c, r, t, s in CALCULATED]
    wrong = [(case, a, b) for case, a, b in zip(CALCULATED, answers, ours, strict=True) if a != b]
    assert len(CALCULATED) > 1000 and not wrong


def test_what_cannot_be_launched_has_no_blocks():
    assert blocks_per_processor(GPUS[80], 64, 166913, 128)[0] == 0
    assert blocks_per_processor(GPUS[90], 256, 0, 128)[0] == 0
    assert blocks_per_processor(GPUS[90], 32, 0, 1056)[0] == 0


# ------------------------------------------------------------------------------------------------ counted work
@triton.jit
def product(x, y, out, flag, n, m, d, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Row sums of exp2(x y^T), the columns from the program's own tile on; nothing unless the flag is 1."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    total = tl.zeros((BM,), tl.float32)
    tiles = tl.where(tl.load(flag) == 1, m // BN, 0)
    for tile in range(tl.program_id(0), tiles):
        column = tile * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, d, BK):
            at = k + tl.arange(0, BK)[None, :]
            acc = tl.dot(tl.load(x + row[:, None] * d + at), tl.load(y + column[:, None] * d + at).T, acc)
        total += tl.sum(tl.exp2(acc), 1)
    tl.store(out + row, total)


N, M, D, BM, BN, BK = 1024, 2048, 256, 128, 64, 32


def recorded(capability: int) -> record.Launch:
    with record.recording(capability) as recorder:
        x, y = (torch.empty(size, D, device="cuda", dtype=torch.bfloat16) for size in (N, M))
        out, flag = torch.empty(N, device="cuda"), torch.empty((), dtype=torch.int32, device="cuda")
        args = {"x": x, "y": y, "out": out, "flag": flag, "n": N, "m": M, "d": D}
        triton_call.launch(product, (N // BM,), args, {"BM": BM, "BN": BN, "BK": BK}, num_warps=8)
    (launch,) = recorder.events
    assert isinstance(launch, record.Launch)
    return launch


def numbers(launch: record.Launch) -> dict[str, float]:
    return {name: a.value for name, a in launch.args.items() if a.value is not None}


@pytest.mark.parametrize("capability", GPUS)
def test_work_of_a_program_is_what_its_loops_say(capability):
    launch = recorded(capability)
    kernel = compiled.compile_launch(launch, capability)
    done = ttir.work(ttir.parse(kernel.ttir), numbers(launch), launch.grid, {"flag": 1})
    tiles = sum(M // BN - i for i in range(N // BM)) / (N // BM)  # the average program's
    total = sum(done.values(), start=type(done[0])())
    assert total["flops:bf16"] == tiles * 2 * BM * BN * D
    assert total["exp"] == tiles * BM * BN and total["write:out"] == 4 * BM
    assert (total["read:x"], total["read:y"]) == (tiles * 2 * BM * D, tiles * 2 * BN * D)
    assert sorted(work["runs"] for work in done.values()) == [1, tiles, tiles * D / BK]
    nothing = ttir.work(ttir.parse(kernel.ttir), numbers(launch), launch.grid, {"flag": 0})
    assert sum(nothing.values(), start=type(done[0])())["flops:bf16"] == 0
    with pytest.raises(ttir.Unknown, match="bounds"):
        ttir.work(ttir.parse(kernel.ttir), numbers(launch), launch.grid)


@pytest.mark.parametrize("capability", GPUS)
def test_a_predicted_launch_has_the_counted_work_in_its_pipes(capability):
    launch, gpu = recorded(capability), GPUS[capability]
    step = predict.predict([launch], capability, {"flag": 1})
    (part,) = step.parts
    tiles = sum(M // BN - i for i in range(N // BM))
    flops = tiles * 2 * BM * BN * D
    assert part.flops == pytest.approx(flops) and part.pipes["tensor"] == pytest.approx(flops / gpu.peak)
    exps = tiles * BM * BN / 16 / gpu.processors / gpu.ghz / 1e9
    assert part.pipes["exp"] == pytest.approx(exps, rel=0.05)  # in the SASS: nothing but the kernel's own exponentials
    assert part.seconds > part.bound and step.percent_of_peak < 100
    assert part.bytes == 2 * (N + M) * D + 4 * N + 4


# ------------------------------------------------------------------------------------------------ recorded steps
@pytest.mark.parametrize("name", ["eager", "open_clip"])
def test_recorded_flops_are_those_that_a_real_run_counts(name):
    if name == "open_clip":
        pytest.importorskip("open_clip")
    case = gpu_case("clip_loss", 48, 32, "float32")
    build = IMPLEMENTATIONS["clip_loss", name].build
    inputs = make_inputs(case, "cpu")
    with FlopCounterMode(display=False) as counter:
        build(case)(inputs).backward()
    with record.recording(90) as recorder:
        fake = make_inputs(case, "cuda")
        recorder.events.clear()
        record.backward(build(case)(fake))
    flops = sum(event.flops for event in recorder.events if isinstance(event, record.Gemm))
    assert flops == counter.get_total_flops() == {"eager": 3, "open_clip": 6}[name] * 2 * 48 * 48 * 32


def test_views_and_allocations_are_not_launches():
    with record.recording(80) as recorder:
        x = torch.empty(64, 32, device="cuda")
        y = x.T[:, 3:].reshape(-1, 61)
        assert not recorder.events
        x.mul_(2)
        y.sum()
    assert [(e.name, e.bytes) for e in recorder.events] == [("mul_", 2 * 8192), ("sum", 4 * 61 * 32 + 4)]  # type: ignore[union-attr]


def test_a_gradient_of_a_broadcast_is_summed():
    with record.recording(80) as recorder:
        a = torch.empty(16, 1, device="cuda", requires_grad=True)
        b = torch.empty(1, 8, device="cuda", requires_grad=True)
        record.backward((a + b).exp().sum())
    assert sum(getattr(e, "name", "") == "sum" for e in recorder.events) == 3  # the loss, and one for a and for b


def test_time_of_a_vendor_product():
    gemm = record.Gemm(4096, 4096, 4096, 1, "bfloat16", 3 * 2 * 4096**2)
    (part,) = predict.predict([gemm], 90).parts
    assert part.seconds == pytest.approx(2 * 4096**3 / GPUS[90].peak / 0.72 + predict.START)
    thin = record.Gemm(4096, 1, 4096, 1, "bfloat16", 2 * 4096**2)
    (part,) = predict.predict([thin], 90).parts
    assert part.seconds == pytest.approx(2 * 4096**2 / GPUS[90].bandwidth / 0.85 + predict.START)


def test_a_pick_reads_what_it_takes_and_not_the_matrix():
    with record.recording(80) as recorder:
        scores = torch.empty(64, 1000, device="cuda", requires_grad=True)
        loss = torch.nn.functional.nll_loss(scores, torch.empty(64, dtype=torch.long, device="cuda"))
        record.backward(loss)
    moved = {e.name: e.bytes for e in recorder.events if isinstance(e, record.Other)}
    assert moved["nll_loss_forward"] < 100 and moved["nll_loss_backward"] == 4 * 64 * 1000
