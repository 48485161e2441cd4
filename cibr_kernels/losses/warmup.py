"""Compiling ahead what a training run will launch, so that no step waits for a compiler."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from cibr_kernels import checks
from cibr_kernels.losses.clip.op import clip_loss
from cibr_kernels.losses.siglip.op import siglip_loss

LOSSES = {"clip_loss": clip_loss, "siglip_loss": siglip_loss}


def warmup(
    n: int,
    d: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    losses: Sequence[str] = ("clip_loss",),
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
        losses: "clip_loss", "siglip_loss".
        device: where the features will be.

    Raises ValueError for n or d below 1 and unknown losses; whatever the losses raise for the dtype.
    """
    if n < 1 or d < 1:
        raise ValueError(f"n and d must be at least 1, got {n} and {d}")
    for name in losses:
        checks.choice("losses", name, tuple(LOSSES))
    device, began = torch.device(device), time.monotonic()
    if device.type == "cpu":
        return 0.0
    with _in_turn():
        for name in losses:
            for rows in dict.fromkeys((n, n - 1 if n % 2 == 0 else n + -n % 16)):
                _step(name, max(rows, 1), d, dtype, device)
    return time.monotonic() - began


def _step(name: str, n: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
    x, y = (torch.zeros(n, d, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    scale, bias = (torch.ones((), device=device, requires_grad=True) for _ in range(2))
    with torch.enable_grad():
        loss = LOSSES[name](x, y, scale, *([bias] if name == "siglip_loss" else []))
    torch.autograd.backward(loss)


@contextmanager
def _in_turn() -> Iterator[None]:
    """One process of this machine at a time, by a lock beside Triton's cache."""
    import fcntl  # POSIX, as Triton

    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "cibr_kernels.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
