"""Scripts of the pages, each in a process that has imported the most of what they need."""

from __future__ import annotations

import os
import runpy
import socket
import sys
import time
import traceback
from pathlib import Path

from forks import process


def run_script(code: str, folder: Path, ranks: int | None = None) -> str:
    """What a script prints on both streams in `folder`; with `ranks` there are so many, as torchrun starts them.

    Raises AssertionError with what they printed unless all of them end with 0.
    """
    path = folder / "script.py"
    path.write_text(code)
    common = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environments = [common]
    if ranks is not None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
        environments = [common | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    logs = [folder / f"{rank}.log" for rank in range(len(environments))]
    processes = [process(_run, path, log, environment) for log, environment in zip(logs, environments, strict=True)]
    for started in processes:
        started.start()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        codes = [started.exitcode for started in processes]
        if any(codes) or None not in codes:  # one has failed, and the others would wait for it; or all are done
            break
        time.sleep(0.01)
    for started in processes:
        started.kill()
        started.join()
    said = "\n".join(log.read_text() for log in logs)
    assert codes == [0] * len(processes), f"exit statuses {codes}:\n{said[-6000:]}"
    return said


def _run(path: Path, log: Path, environment: dict[str, str]) -> None:
    """As `python path`, with both streams into `log`."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(path.parent)
    os.environ |= environment
    sys.argv = [str(path)]
    status = 0
    try:
        runpy.run_path(str(path), run_name="__main__")
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of gloo and of autograd end with it
