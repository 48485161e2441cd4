"""The CIBR objective with everything it has to remember."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cibr_kernels import checks
from cibr_kernels.dispatch import library
from cibr_kernels.distributed.lse import STRATEGIES
from cibr_kernels.distributed.shards import Shards
from cibr_kernels.information.estimators import MAXIMISED
from cibr_kernels.information.negatives import Negatives, check_negatives
from cibr_kernels.information.pairs import DIAGONALS
from cibr_kernels.losses import game
from cibr_kernels.losses.cibr import agree, objective, parts_of
from cibr_kernels.losses.clip.op import clip_loss
from cibr_kernels.losses.diagnostics import capacities
from cibr_kernels.losses.penalty import PENALTIES, Options, Rows, penalty, players
from cibr_kernels.nn.critics import ConcatCritic
from cibr_kernels.nn.groups import OnGroup
from cibr_kernels.nn.means import MeanNetwork
from cibr_kernels.nn.saturation import Saturation
from cibr_kernels.nn.schedule import Schedule
from cibr_kernels.nn.statistics import LogEMA, Standardize


class CIBRLoss(OnGroup):
    """The CIBR objective with its four critics, standardisation of X, noise on Z and a schedule of lambda.

    As it stands it is the paper's: MINE at lambda 0.5.  `CIBRLoss.recommended` is ours, and says why.
    Give `parameters()` to the optimiser in a group of their own, with a learning rate at least twice the encoders' and
    no weight decay on biases; one `loss.backward()` serves encoders and critics.

    Args:
        embed_dim: width of the embeddings Z; image_input_dim, text_input_dim: widths of X (pre-projection features),
            for critics and "ceb".
        image_condition_dim, text_condition_dim: widths of conditions that stand for X in the other modality's term;
            they are then required by the call.
        hidden, activation: of the critics; hidden also of ceb's networks.
        lam: weight of the penalty (0.5, the paper's best).
        noise_std: noise on unit-norm Z, 0.25.
        warmup_steps: training steps in which only the critics learn (lambda 0); ramp_steps: then linear growth.
        total_steps: the run's length.  Where the two above are None they are then these fractions of it:
            warmup_fraction, 10 %, and ramp_fraction, 15 %; else 0.  Warns at once where lambda cannot reach its value.
        accumulation_steps: training calls that make one optimiser step, for gradients that are added up; 1 within
            `cibr_kernels.accumulate`, which calls the loss once per step.
        estimator: as in `cibr_loss`; negatives, diagonal: as in `mutual_information`.
        ema_decay: decay of MINE's moving average; None (default for all pairs) leaves the gradient of DV.
        process_group, strategy: as in `cibr_loss`.  Statistics, averages and the step then move alike on every rank;
            state that was loaded on one rank has to be loaded on all.

    `.to(torch.bfloat16)` and the like cast the critics; statistics, averages, noise, scores and sums stay float32.
    Warns once when Z can carry more than critics tell in batches of n: see `nn/saturation.py`.
    Raises ValueError for unknown names, missing widths, negative lam, noise or steps.
    """

    step: Tensor
    micro_step: Tensor

    def __init__(
        self,
        embed_dim: int,
        image_input_dim: int | None = None,
        text_input_dim: int | None = None,
        *,
        image_condition_dim: int | None = None,
        text_condition_dim: int | None = None,
        hidden: int = 512,
        activation: str = "relu",
        lam: float = 0.5,
        noise_std: float = 0.25,
        warmup_steps: int | None = None,
        ramp_steps: int | None = None,
        total_steps: int | None = None,
        warmup_fraction: float = 0.1,
        ramp_fraction: float = 0.15,
        accumulation_steps: int = 1,
        estimator: str = "mine",
        negatives: Negatives = "all",
        diagonal: str = "exclude",
        ema_decay: float | None = None,
        one_way: bool = False,
        process_group: ProcessGroup | None = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__(process_group)
        checks.choice("estimator", estimator, PENALTIES)
        checks.choice("diagonal", diagonal, DIAGONALS)
        checks.choice("strategy", strategy, STRATEGIES)
        check_negatives(negatives)
        if min(lam, noise_std, warmup_steps or 0, ramp_steps or 0) < 0:
            raise ValueError(f"must not be negative: {lam=}, {noise_std=}, {warmup_steps=}, {ramp_steps=}")
        if ema_decay is not None and estimator != "mine":
            raise ValueError(f"ema_decay belongs to estimator 'mine', got estimator {estimator!r}")
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be positive, got {accumulation_steps}")
        self.options = Options(estimator, negatives, diagonal, noise_std, one_way, strategy)
        self.options.check_noise()
        if noise_std == 0:
            warnings.warn("noise_std is 0: the information of a deterministic Z about X is infinite", stacklevel=2)
        of_run = Schedule.of_run(lam, total_steps or 1, warmup_fraction, ramp_fraction)
        by_length = of_run if total_steps is not None else Schedule(lam)
        self.schedule = Schedule(
            lam,
            by_length.warmup_steps if warmup_steps is None else warmup_steps,
            by_length.ramp_steps if ramp_steps is None else ramp_steps,
            total_steps,
        )
        if said := self.schedule.warning():
            warnings.warn(said, stacklevel=2)
        self.accumulation_steps = accumulation_steps
        widths = {
            "image_inputs": image_input_dim,
            "text_inputs": text_input_dim,
            "image_condition": image_condition_dim,
            "text_condition": text_condition_dim,
        }
        self._build(widths, embed_dim, hidden, activation)
        self.ema = None if ema_decay is None else nn.ModuleDict({name: LogEMA(ema_decay) for name in self.critics})
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("micro_step", torch.zeros((), dtype=torch.int64), persistent=False)
        self._saturation = Saturation()
        self._checked: set[Any] = set()  # kinds of calls, see `_kind`

    def _build(self, widths: dict[str, int | None], embed_dim: int, hidden: int, activation: str) -> None:
        """The critics or networks, and a standardisation for each of the inputs and conditions they read."""
        estimator, made = self.options.estimator, dict[str, nn.Module]()
        self._read: dict[str, str] = {}  # the field of Rows -> the standardisation of it
        for name, (x, _) in players(estimator).items():
            given = x if widths[x] is not None else x.replace("_condition", "_inputs")
            width = widths[given]
            if width is None:
                raise ValueError(f"estimator {estimator!r} needs {given.replace('inputs', 'input')}_dim")
            made[name] = (
                ConcatCritic(width, embed_dim, hidden, activation=activation)
                if estimator in MAXIMISED
                else MeanNetwork(width, embed_dim, hidden)
            )
            self._read[given] = f"standardize_{given.removesuffix('_inputs')}"
        self.critics = nn.ModuleDict(made)
        for given, module in self._read.items():
            width = widths[given]
            assert width is not None
            self.add_module(module, Standardize(width))

    @classmethod
    def recommended(cls, embed_dim: int, *, total_steps: int, **options: Any) -> CIBRLoss:
        """What we would take instead of the paper's: estimator "variance" at lambda 0.02, on a schedule of the run's.

        It needs two views of each concept, or group_ids, and has nothing to train.  The ideal penalty's gradient is
        (z - E[z | concept]) / noise_std^2; two views give it without bias, where four critics first have to learn it.
        lambda 0.02 is where to begin: on one set 0.4 helped, on another it cost ten points and 0.02 nothing.  Whether
        it helps is a question of data, which docs/evidence.md answers for four sets.
        options: of the constructor.
        """
        return cls(embed_dim, **{"estimator": "variance", "lam": 0.02, "total_steps": total_steps, **options})

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the first step; critics, statistics and averages have their own."""
        self.step.zero_()
        self.micro_step.zero_()

    def current_lam(self) -> Tensor:
        """Lambda at the current training step, a 0-d float32: 0 in the warm-up, then linear, then its value."""
        return self.schedule.at(self.step)

    def warn_if_short(self) -> bool:
        """For the end of a run: whether lambda stopped short of its value, with a warning if so.  Reads `step`."""
        said = self.schedule.warning(int(self.step.item()))
        if said:
            warnings.warn(said, stacklevel=2)
        return bool(said)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        image_inputs: Tensor | None = None,
        text_inputs: Tensor | None = None,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        image_condition: Tensor | None = None,
        text_condition: Tensor | None = None,
        image_features2: Tensor | None = None,
        text_features2: Tensor | None = None,
        group_ids: Tensor | None = None,
        diagnostics: bool = False,
    ) -> Any:
        """-> the loss in nats, or a dictionary of it ("loss") and its parts.

        image_features, text_features: (n, embed_dim) of unit norm, of one dtype; image_inputs (n, image_input_dim),
        text_inputs (n, text_input_dim), conditions, of any floating dtype; second views and group_ids as in
        `cibr_loss`.  The dictionary has "loss", "contrastive_loss", "image_cmi", "text_cmi", the four estimates, "lam",
        and with `diagnostics` those of `cibr_loss`; only "loss" carries gradient.  With a process_group "loss" and
        "contrastive_loss" are this rank's part, whose mean over ranks is the whole batch's; the others are the whole
        batch's.  In eval mode statistics, averages and the step stand still.
        """
        if diagnostics and not output_dict:
            raise ValueError("diagnostics are among the parts: output_dict must be True")
        rows = Rows(
            image_features,
            text_features,
            image_inputs,
            text_inputs,
            image_condition,
            text_condition,
            image_features2,
            text_features2,
            group_ids,
        )
        lam = self.current_lam()
        kind = None if diagnostics else self._kind(rows)
        if kind in self._checked:
            shards, rows = None, self._standardized(rows, None)
            loss, parts = self._again(rows, logit_scale, logit_bias, lam, output_dict)
        else:
            shards, seen, rows = self._ready(rows)
            loss, parts = self._objective(rows, logit_scale, logit_bias, lam, seen, shards, diagnostics)
            if kind is not None:
                self._checked.add(kind)
        if self.training:
            self._count()
            if not torch.compiler.is_compiling() and self.options.estimator in MAXIMISED and self.options.noise_std:
                self._saturation.look(image_features, text_features, self.options.noise_std, shards)
        return {"loss": loss, "lam": lam, **parts} if output_dict else loss

    def zeros(self, n: int, embed_dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """What a call of n rows is given but for the scale, of zeros: features, X, conditions and second views."""
        widths = dict.fromkeys(("image_features", "text_features"), embed_dim)
        if self.options.estimator == "variance":
            widths |= {f"{name}2": width for name, width in widths.items()}
        widths |= {name: int(self.get_submodule(module).dim) for name, module in self._read.items()}  # type: ignore[arg-type]
        return {name: torch.zeros(n, width, dtype=dtype, device=device) for name, width in widths.items()}

    @torch.no_grad()
    def estimates(
        self,
        image_features: Tensor,
        text_features: Tensor,
        image_inputs: Tensor | None = None,
        text_inputs: Tensor | None = None,
        *,
        image_condition: Tensor | None = None,
        text_condition: Tensor | None = None,
        image_features2: Tensor | None = None,
        text_features2: Tensor | None = None,
        group_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The penalty's parts and Z's capacities on pairs that nothing was trained on, in nats, detached.

        With one image a text critics can learn the pairs by heart; what they then say of others is less, and is what
        they know.  In one batch, of training's size if values are to be compared.  Nothing moves.
        """
        rows = Rows(
            image_features,
            text_features,
            image_inputs,
            text_inputs,
            image_condition,
            text_condition,
            image_features2,
            text_features2,
            group_ids,
        )
        with self._standing_still(), torch.autocast(image_features.device.type, enabled=False):
            shards, seen, rows = self._ready(rows)
            _, parts = penalty(rows.scaled(1.0), self.options, seen, generator=generator, shards=shards)
            return parts | capacities(rows, self.options.noise_std, shards)

    def _ready(self, rows: Rows) -> tuple[Shards | None, Any, Rows]:
        """Checks -> who has which rows, the players, and the rows with standardised data."""
        for name in ("image_condition", "text_condition"):
            given, made = getattr(rows, name) is not None, name in self._read
            if given != made:
                words = ("needs", "with") if made else ("has no", "without")
                raise ValueError(f"this CIBRLoss {words[0]} {name}: it was made {words[1]} {name}_dim")
        shards, seen = agree("CIBRLoss", self.process_group, rows, self.critics, self.options, training=self.training)
        return shards, seen, self._standardized(rows, shards)

    def _standardized(self, rows: Rows, shards: Shards | None) -> Rows:
        data = {name: self._modules[module](getattr(rows, name), shards) for name, module in self._read.items()}  # type: ignore[misc]
        return replace(rows, **data)

    def _kind(self, rows: Rows) -> tuple[Any, ...] | None:
        """What checks ask of a call's tensors, if it may be one that `game.replay` knows: on a GPU, of one rank."""
        if not (isinstance(rows.image_features, Tensor) and rows.image_features.is_cuda):
            return None
        if self.ema is not None or self.options.estimator not in game.ESTIMATORS or self.options.negatives != "all":
            return None
        given = (
            rows.image_features,
            rows.text_features,
            rows.image_inputs,
            rows.text_inputs,
            rows.image_condition,
            rows.text_condition,
        )
        more = not (rows.image_features2 is rows.text_features2 is rows.group_ids is None)
        if more or self.process_group is not None or not library.only_autograd_looks_on(*given):
            return None
        found: list[Any] = [*map(id, self.critics._modules.values())]
        for t in given:
            if t is None:
                found.append(None)
            elif isinstance(t, Tensor) and t.is_cuda:
                found += (t.shape, t.dtype, t.device)
            else:
                return None
        return None if torch.is_autocast_enabled("cuda") else tuple(found)

    def _again(
        self, rows: Rows, logit_scale: Tensor | float, logit_bias: Tensor | float | None, lam: Tensor, parts: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`_objective` of a call whose tensors were checked before: without checks where its launches are known too."""
        contrastive = clip_loss(
            rows.image_features, rows.text_features, logit_scale, logit_bias, one_way=self.options.one_way
        )
        played = game.replay(rows, self.options, self.critics, lam, contrastive)
        if played is not None:
            return played[0], parts_of(contrastive, played[1]) if parts else {}
        shards, seen = agree("CIBRLoss", None, rows, self.critics, self.options, training=self.training)
        return self._objective(rows, logit_scale, logit_bias, lam, seen, shards, False, contrastive)

    def _objective(
        self,
        rows: Rows,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        lam: Tensor,
        seen: Any,
        shards: Shards | None,
        diagnostics: bool,
        contrastive: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return objective(
            rows,
            logit_scale,
            logit_bias,
            self.options,
            seen,
            lam=lam,
            ema=self.ema,
            shards=shards,
            diagnostics=diagnostics,
            contrastive=contrastive,
        )

    def _count(self) -> None:
        if self.accumulation_steps == 1:
            self.step.add_(1)
            return
        self.micro_step += 1
        self.step += self.micro_step // self.accumulation_steps
        self.micro_step %= self.accumulation_steps

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
