"""A fresh process for every measurement, without paying for `import torch` every time.

A fork server imports the heavy modules once and runs nothing; each call is forked from it, so it starts with cold
thread pools, an empty heap of its own and a peak of memory that belongs to it alone.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

PRELOAD = ["torch", "cibr_kernels", "open_clip.loss"]


LEAVE = "\nfrom bench.processes import leave\nleave()\n"  # the end of a script that took steps on a device, or on ranks


class Failed(RuntimeError):
    """The child raised, or was killed; the message says which."""


def start_server() -> None:
    """Starts the server, which imports in the background; calling it early hides that time."""
    mp.get_context("forkserver").set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()


def call(function: Callable[..., Any], *args: Any, deadline: float | None = None) -> Any:
    """function(*args) in a new process -> its result, which must pickle.  Raises Failed.

    `function` lives at module level; Ctrl-C ends the child too, and so does `deadline` (time.monotonic).
    """
    context = mp.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        if deadline is not None and not receiver.poll(max(0.0, deadline - time.monotonic())):
            process.kill()
            process.join()
            raise Failed("stopped: out of time")
        error, result = receiver.recv()
    except EOFError:
        process.join()
        raise Failed(f"the process ended with {process.exitcode} (-9: killed, usually for memory)") from None
    except BaseException:
        process.kill()
        raise
    process.join()
    if error:
        raise Failed(error)
    return result


def _child(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    answer: tuple[str | None, Any]
    try:
        answer = (None, function(*args))
    except Exception as error:  # whatever it is, it belongs in the table
        answer = (reason(error), None)
    sender.send(answer)


def leave() -> None:
    """Ends this process now, with 0 and without Python's finalisation.

    A thread of PyTorch's autograd or gloo that lets go of a Python object meanwhile would abort it ("terminate called
    without an active exception", pytorch/pytorch issue 190489), after all results are there.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def reason(error: Exception) -> str:
    """An exception in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
