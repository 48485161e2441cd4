"""Triton launches on the emulated GPUs: tensor cores and TMA of each architecture, planted faults, unwritten memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from cibr_kernels.dispatch import cuda_call, triton_call

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from emulator import MissingWait, OutOfBounds, PtxError, Race, Uninitialised  # noqa: E402
from executor import TARGETS, emulated  # noqa: E402
from plans import Emulator as PlanEmulator  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

each_capability = pytest.mark.parametrize("capability", list(TARGETS))
INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}


@triton.jit
def product(x, y, out, n, m, d, TMA: tl.constexpr, ALONG: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """out = x y^T for tiles of BLOCK x BLOCK; ALONG column tiles a program.  TMA: x and y are tensor descriptors."""
    row = tl.program_id(0) * BLOCK
    i, j = row + tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    for t in range(ALONG):
        acc = tl.zeros((BLOCK, BLOCK), tl.float32)
        for k in range(0, d, STEP):
            if TMA:
                a, b = x.load([row, k]), y.load([t * BLOCK, k])
            else:
                at, o = k + tl.arange(0, STEP)[None, :], (t * BLOCK + j)[:, None]
                a = tl.load(x + i[:, None] * d + at, mask=i[:, None] < n, other=0.0)
                b = tl.load(y + o * d + at, mask=o < m, other=0.0)
            acc = tl.dot(a, b.T, acc)
        col = t * BLOCK + j[None, :]
        tl.store(out + i[:, None] * m + col, acc, mask=(i[:, None] < n) & (col < m))


@triton.jit
def row_sums(x, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0), tl.sum(tl.load(x + tl.program_id(0) * n + at, mask=at < n, other=0.0), 0))


@triton.jit
def shift(x, out, n, step, extra, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at * step), mask=at < n)
    if extra is not None:
        tl.store(extra, 1.0)


def multiply(capability: int, edit: Callable[[str, str], str] | None = None) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    n, m, d, block, step = 100, 120, 96, 64, 32
    x, y, out = torch.randn(n, d).bfloat16(), torch.randn(m, d).bfloat16(), torch.full((n, m), torch.nan)
    with emulated(capability, edit_ptx=edit) as e:
        operands = {"x": x, "y": y}
        if capability >= 90:
            operands = {k: TensorDescriptor(t, list(t.shape), [d, 1], [block, step]) for k, t in operands.items()}
        constants = {"TMA": capability >= 90, "ALONG": 2, "BLOCK": block, "STEP": step}
        triton_call.launch(product, (2,), {**operands, "out": out, "n": n, "m": m, "d": d}, constants, num_stages=3)
    assert e.launches == [("product", (2,))] and e.instructions > 100
    return out, x.float() @ y.float().T


@each_capability
def test_tensor_cores_and_tma(capability: int) -> None:
    seen: list[str] = []
    out, expected = multiply(capability, lambda name, ptx: seen.append(ptx) or ptx)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert INSTRUCTION[capability] in seen[0] and "cp.async" in seen[0]
    assert ("cp.async.bulk.tensor" in seen[0]) == (capability >= 90)


def without(text: str) -> Callable[[str, str], str]:
    """Deletes the first instruction that starts with `text`."""

    def edit(name: str, ptx: str) -> str:
        line = next(line for line in ptx.splitlines() if line.strip().startswith(text))
        return ptx.replace(line, "", 1)

    return edit


def too_late(name: str, ptx: str) -> str:
    """Lets every wait leave one group of copies more in flight."""
    return re.sub(r"(cp\.async\.wait_group\s+)(\d+)", lambda found: f"{found[1]}{int(found[2]) + 1}", ptx)


@pytest.mark.parametrize(
    ("capability", "text"), [(80, "bar.sync"), (90, "wgmma.wait_group"), (100, "tcgen05.wait::ld")]
)
def test_a_deleted_wait_is_found(capability: int, text: str) -> None:
    with pytest.raises((MissingWait, Race)):
        multiply(capability, without(text))


def test_data_that_has_not_landed_is_nan() -> None:
    assert multiply(80, too_late)[0].isnan().any()


def test_sums_and_a_wrong_mask() -> None:
    x = torch.arange(30.0).reshape(3, 10)
    for block in (16, 32):
        out = torch.empty(3)
        with emulated(80):
            triton_call.launch(row_sums, (3,), {"x": x, "out": out, "n": 10}, {"BLOCK": block})
        assert torch.equal(out, x.sum(1))
    with emulated(80), pytest.raises(OutOfBounds, match="load of 4 B"):
        triton_call.launch(
            shift, (1,), {"x": x, "out": torch.zeros(64), "n": 64, "step": 1, "extra": None}, {"BLOCK": 64}
        )


def test_memory_that_nobody_wrote() -> None:
    out = torch.zeros(2)
    with emulated(80):
        work = torch.empty(2, 10)
        with pytest.raises(Uninitialised):
            triton_call.launch(row_sums, (2,), {"x": work, "out": out, "n": 10}, {"BLOCK": 16})
        work[1:].fill_(1.0)  # PyTorch wrote: all of it counts as written
        triton_call.launch(row_sums, (2,), {"x": work, "out": out, "n": 10}, {"BLOCK": 16})
        part = out.new_empty(3)
        triton_call.launch(row_sums, (2,), {"x": torch.ones(2, 10), "out": part, "n": 10}, {"BLOCK": 16})
        triton_call.launch(row_sums, (1,), {"x": part[:2], "out": out, "n": 2}, {"BLOCK": 16})
        assert out[0] == 20
        with pytest.raises(Uninitialised):
            triton_call.launch(row_sums, (1,), {"x": part, "out": out, "n": 3}, {"BLOCK": 16})
    assert torch.empty(1).shape == (1,) and "new_empty" not in vars(Tensor)


def test_specialisation_is_that_of_the_run_time() -> None:
    """An integer 1 and None become constants; a view keeps its alignment and its strides."""
    x, out, seen = torch.arange(130.0), torch.zeros(64), []
    with emulated(80, edit_ptx=lambda name, ptx: seen.append(ptx) or ptx):
        for view, step in ((x[2:66], 1), (x[:128], 2)):
            arguments = {"x": view, "out": out, "n": 64, "step": step, "extra": None}
            triton_call.launch(shift, (1,), arguments, {"BLOCK": 64})
            assert torch.equal(out, view[::step])
    assert [ptx.split(".entry")[1].split(")")[0].count(".param") for ptx in seen] == [5, 6]  # with Triton's own two


def test_a_grid_that_cuda_refuses() -> None:
    with emulated(90), pytest.raises(ValueError, match="refuses"):
        triton_call.launch(row_sums, (1, 65536), {"x": torch.zeros(1), "out": torch.zeros(1), "n": 1}, {"BLOCK": 16})


def test_gpus_that_are_too_old_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, 75, triton_call.Target("cuda", 75, 4, 65536))
    for capability, reason in ((75, "the Triton kernels need compute capability 8.0 or newer, got 7.5"), (80, None)):
        with emulated(capability):
            assert triton_call.unsupported(torch.zeros(1)) == reason


def test_launches_of_other_threads_go_where_they_went() -> None:
    with emulated(80), ThreadPoolExecutor(1) as other:
        assert triton_call.unsupported(torch.zeros(1)) is None
        assert "run on CUDA" in str(other.submit(triton_call.unsupported, torch.zeros(1)).result())
    with cuda_call.execute_on(PlanEmulator("80")), ThreadPoolExecutor(1) as other:
        assert cuda_call.takes(torch.zeros(1)) and not other.submit(cuda_call.takes, torch.zeros(1)).result()


def test_too_much_shared_memory() -> None:
    x = torch.zeros(128, 256).bfloat16()
    operand = TensorDescriptor(x, [128, 256], [256, 1], [128, 256])
    with emulated(120), pytest.raises(PtxError, match="limit is 101376"):
        arguments = {"x": operand, "y": operand, "out": torch.zeros(128, 128), "n": 128, "m": 128, "d": 256}
        triton_call.launch(product, (1,), arguments, {"TMA": True, "ALONG": 1, "BLOCK": 128, "STEP": 256}, num_stages=3)
