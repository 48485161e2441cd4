"""Small problems of what stands around critics on a GPU, for mutations.py: groups, the CIBR game, standardised data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from unittest.mock import patch

import torch
from executor import emulated
from gpu_checked import Case, Checked, faulty
from gpu_suites_additive import small_blocks
from mutations import Fault, Suite
from torch import Tensor

from cibr_kernels.information import group_device
from cibr_kernels.information.group import Group, Weights, grouped_moments
from cibr_kernels.losses import game
from cibr_kernels.nn import Standardize, statistics_device
from cibr_kernels.primitives.additive.moments import triton as moments

BLOCKS = {"BLOCK_R": 16, "BLOCK_H": 16}
N, D, WIDTH, HIDDEN = 37, 12, 10, 21


def moments_of(x: Tensor, z: Tensor, own: Weights) -> tuple[Tensor, Tensor]:
    """J and L of a critic of ReLU, as they are written, in the dtype of x."""
    t = (x @ own.wx.t())[:, None] + (z @ own.wz.t() + own.c)
    scores = t.relu() @ own.w[0] + own.bias
    joint = scores.diagonal()
    others = scores.masked_fill(torch.eye(len(x), dtype=torch.bool), -math.inf)
    return joint.mean(), others.flatten().logsumexp(0) - math.log(len(x) * (len(x) - 1))


class _Around(Checked):
    """Critics of N rows, the z of each by `which`; the modules of the fault's package are new."""

    which: tuple[int, ...]

    def __init__(self, capability: int) -> None:
        self.capability = capability

    @contextmanager
    def on_device(self, fault: Fault | None) -> Iterator[None]:
        package = fault.path.rpartition("/")[0].replace("/", ".") if fault is not None else "cibr_kernels.information"
        with (
            faulty(package, fault),
            small_blocks(moments),
            patch.dict(group_device.BLOCKS, BLOCKS),
            patch.object(game, "BLOCK", 64),
            emulated(self.capability),
        ):
            yield

    def leaves(self, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], list[Weights]]:
        """zs, the x of each critic, parameters."""
        torch.manual_seed(0)

        def leaf(*shape: int) -> Tensor:
            return (torch.randn(shape) / math.sqrt(shape[-1])).to(dtype).requires_grad_()

        count = len(self.which)
        zs, xs = ([leaf(N, width) for _ in range(k)] for k, width in ((2, D), (count, WIDTH)))
        shapes = (HIDDEN, WIDTH), (HIDDEN, D), (HIDDEN,), (1, HIDDEN), (1,)
        return zs, xs, [Weights(*(leaf(*shape) for shape in shapes)) for _ in range(count)]

    @staticmethod
    def named(outputs: dict[str, Tensor], weights: list[Weights], gradients: list[Tensor]) -> dict[str, Tensor]:
        """outputs, and the gradients of the parameters, all critics' together."""
        per_critic = [gradients[5 * k : 5 * k + 5] for k in range(len(weights))]
        columns = zip(Weights._fields, zip(*per_critic, strict=True), strict=True)
        return {k: t.detach() for k, t in (outputs | {f"d{name}": torch.stack(g) for name, g in columns}).items()}

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        raise NotImplementedError

    @cached_property
    def expected(self) -> Case:
        eager, truth = (self.plain(dtype) for dtype in (torch.float32, torch.float64))
        options = {"terms": 2 * N + D + HIDDEN, "exponent": 4.0, "features": torch.float32, "magnitude": 1.0}
        return {name: (eager[name], truth[name], options) for name in truth}


class Critics(_Around):
    which = 0, 1, 0

    def run(self, fault: Fault | None) -> Iterator[dict[str, Tensor]]:
        zs, xs, weights = self.leaves()
        group = Group(self.which, (1.0,) * len(self.which), "relu", 0.0, False, "triton")
        with self.on_device(fault):
            j, el = grouped_moments(xs, zs, weights, group)
            found = self.outputs(j, el, zs, xs, weights)
        yield found

    def outputs(
        self, j: Tensor, el: Tensor, zs: list[Tensor], xs: list[Tensor], weights: list[Weights]
    ) -> dict[str, Tensor]:
        """With gradients of J and L that differ from critic to critic."""
        grow = torch.arange(1.0, 1.0 + len(weights), dtype=j.dtype)
        total = (0.7 * grow * j - 1.3 / grow * el).sum()
        of_z, of_x = len(zs), len(zs) + len(xs)
        grads = torch.autograd.grad(total, [*zs, *xs, *(p for own in weights for p in own)])
        outputs = {"J": j, "L": el, "dz": torch.stack(grads[:of_z]), "dx": torch.stack(grads[of_z:of_x])}
        return self.named(outputs, weights, list(grads[of_x:]))

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        zs, xs, weights = self.leaves(dtype)
        found = [moments_of(x, zs[i], own) for i, x, own in zip(self.which, xs, weights, strict=True)]
        j, el = (torch.stack(t) for t in zip(*found, strict=True))
        return self.outputs(j, el, zs, xs, weights)


