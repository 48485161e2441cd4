"""The C++ kernels built for aarch64 and run by qemu-user: a stand-in for `cibr_kernels._C`.

As a plugin (`pytest -p aarch64`) it takes the compiled module's place before tests are collected, so that the tests of
the operators themselves, parametrised by instruction set, judge the other machine's code.  Tensors travel through a
pipe to tests/aarch64/driver.cpp, which has neither torch nor Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from cibr_kernels.dispatch import backends

ROOT = Path(__file__).parents[2]
COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
DRIVER = "CIBR_AARCH64_DRIVER"  # an environment variable: the program that the plugin runs


def emulator() -> str | None:
    """qemu-user, from Debian's qemu-user-static or qemu-user."""
    return next((path for name in EMULATORS if (path := shutil.which(name))), None)


def missing() -> str | None:
    """Why aarch64 cannot be built and run here; None when it can."""
    if shutil.which(COMPILER) is None:
        return f"there is no {COMPILER} (Debian's g++-aarch64-linux-gnu)"
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        return "cmake or ninja is not installed"
    return None if emulator() else "there is no qemu-aarch64 (Debian's qemu-user-static)"


def build() -> Path:
    """The driver, by the same CMakeLists.txt as the module; kept in build/aarch64, so that a second call does nothing.

    Raises RuntimeError with the compiler's words.
    """
    folder = ROOT / "build" / "aarch64"
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCIBR_DRIVER=ON"]
    compiler = f"-DCMAKE_CXX_COMPILER={COMPILER}"
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", compiler, *target]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # of several test processes one builds
        for command in (configure, ["cmake", "--build", str(folder)]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return folder / "driver"


class Params:
    """The fields of a parameter struct."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}

    def fill(self, fields: dict[str, Any]) -> None:
        """None and empty tensors stay null pointers, as in csrc/common/fields.h."""
        self.fields |= {
            name: value
            for name, value in fields.items()
            if value is not None and not (isinstance(value, Tensor) and value.numel() == 0)
        }


class Machine(ModuleType):
    """In place of cibr_kernels._C: structs are `Params`, kernels run in the emulator."""

    has_cuda = False

    def __init__(self, driver: Path, processor: str = "max") -> None:
        super().__init__("cibr_kernels._C of aarch64")
        command = [emulator() or "qemu-aarch64", "-cpu", processor, str(driver)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._host = backends.compiled()
        self._isas = self._ask(b"isas\n").split()
        self._isa = self._isas[-1]

    def supported_isas(self) -> list[str]:
        return self._isas

    def isa(self) -> str:
        return self._isa

    def set_isa(self, name: str) -> None:
        if name not in self._isas:
            raise ValueError(f"unknown or unsupported instruction set '{name}'; see supported_isas()")
        self._isa = name

    def __getattr__(self, name: str) -> Any:
        host = getattr(self._host, name)
        if isinstance(host, type):
            return Params if hasattr(host, "fill") else host  # Scratch is the host's memory

        def of_host(*arguments: Any) -> Any:
            if arguments and isinstance(arguments[0], Params):
                return self.call(name, arguments[0].fields)
            return host(*arguments)

        return of_host

    def _ask(self, request: bytes) -> str:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(request)
        self._process.stdin.flush()
        answer = self._process.stdout.readline().decode()
        if not answer:
            raise RuntimeError(f"the driver has ended with status {self._process.wait()}")
        return answer

    def call(self, kernel: str, fields: dict[str, Any]) -> None:
        """Runs a kernel on these fields of its struct; what it may write is copied back."""
        parts = [f"call {self._isa} {kernel}\n".encode()]
        for name, value in fields.items():
            if isinstance(value, Tensor):
                data = _bytes_of(value).numpy().tobytes()
                parts += [f"data {name} {len(data)}\n".encode(), data]
            else:
                parts.append(f"number {name} {float(value) if isinstance(value, float) else int(value)}\n".encode())
        status, *written = self._ask(b"".join([*parts, b"run\n"])).split()
        if status != "ok":
            raise RuntimeError(" ".join([status, *written]))
        assert self._process.stdout
        for name in written:
            room = _bytes_of(fields[name])
            room.copy_(torch.frombuffer(bytearray(self._process.stdout.read(room.numel())), dtype=torch.uint8))


def _bytes_of(t: Tensor) -> Tensor:
    """A view of the elements of a contiguous tensor, as bytes."""
    if not t.is_contiguous():
        raise ValueError("a tensor that is not contiguous")
    return t.detach().view(-1).view(torch.uint8)


def pytest_configure() -> None:
    """pytest's hook, where this file is its plugin."""
    backends._C = Machine(Path(os.environ[DRIVER]))
