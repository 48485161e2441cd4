"""What the fused ops are compared with, and the fused ops themselves, under one signature: inputs -> loss.

An entry says how to run it, how many N x N x D matmul passes it makes (None: they are not its cost), what its logits
and their sums are rounded to, and about how many bytes it needs at its peak, so that a size that does not fit is
reported and not run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cibr_kernels as ck
from bench import optional_peers
from bench.cases import TIERS, Case, Passes
from bench.inputs import HIDDEN, TERMS, Inputs
from cibr_kernels.losses.penalty import noisy, scale_gradient
from cibr_kernels.primitives.additive.moments.reference import moments

Loss = Callable[[Inputs], Tensor]
NOISE_STD, LAM = 0.25, 0.5


@dataclass(frozen=True)
class Implementation:
    """`build` makes the function to time and imports what it needs; `passes` and `peak_bytes` are of one call.

    numerics: the dtypes of its logits (or scores) and of their sums.  compiles: it must see the real shapes to warm up.
    same: False for another function that stands beside the fused one for its time alone.  graph: the step is captured
    in a CUDA graph, and its replay timed.
    """

    build: Callable[[Case], Loss]
    passes: Callable[[Case], Passes | None]
    peak_bytes: Callable[[Case], float]
    numerics: Callable[[Case], str] = lambda case: "f32, f32"
    compiles: bool = False
    same: bool = True
    graph: bool = False


def itemsize(case: Case) -> int:
    return int(getattr(torch, case.dtype).itemsize)


def _budget(case: Case) -> int:
    """What `stash_budget()` is while the case runs."""
    return TIERS[case.tier] if case.tier else ck.stash_budget()


@contextmanager
def budget_of(case: Case) -> Iterator[None]:
    """Inside, `stash_budget()` is what the case's tier wants."""
    before = ck.stash_budget()
    ck.set_stash_budget(_budget(case))
    try:
        yield
    finally:
        ck.set_stash_budget(before)


def fused(case: Case, backend: str = "auto") -> Loss:
    """The op of the case."""

    def clip(inputs: Inputs) -> Tensor:
        with budget_of(case):
            return ck.clip_loss(*_named(inputs, "x", "z", "scale"), backend=backend)

    def siglip(inputs: Inputs) -> Tensor:
        return ck.siglip_loss(*_named(inputs, "x", "z", "scale", "bias"), backend=backend)

    def critic(inputs: Inputs) -> Tensor:
        x, z = _named(inputs, "x", "z")
        j, el = ck.critic_moments(x, z, inputs.critics["critic"], backend=backend)
        return j - el

    def log_mean_exp(inputs: Inputs) -> Tensor:
        return ck.log_mean_exp(inputs.tensors["scores"], backend=backend)

    losses = {
        "clip_loss": clip,
        "siglip_loss": siglip,
        "critic_moments": critic,
        "cibr_loss": fused_cibr,
        "log_mean_exp": log_mean_exp,
    }
    return losses[case.op]


def _named(inputs: Inputs, *names: str) -> list[Tensor]:
    return [inputs.tensors[name] for name in names]


# ------------------------------------------------------------------------------------------------ clip_loss
def fused_clip_passes(case: Case) -> Passes:
    """1 forward; 2 more in backward from the stash, 3 where the logits are computed again (DESIGN.md)."""
    if not case.backward:
        return Passes(1, 0)
    kernels = case.device == "cuda" or ck.native_available()
    stashed = kernels and case.n**2 * itemsize(case) <= _budget(case)
    return Passes(1 if stashed else 2, 2)


def open_clip(case: Case) -> Loss:
    from open_clip.loss import ClipLoss, SigLipLoss

    if case.op == "siglip_loss":
        sigmoid = SigLipLoss()
        return lambda inputs: sigmoid(*_named(inputs, "x", "z", "scale", "bias"))
    loss = ClipLoss()
    return lambda inputs: loss(*_named(inputs, "x", "z", "scale"))


def symmetric(logits: Tensor) -> Tensor:
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def one_logits(inputs: Inputs) -> Tensor:
    """open_clip's loss with its second matmul replaced by a transpose: the strongest plain PyTorch."""
    x, z, scale = _named(inputs, "x", "z", "scale")
    return symmetric(scale * x @ z.T)