class Game(_Around):
    """Encoders against four critics; the upstream gradient is 0.8, lam 0.3, the contrastive loss 0.5."""

    which = 0, 0, 1, 1
    noise_std, lam = 0.25, 0.3

    def noise(self) -> list[Tensor]:
        return [torch.randn(N, D, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]

    def run(self, fault: Fault | None) -> Iterator[dict[str, Tensor]]:
        zs, xs, weights = self.leaves()
        xs = [x.detach() for x in xs]
        group = Group(self.which, (-1.0, 1.0) * 2, "relu", 0.0, False, "triton")
        contrastive, parameters = torch.tensor(0.5, requires_grad=True), [p for own in weights for p in own]
        played = game.Game(group, (0, 1, 2, 3), self.noise_std)
        with self.on_device(fault):
            loss, parts = game._Play.apply(
                played, None, contrastive, torch.tensor(self.lam), *zs, *self.noise(), *xs, *parameters
            )
            grads = torch.autograd.grad(0.8 * loss, [contrastive, *zs, *parameters])
        outputs = {"loss": loss, "parts": parts, "of contrastive": grads[0], "dz": torch.stack(grads[1:3])}
        yield self.named(outputs, weights, list(grads[3:]))

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        zs, xs, weights = self.leaves(dtype)
        noisy = [
            math.sqrt(D) * (z + self.noise_std * noise.to(dtype)) for z, noise in zip(zs, self.noise(), strict=True)
        ]
        found = [moments_of(x, noisy[i], own) for i, x, own in zip(self.which, xs, weights, strict=True)]
        each = torch.stack([j - el for j, el in found])
        image, text = each[0] - each[1], each[2] - each[3]
        loss = 0.5 + self.lam * (image + text)
        of_z = torch.autograd.grad(0.8 * loss, zs, retain_graph=True)
        of_critics = torch.autograd.grad(-0.8 * each.sum(), [p for own in weights for p in own])
        outputs = {"loss": loss, "parts": torch.stack([image, text, *each]), "of contrastive": torch.tensor(0.8)}
        return self.named({**outputs, "dz": torch.stack(of_z)}, weights, list(of_critics))


@dataclass
class Standardised(Checked):
    """Four batches, of which statistics ignore the first and the third for a NaN in the last column.

    One column does not vary.
    """

    capability: int
    shape: tuple[int, int] = (37, 21)

    def batches(self) -> list[Tensor]:
        torch.manual_seed(0)
        found = [8 + (1 + k) * torch.randn(self.shape) for k in range(4)]
        for batch in found:
            batch[:, 2] = 0.001
        found[0][-1, -1] = found[2][-1, -1] = math.nan
        return found

    def run(self, fault: Fault | None) -> Iterator[dict[str, Tensor]]:
        with faulty("cibr_kernels.nn", fault), patch.dict(statistics_device.BLOCKS, BLOCKS), emulated(self.capability):
            yield self.outputs(Standardize(self.shape[1]), torch.float32)

    def outputs(self, module: Standardize, dtype: torch.dtype) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for k, batch in enumerate(self.batches()):
            out = module(batch.to(dtype))
            found |= {f"{name} {k}": t.to(dtype).clone() for name, t in module.named_buffers()}
            found[f"out {k}"] = out.nan_to_num(7.0)
        return found

    @cached_property
    def expected(self) -> Case:
        eager = self.outputs(Standardize(self.shape[1]), torch.float32)
        truth = self.outputs(Standardize(self.shape[1]).double(), torch.float64)
        options = {"terms": self.shape[0], "exponent": 8.0, "features": torch.float32}
        return {name: (eager[name], truth[name], options) for name in truth}


SUITES: dict[str, Suite] = {"critics": Critics(80), "game": Game(80), "standardize": Standardised(80)}
