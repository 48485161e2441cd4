"""Losses on the ranks of tests/test_distributed.py: each function runs on every rank and returns plain numbers.

`compare` is the heart: a loss of all rows in one process in float64, against the same loss on shards whose gradients
are averaged as DDP averages.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import cibr_kernels as ck

Group = dist.ProcessGroup
DV, DT, D, HIDDEN = 7, 5, 6, 16
F32, F64 = torch.float32, torch.float64
# relative, in the Euclidean norm; on another processor a rank of one row, whose gradient cancels, had 1.9e-6
LIMIT = {F32: 3e-6, F64: 1e-12}


def batch(total: int, dtype: torch.dtype = torch.float64, d: int = D) -> dict[str, Tensor]:
    """Inputs of all ranks: zv, zt of unit norm and alike, xv, xt what they were made of."""
    g = torch.Generator().manual_seed(total)
    shared = torch.randn(total, d, generator=g, dtype=torch.float64)
    zv, zt = (F.normalize(shared + 0.5 * torch.randn(total, d, generator=g), dim=1) for _ in range(2))
    xv, xt = torch.randn(total, DV, generator=g) * 3 + 1, torch.randn(total, DT, generator=g) - 2
    xv[:, : min(d, DV)] += 2 * shared[:, : min(d, DV)]
    return {name: t.float().to(dtype) for name, t in (("zv", zv), ("zt", zt), ("xv", xv), ("xt", xt))}


def mine(t: Tensor, rows: Sequence[int], group: Group) -> Tensor:
    return t.split(list(rows))[dist.get_rank(group)]


Errors = dict[str, tuple[float, float]]  # by name: of the ranks, and of one process in the same dtype


def error(actual: Tensor, truth: Tensor, magnitude: float = 0.0) -> float:
    """|actual - truth| / |truth| in the Euclidean norm, or over `magnitude` where the truth is smaller."""
    return ((actual.double() - truth).norm() / truth.norm().clamp(min=max(magnitude, 1e-30))).item()


def check(answers: list[Errors], dtype: torch.dtype) -> None:
    """Errors of every rank are below the limit, or three times those of one process where that misses it by itself."""
    assert answers and all(answers)
    above = {
        (rank, name): f"{ours:.1e}, one process {one:.1e}"
        for rank, answer in enumerate(answers)
        for name, (ours, one) in answer.items()
        if not ours <= max(LIMIT[dtype], 3 * one)
    }
    assert not above


def averaged(t: Tensor, group: Group) -> Tensor:
    t = t.detach().double()
    dist.all_reduce(t, group=group)
    return t / dist.get_world_size(group)


Loss = Callable[..., Tensor]  # (leaves, modules, group or None) -> loss


def compare(
    group: Group, rows: Sequence[int], loss: Loss, leaves: dict[str, Tensor], shared: dict[str, Tensor],
    modules: nn.Module | None = None, dtype: torch.dtype = torch.float32, unit: Sequence[str] = (),
) -> Errors:  # fmt: skip
    """Errors of the mean loss and of each gradient, by name.

    leaves: (total, ...) in float64, split over ranks; shared: numbers that every rank has; unit: ends of the names of
    gradients that are sums of terms near 1 which cancel.
    """

    def run(dtype: torch.dtype, group: Group | None) -> dict[str, Tensor]:
        parts = {name: t if group is None else mine(t, rows, group) for name, t in leaves.items()} | shared
        parts = {name: t.to(dtype, copy=True).requires_grad_() for name, t in parts.items()}
        critics = copy.deepcopy(modules).to(dtype) if modules is not None else nn.Module()
        torch.manual_seed(5)
        value = loss(parts, critics, group)
        value.backward()
        gradients = {name: t.grad for name, t in parts.items()} | {n: p.grad for n, p in critics.named_parameters()}
        return {"loss": value.detach(), **gradients}

    truth, one, actual = run(torch.float64, None), run(dtype, None), run(dtype, group)
    errors = {}
    for name, t in actual.items():
        split = name in leaves
        t = t / dist.get_world_size(group) if split else averaged(t, group)
        expected, single = (mine(v[name], rows, group) if split else v[name] for v in (truth, one))
        magnitude = 1.0 if name == "loss" or name.endswith(("out.bias", *unit)) else 0.0  # nats; 1 less another 1
        errors[name] = error(t, expected, magnitude), error(single, expected, magnitude)
    return errors


def said(call: Callable[[], Any]) -> str:
    """The error that `call` raises, with its type."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# ------------------------------------------------------------------------------------------------ losses
