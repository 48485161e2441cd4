"""The cases: what `python bench/` and `python bench/ gpu` measure, as data.

inputs.py makes their tensors, peers.py has the implementations, measure.py measures them on a device of devices.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

SCALE = 1 / 0.07  # CLIP's initial logit scale
TIERS = {"stash": 1 << 40, "panel": 0}  # bytes of `stash_budget()` that force a tier of clip_loss's backward
WIDTHS = {"clip_loss": 512, "siglip_loss": 512, "critic_moments": 256, "cibr_loss": 512, "log_mean_exp": 0}
LARGEST = 131072


class Passes(NamedTuple):
    """Matmuls of N x N x D: of the logits S = X Y^T, and of gradients, one half of them G Y and the other G^T X."""

    logits: int
    gradients: int

    @property
    def total(self) -> int:
        return self.logits + self.gradients


@dataclass(frozen=True)
class Target:
    """What the fused op must reach against `baseline`: this many times its speed, at most this share of its memory."""

    baseline: str
    speed: float
    memory: float


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: an op at a size, and the baselines it is compared with."""

    op: str  # a key of WIDTHS
    n: int
    width: int  # features of the losses, hidden units of critic_moments, columns of log_mean_exp
    dtype: str = "float32"
    backward: bool = True
    baselines: tuple[str, ...] = ()
    quick: bool = False
    brief: bool = False  # one of those that run when nothing is asked for
    target: Target | None = None
    tier: str = ""  # a key of TIERS; "": by the stash budget as it is
    activation: str = "relu"  # of critic_moments
    group: str = ""  # what tells apart two cases of one size: the end of the name
    extra: bool = False  # only by name or with --all
    device: str = "cpu"  # "cuda": one of the GPU's table

    @property
    def name(self) -> str:
        """What the command line calls it: clip_loss-train-8192-bfloat16, clip_loss-train-4096-float32-d768-stash; of
        the GPU clip_loss-train-65536x512-stash.  A name leaves out a width of WIDTHS and the GPU's panel tier.
        """
        kind = "train" if self.backward else "forward"
        if self.device == "cuda":
            return "-".join(filter(None, (self.op, kind, f"{self.n}x{self.width}", self.tier.removeprefix("panel"))))
        width = f"d{self.width}" if self.width != WIDTHS[self.op] else ""
        activation = self.activation if self.activation != "relu" else ""
        parts = (self.op, kind, str(self.n), self.dtype)
        return "-".join([*parts, *filter(None, (width, self.tier, activation, self.group))])

    @property
    def implementations(self) -> tuple[str, ...]:
        """The fused op first: ratios are taken against it."""
        return ("fused", *self.baselines)

    def shrunk(self, n: int = 64) -> Case:
        """The same case at a tiny size, for warming up and for tests."""
        return replace(self, n=min(n, self.n), target=None)


def chosen(
    cases: Sequence[Case], names: Sequence[str], everything: bool = False, quick: bool = False, brief: bool = False
) -> list[Case]:
    """The cases that a command line asks for, in order; no names: all not extra.  quick, brief: those alone.

    A whole name is that case.  The beginning of one is every case that begins so; extra ones among them only with
    `everything`, or where all of them are extra.
    """
    wanted: list[Case] = []
    for name in names or [""]:
        found = [c for c in cases if c.name == name] or [c for c in cases if c.name.startswith(name)]
        plain = [c for c in found if not c.extra]
        wanted += found if everything or not plain else plain
    return [c for c in cases if c in wanted and (c.quick or not quick) and (c.brief or not brief)]


def _critic_cases() -> list[Case]:
    return [
        Case("critic_moments", 512, 256, baselines=("eager",), quick=True, brief=True),
        Case("critic_moments", 1024, 256, baselines=("eager",), quick=True),
        Case("critic_moments", 2048, 256, baselines=("eager",), brief=True, target=Target("eager", 60.0, 1 / 100)),
        Case("critic_moments", 4096, 256, baselines=("eager",), brief=True),
        Case("cibr_loss", 256, 512, baselines=("eager",), quick=True),
        Case("cibr_loss", 512, 512, baselines=("eager",), brief=True),
        Case("cibr_loss", 1024, 512, baselines=("eager",)),
        Case("cibr_loss", 2048, 512, baselines=("eager",)),
    ]


