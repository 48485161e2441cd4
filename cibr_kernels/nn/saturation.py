"""A warning where embeddings carry more than critics tell of them in batches of n, without a wait for the device."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from cibr_kernels.distributed.shards import Shards
from cibr_kernels.information.capacity import capacity, covariance, noise_for


def warning(covariances: dict[str, Tensor], n: int, noise_std: float) -> str:
    """What to say of embeddings with these covariances (d, d), on the host; "" where critics can tell it all."""
    limit = math.log(n) - 1
    carried = {name: capacity(c, noise_std).item() for name, c in covariances.items()}
    most = max(carried, key=lambda name: carried[name])
    if not carried[most] > limit:
        return ""
    noise = noise_for(covariances[most], limit)
    remedy = f"noise_std = {noise:.2g} would meet it, or" if math.isfinite(noise) else "take"
    return (
        f"the {most} embeddings can carry {carried[most]:.2f} nats, 1/2 logdet(I + Cov(Z) / noise_std^2), and critics "
        f"tell at most about log(n) - 1 = {limit:.2f} at n = {n}: estimates do not show what is above. {remedy} a "
        f"batch of {math.exp(min(carried[most] + 1, 30)):,.0f}"
    )


class Saturation:
    """Looks at training batches 1, 2, 4, 8, ... and warns once.

    O(n d^2), and with ranks a sum of d^2 numbers over them, which depends on the count of calls alone.  On a GPU the
    covariances go to the host without a wait, and a later call that finds them there reads them.
    """

    def __init__(self, calls: int = 0, told: bool = False) -> None:
        self.calls, self.told = calls, told
        self.under_way: tuple[Any, dict[str, Tensor], int, float] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Saturation, (self.calls, self.told)  # an event cannot be copied

    def look(self, image_features: Tensor, text_features: Tensor, noise_std: float, shards: Shards | None) -> None:
        """Of a training batch (n, d)."""
        device = image_features.device
        if device.type not in ("cpu", "cuda") or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return
        self._read()
        self.calls += 1
        if self.calls & (self.calls - 1) or (self.told and shards is None):
            return
        named = {"image": covariance(image_features, shards), "text": covariance(text_features, shards)}
        n, event = image_features.shape[0] if shards is None else shards.total, None
        if device.type == "cuda":
            host = {name: torch.empty(c.shape, dtype=c.dtype, pin_memory=True) for name, c in named.items()}
            named = {name: host[name].copy_(c, non_blocking=True) for name, c in named.items()}
            event = torch.cuda.Event()
            event.record()
        self.under_way = (event, named, n, noise_std)
        self._read()

    def _read(self) -> None:
        if self.under_way is None or (self.under_way[0] is not None and not self.under_way[0].query()):
            return
        _, named, n, noise_std = self.under_way
        self.under_way = None
        said = "" if self.told else warning(named, n, noise_std)
        if said:
            self.told = True
            warnings.warn(said, stacklevel=6)  # whoever called the module that called `look`
