"""The emulator itself: known answers for PTX, every check fires, and small Triton kernels on four architectures."""

from __future__ import annotations

import emulator
import numpy as np
import pytest
from emulator import Deadlock, Kernel, MissingWait, OutOfBounds, PtxError, Race, Uninitialised, launch

SHARED = ".shared .align 16 .b8 buffer[1024];"
DECLARE = ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .b64 %d<9>;"
# %d1: out + 4 tid (of this block), %d2: in + 4 tid, %r1: tid, %r2: the word loaded from `in`
PROLOGUE = """
    mov.u32 %r1, %tid.x;  mov.u32 %r3, %ctaid.x;  mov.u32 %r4, %ntid.x;  mad.lo.s32 %r5, %r3, %r4, %r1;
    ld.param.u64 %d1, [out];  mad.wide.u32 %d1, %r5, 4, %d1;
    ld.param.u64 %d2, [in];   mad.wide.u32 %d2, %r5, 4, %d2;
    ld.global.b32 %r2, [%d2];
"""


def kernel(body: str, prologue: str = PROLOGUE) -> Kernel:
    return Kernel(
        f".version 8.7\n.target sm_90a\n.address_size 64\n"
        f".visible .entry k(.param .u64 out, .param .u64 in)\n{{\n{SHARED}\n{DECLARE}\n{prologue}\n{body}\nret;\n}}"
    )


def run(body: str, values: np.ndarray | None = None, blocks: int = 1, threads: int = 32, **options) -> np.ndarray:
    values = np.arange(blocks * threads, dtype=np.uint32) if values is None else values
    out = np.full(blocks * threads, 0xDEADBEEF, np.uint32)
    launch(kernel(body), (blocks,), (threads,), [out, np.ascontiguousarray(values).view(np.uint32)], **options)
    return out


def floats(*values: float) -> np.ndarray:
    return np.resize(np.array(values, np.float32), 32)


# ---------------------------------------------------------------- known answers
@pytest.mark.parametrize(
    ("instruction", "value", "expected"),
    [
        ("add.s32 %r6, %r2, -5;", 3, 0xFFFFFFFE),
        ("mul.hi.u32 %r6, %r2, %r2;", 0xFFFFFFFF, 0xFFFFFFFE),
        ("mul.hi.s32 %r6, %r2, 4;", 0x80000000, 0xFFFFFFFE),
        ("div.s32 %r6, %r2, 4;", 0xFFFFFFF9, 0xFFFFFFFF),  # -7 / 4 = -1: towards zero
        ("rem.s32 %r6, %r2, 4;", 0xFFFFFFF9, 0xFFFFFFFD),  # -3
        ("shr.s32 %r6, %r2, 40;", 0x80000000, 0xFFFFFFFF),
        ("shl.b32 %r6, %r2, 32;", 1, 0),
        ("shf.l.wrap.b32 %r6, %r2, 1, 4;", 0xF0000000, 0x0000001F),
        ("prmt.b32 %r6, %r2, 0, 0x0123;", 0x11223344, 0x44332211),
        ("bfe.s32 %r6, %r2, 4, 8;", 0x00000F80, 0xFFFFFFF8),
        ("bfi.b32 %r6, 5, %r2, 8, 4;", 0xFFFFFFFF, 0xFFFFF5FF),
        ("lop3.b32 %r6, %r2, 0x0F0F0F0F, 0x33333333, 0xE8;", 0x55555555, 0x17171717),  # majority
        ("popc.b32 %r6, %r2;", 0xF0F00001, 9),
        ("clz.b32 %r6, %r2;", 0x00012345, 15),
        ("mad.lo.u32 %r6, %r2, 3, 7;", 0x80000001, 0x8000000A),
        ("cvt.u32.u8 %r6, %r2;", 0xABCDEF80, 0x80),
        ("cvt.s32.s8 %r6, %r2;", 0xABCDEF80, 0xFFFFFF80),
        ("mov.u32 %r6, %laneid;", 0, 0),
    ],
)
def test_integers(instruction: str, value: int, expected: int) -> None:
    got = run(f"{instruction} st.global.b32 [%d1], %r6;", np.full(32, value, np.uint32))
    assert hex(got[0]) == hex(expected)