def clip(group: Group, rows: Sequence[int], dtype: torch.dtype, frozen: Sequence[str] = (), **options: Any) -> Errors:
    data = batch(sum(rows))
    trained = {name: data[name] for name in ("zv", "zt") if name not in frozen}

    def loss(t: dict[str, Tensor], _: Any, group: Group | None) -> Tensor:
        fixed = {name: data[name] if group is None else mine(data[name], rows, group) for name in frozen}
        t = t | {name: v.to(t["scale"].dtype) for name, v in fixed.items()}
        return ck.clip_loss(t["zv"], t["zt"], t["scale"], t["bias"], process_group=group, **options)

    # an absolute rounding of a logit is a relative one of its exponential: at 100 float32 is good to 1e-5, not to 1e-6
    scale = 4.0 if dtype == torch.float32 else 100.0
    shared = {"scale": torch.tensor(scale, dtype=torch.float64), "bias": torch.tensor(-10.0, dtype=torch.float64)}
    return compare(group, rows, loss, trained, shared, dtype=dtype)


def contrastive(
    group: Group, rows: Sequence[int], dtype: torch.dtype, name: str, groups: int = 0, weighted: bool = False,
    temperatures: bool = False, queues: Sequence[str] = (), **options: Any,
) -> Errors:  # fmt: skip
    """clip_loss or siglip_loss (by `name`) with the options of one process; queues are the same on every rank."""
    total = sum(rows)
    data, g = batch(total), torch.Generator().manual_seed(3)
    leaves = {"zv": data["zv"], "zt": data["zt"]}
    if weighted:
        leaves["weights"] = torch.rand(total, generator=g, dtype=torch.float64)
    scale = torch.tensor(4.0, dtype=torch.float64)
    shared = {"bias": torch.tensor(-2.0, dtype=torch.float64)}
    if temperatures:
        leaves["scale"] = 1 + 3 * torch.rand(total, generator=g, dtype=torch.float64)
    else:
        shared["scale"] = scale
    for queue in queues:
        shared[queue] = F.normalize(torch.randn(4, D, generator=g, dtype=torch.float64), dim=1)
    ids = torch.randint(0, groups, (total,), generator=g) if groups else None
    if options.get("strategy") == "ring" and weighted and name == "siglip_loss":
        fixed = leaves.pop("weights")  # a ring has no gradient for them
    upstream = torch.rand(total, generator=g, dtype=torch.float64)

    def loss(t: dict[str, Tensor], _: Any, group: Group | None) -> Tensor:
        part = (lambda v: v) if group is None else (lambda v: mine(v, rows, group))
        weights = t.get("weights")
        if weighted and weights is None:
            weights = part(fixed).to(t["zv"].dtype)
        value = getattr(ck, name)(
            t["zv"], t["zt"], t["scale"], t["bias"], group_ids=None if ids is None else part(ids), weights=weights,
            process_group=group, **{queue: t[queue] for queue in queues}, **options,
        )  # fmt: skip
        if value.dim():  # each rank's own rows: weighted so that the ranks' mean is the sum over all rows
            value = (value * part(upstream)).sum() * (1 if group is None else len(rows))
        return value

    # the bias of a sigmoid loss has a gradient of negatives' parts less positives', together near 1
    return compare(group, rows, loss, leaves, shared, dtype=dtype, unit=("bias",) if name == "siglip_loss" else ())


