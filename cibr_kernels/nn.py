"""Modules: critics, a drop-in for open_clip's ClipLoss, and the CIBR objective with everything it has to remember."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cibr_kernels.distributed import Shards, merge
from cibr_kernels.ops import checks
from cibr_kernels.ops.additive_moments.reference import ACTIVATIONS
from cibr_kernels.ops.cibr_loss.op import TERMS, agree, cibr_loss
from cibr_kernels.ops.clip_loss.op import clip_loss
from cibr_kernels.ops.critic_moments.op import Negatives
from cibr_kernels.ops.siglip_loss.op import siglip_loss

__all__ = ["CIBRLoss", "ClipLoss", "ConcatCritic", "LogEMA", "SeparableCritic", "SigLipLoss", "Standardize"]


class ConcatCritic(nn.Module):
    """T(x, z) of an MLP on [x, z] whose first layer is split so that pairs add, with one or two hidden layers.

        layers 1    w . phi(a + b) + c2    a = Wx x, b = Wz z + c    all pairs without n x n x hidden
        layers 2    w . phi(W2 phi(a + b) + b2) + c2    shifts(k) in O(n hidden); all pairs in panels of rows: slow

    Args: x_dim, z_dim and hidden widths; activation, one of relu, leaky_relu, gelu, gelu_tanh, silu, elu, softplus,
    tanh; slope, leaky_relu's negative slope or elu's alpha (defaults: torch's); layers, the number of hidden layers.
        storage: bfloat16 or float16 to keep a and b, and the gradients of them, in half the memory; scores and sums
            stay float32.  Not the default: it rounds a and b, an error of the input that nothing undoes (in bfloat16
            scores of standard deviation 1.1 move by 0.0024, at most 0.011).  One hidden layer only.
    Raises ValueError for other names, layers, dtypes and non-positive widths.
    """

    def __init__(
        self, x_dim: int, z_dim: int, hidden: int = 512, layers: int = 1, *, activation: str = "relu",
        slope: float | None = None, storage: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if storage not in (None, torch.float32, torch.bfloat16, torch.float16) or (storage and layers == 2):
            raise ValueError(
                f"storage must be float32, bfloat16 or float16, of one hidden layer, got {storage} with layers={layers}"
            )
        if layers not in (1, 2):
            raise ValueError(f"ConcatCritic has one or two hidden layers, got layers={layers}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; known are {', '.join(map(repr, ACTIVATIONS))}")
        if min(x_dim, z_dim, hidden) < 1:
            raise ValueError(f"widths must be positive, got x_dim={x_dim}, z_dim={z_dim}, hidden={hidden}")
        self.activation = activation
        self.slope = (1.0 if activation == "elu" else 0.01) if slope is None else slope
        self.storage = storage
        self.x_proj = nn.Linear(x_dim, hidden, bias=False)
        self.z_proj = nn.Linear(z_dim, hidden)
        self.inner = nn.Linear(hidden, hidden) if layers == 2 else None
        self.out = nn.Linear(hidden, 1)
        limit = 1 / math.sqrt(x_dim + z_dim)  # the layer nn.Linear(x_dim + z_dim, hidden) would have been
        for p in (self.x_proj.weight, self.z_proj.weight, self.z_proj.bias):
            nn.init.uniform_(p, -limit, limit)

    @property
    def additive_parts(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor, str, float]]:
        """x (n, x_dim), z (m, z_dim) -> a (n, hidden), b (m, hidden), w (hidden,), c2 (), activation, slope.

        There for one hidden layer only: the scores of two are no function of this kind (AttributeError).
        """
        if self.inner is not None:
            raise AttributeError("a ConcatCritic with two hidden layers has pair_parts, but no additive_parts")
        return self._additive_parts

    def _additive_parts(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, str, float]:
        w, bias = self.out.weight.squeeze(0), self.out.bias.squeeze(0)
        a, b = self.pair_parts(x, z)
        if self.storage is not None and a.dtype != torch.float64:
            a, b = a.to(self.storage), b.to(self.storage)
        return a, b, w, bias, self.activation, self.slope

    @property
    def pair_width(self) -> int:
        """Numbers that `score_parts` holds per pair for its backward."""
        return self.out.in_features * (2 if self.inner is None else 4)

    def pair_parts(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., x_dim), z (..., z_dim) -> a (..., hidden), b (..., hidden)."""
        for name, t, layer in (("x", x, self.x_proj), ("z", z, self.z_proj)):
            if t.shape[-1] != layer.in_features:
                raise ValueError(f"{name} has width {t.shape[-1]} but the critic was made for {layer.in_features}")
        return self.x_proj(x), self.z_proj(z)

    def score_parts(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b (..., hidden), which broadcast -> scores (...)."""
        phi = ACTIVATIONS[self.activation][0]
        hidden = phi(a + b, self.slope)
        if self.inner is not None:
            hidden = phi(self.inner(hidden), self.slope)
        return self.out(hidden).squeeze(-1)

    def pairwise(self, x: Tensor, z: Tensor) -> Tensor:
        """x (n, x_dim), z (m, z_dim) -> (n, m): the eager definition, which builds (n, m, hidden)."""
        return self.paired(x[:, None], z[None])

    def paired(self, x: Tensor, z: Tensor) -> Tensor:
        """x (..., x_dim), z (..., z_dim) -> (...): the critic on matching rows."""
        return self.score_parts(*self.pair_parts(x, z))


class SeparableCritic(nn.Module):
    """T(x, z) = <f(x), g(z)> with f and g two-layer ReLU MLPs into `embed_dim`, or any two modules (`from_maps`)."""

    def __init__(self, x_dim: int, z_dim: int, hidden: int = 512, embed_dim: int = 128) -> None:
        super().__init__()
        if min(x_dim, z_dim, hidden, embed_dim) < 1:
            raise ValueError(f"widths must be positive, got {x_dim}, {z_dim}, {hidden}, {embed_dim}")
        self.embed_x: nn.Module = nn.Sequential(nn.Linear(x_dim, hidden), nn.ReLU(), nn.Linear(hidden, embed_dim))
        self.embed_z: nn.Module = nn.Sequential(nn.Linear(z_dim, hidden), nn.ReLU(), nn.Linear(hidden, embed_dim))

    @classmethod
    def from_maps(cls, embed_x: nn.Module, embed_z: nn.Module) -> SeparableCritic:
        """The critic <embed_x(x), embed_z(z)>; both give (rows, k)."""
        critic = cls(1, 1, 1, 1)
        critic.embed_x, critic.embed_z = embed_x, embed_z
        return critic

    def dot_parts(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, x_dim), z (m, z_dim) -> f (n, k), g (m, k)."""
        return self.embed_x(x), self.embed_z(z)

    def pairwise(self, x: Tensor, z: Tensor) -> Tensor:
        """-> (n, m) scores: the eager definition."""
        return self.embed_x(x) @ self.embed_z(z).T

    def paired(self, x: Tensor, z: Tensor) -> Tensor:
        """-> (n,) scores of matching rows."""
        return (self.embed_x(x) * self.embed_z(z)).sum(-1)


class _OnRanks(nn.Module):
    """A loss with open_clip's rank and world_size, or a process_group."""

    def __init__(self, rank: int, world_size: int, process_group: ProcessGroup | None, strategy: str) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size
        self.process_group, self.strategy = process_group, strategy

    def _group(self) -> ProcessGroup | None:
        if self.process_group is not None or self.world_size == 1:
            return self.process_group
        name = type(self).__name__
        if not dist.is_initialized():
            raise ValueError(f"{name} has world_size={self.world_size}, but torch.distributed is not initialised")
        found = dist.get_rank(), dist.get_world_size()
        if found != (self.rank, self.world_size):
            raise ValueError(
                f"{name} has rank={self.rank}, world_size={self.world_size}, but this process is rank {found[0]} of "
                f"{found[1]}"
            )
        return dist.group.WORLD


class ClipLoss(_OnRanks):
    """Drop-in for `open_clip.loss.ClipLoss`: same constructor, same call, same dictionary, on any number of ranks.

    rank, world_size: of torch.distributed's default group, whose ranks' rows make one batch where world_size > 1; or
    `process_group` and `strategy` as in `cibr_kernels.clip_loss`.
    local_loss: return this rank's part, whose mean over ranks is the loss, instead of the loss of all rows (one more
    all-gather of a number, without gradient).  The gradients are the same, exact under DDP's averaging, either way and
    with or without `gather_with_grad`, which is accepted like `cache_labels` and `use_horovod` and changes nothing.
    Raises ValueError at the call where rank and world_size are not those of the default group.
    """

    def __init__(
        self, local_loss: bool = False, gather_with_grad: bool = False, cache_labels: bool = False, rank: int = 0,
        world_size: int = 1, use_horovod: bool = False, *, process_group: ProcessGroup | None = None,
        strategy: str = "gather",
    ) -> None:  # fmt: skip
        super().__init__(rank, world_size, process_group, strategy)
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.use_horovod = use_horovod

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None, output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """-> the loss, or {"contrastive_loss": loss}.  Arguments as in `cibr_kernels.clip_loss`."""
        group = self._group()
        loss = clip_loss(
            image_features, text_features, logit_scale, logit_bias, process_group=group, strategy=self.strategy
        )
        if group is not None and not self.local_loss:
            loss = loss + (merge.mean_of_ranks(loss.detach(), group) - loss.detach())
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(_OnRanks):
    """Drop-in for `open_clip.loss.SigLipLoss`: same constructor, same call, same dictionary, on any number of ranks.

    rank, world_size, process_group, strategy: as in `ClipLoss`; on several ranks the result is this rank's part, whose
    mean over ranks is the loss, as open_clip's.  cache_labels and dist_impl are accepted and change nothing: the sum
    does not depend on the order in which texts arrive.
    Raises ValueError for an unknown dist_impl, and at the call where rank and world_size are not the default group's.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None, *,
        process_group: ProcessGroup | None = None, strategy: str = "gather",
    ) -> None:  # fmt: skip
        super().__init__(rank, world_size, process_group, strategy)
        checks.choice("dist_impl", dist_impl or "bidir", ("bidir", "shift", "reduce", "gather"))
        self.cache_labels, self.dist_impl = cache_labels, dist_impl

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None, output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """-> the loss, or {"contrastive_loss": loss}.  Arguments as in `cibr_kernels.siglip_loss`."""
        loss = siglip_loss(
            image_features, text_features, logit_scale, logit_bias, process_group=self._group(), strategy=self.strategy
        )
        return {"contrastive_loss": loss} if output_dict else loss


class LogEMA(nn.Module):
    """The log of a moving average of e^L, for MINE's corrected gradient; all in log space, so e^L may overflow.

    log_ema <- log(decay e^log_ema + (1 - decay) e^L): `decay` weighs the old value.  The first L starts it.
    Called with L it returns the log average, moved by L in training mode only.
    """

    value: Tensor
    started: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("value", torch.zeros(()))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def forward(self, el: Tensor) -> Tensor:
        return self.update(el) if self.training else self.value

    @torch.no_grad()
    def update(self, el: Tensor) -> Tensor:
        """Takes one training batch's L (0-d, nats) in and returns the new log average; call once per optimiser step."""
        el = el.detach().float()
        log_decay = math.log(self.decay) if self.decay > 0 else float("-inf")
        moved = torch.logaddexp(self.value + log_decay, el + math.log1p(-self.decay))
        self.value.copy_(torch.where(self.started, moved, el))
        self.started.fill_(True)
        return self.value


class Standardize(nn.Module):
    """(x - mean) / std by running statistics of the training batches, detached, without learnt parameters.

    The first batch starts the statistics; momentum is the weight of a new batch.  Features that do not vary become 0.
    """

    mean: Tensor
    var: Tensor
    started: Tensor

    def __init__(self, dim: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def forward(self, x: Tensor, shards: Shards | None = None) -> Tensor:
        """(n, dim) of any float dtype -> (n, dim) float32 (float64 of a float64 module), no gradient.

        Statistics move in training mode only; with `shards` they are those of the rows of all ranks.
        """
        x = x.detach().to(torch.promote_types(self.mean.dtype, torch.float32))
        if self.training:
            weight = torch.where(self.started, self.momentum, 1.0)
            var, mean = torch.var_mean(x, 0, unbiased=False)
            if shards is not None:
                mean, var = merge.statistics(mean, var, shards)
            self.mean.lerp_(mean, weight)
            self.var.lerp_(var, weight)
            self.started.fill_(True)
        return (x - self.mean) * (self.var + self.eps).rsqrt()


class CIBRLoss(nn.Module):
    """The CIBR objective with its four critics, standardisation of X, noise on Z and warm-up of lambda.

    Give `parameters()` to the optimiser in a group of their own, with a learning rate at least twice the encoders' and
    no weight decay on biases; one `loss.backward()` serves encoders and critics.

    Args:
        embed_dim: width of the embeddings Z; image_input_dim, text_input_dim: widths of X (pre-projection features).
        hidden, activation: of the critics.
        lam: weight of the penalty (0.5, the paper's best).
        noise_std: noise on unit-norm Z, 0.25.
        warmup_steps: training steps in which only the critics learn (lambda 0); ramp_steps: then linear growth.
        estimator, negatives, diagonal: as in `mutual_information`.
        ema_decay: decay of MINE's moving average; None (default for all pairs) leaves the gradient of DV.
        process_group, strategy: as in `cibr_loss`.  Statistics, averages and the step then move alike on every rank;
            state that was loaded on one rank has to be loaded on all.

    Warns once per critic when an estimate passes log(n) - 1: there it measures the batch, not the information.
    Raises ValueError for negative lam, noise or steps.
    """

    step: Tensor

    def __init__(
        self, embed_dim: int, image_input_dim: int, text_input_dim: int, *, hidden: int = 512, activation: str = "relu",
        lam: float = 0.5, noise_std: float = 0.25, warmup_steps: int = 0, ramp_steps: int = 0, estimator: str = "mine",
        negatives: Negatives = "all", diagonal: str = "exclude", ema_decay: float | None = None,
        one_way: bool = False, process_group: ProcessGroup | None = None, strategy: str = "gather",
    ) -> None:  # fmt: skip
        super().__init__()
        if min(lam, noise_std, warmup_steps, ramp_steps) < 0:
            raise ValueError(f"must not be negative: {lam=}, {noise_std=}, {warmup_steps=}, {ramp_steps=}")
        if ema_decay is not None and estimator != "mine":
            raise ValueError(f"ema_decay belongs to estimator 'mine', got estimator {estimator!r}")
        if noise_std == 0:
            warnings.warn("noise_std is 0: the information of a deterministic Z about X is infinite", stacklevel=2)
        widths = {
            "image_own": image_input_dim, "image_other": text_input_dim,
            "text_own": text_input_dim, "text_other": image_input_dim,
        }  # fmt: skip
        self.critics = nn.ModuleDict(
            {name: ConcatCritic(widths[name], embed_dim, hidden, activation=activation) for name in TERMS}
        )
        self.standardize_image, self.standardize_text = Standardize(image_input_dim), Standardize(text_input_dim)
        self.ema = None if ema_decay is None else nn.ModuleDict({name: LogEMA(ema_decay) for name in TERMS})
        self.lam, self.noise_std, self.warmup_steps, self.ramp_steps = lam, noise_std, warmup_steps, ramp_steps
        self.estimator, self.negatives, self.diagonal, self.one_way = estimator, negatives, diagonal, one_way
        self.process_group, self.strategy = process_group, strategy
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._warned: set[str] = set()

    def current_lam(self) -> Tensor:
        """Lambda at the current training step, a 0-d tensor: 0 in the warm-up, then linear, then `lam`."""
        grown = (self.step - self.warmup_steps + 1).clamp(min=0) / (self.ramp_steps + 1)
        return self.lam * grown.clamp(max=1.0)

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, image_inputs: Tensor,
        text_inputs: Tensor, logit_bias: Tensor | float | None = None, output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """-> the loss in nats, or a dictionary of it ("loss") and its parts.

        image_features, text_features: (n, embed_dim) of unit norm; image_inputs (n, image_input_dim), text_inputs
        (n, text_input_dim).  The dictionary has "loss", "contrastive_loss", "image_cmi", "text_cmi", the four estimates
        and "lam"; only "loss" carries gradient.  With a process_group "loss" and "contrastive_loss" are this rank's
        part, whose mean over ranks is the whole batch's; the others are the whole batch's.  In eval mode statistics,
        averages and the step stand still.
        """
        lam = self.current_lam()
        shards = agree(
            "CIBRLoss", self.process_group, image_features, text_features, image_inputs, text_inputs,
            training=self.training,
        )  # fmt: skip
        loss, parts = cibr_loss(
            image_features, text_features, logit_scale, logit_bias,
            image_inputs=self.standardize_image(image_inputs, shards),
            text_inputs=self.standardize_text(text_inputs, shards),
            critics=dict(self.critics.items()), lam=lam, noise_std=self.noise_std, estimator=self.estimator,
            negatives=self.negatives, diagonal=self.diagonal, one_way=self.one_way,
            ema=None if self.ema is None else dict(self.ema.items()), return_parts=True, process_group=shards,
            strategy=self.strategy,
        )  # fmt: skip
        if self.training:
            self.step += 1
        self._warn_if_saturated(parts, image_features.shape[0] if shards is None else shards.total)
        return {"loss": loss, "lam": lam, **parts} if output_dict else loss

    def _warn_if_saturated(self, parts: dict[str, Tensor], n: int) -> None:
        if torch.compiler.is_compiling() or parts["image_own"].device.type != "cpu" or self.estimator == "js":
            return  # reading the values would stall an accelerator; js is no information
        limit = math.log(n) - 1
        for name in TERMS:
            if name not in self._warned and parts[name].item() > limit:
                self._warned.add(name)
                warnings.warn(
                    f"the estimate {name} is {parts[name].item():.2f} nats, above log(n) - 1 = {limit:.2f} at n = {n}: "
                    "use a larger batch or more noise_std",
                    stacklevel=3,
                )