@pytest.mark.parametrize(
    ("instruction", "value", "expected"),
    [
        ("ex2.approx.f32 %r6, %r2;", -3.0, 0.125),
        ("ex2.approx.ftz.f32 %r6, %r2;", -127.0, 0.0),  # 2^-127 is subnormal
        ("ex2.approx.f32 %r6, %r2;", -127.0, 2.0**-127),
        ("ex2.approx.ftz.f32 %r6, %r2;", -float("inf"), 0.0),
        ("lg2.approx.f32 %r6, %r2;", 8.0, 3.0),
        ("add.ftz.f32 %r6, %r2, %r2;", 2.0**-130, 0.0),
        ("add.f32 %r6, %r2, %r2;", 2.0**-130, 2.0**-129),
        ("max.f32 %r6, %r2, 0f40000000;", float("nan"), 2.0),
        ("max.NaN.f32 %r6, %r2, 0f40000000;", float("nan"), float("nan")),
        ("fma.rn.f32 %r6, %r2, %r2, 0fBF800000;", 1 + 2.0**-12, 2.0**-11 + 2.0**-24),  # one rounding
        ("cvt.rni.f32.f32 %r6, %r2;", 2.5, 2.0),
        ("cvt.rn.bf16x2.f32 %r6, %r2, 0f00000000; and.b32 %r6, %r6, 0xFFFF0000;", 1 + 2.0**-8, 1.0),  # ties to even
        ("cvt.rn.bf16x2.f32 %r6, %r2, 0f00000000; and.b32 %r6, %r6, 0xFFFF0000;", 1 + 3 * 2.0**-8, 1 + 2.0**-6),
        ("cvt.rna.tf32.f32 %r6, %r2;", 1 + 2.0**-11, 1 + 2.0**-10),  # ties away from zero
        ("rcp.approx.f32 %r6, %r2;", -0.0, -float("inf")),
        ("abs.f32 %r6, %r2;", -1.5, 1.5),
    ],
)
def test_floats(instruction: str, value: float, expected: float) -> None:
    got = run(f"{instruction} st.global.b32 [%d1], %r6;", floats(value)).view(np.float32)[0]
    np.testing.assert_equal(got, np.float32(expected))


def test_float_to_integer_saturates_and_nan_is_zero() -> None:
    got = run("cvt.rzi.s32.f32 %r6, %r2; st.global.b32 [%d1], %r6;", floats(3e9, -3e9, float("nan"), -1.9)).view(
        np.int32
    )
    assert got[:4].tolist() == [2**31 - 1, -(2**31), 0, -1]


def test_bf16_arithmetic_rounds_each_half() -> None:
    one, small = 0x3F80, 0x3B81  # 1, and s = 2^-8 (1 + 2^-7)
    got = run("fma.rn.bf16x2 %r6, %r2, %r2, %r2; st.global.b32 [%d1], %r6;", np.full(32, one << 16 | small, np.uint32))
    assert hex(got[0]) == hex(0x4000 << 16 | 0x3B82)  # s^2 + s = 2^-8 (1 + 2^-7 + 2^-8 + more): just above half a step


def test_shuffles_and_votes() -> None:
    lane = np.arange(32)
    for mode, b, c, expected in (
        ("bfly", 5, 0x1F, lane ^ 5),
        ("up", 3, 0, np.maximum(lane - 3, np.where(lane < 3, lane, 0))),
        ("down", 3, 0x1F, np.where(lane + 3 < 32, lane + 3, lane)),
        ("idx", 7, 0x1F, np.full(32, 7)),
        ("bfly", 1, 0x1C1F, lane ^ 1),
    ):
        assert (
            run(f"shfl.sync.{mode}.b32 %r6, %r2, {b}, {c}, -1; st.global.b32 [%d1], %r6;").tolist() == expected.tolist()
        )
    ballot = run("setp.lt.u32 %p1, %r1, 5; vote.sync.ballot.b32 %r6, %p1, -1; st.global.b32 [%d1], %r6;")
    assert set(ballot.tolist()) == {31}
    assert set(run("redux.sync.add.s32 %r6, %r2, -1; st.global.b32 [%d1], %r6;").tolist()) == {496}


def test_divergent_lanes_meet_again() -> None:
    got = run(
        "setp.lt.u32 %p1, %r1, 10; mov.u32 %r6, 0; @%p1 bra LOW; add.u32 %r6, %r1, 100; bra END;"
        "LOW: add.u32 %r6, %r1, 1; END: shfl.sync.bfly.b32 %r6, %r6, 0, 31, -1; st.global.b32 [%d1], %r6;"
    )
    assert got.tolist() == [i + 1 if i < 10 else i + 100 for i in range(32)]


MMA = """
    shl.b32 %r7, %r1, 4;  mov.u32 %r8, buffer;  add.u32 %r7, %r7, %r8;
    ld.param.u64 %d3, [in];  mad.wide.u32 %d3, %r1, 16, %d3;
    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d3];  st.shared.v4.b32 [%r7], {%r10, %r11, %r12, %r13};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r7];
    mov.b32 %r30, 0f3F800000;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r14, %r15, %r16, %r17}, {%r20, %r21, %r22, %r23},
        {%r20, %r21}, {%r30, %r30, %r30, %r30};
    ld.param.u64 %d4, [out];  mad.wide.u32 %d4, %r1, 16, %d4;  st.global.v4.b32 [%d4], {%r14, %r15, %r16, %r17};
"""