def _clip_cases() -> list[Case]:
    small = ("open_clip", "one-logits")
    cases = [Case("clip_loss", n, 512, baselines=small, brief=n != 128) for n in (64, 128, 256)]  # overhead
    for n in (1024, 2048, 4096, 8192, 16384):
        for dtype in ("float32", "bfloat16"):
            for backward in (True, False):
                baselines: tuple[str, ...] = ("open_clip", "one-logits") if n <= 4096 else ("open_clip",)
                if backward and n >= 4096:
                    baselines += ("torch-chunked",)
                if backward and n == 4096:  # one size: a compilation takes as long as the row
                    baselines += ("compiled",)
                    baselines += ("max-autotune", "cut-cross-entropy") if dtype == "float32" else ("float32-logits",)
                target = Target("open_clip", 2.0, 1 / 10) if backward and n == 8192 else None
                # minutes: of open_clip where nothing multiplies bfloat16, and of everybody at the largest
                extra = n == 16384 or (dtype == "bfloat16" and n == 2048)
                quick = backward and n <= 4096 and not extra
                brief = backward and (n == 1024 or (n == 8192 and dtype == "float32"))
                cases.append(Case("clip_loss", n, 512, dtype, backward, baselines, quick, brief, target, extra=extra))
    for width in (256, 768, 1024):
        cases.append(Case("clip_loss", 4096, width, baselines=("open_clip",), extra=width != 768))
    return cases


def _siglip_cases() -> list[Case]:
    cases = []
    for n in (1024, 4096, 8192):
        for dtype in ("float32", "bfloat16"):
            baselines = ("open_clip", "compiled") if n == 4096 and dtype == "float32" else ("open_clip",)
            brief = n in (1024, 8192) and dtype == "float32"
            cases.append(Case("siglip_loss", n, 512, dtype, True, baselines, n == 1024, brief))
    return cases


def _extra_cases() -> list[Case]:
    """Every width and size, both tiers, other activations, slow peers: more than an hour on two cores."""
    cases = []
    for dtype in ("float32", "bfloat16"):
        for width in (256, 512, 768, 1024):
            for n in (1024, 4096, 8192, 16384, 32768):
                peer = ("open_clip",) if n <= 8192 else ()
                cases += [Case("clip_loss", n, width, dtype, baselines=peer, tier=tier, extra=True) for tier in TIERS]
                cases.append(Case("siglip_loss", n, width, dtype, baselines=peer, extra=True))
            for op in ("clip_loss", "siglip_loss"):
                cases.append(Case(op, 65536, width, dtype, False, extra=True))
        cases.append(Case("clip_loss", LARGEST, 512, dtype, False, ("open_clip",), extra=True))
    cases += [
        Case("critic_moments", 1024, 256, baselines=("eager", "fused-relu"), activation=name, extra=True)
        for name in ("leaky_relu", "gelu", "gelu_tanh", "silu", "elu", "softplus", "tanh")
    ]
    cases.append(Case("critic_moments", 2048, 256, backward=False, extra=True))
    peers = ("one-logits", "compiled", "max-autotune", "cut-cross-entropy")
    cases.append(Case("clip_loss", 1024, 512, baselines=(*peers, "keops"), group="peers", extra=True))
    cases.append(Case("clip_loss", 4096, 512, "bfloat16", baselines=peers, group="peers", extra=True))
    return cases


def _all_cases() -> list[Case]:
    """The first case of each name."""
    named: dict[str, Case] = {}
    for case in [*_critic_cases(), *_clip_cases(), *_siglip_cases(), *_extra_cases()]:
        named.setdefault(case.name, case)
    return list(named.values())


CASES = _all_cases()


GPU_SIZES = ((32768, 512), (65536, 512), (65536, 768), (131072, 768))
GPU_SMALL = 16384  # up to here the host takes longer than the GPU, and steps are timed in a CUDA graph too
GPU_PEERS = {
    "clip_loss": ("eager", "compiled", "open_clip", "torch-chunked", "inf_cl", "memeff"),
    "siglip_loss": ("eager", "compiled", "open_clip", "siglip_kernel"),
    "critic_moments": ("eager", "compiled"),
    "log_mean_exp": ("eager", "compiled"),
}


def gpu_case(op: str, n: int, width: int, dtype: str = "bfloat16", backward: bool = True, stash: bool = False) -> Case:
    """The peers without a stash stand beside the other tier only."""
    peers = () if stash else GPU_PEERS[op]
    if backward and n <= GPU_SMALL and "open_clip" in peers:
        peers += ("fused+graph", "open_clip+graph")
    tier = "" if op != "clip_loss" else "stash" if stash else "panel"
    return Case(op, n, width, dtype, backward, peers, tier=tier, device="cuda")


GPU_CASES = [
    *(gpu_case("clip_loss", n, 512) for n in (1024, 4096, 8192, 16384)),
    *(gpu_case("clip_loss", n, d, backward=False) for n, d in GPU_SIZES),
    *(gpu_case("clip_loss", n, d) for n, d in GPU_SIZES),
    *(gpu_case("clip_loss", n, d, stash=True) for n, d in GPU_SIZES if 2 * n * n <= 16e9),
    gpu_case("siglip_loss", 8192, 512),
    *(gpu_case("siglip_loss", n, d) for n, d in GPU_SIZES),
    gpu_case("critic_moments", 4096, 512, "float32", backward=False),
    gpu_case("critic_moments", 4096, 512, "float32"),
    gpu_case("critic_moments", 32768, 512, "float32"),
    gpu_case("log_mean_exp", 32768, 32768, "float32"),
]
