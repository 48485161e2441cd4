"""What the suites of mutations.py share: the tolerance rule over named outputs, and modules with a fault in them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from mutations import Fault
from torch import Tensor

from cibr_kernels import testing
from cibr_kernels.dispatch import backends

ALL = True, True, True  # gradients
Case = dict[str, tuple[Tensor, Tensor, dict[str, Any]]]  # output: eager, truth, options of assert_close


class Checked:
    """A suite whose outputs are named "case output"."""

    def check(self, outputs: dict[str, Tensor]) -> None:
        for name, actual in outputs.items():
            eager, truth, options = self.expected[name]
            empty = truth == float("-inf")
            assert torch.equal(actual == float("-inf"), empty), f"{name}: which sums are empty"
            actual, eager, truth = (t.masked_fill(empty, 0.0) for t in (actual, eager, truth))
            testing.assert_close(name, actual, eager, truth, **options)

    expected: Case


@contextmanager
def launcher_of(op: str, fault: Fault | None) -> Iterator[ModuleType]:
    """The launcher of an op's Triton backend, freshly imported with the fault in its file; put back afterwards."""
    package = backends.home(op)
    with faulty(package, fault):
        yield importlib.import_module(f"{package}.triton")


@contextmanager
def faulty(package: str, fault: Fault | None) -> Iterator[None]:
    """Inside, the modules of `package` that begin with "triton" are new, and the fault is in its file."""
    parent = importlib.import_module(package)
    ours = {n: m for n, m in sys.modules.items() if n.startswith(f"{package}.triton")}
    attributes = {n: vars(parent)[n] for n in list(vars(parent)) if n.startswith("triton")}
    for name in ours:
        del sys.modules[name]
    for name in attributes:
        delattr(parent, name)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if fault is not None and fault.path:
                name = ".".join(Path(fault.path).with_suffix("").parts)
                file = Path(folder) / Path(fault.path).name
                file.write_text(fault.source())  # Triton reads the source of its kernels from the file
                spec = importlib.util.spec_from_file_location(name, file)
                module = importlib.util.module_from_spec(spec)
                sys.modules[name] = module
                spec.loader.exec_module(module)
                setattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2], module)
            yield
    finally:
        for name in [n for n in sys.modules if n.startswith(f"{package}.triton")]:
            del sys.modules[name]
        for name in [n for n in vars(parent) if n.startswith("triton")]:
            delattr(parent, name)
        sys.modules.update(ours)
        for name, module in attributes.items():
            setattr(parent, name, module)