def negatives(
    group: Group, rows: Sequence[int], dtype: torch.dtype, own: bool = False, guided: bool = False, groups: int = 0,
    strategy: str = "gather", **choice: Any,
) -> Errors:  # fmt: skip
    """clip_loss with `Negatives`, or with `guided` SoftTargets; own: each anchor's hard texts."""
    total = sum(rows)
    data, g = batch(total), torch.Generator().manual_seed(4)
    leaves = {"zv": data["zv"], "zt": data["zt"]}
    if own:
        leaves["texts"] = F.normalize(torch.randn(total, 3, D, generator=g, dtype=torch.float64), dim=2)
    guide = torch.randn(total, 5, generator=g, dtype=torch.float64)
    ids = torch.randint(0, groups, (total,), generator=g) if groups else None

    def loss(t: dict[str, Tensor], _: Any, group: Group | None) -> Tensor:
        part = (lambda v: v) if group is None else (lambda v: mine(v, rows, group).contiguous())
        option: dict[str, Any] = {"negatives": ck.Negatives(**choice, texts=t.get("texts"))}
        if guided:
            soft = ck.SoftTargets(guide=part(guide).to(t["zv"].dtype), scale=2.0, share=0.5)
            option = {"soft_targets": soft}
        return ck.clip_loss(
            t["zv"], t["zt"], t["scale"], group_ids=None if ids is None else part(ids), process_group=group,
            strategy=strategy, **option,
        )  # fmt: skip

    return compare(group, rows, loss, leaves, {"scale": torch.tensor(4.0, dtype=torch.float64)}, dtype=dtype)


def ntxent(group: Group, rows: Sequence[int], dtype: torch.dtype, strategy: str) -> Errors:
    """nn.NTXentLoss of two views, of lengths that it has to take away."""
    data = batch(sum(rows))
    views = {"zv": 3 * data["zv"], "zt": data["zt"] / 2}

    def loss(t: dict[str, Tensor], _: Any, group: Group | None) -> Tensor:
        return ck.nn.NTXentLoss(0.3, process_group=group, strategy=strategy)(t["zv"], t["zt"])

    return compare(group, rows, loss, views, {}, dtype=dtype)


def metrics(group: Group, rows: Sequence[int], name: str, groups: int, strategy: str) -> list[dict[str, float]]:
    """What return_metrics gives on this rank, and in one process."""
    data = {k: t.float() for k, t in batch(sum(rows)).items()}
    data["zv"][0] = data["zt"][-1]
    ids = torch.arange(sum(rows)) % groups if groups else None

    def found(part: Callable[[Tensor], Tensor], **options: Any) -> dict[str, float]:
        zv, zt = part(data["zv"]).contiguous(), part(data["zt"]).contiguous()
        own = None if ids is None else part(ids)
        _, values = getattr(ck, name)(zv, zt, 4.0, -2.0, group_ids=own, return_metrics=True, **options)
        return {key: value.item() for key, value in values.items()}

    return [found(lambda t: mine(t, rows, group), process_group=group, strategy=strategy), found(lambda t: t)]


def some(group: Group, strategy: str) -> Errors | str:
    """Errors in a group of ranks 1 and 3 of the four, and what the others say, who are not in it."""
    pair: Any = dist.new_group([1, 3])
    if dist.get_rank() in (1, 3):
        return clip(pair, (4, 7), torch.float32, strategy=strategy)
    x = torch.ones(2, D)
    return said(lambda: ck.clip_loss(x, x, 5.0, process_group=pair, strategy=strategy))


