"""The cases: what `python bench/` measures, as data.  How it is measured stands in measure.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import cibr_kernels as ck

SCALE = 1 / 0.07  # CLIP's initial logit scale
TERMS = ("image_own", "image_other", "text_own", "text_other")


@dataclass(frozen=True)
class Target:
    """What the fused op must reach against `baseline`: this many times its speed, at most this share of its memory."""

    baseline: str
    speed: float
    memory: float


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: an op at a size, and the baselines it is compared with."""

    op: str  # "clip_loss", "siglip_loss", "critic_moments" or "cibr_loss"
    n: int
    width: int  # features of the losses, hidden units of critic_moments
    dtype: str = "float32"
    backward: bool = True
    baselines: tuple[str, ...] = ()
    quick: bool = False
    target: Target | None = None

    @property
    def name(self) -> str:
        """What the command line calls it, such as clip_loss-train-8192-bfloat16."""
        return f"{self.op}-{'train' if self.backward else 'forward'}-{self.n}-{self.dtype}"

    @property
    def implementations(self) -> tuple[str, ...]:
        """The fused op first: ratios are taken against it."""
        return ("fused", *self.baselines)

    def shrunk(self, n: int = 64) -> Case:
        """The same case at a tiny size, for warming up and for tests."""
        return replace(self, n=min(n, self.n), target=None)


def _clip_cases() -> list[Case]:
    cases = [Case("clip_loss", n, 512, baselines=("open_clip", "one-logits")) for n in (64, 128, 256)]  # overhead
    for n in (1024, 2048, 4096, 8192, 16384):
        for dtype in ("float32", "bfloat16"):
            for backward in (True, False):
                baselines: tuple[str, ...] = ("open_clip", "one-logits")
                if backward and n == 4096:
                    baselines += ("compiled",)  # one size: a compilation takes as long as the row
                target = Target("open_clip", 2.0, 1 / 10) if backward and n == 8192 else None
                cases.append(Case("clip_loss", n, 512, dtype, backward, baselines, backward and n <= 4096, target))
    return cases


def _siglip_cases() -> list[Case]:
    cases = []
    for n in (1024, 4096, 8192):
        for dtype in ("float32", "bfloat16"):
            baselines = ("open_clip", "compiled") if n == 4096 else ("open_clip",)
            cases.append(Case("siglip_loss", n, 512, dtype, True, baselines, n == 1024))
    return cases


CASES = [
    Case("critic_moments", 512, 256, baselines=("eager",), quick=True),
    Case("critic_moments", 1024, 256, baselines=("eager",), quick=True),
    Case("critic_moments", 2048, 256, baselines=("eager",), target=Target("eager", 60.0, 1 / 100)),
    Case("critic_moments", 4096, 256, baselines=("eager",)),
    Case("cibr_loss", 256, 512, baselines=("eager",), quick=True),
    Case("cibr_loss", 512, 512, baselines=("eager",)),
    Case("cibr_loss", 2048, 512, baselines=("eager",)),
    *_clip_cases(),
    *_siglip_cases(),
]


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case; `leaves` are those whose gradients a training step needs."""

    tensors: dict[str, Tensor]
    critics: nn.ModuleDict
    leaves: tuple[Tensor, ...]


def make_inputs(case: Case) -> Inputs:
    """The same numbers in every process: unit-norm features whose pairs agree in part."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    torch.manual_seed(0)  # the critics' parameters
    n, dtype = case.n, getattr(torch, case.dtype)
    if case.op == "critic_moments":
        x, z = normal(n, case.width).to(dtype), normal(n, case.width).to(dtype)
        critics = nn.ModuleDict({"critic": ck.nn.ConcatCritic(case.width, case.width, case.width)})
        tensors = {"x": x, "z": z}
    else:
        shared = normal(n, case.width)
        x, z = (nn.functional.normalize(shared + normal(n, case.width), dim=1).to(dtype) for _ in range(2))
        tensors = {"x": x, "z": z, "scale": torch.tensor(SCALE)}
        if case.op == "siglip_loss":
            tensors |= {"scale": torch.tensor(10.0), "bias": torch.tensor(-10.0)}  # where SigLIP starts
        critics = nn.ModuleDict()
        if case.op == "cibr_loss":
            tensors |= {"image_inputs": normal(n, 768), "text_inputs": normal(n, 512)}
            widths = {"image_own": 768, "image_other": 512, "text_own": 512, "text_other": 768}
            critics.update({name: ck.nn.ConcatCritic(widths[name], case.width, 256) for name in TERMS})
    leaves = [tensors[name] for name in ("x", "z", "scale", "bias") if name in tensors]
    if case.backward:
        for leaf in leaves:
            leaf.requires_grad_()
    else:
        critics.requires_grad_(False)
    return Inputs(tensors, critics, (*leaves, *critics.parameters()))
