"""The cases of `bench gpu`, as data, and what the fused ops are compared with on a GPU.

The same functions are timed on a real GPU (gpu.py) and recorded on fake tensors (predict.py).  Numerics are matched:
the same features in, a float32 loss out.  The eager rows multiply in the features' dtype and take the softmax in
float32, which is what autocast does; their logits are rounded to that dtype, ours are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cibr_kernels as ck
from bench import optional_peers
from bench.registry import SCALE

Tensors = dict[str, Any]  # by name; "critic" is a module
Loss = Callable[[Tensors], Tensor]
STASH = 1 << 62  # a budget that everything fits


@dataclass(frozen=True)
class GpuCase:
    """An op at a size.  `d` is the width of the features, the hidden width of a critic, the columns of scores."""

    op: str
    n: int
    d: int
    dtype: str = "bfloat16"
    backward: bool = True
    stash: bool = False  # clip_loss: keep the exponentials for the backward

    @property
    def name(self) -> str:
        """Such as clip_loss-train-65536x512-stash."""
        tier = "-stash" if self.stash else ""
        return f"{self.op}-{'train' if self.backward else 'forward'}-{self.n}x{self.d}{tier}"

    @property
    def matmul_passes(self) -> int | None:
        """Products of n x n x d that our own implementation makes; None where they are not the cost."""
        if self.op not in ("clip_loss", "siglip_loss"):
            return None
        return 1 if not self.backward else 3 if self.stash or self.op == "siglip_loss" else 4


SIZES = ((32768, 512), (65536, 512), (65536, 768), (131072, 768))
SMALL = 16384  # up to here the host takes longer than the GPU, and steps are timed in a CUDA graph too
CASES = [
    *(GpuCase("clip_loss", n, 512) for n in (1024, 4096, 8192, 16384)),
    *(GpuCase("clip_loss", n, d, backward=False) for n, d in SIZES),
    *(GpuCase("clip_loss", n, d) for n, d in SIZES),
    *(GpuCase("clip_loss", n, d, stash=True) for n, d in SIZES if 2 * n * n <= 16e9),
    GpuCase("siglip_loss", 8192, 512),
    *(GpuCase("siglip_loss", n, d) for n, d in SIZES),
    GpuCase("critic_moments", 4096, 512, "float32", backward=False),
    GpuCase("critic_moments", 4096, 512, "float32"),
    GpuCase("critic_moments", 32768, 512, "float32"),
    GpuCase("log_mean_exp", 32768, 32768, "float32"),
]


def make_tensors(case: GpuCase, device: str) -> Tensors:
    """Unit-norm features whose pairs agree in part, on `device`; the same numbers on every call."""
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(0)
    if case.op == "log_mean_exp":
        tensors: Tensors = {"scores": torch.randn(case.n, case.d, device=device, dtype=dtype)}
    else:
        shared = torch.randn(case.n, case.d, device=device)
        x, z = (F.normalize(shared + torch.randn_like(shared), dim=1).to(dtype) for _ in range(2))
        tensors = {"x": x, "z": z}
        if case.op == "clip_loss":
            tensors["scale"] = torch.full((), SCALE, device=device)
        elif case.op == "siglip_loss":  # where SigLIP starts
            tensors |= {"scale": torch.full((), 10.0, device=device), "bias": torch.full((), -10.0, device=device)}
        else:
            with torch.device(device):
                tensors["critic"] = ck.nn.ConcatCritic(case.d, case.d, case.d)
    for value in tensors.values():
        value.requires_grad_(case.backward)
    if case.op == "critic_moments":  # J - L does not change with it: its gradient is 0, and rounding in eager PyTorch
        tensors["critic"].out.bias.requires_grad_(False)
    return tensors


def leaves(tensors: Tensors) -> list[Tensor]:
    """Whose gradients a training step needs."""
    found = [v for v in tensors.values() if isinstance(v, Tensor)]
    modules = [v for v in tensors.values() if isinstance(v, torch.nn.Module)]
    return found + [p for module in modules for p in module.parameters() if p.requires_grad]


# ------------------------------------------------------------------------------------------------ ours
def fused(case: GpuCase, backend: str = "auto") -> Loss:
    if case.op == "clip_loss":

        def clip(t: Tensors) -> Tensor:
            before = ck.stash_budget()
            ck.set_stash_budget(STASH if case.stash else 0)
            try:
                return ck.clip_loss(t["x"], t["z"], t["scale"], backend=backend)
            finally:
                ck.set_stash_budget(before)

        return clip
    if case.op == "siglip_loss":
        return lambda t: ck.siglip_loss(t["x"], t["z"], t["scale"], t["bias"], backend=backend)
    if case.op == "critic_moments":

        def critic(t: Tensors) -> Tensor:
            j, el = ck.critic_moments(t["x"], t["z"], t["critic"], backend=backend)
            return j - el

        return critic
    return lambda t: ck.log_mean_exp(t["scores"], backend=backend)


# ------------------------------------------------------------------------------------------------ theirs
def eager(case: GpuCase) -> Loss:
    """The strongest plain PyTorch: one product of the features, the whole matrix in memory."""
    if case.op == "clip_loss":

        def clip(t: Tensors) -> Tensor:
            logits = (t["scale"].to(t["x"].dtype) * t["x"] @ t["z"].T).float()
            labels = torch.arange(len(logits), device=logits.device)
            return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

        return clip
    if case.op == "siglip_loss":

        def siglip(t: Tensors) -> Tensor:
            logits = (t["scale"].to(t["x"].dtype) * t["x"] @ t["z"].T).float() + t["bias"]
            return -F.logsigmoid(logits * (2 * torch.eye(len(logits), device=logits.device) - 1)).sum() / len(logits)

        return siglip
    if case.op == "critic_moments":

        def critic(t: Tensors) -> Tensor:
            s = t["critic"].pairwise(t["x"], t["z"])
            n = len(s)
            diagonal = torch.eye(n, dtype=torch.bool, device=s.device)
            return s.diagonal().mean() - s.masked_fill(diagonal, -math.inf).logsumexp((0, 1)) + math.log(n * (n - 1))

        return critic
    return lambda t: t["scores"].logsumexp((0, 1)) - math.log(t["scores"].numel())


def compiled(case: GpuCase) -> Loss:
    return torch.compile(eager(case), dynamic=False)


def open_clip(case: GpuCase) -> Loss:
    from open_clip.loss import ClipLoss, SigLipLoss

    if case.op == "siglip_loss":
        sigmoid = SigLipLoss()
        return lambda t: sigmoid(t["x"], t["z"], t["scale"].to(t["x"].dtype), t["bias"].to(t["x"].dtype))
    loss = ClipLoss()
    return lambda t: loss(t["x"], t["z"], t["scale"].to(t["x"].dtype))


def torch_chunked(case: GpuCase) -> Loss:
    """PyTorch's linear_cross_entropy, two calls: float32 logits and sums, a loss in the features' dtype."""
    loss = optional_peers.torch_chunked()
    return lambda t: loss(t["x"], t["z"], t["scale"])


def inf_cl(case: GpuCase) -> Loss:
    """Its two directions, with the mean outside: cal_inf_loss needs a process group for a scale with a gradient."""
    from inf_cl import cal_flash_loss

    def loss(t: Tensors) -> Tensor:
        rows, columns = (cal_flash_loss(t[a], t[b], scale=t["scale"], head_dim=256) for a, b in ("xz", "zx"))
        return (rows.mean() + columns.mean()) / 2

    return loss


def memeff(case: GpuCase) -> Loss:
    """Its temperature is a number without a gradient; stable=False returns the gradient of the loss."""
    from memeff import MemoryEfficientCLIPLoss

    loss = MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
    return lambda t: loss(t["x"], t["z"])


def siglip_kernel(case: GpuCase) -> Loss:
    """Gradients are made in its forward; logits are rounded to bfloat16, and so is the loss."""
    from siglip_kernel import fused_siglip_loss

    return lambda t: fused_siglip_loss(t["x"], t["z"], t["scale"].log(), t["bias"], backend="chunked_bf16")


@dataclass(frozen=True)
class Implementation:
    """How to make the function to time; `bytes` of its n x n tensors."""

    build: Callable[[GpuCase], Loss]
    bytes: Callable[[GpuCase], float] = lambda case: 0.0
    graph: bool = False  # the step is captured in a CUDA graph, and its replay timed


def _matrices(case: GpuCase, forward: float, train: float) -> float:
    """Bytes of so many float32 (n, n) tensors, (n, n, hidden) for a critic."""
    columns = case.d if case.op == "log_mean_exp" else case.n
    size = 4 * case.n * columns * (case.d if case.op == "critic_moments" else 1)
    return (train if case.backward else forward) * size


IMPLEMENTATIONS: dict[tuple[str, str], Implementation] = {
    ("clip_loss", "fused"): Implementation(fused, lambda c: 2.0 * c.n**2 if c.stash else 0.0),
    ("clip_loss", "eager"): Implementation(eager, lambda c: _matrices(c, 3, 4)),
    ("clip_loss", "compiled"): Implementation(compiled, lambda c: _matrices(c, 1, 2)),
    ("clip_loss", "open_clip"): Implementation(open_clip, lambda c: _matrices(c, 1, 4)),
    ("clip_loss", "torch-chunked"): Implementation(torch_chunked),
    ("clip_loss", "inf_cl"): Implementation(inf_cl),
    ("clip_loss", "memeff"): Implementation(memeff),
    ("siglip_loss", "fused"): Implementation(fused),
    ("siglip_loss", "eager"): Implementation(eager, lambda c: _matrices(c, 4, 5)),
    ("siglip_loss", "compiled"): Implementation(compiled, lambda c: _matrices(c, 1, 2)),
    ("siglip_loss", "open_clip"): Implementation(open_clip, lambda c: _matrices(c, 3, 4)),
    ("siglip_loss", "siglip_kernel"): Implementation(siglip_kernel),
    ("critic_moments", "fused"): Implementation(fused),
    ("critic_moments", "eager"): Implementation(eager, lambda c: _matrices(c, 2, 3)),
    ("critic_moments", "compiled"): Implementation(compiled, lambda c: _matrices(c, 1, 2)),
    ("log_mean_exp", "fused"): Implementation(fused),
    ("log_mean_exp", "eager"): Implementation(eager, lambda c: _matrices(c, 1, 2)),
    ("log_mean_exp", "compiled"): Implementation(compiled, lambda c: _matrices(c, 1, 2)),
}


for _op in ("clip_loss", "siglip_loss"):
    for _name in ("fused", "open_clip"):
        IMPLEMENTATIONS[_op, f"{_name}+graph"] = replace(IMPLEMENTATIONS[_op, _name], graph=True)


def implementations(case: GpuCase) -> list[str]:
    """The fused op first; the peers without a stash are timed beside the other tier only."""
    names = [name for op, name in IMPLEMENTATIONS if op == case.op]
    if case.n > SMALL or not case.backward:
        names = [name for name in names if not IMPLEMENTATIONS[case.op, name].graph]
    return names[:1] if case.stash else names


@dataclass(frozen=True)
class Published:
    """A time that a peer's author measured; forward and backward, bfloat16."""

    op: str
    implementation: str
    n: int
    d: int
    gpu: str
    milliseconds: float
    source: str


PUBLISHED = [
    Published("clip_loss", "memeff", 65536, 512, "A100 40GB PCIe", 201, "memeff 0.3.1, README"),
    Published("siglip_loss", "siglip_kernel", 65536, 768, "GH200", 48.8, "siglip-kernel 0.1.2, README"),
]
