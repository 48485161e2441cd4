"""Compiling ahead what a training run will launch, so that no step waits for a compiler."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cibr_kernels import checks
from cibr_kernels.losses.clip.op import clip_loss
from cibr_kernels.losses.siglip.op import siglip_loss

LOSSES = {"clip_loss": clip_loss, "siglip_loss": siglip_loss}


def warmup(
    n: int,
    d: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    losses: Sequence[str | nn.Module] = ("clip_loss",),
    device: torch.device | str = "cuda",
) -> float:
    """Compiles the kernels of losses without options for batches of n rows and for any other number -> seconds taken.

    It takes a step of n rows and one of a ragged number, forward and backward, on zeros: that compiles, loads the
    kernels and makes cuBLAS's handle, so call it before a CUDA graph is captured, too.  Processes of one machine take
    turns: the first compiles, the others find its kernels in Triton's cache.  On the CPU there is nothing to compile.

    Args:
        n: rows of a batch on this device; a last batch of another number compiles nothing more.
        d: width of the features.
        dtype: of the features.
        losses: "clip_loss", "siglip_loss", or an `nn.CIBRLoss`: its critics, statistics and contrastive loss, for X of
            `dtype` too.  A copy of it takes the steps, so neither its state nor random numbers move.
        device: where the features will be.

    Raises ValueError for n or d below 1, unknown losses and a CIBRLoss of another width; TypeError for other modules;
    whatever the losses raise for the dtype.
    """
    if n < 1 or d < 1:
        raise ValueError(f"n and d must be at least 1, got {n} and {d}")
    for loss in losses:
        _check(loss)
    device, began = torch.device(device), time.monotonic()
    if device.type == "cpu":
        return 0.0
    with _in_turn():
        for loss in losses:
            step = _step if isinstance(loss, str) else _step_of_module
            for rows in dict.fromkeys((n, n - 1 if n % 2 == 0 else n + -n % 16)):
                step(loss, max(rows, 1), d, dtype, device)  # type: ignore[arg-type]
    return time.monotonic() - began


def _check(loss: str | nn.Module) -> None:
    if isinstance(loss, nn.Module):
        if not hasattr(loss, "zeros"):
            raise TypeError(f"losses: names of {list(LOSSES)} or an nn.CIBRLoss, got {type(loss).__name__}")
    else:
        checks.choice("losses", loss, tuple(LOSSES))


def _step(name: str, n: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
    x, y = (torch.zeros(n, d, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    scale, bias = (torch.ones((), device=device, requires_grad=True) for _ in range(2))
    with torch.enable_grad():
        loss = LOSSES[name](x, y, scale, *([bias] if name == "siglip_loss" else []))
    torch.autograd.backward(loss)


def _step_of_module(module: Any, n: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
    """Three steps of training: calls of a known kind are checked less, and the third does not look at covariances."""
    module = copy.deepcopy(module).to(device).train()
    module.process_group = None
    given = module.zeros(n, d, dtype, device)
    for name, t in given.items():
        t.requires_grad_("_features" in name)
    scale = torch.ones((), device=device, requires_grad=True)
    with torch.random.fork_rng([device]), torch.enable_grad():
        for _ in range(3):
            torch.autograd.backward(module(**given, logit_scale=scale))


@contextmanager
def _in_turn() -> Iterator[None]:
    """One process of this machine at a time, by a lock beside Triton's cache."""
    import fcntl  # POSIX, as Triton

    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "cibr_kernels.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
