"""The CIBR objective with everything it has to remember."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cibr_kernels import checks
from cibr_kernels.distributed.lse import STRATEGIES
from cibr_kernels.information.estimators import MAXIMISED
from cibr_kernels.information.negatives import Negatives, check_negatives
from cibr_kernels.information.pairs import DIAGONALS
from cibr_kernels.losses.cibr import TERMS, agree, objective
from cibr_kernels.nn.critics import ConcatCritic
from cibr_kernels.nn.groups import OnGroup
from cibr_kernels.nn.statistics import LogEMA, Standardize


class CIBRLoss(OnGroup):
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

    `.to(torch.bfloat16)` and the like cast the critics; statistics, averages, noise, scores and sums stay float32.
    Warns once per critic when an estimate passes log(n) - 1: there it measures the batch, not the information.
    Raises ValueError for unknown names, negative lam, noise or steps.
    """

    step: Tensor

    def __init__(
        self, embed_dim: int, image_input_dim: int, text_input_dim: int, *, hidden: int = 512, activation: str = "relu",
        lam: float = 0.5, noise_std: float = 0.25, warmup_steps: int = 0, ramp_steps: int = 0, estimator: str = "mine",
        negatives: Negatives = "all", diagonal: str = "exclude", ema_decay: float | None = None,
        one_way: bool = False, process_group: ProcessGroup | None = None, strategy: str = "gather",
    ) -> None:  # fmt: skip
        super().__init__(process_group)
        checks.choice("estimator", estimator, MAXIMISED)
        checks.choice("diagonal", diagonal, DIAGONALS)
        checks.choice("strategy", strategy, STRATEGIES)
        check_negatives(negatives)
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
        self.strategy = strategy
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._warned: set[str] = set()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the first step; critics, statistics and averages have their own."""
        self.step.zero_()

    def current_lam(self) -> Tensor:
        """Lambda at the current training step, a 0-d float32: 0 in the warm-up, then linear, then `lam`."""
        grown = (self.step - self.warmup_steps + 1).clamp(min=0).float() / (self.ramp_steps + 1)
        return self.lam * grown.clamp(max=1.0)

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, image_inputs: Tensor,
        text_inputs: Tensor, logit_bias: Tensor | float | None = None, output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """-> the loss in nats, or a dictionary of it ("loss") and its parts.

        image_features, text_features: (n, embed_dim) of unit norm, of one dtype; image_inputs (n, image_input_dim),
        text_inputs (n, text_input_dim), of any floating dtype.  The dictionary has "loss", "contrastive_loss",
        "image_cmi", "text_cmi", the four estimates and "lam"; only "loss" carries gradient.  With a process_group
        "loss" and "contrastive_loss" are this rank's part, whose mean over ranks is the whole batch's; the others are
        the whole batch's.  In eval mode statistics, averages and the step stand still.
        """
        lam = self.current_lam()
        options: dict[str, Any] = {
            "estimator": self.estimator, "negatives": self.negatives,
            "diagonal": self.diagonal, "one_way": self.one_way, "noise_std": self.noise_std, "strategy": self.strategy,
        }  # fmt: skip
        shards, critics = agree(
            "CIBRLoss", self.process_group, image_features, text_features, image_inputs, text_inputs,
            critics=self.critics, training=self.training, **options,
        )  # fmt: skip
        loss, parts = objective(
            image_features, text_features, logit_scale, logit_bias,
            image_inputs=self.standardize_image(image_inputs, shards),
            text_inputs=self.standardize_text(text_inputs, shards),
            critics=critics, lam=lam, ema=self.ema, shards=shards, **options,
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
