"""Processes of the tests, forked from a server that has imported what they need and runs nothing.

They cannot be forks of the process that tests run in: once a backward on a device, emulated ones too, has started
autograd's threads there, PyTorch refuses a backward in a fork of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch

CONTEXT = get_context("forkserver")
PRELOAD = ["torch", "torch._dynamo", "torch.distributed.fsdp", "cibr_kernels", "open_clip", "cibr.train"]
CONTEXT.set_forkserver_preload(PRELOAD)


def process(target: Callable[..., None], *args: Any, daemon: bool = False) -> ForkServerProcess:
    """A process, not started yet, that calls target(*args) with one thread and the environment of now."""
    return CONTEXT.Process(target=_run, args=(dict(os.environ), target, args), daemon=daemon)


def _run(environment: dict[str, str], target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    target(*args)
