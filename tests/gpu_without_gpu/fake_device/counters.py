"""What the fake device counted, read in the process that has it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cibr_kernels.dispatch import backends, cuda_call

NAMES = ("aten", "triton", "cublas", "memcpys", "memsets", "tensor_maps", "synchronisations", "mallocs")  # fake.h


class Counters:
    """`read()` -> counts by name since `reset()`; "cpp" are launches of the CUDA C++ kernels, by their plan."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(os.environ["FAKE_CUDA"])
        self._counts = (ctypes.c_long * len(NAMES)).in_dll(self.library, "fake_counts")
        self._logging = ctypes.c_int.in_dll(self.library, "fake_logging")
        self._names = (ctypes.c_char * (1 << 20)).in_dll(self.library, "fake_names")
        self.planned: list[str] = []

    def reset(self) -> None:
        self.library.fake_reset()
        self.planned.clear()

    def read(self) -> dict[str, int]:
        return {**dict(zip(NAMES, self._counts, strict=True)), "cpp": len(self.planned)}

    def launched(self, run: Callable[[], Any]) -> list[str]:
        """Names of what run() launches, in order; the C++ kernels' last."""
        self.reset()
        self._logging.value = 1
        try:
            run()
        finally:
            self._logging.value = 0
        return self._names.value.decode().splitlines() + self.planned

    @contextmanager
    def planned_launches(self) -> Iterator[None]:
        """The CUDA C++ kernels plan their launches, and do not launch.  The device keeps what they would pass."""
        planned, library = self.planned, self.library

        class Plan(cuda_call.Device):
            @staticmethod
            def refusal(device: torch.device) -> str:
                return ""

            @staticmethod
            def launch(kernel: str, params: Any, tensors: list[torch.Tensor]) -> None:
                params.device, params.stream = tensors[0].device.index, 0
                launches, _ = getattr(backends.compiled(), f"{kernel}_cuda_plan")(params)
                planned.extend(launch[0] for launch in launches)
                told = repr((params.device, launches)).encode()
                library.fake_keep(told, ctypes.c_size_t(len(told)))

        with cuda_call.execute_on(Plan()):
            yield
