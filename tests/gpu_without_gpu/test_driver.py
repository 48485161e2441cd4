"""A driver that cannot run the compiled CUDA module: asked once, "auto" takes Triton, "native" by name says why.

Where there is no driver at all, the module's own runtime refuses as it does where the driver is too old.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cibr_kernels.dispatch import backends, cuda_call, triton_call

pytestmark = pytest.mark.skipif(bool(backends.cuda_missing()), reason=backends.cuda_missing() or "")
OPS = ("additive_moments", "additive_shifts")
TOO_OLD = "CUDA: CUDA driver version is insufficient for CUDA runtime version (cudaErrorInsufficientDriver)"


@pytest.fixture
def features(monkeypatch) -> Iterator[Tensor]:
    """On a GPU of capability 9.0 that is not here."""
    target = triton_call.Target("cuda", 90, 132, 232448)
    monkeypatch.setattr(triton_call.Gpu, "target", staticmethod(lambda device: target))
    cuda_call.Device.refusal.cache_clear()
    with FakeTensorMode():
        yield torch.empty(8, 4, device="cuda")
    cuda_call.Device.refusal.cache_clear()


def asked(monkeypatch, answer: str) -> list[int]:
    """The devices that the module is asked about, whose answer this is from now on."""
    devices: list[int] = []
    module = SimpleNamespace(cuda_refusal=lambda device: devices.append(device) or answer)
    monkeypatch.setattr(backends, "compiled", lambda: module)
    return devices


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
@pytest.mark.parametrize("op", OPS)
def test_without_a_driver_triton_runs_and_the_cuda_module_says_why(op, features):
    assert backends.choose(op, "auto", features).__name__ == f"{backends.home(op)}.triton"
    words = r"native: the CUDA C\+\+ kernels cannot run on cuda:0: .* built with CUDA \d+\.\d, no driver was found"
    with pytest.raises(RuntimeError, match=words):
        backends.choose(op, "native", features)


def test_a_driver_that_is_too_old_is_asked_once(features, monkeypatch):
    devices = asked(monkeypatch, TOO_OLD)
    for op in OPS:
        assert backends.choose(op, "auto", features).__name__ == f"{backends.home(op)}.triton"
        with pytest.raises(RuntimeError, match="cudaErrorInsufficientDriver"):
            backends.choose(op, "native", features)
    assert devices == [0]


def test_a_driver_that_can_is_asked_once(features, monkeypatch):
    devices = asked(monkeypatch, "")
    for op in OPS:
        assert backends.choose(op, "auto", features).__name__ == f"{backends.home(op)}.native"
    assert devices == [0]
