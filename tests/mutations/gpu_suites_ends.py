"""Small problems of the O(n) ends of losses on a GPU, and of log_mean_exp, for mutations.py."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from executor import emulated
from gpu_checked import Case, Checked, faulty, launcher_of
from mutations import Fault, Suite
from torch import Tensor

import cibr_kernels as ck
from cibr_kernels.losses.siglip import triton as siglip
from cibr_kernels.primitives.dot.lse import triton as dot_lse
from cibr_kernels.primitives.dot.lse import triton_configs as configs

N, D = 38, 24
G = 0.7  # the upstream gradient
SMALL = configs.Config(16, 16, 16, 1, 2)
TABLE = {key: configs.Configs(SMALL, SMALL, SMALL) for key in configs.CONFIGS}


def features(dtype: torch.dtype, opposed: bool = False) -> list[Tensor]:
    """Of unit norm; opposed: all x lie near u and all y near -u."""
    torch.manual_seed(N)
    raw = [(0.1 * torch.randn(N, D) + side if opposed else torch.randn(N, D)) for side in (1, -1)]
    return [F.normalize(t, dim=1).to(dtype).requires_grad_() for t in raw]


def number(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def with_gradients(names: Sequence[str], loss: Tensor, *leaves: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(G * loss, leaves)
    return dict(zip(names, (loss.detach(), *gradients), strict=True))


def held(plain: Callable[[torch.dtype], dict[str, Tensor]], **options: Any) -> Case:
    """Outputs of plain PyTorch in float32 and float64, and how they are compared."""
    eager, truth = plain(torch.float32), plain(torch.float64)
    return {name: (eager[name], t, {"features": torch.float32, **options}) for name, t in truth.items()}


@dataclass
class ClipLoss(Checked):
    """Scale 10 keeps one exponential for all; 200 needs the online maxima, and so do opposed features, whose
    exponentials with one offset would all be 0.  rows: of a panel."""

    scale: float
    opposed: bool = False
    rows: int = 8192
    one_way: bool = False

    names = ("loss", "dx", "dy", "dscale")

    def run(self, fault: Fault | None) -> Iterator[dict[str, Tensor]]:
        (x, y), scale = (t.detach() for t in features(torch.float32, self.opposed)), torch.tensor(self.scale)
        panels = dot_lse.Panels(self.rows, self.rows)
        with faulty("cibr_kernels.losses.clip", fault), patch.object(configs, "CONFIGS", TABLE), emulated(80):
            clip = importlib.import_module("cibr_kernels.losses.clip.triton")
            loss, *kept = clip.launch_forward(x, y, scale, self.one_way, 0, True, panels)
            made = clip.launch_backward(torch.tensor(G), x, y, scale, kept, self.one_way, True, True, panels)
        yield dict(zip(self.names, (loss, *made), strict=True))

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        x, y = features(dtype, self.opposed)
        scale, own = number(self.scale, dtype), torch.eye(N, dtype=torch.bool)
        logits = scale * x @ y.T
        others, positives = logits.masked_fill(own, -math.inf), logits.diagonal()
        directions = [others.logsumexp(1), others.logsumexp(0)][: 1 if self.one_way else 2]
        loss = torch.stack([F.softplus(sums - positives, threshold=1e9).mean() for sums in directions]).mean()
        return with_gradients(self.names, loss, x, y, scale)

    @cached_property
    def expected(self) -> Case:
        return held(self.plain, terms=2 * N + D, exponent=self.scale, magnitude=1.0)


class SiglipLoss(Checked):
    names = ("loss", "dx", "dy", "dscale", "dbias")

    def run(self, fault: Fault | None) -> Iterator[dict[str, Tensor]]:
        leaves = [*features(torch.float32), number(10.0, torch.float32), number(-2.0, torch.float32)]
        with (
            launcher_of("dot_softplus", fault) as launcher,
            patch.object(configs, "CONFIGS", TABLE),
            patch.object(launcher, "CONFIGS", dict.fromkeys(launcher.CONFIGS, SMALL)),
            patch.object(siglip, "dot_softplus", launcher),
            emulated(80),
        ):
            found = with_gradients(self.names, ck.siglip_loss(*leaves, backend="triton"), *leaves)
        yield found

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        x, y = features(dtype)
        scale, bias = number(10.0, dtype), number(-2.0, dtype)
        signs = 2 * torch.eye(N, dtype=dtype) - 1
        loss = F.softplus(-signs * (scale * x @ y.T + bias), threshold=1e9).sum() / N
        return with_gradients(self.names, loss, x, y, scale, bias)

    @cached_property
    def expected(self) -> Case:
        return held(self.plain, terms=2 * N + D, exponent=12.0, magnitude=1.0)


class LogMeanExp(Checked):
    """Pieces of 64 of a ragged number of scores, merged two at a time; some have none that takes part."""

    names = ("L", "dscores")

    @staticmethod
    def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        scores, mask = (20 * torch.randn(7, 61)).to(dtype).requires_grad_(), torch.rand(7, 61) < 0.3
        mask[2] = mask[3] = False
        scores.data[0] += 160.0  # without the largest maximum the others' factors overflow
        return scores, mask

    def run(self, fault: Fault | None) -> Iterator[dict[str, Tensor]]:
        scores, mask = self.inputs(torch.float32)
        scores = scores.detach()
        with launcher_of("log_mean_exp", fault) as launcher, patch.multiple(launcher, PIECE=64, BLOCK=2), emulated(80):
            for name, part in (("all", None), ("some", mask)):
                el = launcher.forward(scores, part)
                dscores = launcher.backward(torch.tensor(G), scores, part, el)
                yield {f"{name} {k}": t for k, t in zip(self.names, (el, dscores), strict=True)}

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        found = {}
        for name in ("all", "some"):
            scores, mask = self.inputs(dtype)
            part = scores[mask] if name == "some" else scores.flatten()
            el = part.logsumexp(0) - math.log(part.numel())
            found |= with_gradients([f"{name} {k}" for k in self.names], el, scores)
        return found

    @cached_property
    def expected(self) -> Case:
        return held(self.plain, terms=427, exponent=240.0)


SUITES: dict[str, Suite] = {
    "clip_loss": ClipLoss(10.0),
    "clip_loss_online": ClipLoss(200.0, opposed=True),
    "clip_loss_panels": ClipLoss(10.0, rows=32, one_way=True),
    "siglip_loss": SiglipLoss(),
    "log_mean_exp": LogMeanExp(),
}
