"""Drop-ins for open_clip's losses, and NT-Xent with lightly's call."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from cibr_kernels import checks
from cibr_kernels.distributed import merge
from cibr_kernels.distributed.lse import STRATEGIES
from cibr_kernels.distributed.shards import Agreement, Shards
from cibr_kernels.losses.clip.op import clip_loss
from cibr_kernels.losses.clip.options import Negatives, SoftTargets
from cibr_kernels.losses.siglip.op import siglip_loss
from cibr_kernels.nn.groups import OnGroup


class _OnRanks(OnGroup):
    """A loss with open_clip's rank and world_size, or a process_group, and negatives for every call."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        negatives: Negatives | None,
        process_group: ProcessGroup | None,
        strategy: str,
    ) -> None:
        super().__init__(process_group)
        checks.choice("strategy", strategy, STRATEGIES)
        self.rank, self.world_size, self.negatives, self.strategy = rank, world_size, negatives, strategy

    def _group(self) -> ProcessGroup | None:
        given = self.process_group
        if given is not None or self.world_size == 1:
            return given
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
    negatives: `cibr_kernels.Negatives` for every call; one given to a call, with that batch's tensors, takes its place.
    Raises ValueError at the call where rank and world_size are not those of the default group.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        negatives: Negatives | None = None,
        process_group: ProcessGroup | None = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__(rank, world_size, negatives, process_group, strategy)
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        group_ids: Tensor | None = None,
        image_negatives: Tensor | None = None,
        text_negatives: Tensor | None = None,
        negatives: Negatives | None = None,
        soft_targets: SoftTargets | None = None,
    ) -> Any:
        """-> the loss, or {"contrastive_loss": loss}.  Arguments as in `cibr_kernels.clip_loss`."""
        group = self._group()
        loss = clip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            group_ids=group_ids,
            image_negatives=image_negatives,
            text_negatives=text_negatives,
            negatives=self.negatives if negatives is None else negatives,
            soft_targets=soft_targets,
            process_group=group,
            strategy=self.strategy,
        )
        if group is not None and not self.local_loss:
            loss = loss + (merge.mean_of_ranks(loss.detach(), group) - loss.detach())
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(_OnRanks):
    """Drop-in for `open_clip.loss.SigLipLoss`: same constructor, same call, same dictionary, on any number of ranks.

    rank, world_size, process_group, strategy: as in `ClipLoss`; on several ranks the result is this rank's part, whose
    mean over ranks is the loss, as open_clip's.  cache_labels and dist_impl are accepted and change nothing: the sum
    does not depend on the order in which texts arrive.  negatives: as in `ClipLoss`.
    Raises ValueError for an unknown dist_impl, and at the call where rank and world_size are not the default group's.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        negatives: Negatives | None = None,
        process_group: ProcessGroup | None = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__(rank, world_size, negatives, process_group, strategy)
        checks.choice("dist_impl", dist_impl or "bidir", ("bidir", "shift", "reduce", "gather"))
        self.cache_labels, self.dist_impl = cache_labels, dist_impl

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        group_ids: Tensor | None = None,
        image_negatives: Tensor | None = None,
        text_negatives: Tensor | None = None,
        negatives: Negatives | None = None,
    ) -> Any:
        """-> the loss, or {"contrastive_loss": loss}.  Arguments as in `cibr_kernels.siglip_loss`."""
        loss = siglip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            group_ids=group_ids,
            image_negatives=image_negatives,
            text_negatives=text_negatives,
            negatives=self.negatives if negatives is None else negatives,
            process_group=self._group(),
            strategy=self.strategy,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class NTXentLoss(OnGroup):
    """NT-Xent, the loss of SimCLR, with the call of `lightly.loss.NTXentLoss`.

    A row's positive is its other view; the 2n - 2 rows of other samples, in both views, are its negatives.  Features
    are normalised here.

    temperature: a positive number, 1 / logit_scale.
    gather_distributed: where torch.distributed is initialised, its default group's ranks make one batch; or
    `process_group` and `strategy` as in `cibr_kernels.clip_loss`.  Shards may be uneven.  The mean over ranks is the
    loss of the whole batch, and DDP's averages are its gradients.
    Raises ValueError for a temperature that is not positive, and what `cibr_kernels.clip_loss` raises.
    Source: Chen et al. 2020 (2002.05709), equation 1.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        gather_distributed: bool = False,
        process_group: ProcessGroup | None = None,
        strategy: str = "gather",
    ) -> None:
        super().__init__(process_group)
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        checks.choice("strategy", strategy, STRATEGIES)
        self.temperature, self.gather_distributed, self.strategy = temperature, gather_distributed, strategy

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """(n, d) and (n, d), two views of n samples, of one dtype and device -> the loss in nats, a float32 scalar."""
        group = self.process_group
        if group is None and self.gather_distributed and dist.is_initialized():
            group = dist.group.WORLD
        with Agreement("NTXentLoss", group, temperature=self.temperature, strategy=self.strategy) as agreement:
            checks.matrix("out0", out0)
            checks.matrix("out1", out1)
            checks.same_place(out0=out0, out1=out1)
            checks.same_rows(out0=out0, out1=out1)
            checks.same_width(out0=out0, out1=out1)
            agreement.describe(out0=out0, out1=out1)
        n, shards = out0.shape[0], agreement.shards
        first = 0 if shards is None else shards.offset
        samples = torch.arange(first, first + n, device=out0.device)
        if shards is not None:
            shards = Shards(shards.group, shards.rank, tuple(2 * rows for rows in shards.rows))
        view0, view1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        return clip_loss(
            torch.cat([view0, view1]),
            torch.cat([view1, view0]),
            1 / self.temperature,
            group_ids=samples.repeat(2),
            one_way=True,
            process_group=shards,
            strategy=self.strategy,
        )
