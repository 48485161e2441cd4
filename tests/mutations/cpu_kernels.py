"""Planted faults in the C++ kernels of the CPU, each judged by the project's own tests of its op.

A fault is compiled with its op alone, for one instruction set, as a small library.  Tests are collected once; for each
library a forked child calls it in place of cibr_kernels._C's kernels and runs the op's tests until one fails.  A child
that crashes or hangs has found its fault too.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol
from mutations import ROOT, Fault, Verdict

from cibr_kernels.dispatch import backends

CSRC = ROOT / "csrc"
HANGS = 300  # seconds, on a busy machine; the longest suite takes ten
FLAGS = {
    "generic": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
}


@dataclass(frozen=True)
class Op:
    """What is compiled together (from csrc/), the kernels that it has, and the tests (from tests/) that judge it."""

    sources: tuple[str, ...]
    kernels: tuple[str, ...]
    tests: tuple[str, ...]
    isa: str = ""  # the best of generic and avx2 unless it says


_LSE = ("dot_lse_forward", "dot_lse_backward")
_SCORES = ("additive_scores_forward", "additive_scores_backward")
_SHIFTS = ("additive_shifts_forward", "additive_shifts_backward")
_AT_ONCE = "losses/test_at_once.py::test_"
OPS = {
    "lse": Op(("dot/lse/cpu.cpp",), _LSE, ("primitives/test_dot_lse.py", "losses/test_clip_loss.py")),
    "softplus": Op(("dot/softplus/cpu.cpp",), ("dot_softplus",), ("primitives/test_dot_softplus.py",)),
    "clip": Op(
        ("losses/clip/cpu.cpp", "dot/lse/cpu.cpp"), ("clip_loss", *_LSE),
        tuple(_AT_ONCE + t for t in ("equals_float64_whatever_the_upstream_gradient", "gradients_of_some_inputs")),
    ),
    "siglip": Op(
        ("losses/siglip/cpu.cpp", "dot/softplus/cpu.cpp"), ("siglip_loss", "dot_softplus"),
        (f"{_AT_ONCE}equals_float64_whatever_the_upstream_gradient",),
    ),
    "moments": Op(("additive/moments/cpu.cpp",), ("additive_moments",), ("primitives/test_additive_moments.py",)),
    "scores": Op(
        ("additive/scores/cpu.cpp",), _SCORES, ("primitives/test_additive_scores.py", "primitives/test_activations.py")
    ),
    "scores_avx512": Op(
        ("additive/scores/cpu.cpp",), _SCORES, ("primitives/test_activations.py",), "avx512"
    ),
    "shifts": Op(("additive/shifts/cpu.cpp",), _SHIFTS, ("primitives/test_additive_shifts.py",)),
    "log_mean_exp": Op(
        ("log_mean_exp/cpu.cpp",), ("log_mean_exp_forward", "log_mean_exp_backward"),
        ("primitives/test_log_mean_exp.py",),
    ),
}  # fmt: skip


def isa(op: Op) -> str:
    """The instruction set that an op's faults are compiled for."""
    return op.isa or ("avx2" if "avx2" in backends.compiled().supported_isas() else "generic")


def missing(suite: str) -> str | None:
    """Why the faults of an op cannot be judged here; None when they can."""
    if not backends.native_available():
        return "the compiled kernels are not built"
    return None if isa(OPS[suite]) in backends.compiled().supported_isas() else f"no {isa(OPS[suite])} here"