def test_ldmatrix_and_mma() -> None:
    """Four 8 x 8 matrices m0..m3 of small integers: A = [[m0, m2], [m1, m3]], B^T = [m0, m1], D = A B + 1."""
    m = np.random.default_rng(0).integers(-8, 8, (4, 8, 8)).astype(np.float32)
    words = (m.view(np.uint32) >> 16).astype(np.uint16).view(np.uint32)
    out = np.zeros(128, np.float32)
    launch(kernel(MMA), (1,), (32,), [out.view(np.uint32), words.reshape(-1)])
    a = np.block([[m[0], m[2]], [m[1], m[3]]])
    d = a @ np.hstack([m[0], m[1]]).T + 1
    lane = np.arange(32)
    for j in range(4):
        np.testing.assert_array_equal(out.reshape(32, 4)[:, j], d[lane // 4 + 8 * (j // 2), 2 * (lane % 4) + j % 2])


COPY = """
    mov.u32 %r8, buffer;  mad.lo.u32 %r7, %r1, 4, %r8;
    st.shared.b32 [%r7], 0;
    cp.async.ca.shared.global [%r7], [%d2], 4;  cp.async.commit_group;
    WAIT
    bar.sync 0;
    xor.b32 %r9, %r1, 63;  mad.lo.u32 %r9, %r9, 4, %r8;  ld.shared.b32 %r6, [%r9];  st.global.b32 [%d1], %r6;
"""


def test_cp_async_lands_at_the_wait() -> None:
    assert run(COPY.replace("WAIT", "cp.async.wait_group 0;"), threads=64).tolist() == list(range(63, -1, -1))
    assert run(COPY.replace("WAIT", "cp.async.wait_group 1;"), threads=64).tolist() == [0] * 64


# ---------------------------------------------------------------- every check fires
EXCHANGE = """
    mov.u32 %r8, buffer;  mad.lo.u32 %r7, %r1, 4, %r8;  st.shared.b32 [%r7], %r2;
    bar.sync 0;
    xor.b32 %r9, %r1, 32;  mad.lo.u32 %r9, %r9, 4, %r8;  ld.shared.b32 %r6, [%r9];  st.global.b32 [%d1], %r6;
"""


def test_a_missing_barrier_is_a_race() -> None:
    assert run(EXCHANGE, threads=64).tolist() == [i ^ 32 for i in range(64)]
    with pytest.raises(
        Race, match=r"warp \d reads byte \d+ of shared memory, written by warp \d.*\n  at PTX line \d+: ld.shared"
    ):
        run(EXCHANGE.replace("bar.sync 0;", ""), threads=64)
    again = EXCHANGE + "st.shared.b32 [%r7], %r6;"  # overwrites what the other warp may still read
    with pytest.raises(Race, match="writes byte"):
        run(again, threads=64)
    run(again.replace("st.shared.b32 [%r7], %r6", "bar.sync 0; st.shared.b32 [%r7], %r6"), threads=64)


def test_named_barriers_order_only_those_who_meet() -> None:
    run(EXCHANGE.replace("bar.sync 0;", "bar.sync 1, 64;"), threads=64)
    with pytest.raises(Race):  # warps 0 and 1 meet, and warps 2 and 3, but data crosses between the pairs
        body = EXCHANGE.replace("bar.sync 0;", "shr.u32 %r11, %r1, 6; add.u32 %r11, %r11, 1; bar.sync %r11, 64;")
        run(body.replace("xor.b32 %r9, %r1, 32", "xor.b32 %r9, %r1, 64"), threads=128)


def test_two_warps_storing_different_values_to_one_place() -> None:
    with pytest.raises(Race, match="different values"):
        run("st.shared.b32 [buffer], %r1;", threads=64)


@pytest.mark.parametrize("access", ["ld.global.b32 %r6, [%d1+128];", "st.global.b32 [%d1+-4], %r1;"])
def test_global_out_of_bounds(access: str) -> None:
    with pytest.raises(OutOfBounds, match=r"byte (128|-4) of buffer 0 \(128 B\)|byte (128|-4) of buffer 1"):
        run(access)


def test_misaligned_and_shared_out_of_bounds() -> None:
    with pytest.raises(OutOfBounds, match="misaligned"):
        run("ld.global.v2.b32 {%r6, %r7}, [%d1];")
    with pytest.raises(OutOfBounds, match="1024 B"):
        run("mov.u32 %r8, buffer; mad.lo.u32 %r7, %r1, 4, %r8; ld.shared.b32 %r6, [%r7+1000];")
    with pytest.raises(OutOfBounds, match="limit"):
        run("", dynamic_shared=300_000)


def test_deadlocks() -> None:
    with pytest.raises(Deadlock, match="warp 0 waits at a barrier"):
        run("setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 1, 64;", threads=64)
    with pytest.raises(Deadlock, match="mbarrier"):
        run(
            "setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared.b64 [buffer], 1; bar.warp.sync -1;"
            "W: mbarrier.try_wait.parity.shared.b64 %p2, [buffer], 0; @!%p2 bra W;"
        )
    with pytest.raises(Deadlock, match="endless"):
        run("L: bra L;", max_instructions=1000)


def test_an_exited_thread_does_not_hold_a_barrier() -> None:
    got = run("setp.ge.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0; st.global.b32 [%d1], %r1;", threads=64)
    assert got.tolist() == [*range(32), *[0xDEADBEEF] * 32]


def test_uninitialised_reads() -> None:
    values, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    known = np.ones(128, bool)
    body = kernel("st.global.b32 [%d1], %r2;")
    written = np.zeros(128, bool)
    launch(body, (1,), (32,), [out, values], known=[written, known])
    assert written.all()
    known[77] = False
    with pytest.raises(Uninitialised, match="byte 76 of buffer"):
        launch(body, (1,), (32,), [out, values], known=[written, known])


def test_blocks_that_touch_the_same_memory() -> None:
    first = "ld.param.u64 %d3, [out];"
    with pytest.raises(Race, match=r"blocks 0 and 1 .*write the same"):
        run(first + "st.global.b32 [%d3], %r3;", blocks=2, batch=1)
    with pytest.raises(Race, match="different values"):  # in the same batch of the emulator
        run(first + "st.global.b32 [%d3], %r3;", blocks=2)
    run(first + "setp.eq.u32 %p1, %r1, 0; @%p1 st.global.b32 [%d3], 7;", blocks=2)  # the same value: only noted
    for blocks in ("first", "last"):  # whichever block runs first here
        mine = "setp.eq.u32 %p1, %r3, 0;" if blocks == "first" else "setp.ne.u32 %p1, %r3, 0;"
        with pytest.raises(Race, match="reads bytes of global memory that block"):
            reads = "@!%p1 ld.global.b32 %r6, [%d3]; @!%p1 ld.global.b32 %r6, [%d3+128];"
            run(f"{mine} {first} @%p1 st.global.b32 [%d1], %r1; {reads}", blocks=2, batch=1)
    run(first + "atom.global.add.u32 %r6, [%d3], 1;", blocks=2)


def test_fewer_shuffle_lanes_and_unknown_instructions() -> None:
    with pytest.raises(PtxError, match="does not take part"):
        run("setp.lt.u32 %p1, %r1, 8; @%p1 shfl.sync.bfly.b32 %r6, %r2, 16, 31, 255;")
    with pytest.raises(PtxError, match="not implemented"):
        run("tex.1d.v4.f32.s32 {%r6, %r7, %r8, %r9}, [t, {%r1}];")


WGMMA = """
    mov.u32 %r8, buffer;  mad.lo.u32 %r7, %r1, 4, %r8;  st.shared.b32 [%r7], 0;  bar.sync 0;
    cvt.u64.u32 %d5, %r8;  shr.u64 %d5, %d5, 4;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r20, %r21, %r22, %r23}, {%r24, %r24, %r24, %r24}, %d5,
        %p1, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    WAIT
    USE
"""


def wgmma(wait: str, use: str) -> None:
    body = WGMMA.replace("WAIT", wait).replace("USE", use)
    run("setp.eq.u32 %p1, %r1, %r1;" + body, threads=128)


def test_wgmma_must_be_waited_for() -> None:
    done, late = "wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;"
    read = "st.global.b32 [%d1], %r20;"
    overwrite = "bar.sync 0; st.shared.b32 [%r7], 1;"
    wgmma(done, read)
    wgmma(done, overwrite)
    with pytest.raises(MissingWait, match="wgmma is still filling"):
        wgmma(late, read)
    with pytest.raises(MissingWait):
        wgmma(late, "mov.b32 %r25, %r20; st.global.b32 [%d1], %r25;")
    with pytest.raises(Race, match="read by wgmma of warpgroup 0"):
        wgmma(late, overwrite)


def test_arguments_that_overlap_stay_one_buffer() -> None:
    values = np.arange(64, dtype=np.uint32)
    launch(kernel("add.u32 %r6, %r2, 1; st.global.b32 [%d1], %r6;"), (1,), (32,), [values, values])
    assert values[:32].tolist() == list(range(1, 33)) and values[32] == 32


def test_module_lists_what_it_raises() -> None:
    assert {"Race", "Deadlock", "OutOfBounds"} <= set(emulator.__all__)