class Product(nn.Module):
    """A critic of matching rows and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(DV + D, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.out(torch.cat([x, z], 1))).squeeze(1)


def critic(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "separable":
        return ck.nn.SeparableCritic(DV, D, HIDDEN, 4)
    if kind == "two layers":
        return ck.nn.ConcatCritic(DV, D, HIDDEN, layers=2, activation="silu")
    if kind == "callable":
        return Product()
    if kind == "gaussian":
        return nn.Linear(DV, D)  # the mean of z given x
    return ck.nn.ConcatCritic(DV, D, HIDDEN, activation=kind)


def moments(group: Group, rows: Sequence[int], dtype: torch.dtype, kind: str, **options: Any) -> Errors:
    """3 J - 2 L, so that both gradients count and the output bias has one."""
    data = batch(sum(rows))

    def loss(t: dict[str, Tensor], modules: Any, group: Group | None) -> Tensor:
        j, el = ck.critic_moments(t["xv"], t["zv"], modules, process_group=group, **options)
        return 3 * j - 2 * el

    return compare(group, rows, loss, {"xv": data["xv"], "zv": data["zv"]}, {}, critic(kind), dtype)


def information(
    group: Group, rows: Sequence[int], dtype: torch.dtype, kind: str = "relu", ema: bool = False, queue: bool = False,
    unit: Sequence[str] = (), **options: Any,
) -> Errors:  # fmt: skip
    """queue: marginals that every rank has."""
    data, g = batch(sum(rows)), torch.Generator().manual_seed(2)
    shared = {"marginals": torch.randn(4, D, generator=g, dtype=torch.float64)} if queue else {}

    def loss(t: dict[str, Tensor], modules: Any, group: Group | None) -> Tensor:
        average = ck.nn.LogEMA(0.5).to(t["xv"].dtype) if ema else None
        if average is not None:
            average.update(torch.tensor(0.7))
        return ck.mutual_information(
            t["xv"], t["zv"], modules, ema=average, marginals=t.get("marginals"), process_group=group, **options
        )

    return compare(group, rows, loss, {"xv": data["xv"], "zv": data["zv"]}, shared, critic(kind), dtype, unit)


def estimates(group: Group, rows: Sequence[int], kinds: Sequence[str], estimators: Sequence[str]) -> list[bytes]:
    """The bits of every estimate on this rank."""
    x, z = (mine(batch(sum(rows))[name], rows, group).float() for name in ("xv", "zv"))
    return [
        ck.mutual_information(x, z, critic(kind), estimator=estimator, process_group=group).detach().numpy().tobytes()
        for kind in kinds
        for estimator in estimators
    ]


def random_partners(group: Group) -> list[str]:
    """What random negatives say on several ranks."""
    pairs = torch.ones(3, DV), torch.ones(3, D), critic("relu")
    return [
        said(partial(ck.mutual_information, *pairs, negatives=n, estimator=estimator, process_group=group))
        for n in (ck.derangement(2), ck.permutation(1))
        for estimator in ("dv", "js")
    ]


def conditional(group: Group, rows: Sequence[int], dtype: torch.dtype, estimator: str, **options: Any) -> Errors:
    data = batch(sum(rows))
    torch.manual_seed(2)
    modules: Any = {
        "ceb": lambda: nn.Linear(DT, D),
        "align": lambda: None,
        "markov": lambda: nn.ModuleList([ck.nn.ConcatCritic(DV, D, HIDDEN), ck.nn.ConcatCritic(DT, D, HIDDEN)]),
        "joint": lambda: nn.ModuleList([ck.nn.ConcatCritic(DV, D + DT, HIDDEN)]),
    }[options.get("decomposition", estimator)]()

    def loss(t: dict[str, Tensor], modules: Any, group: Group | None) -> Tensor:
        other = t["zt"] if estimator == "align" else t["xt"]
        return ck.conditional_mutual_information(
            t["zv"], t["xv"], other, modules, estimator=estimator, noise_std=0.3, process_group=group, **options
        )

    leaves = {"zv": data["zv"]} | ({"zt": data["zt"]} if estimator == "align" else {})
    fixed = {"xv": data["xv"], "xt": data["xt"]}

    def with_inputs(t: dict[str, Tensor], modules: Any, group: Group | None) -> Tensor:
        more = {name: v if group is None else mine(v, rows, group) for name, v in fixed.items()}
        return loss({**{name: v.to(t["zv"].dtype) for name, v in more.items()}, **t}, modules, group)

    return compare(group, rows, with_inputs, leaves, {}, modules, dtype)


def objective(group: Group | None = None, **options: Any) -> ck.nn.CIBRLoss:
    torch.manual_seed(3)
    return ck.nn.CIBRLoss(D, DV, DT, hidden=HIDDEN, process_group=group, **options)


def cibr(group: Group, rows: Sequence[int], dtype: torch.dtype, **options: Any) -> Errors:
    """The loss itself; the noise is that of one process, given as data so that float64 and float32 have the same."""
    data = batch(sum(rows))
    fixed = {"xv": data["xv"], "xt": data["xt"]}

    def loss(t: dict[str, Tensor], modules: Any, group: Group | None) -> Tensor:
        x = {n: (v if group is None else mine(v, rows, group)).to(t["zv"].dtype) for n, v in fixed.items()}
        return ck.cibr_loss(
            t["zv"], t["zt"], t["scale"], image_inputs=x["xv"], text_inputs=x["xt"], critics=modules, lam=0.7,
            noise_std=0.0, process_group=group, **options,
        )  # fmt: skip

    shared = {"scale": torch.tensor(4.0, dtype=torch.float64)}
    return compare(group, rows, loss, {"zv": data["zv"], "zt": data["zt"]}, shared, objective().critics, dtype)


def upper_bound(group: Group, rows: Sequence[int], dtype: torch.dtype, estimator: str, grouped: bool = False) -> Errors:
    """cibr_loss without an adversary: groups go over ranks; `grouped` "variance" has no second views."""
    data, total = batch(sum(rows)), sum(rows)
    g = torch.Generator().manual_seed(4)
    names = ("zv", "zt", "zv2", "zt2") if estimator == "variance" and not grouped else ("zv", "zt")
    seconds = {
        f"{name}2": F.normalize(data[name] + 0.3 * torch.randn(total, D, generator=g), dim=1) for name in names[:2]
    }
    leaves = {name: (data | seconds)[name] for name in names}
    ids = torch.randint(0, max(total // 3, 1), (total,), generator=g) if grouped else None
    torch.manual_seed(2)
    means = nn.ModuleDict({"image_mean": ck.nn.MeanNetwork(DT, D, 9), "text_mean": ck.nn.MeanNetwork(DV, D, 9)})
    for p in means.parameters():
        nn.init.normal_(p, std=0.3)

    def loss(t: dict[str, Tensor], modules: Any, group: Group | None) -> Tensor:
        part = (lambda v: v) if group is None else (lambda v: mine(v, rows, group))
        options: dict[str, Any] = {"image_features2": t.get("zv2"), "text_features2": t.get("zt2")}
        if estimator == "ceb":
            x = {name: part(data[name]).to(t["zv"].dtype) for name in ("xv", "xt")}
            options = {"critics": modules, "image_condition": x["xv"], "text_inputs": x["xt"]}
        return ck.cibr_loss(
            t["zv"], t["zt"], t["scale"], estimator=estimator, lam=0.7, noise_std=0.3, process_group=group,
            group_ids=None if ids is None else part(ids), **options,
        )  # fmt: skip

    shared = {"scale": torch.tensor(4.0, dtype=torch.float64)}
    return compare(group, rows, loss, leaves, shared, means if estimator == "ceb" else None, dtype)


def looked_at(group: Group, rows: Sequence[int]) -> dict[str, float]:
    """Diagnostics, warnings and the step of ranks; of one process where the group is None."""
    import warnings

    data = batch(sum(rows))
    part = (lambda v: v) if group is None else (lambda v: mine(v, rows, group))
    own = {name: part(data[name]).requires_grad_() for name in ("zv", "zt")}
    module = ck.nn.CIBRLoss(D, estimator="align", process_group=group)
    module(own["zv"], own["zt"], 4.0).backward()
    out = module(own["zv"], own["zt"], 4.0, output_dict=True, diagnostics=True)
    found = {name: out[name].item() for name in out if "gradient" in name or "capacity" in name}
    critics = objective(group)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            critics(*(part(data[name]).float() for name in ("zv", "zt")), 4.0, *(part(data[n]) for n in ("xv", "xt")))
    held = critics.estimates(*(part(data[name]).float() for name in ("zv", "zt", "xv", "xt")))
    return found | {
        "warnings": float(len(seen)), "nats": float(str(seen[0].message).split()[5]), "step": critics.step.item(),
        "held-out capacity": held["image_capacity"].item(),
    }  # fmt: skip