def compile_op(op: Op, fault: Fault | None, folder: Path) -> Path:
    """The op's kernels as a library that exports each under its own name; raises RuntimeError with g++'s words."""
    library, unit = folder / "kernels.so", folder / "unit.cpp"
    if fault is not None:
        changed = folder / fault.path
        changed.parent.mkdir(parents=True, exist_ok=True)
        changed.write_text(fault.source())
    include = [f'#include "{path}"' for path in (*op.sources, "common/scratch.cpp")]
    export = [f'extern "C" void {k}(const void* p) {{ ck::CK_ISA::{k}(*static_cast<const ck::{_struct(k)}*>(p)); }}'
              for k in op.kernels]  # fmt: skip
    unit.write_text("\n".join([*include, *export]))
    name = isa(op)
    command = [
        "g++", "-std=c++17", "-O1", "-ffp-contract=fast", "-fno-math-errno", "-w", "-shared", "-fPIC", "-fopenmp",
        *FLAGS[name], f"-DCK_ISA={name}", f"-DCK_ISA_{name}=1", f"-I{folder / 'csrc'}", f"-I{CSRC}", str(unit),
        "-o", str(library),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{fault.name if fault else 'without fault'}: {done.stderr[:2000]}")
    return library


def _struct(kernel: str) -> str:
    if kernel.startswith("dot_lse"):
        return "DotForward" if kernel.endswith("forward") else "DotBackward"
    return "".join(word.capitalize() for word in kernel.removesuffix("_forward").removesuffix("_backward").split("_"))


def install(library: Path, op: Op) -> None:
    """From now on this process calls the library's kernels."""
    module, functions = backends.compiled(), ctypes.CDLL(str(library))
    for kernel in op.kernels:
        setattr(module, kernel, _caller(getattr(functions, kernel)))


def _caller(function: Any) -> Any:
    def call(params: Any) -> None:
        # a pybind11 instance holds the address of its struct right after the head of a Python object
        function(ctypes.c_void_p.from_address(id(params) + object.__basicsize__))

    return call


# ------------------------------------------------------------------------------------------------ running
class Judge:
    """A pytest plugin that runs every fault on the collected tests in place of running them once."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults, self.verdicts, self.error = faults, [], None

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {suite: _of(OPS[suite], session.items) for suite in dict.fromkeys(f.suite for f in self.faults)}
        jobs: list[Fault | str] = [*items, *self.faults]  # a suite's name: its kernels without a fault
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as compiler:
            ahead = [compiler.submit(self._compile, job, Path(folder) / str(k)) for k, job in enumerate(jobs)]
            try:
                for job, library in zip(jobs, ahead, strict=True):
                    self._judge(job, library, items)
            except Exception as error:
                self.error = error
                for future in ahead:
                    future.cancel()
        return True

    @staticmethod
    def _compile(job: Fault | str, folder: Path) -> Path:
        folder.mkdir()
        return compile_op(OPS[job], None, folder) if isinstance(job, str) else compile_op(OPS[job.suite], job, folder)

    def _judge(self, job: Fault | str, compiled: Future[Path], items: dict[str, list[pytest.Item]]) -> None:
        suite, library = (job if isinstance(job, str) else job.suite), compiled.result()
        start = time.perf_counter()
        found = first_failure(items[suite], library, OPS[suite])
        seconds = time.perf_counter() - start
        if isinstance(job, str):
            if found is not None:
                raise AssertionError(f"{suite} fails without a fault: {found}")
            print(f"           {seconds:5.1f} s  {suite:14} {len(items[suite])} tests pass without a fault", flush=True)
            return
        verdict = Verdict(job, "missed" if found is None else "caught", found or "every test passes", seconds)
        self.verdicts.append(verdict)
        print(verdict, flush=True)


def _of(op: Op, items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The op's tests that take parameters; of those that differ in the instruction set alone, one."""
    places, found = tuple(f"tests/{t}" for t in op.tests), {}
    for item in items:
        if item.nodeid.startswith(places) and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            rest = {name: str(value) for name, value in item.callspec.params.items() if name != "isa"}
            found.setdefault((item.nodeid.partition("[")[0], *rest.items()), item)
    return list(found.values())


def first_failure(items: Sequence[pytest.Item], library: Path, op: Op) -> str | None:
    """What the first of the tests that fails says, in a child of its own; None where all pass."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run_until_failure(items, library, op, writer)
    os.close(writer)
    with selectors.DefaultSelector() as ready, os.fdopen(reader, "rb") as pipe:
        ready.register(pipe, selectors.EVENT_READ)
        answered = bool(ready.select(HANGS))
        if not answered:
            os.kill(child, signal.SIGKILL)
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not answered:
        return f"hangs: no answer in {HANGS} s"
    if os.WIFSIGNALED(status):
        return f"crashes: {signal.Signals(os.WTERMSIG(status)).name}"
    return pickle.loads(answer) if answer else f"ends with status {os.waitstatus_to_exitcode(status)}"


def _run_until_failure(items: Sequence[pytest.Item], library: Path, op: Op, writer: int) -> None:
    """Never returns."""
    found = "raised outside a test"
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1), os.dup2(silent, 2)
        install(library, op)
        found = next(_failures(items), None)
    finally:
        os.write(writer, pickle.dumps(found))
        os._exit(0)


def _failures(items: Sequence[pytest.Item]) -> Iterator[str]:
    for item, following in zip(items, [*items[1:], None], strict=True):
        for report in runtestprotocol(item, nextitem=following, log=False):
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                yield f"{item.name}: {crash.message.splitlines()[0] if crash else report.longreprtext[-200:]}"


def run(faults: Sequence[Fault]) -> list[Verdict]:
    """Verdicts in order, printed as they come.  Raises StaleAnchor before anything is compiled, AssertionError where
    an op's tests fail without a fault."""
    for fault in faults:
        fault.source()
    places = sorted({f"tests/{t}" for f in faults for t in OPS[f.suite].tests})
    judge = Judge(faults)
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:terminal", "-s", "-m", "not slow"]
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        code = pytest.main([*options, *places], plugins=[judge])
    finally:
        os.chdir(before)
    if judge.error:
        raise judge.error
    if len(judge.verdicts) != len(faults):
        raise RuntimeError(f"pytest collected nothing to judge with: {code!r}")
    sys.stdout.flush()
    return judge.verdicts
