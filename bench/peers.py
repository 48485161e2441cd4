"""What the fused ops are compared with, and the fused ops themselves, under one signature: inputs -> loss.

An entry says how to run it, how many N x N x D matmul passes it makes (None: they are not its cost), what its logits
and their sums are rounded to, and about how many bytes it needs at its peak, so that a size that does not fit is
reported and not run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cibr_kernels as ck
from bench import optional_peers
from bench.inputs import HIDDEN, TERMS, Inputs
from bench.registry import TIERS, Case, Passes
from cibr_kernels.losses.cibr import noisy, scale_gradient
from cibr_kernels.primitives.additive.moments.reference import moments

Loss = Callable[[Inputs], Tensor]
NOISE_STD, LAM = 0.25, 0.5


@dataclass(frozen=True)
class Implementation:
    """`build` makes the function to time and imports what it needs; `passes` and `peak_bytes` are of one call.

    numerics: the dtypes of its logits (or scores) and of their sums.  compiles: it must see the real shapes to warm up.
    same: False for another function that stands beside the fused one for its time alone.
    """

    build: Callable[[], Loss]
    passes: Callable[[Case], Passes | None]
    peak_bytes: Callable[[Case], float]
    numerics: Callable[[Case], str] = lambda case: "f32, f32"
    compiles: bool = False
    same: bool = True


def itemsize(case: Case) -> int:
    return int(getattr(torch, case.dtype).itemsize)


def _budget(case: Case) -> int:
    """What `stash_budget()` is while the case runs."""
    return TIERS[case.tier] if case.tier else ck.stash_budget()


# ------------------------------------------------------------------------------------------------ clip_loss
def fused_clip(inputs: Inputs) -> Tensor:
    t = inputs.tensors
    return ck.clip_loss(t["x"], t["z"], t["scale"])


def fused_clip_passes(case: Case) -> Passes:
    """1 forward; 2 more in backward from the stash, 3 where the logits are computed again (DESIGN.md)."""
    if not case.backward:
        return Passes(1, 0)
    stashed = ck.native_available() and case.n**2 * itemsize(case) <= _budget(case)
    return Passes(1 if stashed else 2, 2)


def build_open_clip() -> Loss:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda inputs: loss(inputs.tensors["x"], inputs.tensors["z"], inputs.tensors["scale"])


def one_logits(inputs: Inputs) -> Tensor:
    """open_clip's loss with its second matmul replaced by a transpose: the strongest plain PyTorch."""
    t = inputs.tensors
    logits = t["scale"] * t["x"] @ t["z"].T
    labels = torch.arange(logits.shape[0])
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def float32_logits(inputs: Inputs) -> Tensor:
    """one_logits at our numerics: the features become float32 before the matmul."""
    t = inputs.tensors
    return one_logits(Inputs({**t, "x": t["x"].float(), "z": t["z"].float()}, inputs.critics, inputs.leaves))


def _compiled(mode: str | None = None) -> Loss:
    return torch.compile(one_logits, fullgraph=False, dynamic=False, mode=mode)


# ------------------------------------------------------------------------------------------------ siglip_loss
def fused_siglip(inputs: Inputs) -> Tensor:
    t = inputs.tensors
    return ck.siglip_loss(t["x"], t["z"], t["scale"], t["bias"])


def build_open_clip_siglip() -> Loss:
    from open_clip.loss import SigLipLoss

    loss = SigLipLoss()
    return lambda inputs: loss(*(inputs.tensors[name] for name in ("x", "z", "scale", "bias")))


