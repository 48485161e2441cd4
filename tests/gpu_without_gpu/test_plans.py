"""Replayed plans, on the fake device: what they pass, when they serve, where their memory lies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_device
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.guards import host
from cibr_kernels.dispatch import plan, plans
from cibr_kernels.dispatch.triton_recording import Recorder

CPU = torch.device("cpu")


def run(device: Path, program: str, **environment: str) -> dict[str, Any]:
    """What a program of fake_device prints, on the fake device."""
    if plans._native() is None:
        pytest.skip("cibr_kernels._plans is not built")
    paths = {"PYTHONPATH": f"{host.ROOT}:{host.FAKE_DEVICE}"}
    full = fake_device.environment(device) | paths | environment
    command = [sys.executable, "-m", *f"fake_device.{program}".split()]
    done = subprocess.run(command, env=full, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_replay_passes_the_bytes_that_triton_and_pytorch_pass(device: Path) -> None:
    found = run(device, "replays", CIBR_KERNELS_PLANS="1")
    assert found["different"] == [] and found["bytes"] > 40000, "launches, tensor maps, matmuls"
    assert found["names"] == [], "the same kernels in the same order"
    assert found["around"] == [] and found["refused"] == {}


def test_when_plans_serve(device: Path) -> None:
    """fake_device/planned.py has the situations: [replays, plans that are kept] after each."""
    assert run(device, "planned", CIBR_KERNELS_PLANS="1") == {
        "first step": [0, 2],
        "second step": [2, 2],
        "another size": [2, 4],
        "that size again": [4, 4],
        "misaligned": [4, 4],
        "one tensor twice": [4, 4],
        "then two": [4, 6],
        "disabled": [4, 6],
        "a hook": [4, 6],
        "switched off": [4, 6],
        "float32": [4, 8],
        "tf32": [4, 10],
        "another stream": [6, 10],
        "capturing": [8, 10],
        "capturing what is new": [8, 10],
        "few are kept": [8, 3],
        "what was let go": [9, 4],
        "waits": 0,
        "old addresses": 0,
        "streams": [[0, 1, 2, 3], [0]],
    }


def test_devices_have_plans_of_their_own_and_are_current_while_they_replay(device: Path) -> None:
    both = {"FAKE_DEVICES": "2", "CUDA_VISIBLE_DEVICES": "0,1", "CIBR_KERNELS_PLANS": "1"}
    zero, one = [[0, 0]] * 2, [[1, 1]] * 2  # the directions of a step
    assert run(device, "machines devices", **both) == [
        [2, []],
        [4, []],
        [4, one],
        [4, [*one, *zero]],
        [4, [*one, *zero, *one]],
    ]


def test_one_of_two_processes_compiles_and_the_other_finds(device: Path, tmp_path: Path) -> None:
    paths = {"PYTHONPATH": f"{host.ROOT}:{host.FAKE_DEVICE}", "TRITON_CACHE_DIR": str(tmp_path)}
    environment = fake_device.environment(device) | paths
    command = [sys.executable, "-m", "fake_device.machines", "warmup"]
    pair = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = sorted(json.loads(process.communicate()[0]) for process in pair)
    compiled = found[1][0]
    assert compiled > 9 and found == [[0, compiled], [compiled, 0]]


def test_after_a_warmup_with_a_cibr_loss_its_steps_compile_nothing(device: Path) -> None:
    warm, after, moved = run(device, "machines critics")
    assert warm == after > 20 and moved == []


# ------------------------------------------------------------------------------------------------ memory, on the CPU


class Matmuls:
    """Stands for the module _plans where PyTorch multiplies."""

    has_gemm = False


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentBlasHandle", lambda: 0, raising=False)
    blocks: dict[int, Tensor] = {}

    def allocate(size: int, stream: int) -> int:
        block = torch.full((size,), 255, dtype=torch.uint8)  # NaN
        blocks[block.data_ptr()] = block
        return block.data_ptr()

    monkeypatch.setattr(torch._C, "_cuda_cudaCachingAllocator_raw_alloc", allocate, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_cudaCachingAllocator_raw_delete", blocks.pop, raising=False)


def planned(direction: Any, *inputs: Tensor) -> plan.Plan:
    with Recorder(inputs) as seen:
        outputs = direction(*inputs)
    assert seen.refusal is None, seen.refusal
    return plan.Plan(seen, outputs, CPU, Matmuls)


def chain(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Temporaries that live at different times, an output that is wanted early and one that is wanted late."""
    first, early, large, late = torch.empty(8, 8), torch.empty(8, 8), torch.empty(64, 64), torch.empty(8, 8)
    torch.mm(a, b, out=first)
    torch.addmm(first, b, a, out=first)
    torch.mm(first, b, out=early)
    for corner in (large[:8, :8], large[8:16, 40:48].T):
        torch.mm(first, early, out=corner) if corner.stride(1) == 1 else torch.mm(early, b, out=corner.T)
    second = torch.empty_like(first)
    torch.mm(large[:8, :8], large[8:16, 40:48], out=second)
    torch.mm(second, a, out=late)
    return early, late, torch.empty(0)


@pytest.mark.parametrize("large", [1 << 30, 64 * 64 * 4])
def test_memory_that_is_used_again_holds_what_it_should(
    on_the_cpu: None, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    monkeypatch.setattr(plan, "LARGE", large)
    torch.manual_seed(0)
    found = planned(chain, torch.randn(8, 8), torch.randn(8, 8))
    assert len(found.phases) == (1 if large > 64 * 64 * 4 else 2)
    for _ in range(2):
        a, b = torch.randn(8, 8), torch.randn(8, 8)
        for ours, theirs in zip(found.run((a, b)), chain(a, b), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 5000)), min_size=1, max_size=12),
    st.integers(1, 10),
)
def test_what_lives_at_one_time_lies_apart(drawn: list[tuple[int, int, int]], split: int) -> None:
    spans = {k: plan._Span(min(a, b), max(a, b), size) for k, (a, b, size) in enumerate(drawn)}
    at: dict[int, plan.Place] = {}
    sizes = dict(plan._workspaces(spans, split, 5, at))
    for k, span in spans.items():
        assert at[k].slot == (5 if span.last < split else 6), "the first workspace is let go at the split"
        assert at[k].offset % 512 == 0 and at[k].offset + span.nbytes <= sizes[at[k].slot]
        for j, other in spans.items():
            together = j < k and span.first <= other.last and other.first <= span.last and at[j].slot == at[k].slot
            apart = at[j].offset + other.nbytes <= at[k].offset or at[k].offset + span.nbytes <= at[j].offset
            assert not together or apart


@pytest.mark.parametrize(
    ("direction", "reason"),
    [
        (lambda a, b: (a + b,), "neither a launch of Triton's nor a matmul"),
        (lambda a, b: (a.t(),), "no tensor of its own"),
        (lambda a, b: (torch.empty(16)[:4],), "no tensor of its own"),
        (lambda a, b: torch.empty(8, 8).unbind(0), "no tensor of its own"),
        (lambda a, b: (torch.mm(a, CONSTANT, out=torch.empty(8, 8)),), "neither an input nor allocated here"),
    ],
)
def test_what_cannot_be_replayed_is_refused(direction: Any, reason: str) -> None:
    inputs = torch.randn(8, 8), torch.randn(8, 8)
    with Recorder(inputs) as seen:
        outputs = direction(*inputs)
    if seen.refusal is None:
        with pytest.raises(plan.Unknown, match=reason):
            plan.Plan(seen, outputs, CPU, Matmuls)
    else:
        assert reason in seen.refusal


CONSTANT = torch.randn(8, 8)