def float32_sums(inputs: Inputs) -> Tensor:
    """one_logits with its softmax in float32, as under autocast."""
    x, z, scale = _named(inputs, "x", "z", "scale")
    return symmetric((scale * x @ z.T).float())


def float32_logits(inputs: Inputs) -> Tensor:
    """one_logits at our numerics: the features become float32 before the matmul."""
    x, z, scale = _named(inputs, "x", "z", "scale")
    return symmetric(scale * x.float() @ z.float().T)


# ------------------------------------------------------------------------------------------------ siglip_loss
def eager_siglip(inputs: Inputs) -> Tensor:
    x, z, scale, bias = _named(inputs, "x", "z", "scale", "bias")
    logits = (scale * x @ z.T).float() + bias
    labels = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(labels * logits).sum() / len(logits)


# ------------------------------------------------------------------------------------------------ critics
def eager_critic(inputs: Inputs) -> Tensor:
    j, el = moments(inputs.critics["critic"].pairwise(*_named(inputs, "x", "z")), 0, False)  # type: ignore[operator]
    return j - el


def relu_critic(case: Case) -> Loss:
    """The fused op with ReLU on the same parameters: the ratio to this is what an activation costs."""

    def loss(inputs: Inputs) -> Tensor:
        critic = copy.copy(inputs.critics["critic"])
        critic.activation = "relu"  # type: ignore[assignment]
        return fused(case)(Inputs(inputs.tensors, nn.ModuleDict({"critic": critic}), inputs.leaves))

    return loss


def eager_log_mean_exp(inputs: Inputs) -> Tensor:
    scores = inputs.tensors["scores"]
    return scores.logsumexp((0, 1)) - math.log(scores.numel())


def fused_cibr(inputs: Inputs) -> Tensor:
    t = inputs.tensors
    return ck.cibr_loss(
        t["x"],
        t["z"],
        t["scale"],
        image_inputs=t["image_inputs"],
        text_inputs=t["text_inputs"],
        critics=dict(inputs.critics.items()),
        lam=LAM,
        noise_std=NOISE_STD,
        generator=torch.Generator().manual_seed(0),
    )


def eager_cibr(inputs: Inputs) -> Tensor:
    """`cibr_loss` as one would write it without kernels: one-logits and four critics on (n, n, hidden) tensors."""
    t, generator = inputs.tensors, torch.Generator().manual_seed(0)
    zv, zt = noisy(t["x"], NOISE_STD, generator), noisy(t["z"], NOISE_STD, generator)
    xv, xt = t["image_inputs"], t["text_inputs"]
    pairs = (
        (xv, scale_gradient(zv, -LAM)),
        (xt, scale_gradient(zv, LAM)),
        (xt, scale_gradient(zt, -LAM)),
        (xv, scale_gradient(zt, LAM)),
    )
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
    if case.device == "cuda" or ck.native_available():
        return linear + (itemsize(case) * case.n**2 if case.tier == "stash" and case.backward else 0)
    matrices = {
        "clip_loss": 4.0,
        "siglip_loss": 6.0,
        "critic_moments": 5.0 * case.width,
        "cibr_loss": 5.0 * HIDDEN,
        "log_mean_exp": 1.0,
    }
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


EAGER, FLOAT_SUMS = _rounded(True, True), _rounded(True, False)


def _always(loss: Loss) -> Callable[[Case], Loss]:
    return lambda case: loss


def _compiled(loss: Loss, mode: str | None = None) -> Callable[[Case], Loss]:
    return lambda case: torch.compile(loss, fullgraph=False, dynamic=False, mode=mode)


def _plain(loss: Loss, bytes_: Callable[[Case], float]) -> Implementation:
    """PyTorch on one logits matrix: 1 + 2 passes, sums in float32."""
    return Implementation(_always(loss), _passes(1, 2), bytes_, FLOAT_SUMS)


def _inductor(loss: Loss, mode: str | None = None) -> Implementation:
    return Implementation(_compiled(loss, mode), _passes(1, 2), lambda c: _logits(c, 4, 6), FLOAT_SUMS, compiles=True)


