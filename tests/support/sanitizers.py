"""A .cu file under the host compiler's sanitizers: who forgot a barrier, who reads past the end, at file:line.

    report = sanitizers.check(ROOT / "csrc/my_op/cuda.cu", DRIVER, "thread", include=[ROOT / "csrc"])
    assert report.clean, report.text

where DRIVER is the C++ of a `main` that calls kernels or the file's own host launchers, for instance

    int main() {
      std::vector<float> x(100, 1.0f), y(100);
      emu::launch(dim3(2), dim3(64), 0, [&] { double_it(x.data(), y.data(), 100); });
      for (float v : y) if (v != 2.0f) { std::puts("wrong"); return 1; }
    }

"thread" is ThreadSanitizer, which reports accesses that no barrier orders even where the result is right; "address" is
AddressSanitizer and UBSan.  See cuda_emu.h for what the emulated device has.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nvcc

HERE = Path(__file__).parent
FLAGS = {  # -g1 has the lines; values of variables would take longer than the rest of the compiler
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
    "address": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}
QUIET = ["-Wno-unknown-pragmas", "-Wno-attributes"]  # #pragma unroll; the toolkit's __attribute__((device))
MARKS = ("WARNING: ThreadSanitizer", "ERROR: AddressSanitizer", "runtime error:", "cuda_emu: deadlock")


@dataclass(frozen=True)
class Report:
    """What a run printed.  `clean`: exit code 0 and no finding."""

    code: int
    text: str

    @property
    def clean(self) -> bool:
        return self.code == 0 and not any(mark in self.text for mark in MARKS)


def missing() -> str | None:
    """Why sanitizers cannot run here; None when they can."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    return None if nvcc.include_directory() else "the CUDA headers are not installed"


def check(
    source: Path,
    driver: str,
    sanitizer: Literal["thread", "address"],
    include: Sequence[Path] = (),
    timeout: float = 600,
) -> Report:
    """Compiles `source` and the C++ text `driver` (which has main) with g++, runs it and returns the report.

    Raises RuntimeError if it does not compile, subprocess.TimeoutExpired if it hangs.
    """
    with tempfile.TemporaryDirectory() as folder:
        return run(build(Path(folder), source, driver, sanitizer, include), timeout=timeout)


def build(
    folder: Path,
    source: Path,
    driver: str,
    sanitizer: Literal["thread", "address"],
    include: Sequence[Path] = (),
) -> Path:
    """`check`'s program, in `folder`."""
    unit, program = folder / "unit.cpp", folder / "unit"
    unit.write_text('#include "cuda_emu.h"\n' + host_source(source) + '\n#line 1 "driver"\n' + driver)
    places = [f"-I{place}" for place in (HERE, source.parent, *include)]
    command = ["g++", "-std=c++20", *FLAGS[sanitizer], *QUIET, *places]
    command += ["-isystem", str(nvcc.include_directory()), str(unit), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{built.stderr[:8000]}")
    return program


def run(program: Path, *arguments: str, timeout: float = 600) -> Report:
    report = _run([str(program), *arguments], timeout)
    if "unexpected memory mapping" in report.text:  # ThreadSanitizer on kernels with much address randomisation
        report = _run(["setarch", "-R", str(program), *arguments], timeout)
    return report


def _run(command: list[str], timeout: float) -> Report:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}  # one finding is enough
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout, env=environment)
    return Report(done.returncode, done.stdout + done.stderr)


def host_source(path: Path) -> str:
    """The file as C++: launches and dynamic shared memory spelled as calls of cuda_emu.h, line numbers kept."""
    text = path.read_text()
    text = re.sub(
        r"extern\s+__shared__\s+(?:(?:__align__|alignas)\s*\(\d+\)\s*)?([\w:]+(?:\s+\w+)*?)\s+(\w+)\s*\[\s*\]\s*;",
        r"\1* \2 = emu::dynamic_shared<\1>();",
        text,
    )
    while "<<<" in text:
        text = _rewrite_launch(text, text.index("<<<"))
    return f'#line 1 "{path}"\n{text}'


def _rewrite_launch(text: str, at: int) -> str:
    """`f<T><<<grid, block, bytes, stream>>>(args)` -> `emu::launch(grid, block, bytes, [&] { f<T>(args); })`."""
    begin = at
    if text[:at].rstrip().endswith(">"):
        begin = _matching_back(text, text[:at].rstrip().rindex(">"))
    begin -= len(re.search(r"[\w:]*\s*$", text[:begin]).group())
    close = text.index(">>>", at)
    end = _matching(text, text.index("(", close))
    options = _split(text[at + 3 : close])
    options = options[:3] if len(options) > 2 else [*options, "0"]
    call = f"[&] {{ {text[begin:at].strip()}{text[close + 3 : end + 1]}; }}"
    return f"{text[:begin]}emu::launch({','.join(options)}, {call}){text[end + 1 :]}"


def _split(text: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _matching(text: str, at: int) -> int:
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError("unbalanced parentheses after a kernel launch")


def _matching_back(text: str, at: int) -> int:
    depth = 0
    for i in range(at, -1, -1):
        depth += (text[i] == ">") - (text[i] == "<")
        if depth == 0:
            return i
    raise ValueError("unbalanced template arguments before a kernel launch")
