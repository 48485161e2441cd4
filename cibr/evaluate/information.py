"""Mutual information in nats between Z~ = Z + noise and what the towers saw, on rows that the critics never saw.

    image_own = I(Z~v; Xv)    image_other = I(Z~v; Xt)    image_cmi = image_own - image_other    text_* likewise

Each by MINE over all pairs, its critic trained on half of the rows and read on the other half. The noise is CIBR's: a
deterministic Z has infinite information about X. A difference of two lower bounds bounds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import cibr_kernels as ck
from cibr.errors import UsageError
from cibr.evaluate.retrieval import check_features
from cibr_kernels.information.capacity import capacity, covariance

LR = 1e-2  # of Adam: an estimate of 3 nats needs 200 steps, at 3e-3 400 and at 1e-3 more
ROWS = 256  # to train on, and to read; with 82 critics memorised, and read -1.5 nats of what cannot be negative
Pair = tuple[Tensor, Tensor]  # x (n, dx) and z (n, dz)


def information(
    image: Pair,  # Xv (n, dv) and Zv (n, d) of unit norm
    text: Pair,  # Xt (n, dt) and Zt (n, d) of the same rows
    *,
    noise_std: float = 0.25,
    steps: int = 300,
    batch_size: int = 256,
    hidden: int = 128,
    seed: int = 0,
    sizes: Sequence[int] = (),
) -> dict[str, Any]:
    """The six numbers above, `rows` read and their log, and `image_ceiling`, `text_ceiling`.

    A ceiling is more than Z~ can say of anything; where it is far above log n, an estimate measures the rows and not
    the information.

    `sizes` adds `by_size`: the estimates that the same critics give when read in batches of so many rows, and the
    size itself under "n". The rows must be in random order. Raises UsageError for fewer than 512 rows, for sizes
    beyond the rows that are read, and for features that are not finite.
    """
    (xv, zv), (xt, zt) = image, text
    for name, features in (("Xv", xv), ("Zv", zv), ("Xt", xt), ("Zt", zt)):
        check_features(name, features)
    half = len(zv) // 2
    if half < ROWS:
        raise UsageError(f"an estimate of information needs {2 * ROWS} pairs, got {len(zv)}")
    if sizes and not 2 <= min(sizes) <= max(sizes) <= len(zv) - half:
        raise UsageError(f"sizes are {list(sizes)}, but must lie between 2 and the {len(zv) - half} rows read")
    generator = torch.Generator().manual_seed(seed)
    result: dict[str, Any] = {"rows": len(zv) - half, "log_rows": math.log(len(zv) - half)}
    by_size: dict[str, list[float]] = {"n": [float(n) for n in sizes]}
    for tower, z, own, other in (("image", zv, xv, xt), ("text", zt, xt, xv)):
        for kind, x in (("own", own), ("other", other)):
            x = (x - x[:half].mean(0)) / (x[:half].std(0) + 1e-5)
            critic = _train((x[:half], z[:half]), noise_std, steps, min(batch_size, half), hidden, generator)
            held = x[half:], _noisy(z[half:], noise_std, generator)
            result[f"{tower}_{kind}"] = _read(critic, held, len(held[0]))
            by_size[f"{tower}_{kind}"] = [_read(critic, held, n) for n in sizes]
        result[f"{tower}_cmi"] = result[f"{tower}_own"] - result[f"{tower}_other"]
        result[f"{tower}_ceiling"] = capacity(covariance(z.double()), noise_std).item()
    return {**result, "by_size": by_size} if sizes else result


def _noisy(z: Tensor, noise_std: float, generator: torch.Generator) -> Tensor:
    return z + noise_std * torch.randn(z.shape, generator=generator)


def _train(rows: Pair, noise_std: float, steps: int, batch_size: int, hidden: int, generator: torch.Generator) -> Any:
    """A critic of the rows after `steps` of Adam, its rate on a cosine to 0, fresh noise at every step."""
    x, z = rows
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        critic = ck.nn.ConcatCritic(x.shape[1], z.shape[1], hidden)
    optimizer = torch.optim.Adam(critic.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randperm(len(x), generator=generator)[:batch_size]
        loss = -ck.mutual_information(x[chosen], _noisy(z[chosen], noise_std, generator), critic)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return critic.requires_grad_(False)


def _read(critic: Any, rows: Pair, size: int) -> float:
    """The mean estimate over whole batches of `size` rows."""
    x, z = rows
    starts = range(0, len(x) - size + 1, size)
    return sum(ck.mutual_information(x[s : s + size], z[s : s + size], critic).item() for s in starts) / len(starts)
