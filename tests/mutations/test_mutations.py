"""mutations.py: its verdicts on a kernel of this file, and the score over the package's kernels."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator

import mutations
import pytest
import torch
import verdicts
from mutations import Fault, StaleAnchor, delete
from torch import Tensor

from cibr_kernels.dispatch import backends, triton_call

triton = pytest.importorskip("triton")
import cpu_faults  # noqa: E402
import cpu_kernels  # noqa: E402
import cpu_keys  # noqa: E402
import gpu_faults  # noqa: E402
import gpu_suites  # noqa: E402
import triton.language as tl  # noqa: E402
from executor import emulated  # noqa: E402


@triton.jit
def total(x, out, n, LAST: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        sums += tl.load(x + at, mask=at < n + LAST, other=0.0)
    tl.store(out, tl.sum(sums, 0) * SCALE)


class Suite:
    """`old` of a fault is what it sets: a constant of the kernel."""

    def run(self, fault: Fault | None) -> Iterator[dict[str, Tensor]]:
        x, out = torch.arange(300.0), torch.zeros(())
        changed = {fault.old: eval(fault.new)} if fault is not None and fault.old else {}
        with emulated(80, edit_ptx=fault.edit_ptx if fault else None):
            constants = {"LAST": 0, "SCALE": 2.0, "BLOCK": 128} | changed
            triton_call.launch(total, (1,), {"x": x, "out": out, "n": 300}, constants)
        yield {"total": out}

    def check(self, outputs: dict[str, Tensor]) -> None:
        assert abs(outputs["total"].item() - 89700) < 1, "total is wrong"


@pytest.mark.parametrize(
    ("fault", "kind", "by"),
    [
        (Fault("mask past the end", "own", old="LAST", new="1"), "caught", "OutOfBounds"),
        (Fault("last one missed", "own", old="LAST", new="-1"), "caught", "total is wrong"),
        (Fault("other blocks", "own", old="BLOCK", new="256"), "equivalent", "bit-identical over 1"),
        (Fault("a little off", "own", old="SCALE", new="2.0 + 2e-6"), "missed", "another result"),
        (Fault("barrier", "own", kernel="total", ptx=delete("bar.sync")), "caught", "Race"),
    ],
)
def test_verdicts(fault: Fault, kind: str, by: str) -> None:
    (verdict,) = mutations.run([fault], {"own": Suite()})
    assert verdict.kind == kind and by in verdict.by


def test_a_stale_anchor_is_an_error() -> None:
    for old in ("no such text", "import"):
        with pytest.raises(StaleAnchor):
            next(mutations.run([Fault("stale", "own", "setup.py", old, "")], {"own": Suite()}))
    with pytest.raises(StaleAnchor):
        next(mutations.run([Fault("stale", "own", kernel="total", ptx=delete("bar.sync", 99))], {"own": Suite()}))


@pytest.mark.parametrize("faults", [cpu_faults.FAULTS, gpu_faults.FAULTS], ids=["cpu", "gpu"])
def test_anchors_of_the_faults_are_there(faults: list[Fault]) -> None:
    for fault in faults:
        assert fault.path == "" or fault.source()
    assert len(faults) >= 30 and all(f.path or f.ptx for f in faults)
    assert len({(f.suite, f.name) for f in faults}) == len(faults)


def test_every_file_of_triton_kernels_has_faults() -> None:
    """But that of the activations, which kernels inline: their values and slopes are compared one by one elsewhere."""
    files = (mutations.ROOT / "cibr_kernels").rglob("triton*.py")
    kernels = {str(f.relative_to(mutations.ROOT)) for f in files if "\n@triton.jit" in f.read_text()}
    without = kernels - {fault.path for fault in gpu_faults.FAULTS}
    assert len(kernels) > 10 and without == {"cibr_kernels/primitives/additive/triton_activations.py"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.skipif(not backends.native_available(), reason="the compiled kernels are not built")
def test_no_fault_of_the_cpu_kernels_is_missed() -> None:
    """By the table of verdicts; what is judged anew is so in a process of its own, whose pytest judges."""
    rows = verdicts.load(verdicts.CPU)
    anew = cpu_keys.judged_anew(cpu_faults.FAULTS)
    others = {verdicts.name(f) for f in cpu_faults.FAULTS if f not in anew}
    assert {name: rows[name]["verdict"] for name in others} == dict.fromkeys(others, "caught")
    names = [f"cpu {verdicts.name(f)}" for f in anew if cpu_kernels.missing(f.suite) is None]
    if names:  # without any it would judge all
        command = [sys.executable, str(mutations.HERE / "mutations.py"), *names]
        done = subprocess.run(command, capture_output=True, text=True)
        score = f"cpu score {len(names)} of {len(names)};"
        assert done.returncode == 0 and score in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("suite", list(gpu_suites.SUITES))
def test_no_fault_of_the_gpu_kernels_is_missed(suite: str) -> None:
    if reason := gpu_suites.missing(suite):
        pytest.skip(reason)
    faults, rows = [f for f in gpu_faults.FAULTS if f.suite == suite], verdicts.load(verdicts.GPU)
    changed, again = verdicts.unsettled(faults, rows, gpu_suites.key)
    judged = mutations.run([*changed, *again], gpu_suites.SUITES, gpu_suites.watched)
    anew = {verdicts.name(v.fault): v.kind for v in judged}
    kinds = {verdicts.name(f): rows.get(verdicts.name(f), {}).get("verdict") for f in faults}
    assert {verdicts.name(f): anew[verdicts.name(f)] for f in again}.items() <= kinds.items()
    kinds |= anew
    assert kinds and {name for name, kind in kinds.items() if kind not in ("caught", "equivalent")} == set()
    assert sum(kind == "equivalent" for kind in kinds.values()) <= 1 + len(kinds) // 10
