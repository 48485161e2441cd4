"""Planted faults in the C++ kernels of the CPU, each judged by the project's own tests of its op.

A fault is compiled with its op alone, for one instruction set, as a small library.  Tests are collected once; for each
library a forked child calls it in place of cibr_kernels._C's kernels and runs the op's tests until one fails.  A child
that crashes or hangs has found its fault too.  The test that found a fault last time (cpu_verdicts.json) runs first.
"""

from __future__ import annotations

import ctypes
import os
import resource
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from _pytest.runner import runtestprotocol
from mutations import ROOT, Fault, Verdict
from verdicts import name, within

from cibr_kernels.dispatch import backends

CSRC = ROOT / "csrc"
HANGS = 120  # seconds of a processor; the longest suite takes ten
SLEEPS = 3600  # seconds without a word, however busy the machine is
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
    package: tuple[str, ...]  # the folders and files of the package that stand between them
    isa: str = ""  # the best of generic and avx2 unless it says
    level: str = "-O1"


_LSE = ("dot_lse_forward", "dot_lse_backward")
_MOMENTS = ("additive_moments", "additive_moments_backward")
_SCORES = ("additive_scores_forward", "additive_scores_backward")
_SHIFTS = ("additive_shifts_forward", "additive_shifts_backward")
_DOT, _ADDITIVE = ("primitives/dot",), ("primitives/additive",)
_LOSS = "losses/native_gradients.py", "losses/targets.py"
_NATIVE = "losses/test_native_gradients.py::test_"
OPS = {
    "lse": Op(
        ("dot/lse/cpu.cpp",),
        _LSE,
        ("primitives/test_dot_lse.py", "losses/test_clip_loss.py"),
        (*_DOT, "losses/clip", *_LOSS),
    ),
    "softplus": Op(("dot/softplus/cpu.cpp",), ("dot_softplus",), ("primitives/test_dot_softplus.py",), _DOT),
    "clip": Op(
        ("losses/clip/cpu.cpp", "dot/lse/cpu.cpp"),
        ("clip_loss", *_LSE),
        tuple(_NATIVE + t for t in ("equals_float64_whatever_the_upstream_gradient", "gradients_of_some_inputs")),
        (*_DOT, "losses/clip", *_LOSS),
    ),
    "siglip": Op(
        ("losses/siglip/cpu.cpp", "dot/softplus/cpu.cpp"),
        ("siglip_loss", "dot_softplus"),
        (f"{_NATIVE}equals_float64_whatever_the_upstream_gradient",),
        (*_DOT, "losses/siglip", *_LOSS),
    ),
    "moments": Op(("additive/moments/cpu.cpp",), _MOMENTS, ("primitives/test_additive_moments.py",), _ADDITIVE),
    "scores": Op(
        ("additive/scores/cpu.cpp",),
        _SCORES,
        ("primitives/test_additive_scores.py", "primitives/test_activations.py"),
        _ADDITIVE,
    ),
    "scores_avx512": Op(
        ("additive/scores/cpu.cpp",),
        _SCORES,
        ("primitives/test_activations.py",),
        _ADDITIVE,
        "avx512",
        "-O3",  # as shipped: other products are fused at -O1, and softplus is 1e-9 past its bound
    ),
    "shifts": Op(("additive/shifts/cpu.cpp",), _SHIFTS, ("primitives/test_additive_shifts.py",), _ADDITIVE),
    "log_mean_exp": Op(
        ("log_mean_exp/cpu.cpp",),
        ("log_mean_exp_forward", "log_mean_exp_backward"),
        ("primitives/test_log_mean_exp.py",),
        ("primitives/log_mean_exp",),
    ),
}


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
    export = [
        f'extern "C" void {k}(const void* p) {{ ck::CK_ISA::{k}(*static_cast<const ck::{_struct(k)}*>(p)); }}'
        for k in op.kernels
    ]
    unit.write_text("\n".join([*include, *export]))
    level = isa(op)
    command = [
        *("g++", "-std=c++17", op.level, "-fexpensive-optimizations", "-ffp-contract=fast", "-fno-math-errno"),
        *("-w", "-shared", "-fPIC", "-fopenmp"),
        *FLAGS[level],
        *(f"-DCK_ISA={level}", f"-DCK_ISA_{level}=1", f"-I{folder / 'csrc'}", f"-I{CSRC}"),
        *(str(unit), "-o", str(library)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{fault.name if fault else 'without fault'}: {done.stderr[:2000]}")
    return library


def _struct(kernel: str) -> str:
    if kernel.startswith("dot_lse"):
        return "DotForward" if kernel.endswith("forward") else "DotBackward"
    if kernel == "additive_moments_backward":
        return "AdditiveMomentsBackward"
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
class Failure(NamedTuple):
    test: int  # its place among the op's tests
    says: str


Known = Callable[..., Collection[Path]]  # files of code, of an op and files of tests: cpu_keys.known


class Judge:
    """A pytest plugin that runs every fault on the collected tests in place of running them once."""

    def __init__(self, faults: Sequence[Fault], finders: Mapping[str, str], known: Known) -> None:
        self.faults, self.finders, self.known = faults, finders, known
        self.verdicts, self.error = [], None

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        # imports inductor's settings, which takes a second: once, and not in each child
        torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())
        items = {suite: _of(OPS[suite], session.items) for suite in dict.fromkeys(f.suite for f in self.faults)}
        jobs: list[Fault | str] = [*self.faults, *items]  # a suite's name: its kernels without a fault
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as compiler:
            ahead = [compiler.submit(self._compile, job, Path(folder) / str(k)) for k, job in enumerate(jobs)]
            try:
                for job, library in zip(jobs, ahead, strict=True):
                    if isinstance(job, str):
                        self._check(job, library.result(), items[job])
                    else:
                        self._judge(job, library.result(), items[job.suite])
            except Exception as error:
                self.error = error
                compiler.shutdown(cancel_futures=True)
        return True

    @staticmethod
    def _compile(job: Fault | str, folder: Path) -> Path:
        folder.mkdir()
        return compile_op(OPS[job], None, folder) if isinstance(job, str) else compile_op(OPS[job.suite], job, folder)

    def _judge(self, fault: Fault, library: Path, items: Sequence[pytest.Item]) -> None:
        start = time.perf_counter()
        ordered = sorted(items, key=lambda item: item.nodeid != self.finders.get(name(fault)))
        failure = first_failure(ordered, library, OPS[fault.suite])
        kind, by = ("caught", failure.says) if failure else ("missed", f"all of {len(items)} tests pass")
        finder = ordered[failure.test].nodeid if failure else ""
        self.verdicts.append(Verdict(fault, kind, by, time.perf_counter() - start, finder))
        print(self.verdicts[-1], flush=True)

    def _check(self, suite: str, library: Path, items: Sequence[pytest.Item]) -> None:
        """The tests that found faults pass without one."""
        found = {v.finder for v in self.verdicts if v.fault.suite == suite}
        chosen = [item for item in items if item.nodeid in found]
        known = self.known(OPS[suite], *{item.path for item in chosen})
        if failure := first_failure(chosen, library, OPS[suite], known):
            raise AssertionError(f"{suite} fails without a fault: {failure.says}")


def _of(op: Op, items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The op's tests that take parameters; of those that differ in the instruction set alone, one."""
    places, found = tuple(f"tests/{t}" for t in op.tests), {}
    for item in items:
        if item.nodeid.startswith(places) and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            rest = {name: str(value) for name, value in item.callspec.params.items() if name != "isa"}
            found.setdefault((item.nodeid.partition("[")[0], *rest.items()), item)
    return list(found.values())


def first_failure(
    items: Sequence[pytest.Item], library: Path, op: Op, known: Collection[Path] | None = None
) -> Failure | None:
    """The first of the tests that fails, in a child of its own; None where all pass.

    One that runs code of other files than the known ones fails too.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run_until_failure(items, library, op, writer, known)
    os.close(writer)
    last, sleeps = b"0\t\n", False
    with selectors.DefaultSelector() as ready, os.fdopen(reader, "rb", buffering=0) as pipe:
        ready.register(pipe, selectors.EVENT_READ)
        while not (sleeps := not ready.select(SLEEPS)) and (read := pipe.read(1 << 16)):
            last = (last + read)[-4096:]
    if sleeps:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    test, _, says = last.rstrip(b"\n").rpartition(b"\n")[2].decode(errors="replace").partition("\t")
    if sleeps:
        says = f"hangs: no word in {SLEEPS} s"
    elif os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        says = f"hangs: {HANGS} s of a processor end in {items[int(test)].name}"
    elif os.WIFSIGNALED(status):
        says = f"crashes: {signal.Signals(os.WTERMSIG(status)).name} in {items[int(test)].name}"
    return Failure(int(test), says) if says else None


def _run_until_failure(
    items: Sequence[pytest.Item], library: Path, op: Op, writer: int, known: Collection[Path] | None
) -> None:
    """Writes the number of each test as it starts, and after a tab what the first says that fails.  Never returns."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1), os.dup2(silent, 2)
    used = int(sum(os.times()[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (used + HANGS, used + HANGS + 10))
    try:
        install(library, op)
        for k, (item, following) in enumerate(zip(items, [*items[1:], None], strict=True)):
            os.write(writer, f"{k}\t\n".encode())
            with within(known) if known is not None else nullcontext():
                reports = runtestprotocol(item, nextitem=following, log=False)
            if failed := [r for r in reports if r.failed]:
                crash = getattr(failed[0].longrepr, "reprcrash", None)
                words = (crash.message if crash else failed[0].longreprtext).splitlines()[0]
                os.write(writer, f"{k}\t{item.name}: {words}\n".encode()[:3000])
                break
    except Exception as error:
        os.write(writer, f"0\t{error}\n".encode()[:3000])
    finally:
        os._exit(0)


def run(faults: Sequence[Fault], finders: Mapping[str, str], known: Known) -> list[Verdict]:
    """Verdicts in order, printed as they come.  finders: the tests that run first, by name of a fault.

    Raises StaleAnchor before anything is compiled, AssertionError where a test that found a fault fails without it, or
    runs code of files that are not known.
    """
    for fault in faults:
        fault.source()
    places = sorted({f"tests/{t}" for f in faults for t in OPS[f.suite].tests})
    judge = Judge(faults, finders, known)
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
    return judge.verdicts