CRITIC = Implementation(_always(eager_critic), _no_passes, lambda c: _activations(c, 2, 3))
SCORES = Implementation(_always(eager_log_mean_exp), _no_passes, lambda c: 4 * c.n * c.width * (2 if c.backward else 1))
IMPLEMENTATIONS: dict[tuple[str, str], Implementation] = {
    ("clip_loss", "fused"): Implementation(fused, fused_clip_passes, _small),
    ("clip_loss", "open_clip"): Implementation(open_clip, _passes(2, 4), lambda c: _logits(c, 4, 6), EAGER),
    ("clip_loss", "one-logits"): Implementation(_always(one_logits), _passes(1, 2), lambda c: _logits(c, 4, 6), EAGER),
    ("clip_loss", "eager"): _plain(float32_sums, lambda c: (4 if c.backward else 3) * 4 * c.n**2),
    ("clip_loss", "float32-logits"): Implementation(
        _always(float32_logits), _passes(1, 2), lambda c: (6 if c.backward else 4) * 4 * c.n**2
    ),
    ("clip_loss", "compiled"): _inductor(float32_sums),
    ("clip_loss", "max-autotune"): _inductor(float32_sums, "max-autotune"),
    # chunks of logits and of float32 gradients; its gradients are made in the forward
    ("clip_loss", "torch-chunked"): Implementation(
        optional_peers.torch_chunked, _passes(2, 4), lambda c: _logits(c, 1, 1)
    ),
    ("clip_loss", "cut-cross-entropy"): Implementation(
        optional_peers.cut_cross_entropy, _passes(2, 4), lambda c: _logits(c, 4, 6), FLOAT_SUMS, compiles=True
    ),
    # a map over pairs that makes each logit again wherever it is needed; no matmul
    ("clip_loss", "keops"): Implementation(optional_peers.keops, _passes(4, 4), _small, compiles=True),
    ("clip_loss", "inf_cl"): Implementation(optional_peers.inf_cl, _passes(2, 8), _small),
    ("clip_loss", "memeff"): Implementation(optional_peers.memeff, _passes(1, 4), _small),
    ("siglip_loss", "fused"): Implementation(fused, _passes(1, 2), _small),
    ("siglip_loss", "open_clip"): Implementation(open_clip, _passes(1, 2), lambda c: _logits(c, 6, 8), EAGER),
    ("siglip_loss", "eager"): _plain(eager_siglip, lambda c: (5 if c.backward else 4) * 4 * c.n**2),
    ("siglip_loss", "compiled"): _inductor(eager_siglip),
    ("siglip_loss", "siglip_kernel"): Implementation(optional_peers.siglip_kernel, _passes(3, 0), _small, EAGER),
    ("critic_moments", "fused"): Implementation(fused, _no_passes, _small),
    ("critic_moments", "fused-relu"): Implementation(relu_critic, _no_passes, _small, same=False),
    ("critic_moments", "eager"): CRITIC,
    ("critic_moments", "compiled"): replace(CRITIC, build=_compiled(eager_critic), compiles=True),
    ("cibr_loss", "fused"): Implementation(fused, _no_passes, _small),
    # each critic keeps one activation until backward, which then needs two more
    ("cibr_loss", "eager"): Implementation(_always(eager_cibr), _no_passes, lambda c: _activations(c, 2, 6, HIDDEN)),
    ("log_mean_exp", "fused"): Implementation(fused, _no_passes, _small),
    ("log_mean_exp", "eager"): SCORES,
    ("log_mean_exp", "compiled"): replace(SCORES, build=_compiled(eager_log_mean_exp), compiles=True),
}
for _op in ("clip_loss", "siglip_loss"):
    for _name in ("fused", "open_clip"):
        IMPLEMENTATIONS[_op, f"{_name}+graph"] = replace(IMPLEMENTATIONS[_op, _name], graph=True)


def gigabytes(size: float) -> str:
    """A size in the unit that suits it, decimal."""
    if size <= 0:
        return "0"
    power = min(int(math.log10(size) // 3), 4)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