def eager_siglip(inputs: Inputs) -> Tensor:
    t = inputs.tensors
    logits = t["scale"] * t["x"] @ t["z"].T + t["bias"]
    labels = 2 * torch.eye(logits.shape[0], dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / logits.shape[0]


def _compiled_siglip() -> Loss:
    return torch.compile(eager_siglip, fullgraph=False, dynamic=False)


# ------------------------------------------------------------------------------------------------ critics
def fused_critic(inputs: Inputs) -> Tensor:
    t = inputs.tensors
    j, el = ck.critic_moments(t["x"], t["z"], inputs.critics["critic"])
    return j - el


def eager_critic(inputs: Inputs) -> Tensor:
    t = inputs.tensors
    j, el = moments(inputs.critics["critic"].pairwise(t["x"], t["z"]), 0, False)  # type: ignore[operator]
    return j - el


def relu_critic(inputs: Inputs) -> Tensor:
    """fused_critic with ReLU on the same parameters: the ratio to this is what an activation costs."""
    critic = copy.copy(inputs.critics["critic"])
    critic.activation = "relu"  # type: ignore[assignment]
    return fused_critic(Inputs(inputs.tensors, nn.ModuleDict({"critic": critic}), inputs.leaves))


def fused_cibr(inputs: Inputs) -> Tensor:
    t = inputs.tensors
    return ck.cibr_loss(
        t["x"], t["z"], t["scale"], image_inputs=t["image_inputs"], text_inputs=t["text_inputs"],
        critics=dict(inputs.critics.items()), lam=LAM, noise_std=NOISE_STD, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def eager_cibr(inputs: Inputs) -> Tensor:
    """`cibr_loss` as one would write it without kernels: one-logits and four critics on (n, n, hidden) tensors."""
    t, generator = inputs.tensors, torch.Generator().manual_seed(0)
    zv, zt = noisy(t["x"], NOISE_STD, generator), noisy(t["z"], NOISE_STD, generator)
    xv, xt = t["image_inputs"], t["text_inputs"]
    pairs = ((xv, scale_gradient(zv, -LAM)), (xt, scale_gradient(zv, LAM)),
             (xt, scale_gradient(zt, -LAM)), (xv, scale_gradient(zt, LAM)))  # fmt: skip
    nats = []
    for name, (x, z) in zip(TERMS, pairs, strict=True):
        j, el = moments(inputs.critics[name].pairwise(x, z), 0, False)  # type: ignore[operator]
        nats.append(j - el)
    surrogate = -torch.stack(nats).sum()
    penalty = LAM * (nats[0] - nats[1] + nats[2] - nats[3]).detach()
    return one_logits(inputs) + penalty + (surrogate - surrogate.detach())


def _activations(case: Case, forward: int, train: int, hidden: int = 0) -> float:
    """Bytes of so many (n, n, hidden) float32 tensors."""
    return (train if case.backward else forward) * 4 * case.n**2 * (hidden or case.width)


def _logits(case: Case, forward: int, train: int) -> float:
    """Bytes of so many (n, n) tensors in the features' dtype."""
    return (train if case.backward else forward) * itemsize(case) * case.n**2


def _small(case: Case) -> float:
    """The fused ops: features, gradients, one stash and one panel of logits; or the reference's (n, n) tensors."""
    linear = 16 * 4 * case.n * max(case.width, 512) + 2 * ck.stash_budget()
    if ck.native_available():
        return linear + (itemsize(case) * case.n**2 if case.tier == "stash" and case.backward else 0)
    matrices = {"clip_loss": 4.0, "siglip_loss": 6.0, "critic_moments": 5.0 * case.width, "cibr_loss": 5.0 * HIDDEN}
    return linear + matrices[case.op] * 4 * case.n**2


def _no_passes(case: Case) -> None:
    return None


def _passes(forward: int, gradients: int) -> Callable[[Case], Passes]:
    """Products of logits in the forward, the same ones in training, and those of the gradients."""
    return lambda case: Passes(forward, gradients if case.backward else 0)


def _rounded(logits: bool, sums: bool) -> Callable[[Case], str]:
    """What is rounded to the features' dtype, as the table says it; the rest is float32."""
    names = {"float32": "f32", "bfloat16": "bf16"}
    return lambda case: f"{names[case.dtype] if logits else 'f32'}, {names[case.dtype] if sums else 'f32'}"


EAGER, INDUCTOR = _rounded(True, True), _rounded(True, False)  # Inductor sums in float32 what the matmul rounded

IMPLEMENTATIONS: dict[tuple[str, str], Implementation] = {
    ("clip_loss", "fused"): Implementation(lambda: fused_clip, fused_clip_passes, _small),
    ("clip_loss", "open_clip"): Implementation(build_open_clip, _passes(2, 4), lambda c: _logits(c, 4, 6), EAGER),
    ("clip_loss", "one-logits"): Implementation(lambda: one_logits, _passes(1, 2), lambda c: _logits(c, 4, 6), EAGER),
    ("clip_loss", "float32-logits"): Implementation(
        lambda: float32_logits, _passes(1, 2), lambda c: (6 if c.backward else 4) * 4 * c.n**2
    ),
    ("clip_loss", "compiled"): Implementation(_compiled, _passes(1, 2), lambda c: _logits(c, 4, 6), INDUCTOR, True),
    ("clip_loss", "max-autotune"): Implementation(
        lambda: _compiled("max-autotune"), _passes(1, 2), lambda c: _logits(c, 4, 6), INDUCTOR, True
    ),
    # chunks of logits and of float32 gradients; its gradients are made in the forward
    ("clip_loss", "torch-chunked"): Implementation(
        optional_peers.build_torch_chunked, _passes(2, 4), lambda c: _logits(c, 1, 1)
    ),
    ("clip_loss", "cut-cross-entropy"): Implementation(
        optional_peers.build_cut_cross_entropy, _passes(2, 4), lambda c: _logits(c, 4, 6), INDUCTOR, True
    ),
    # a map over pairs that makes each logit again wherever it is needed; no matmul
    ("clip_loss", "keops"): Implementation(optional_peers.build_keops, _passes(4, 4), _small, compiles=True),
    ("siglip_loss", "fused"): Implementation(lambda: fused_siglip, _passes(1, 2), _small),
    ("siglip_loss", "open_clip"): Implementation(
        build_open_clip_siglip, _passes(1, 2), lambda c: _logits(c, 6, 8), EAGER
    ),
    ("siglip_loss", "compiled"): Implementation(
        _compiled_siglip, _passes(1, 2), lambda c: _logits(c, 4, 6), INDUCTOR, True
    ),
    ("critic_moments", "fused"): Implementation(lambda: fused_critic, _no_passes, _small),
    ("critic_moments", "fused-relu"): Implementation(lambda: relu_critic, _no_passes, _small, same=False),
    ("critic_moments", "eager"): Implementation(lambda: eager_critic, _no_passes, lambda c: _activations(c, 2, 3)),
    ("cibr_loss", "fused"): Implementation(lambda: fused_cibr, _no_passes, _small),
    # each critic keeps one activation until backward, which then needs two more
    ("cibr_loss", "eager"): Implementation(lambda: eager_cibr, _no_passes, lambda c: _activations(c, 2, 6, HIDDEN)),
}


def gigabytes(size: float) -> str:
    """A size in the unit that suits it, decimal."""
    if size <= 0:
        return "0"
    power = min(int(math.log10(size) // 3), 4)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
