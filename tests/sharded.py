"""What the ranks of tests/test_distributed.py do: each function runs on every rank and returns plain numbers.

`compare` is the heart: a loss of all rows in one process in float64, against the same loss on shards whose gradients
are averaged as DDP averages.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import cibr_kernels as ck
from bench import sharded as measured
from cibr_kernels.distributed import Shards, merge, set_header_check, traffic
from cibr_kernels.ops.cibr_loss.op import noisy

Group = dist.ProcessGroup
DV, DT, D, HIDDEN = 7, 5, 6, 16


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

    return compare(group, rows, loss, leaves, shared, dtype=dtype)


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


# ------------------------------------------------------------------------------------------------ training
class Model(nn.Module):
    """Two linear towers, a temperature and the CIBR objective: inputs -> loss."""

    def __init__(self, group: Group | None, _: str = "gather") -> None:
        super().__init__()
        self.loss = objective(group, ema_decay=0.9, warmup_steps=1, noise_std=1e-9)
        self.image, self.text = nn.Linear(DV, D), nn.Linear(DT, D)
        self.log_scale = nn.Parameter(torch.tensor([1.4]))  # FSDP shards no 0-d parameters

    def forward(self, xv: Tensor, xt: Tensor) -> Tensor:
        zv, zt = F.normalize(self.image(xv), dim=1), F.normalize(self.text(xt), dim=1)
        return self.loss(zv, zt, self.log_scale.exp(), xv, xt)


class Sigmoid(nn.Module):
    """Two linear towers, a temperature, a bias and the sigmoid loss: inputs -> loss."""

    def __init__(self, group: Group | None, strategy: str) -> None:
        super().__init__()
        self.options = {"process_group": group, "strategy": strategy}
        self.image, self.text = nn.Linear(DV, D), nn.Linear(DT, D)
        self.log_scale, self.logit_bias = nn.Parameter(torch.tensor([1.4])), nn.Parameter(torch.tensor([-2.0]))

    def forward(self, xv: Tensor, xt: Tensor) -> Tensor:
        zv, zt = F.normalize(self.image(xv), dim=1), F.normalize(self.text(xt), dim=1)
        return ck.siglip_loss(zv, zt, self.log_scale.exp(), self.logit_bias, **self.options)


def _averaged_by(wrapper: str | None, model: Model | Sigmoid, group: Group) -> tuple[nn.Module, Callable[[bool], Any]]:
    """The model to call, and a context for the micro-batches: gradients are averaged in the last one only."""
    if wrapper == "ddp":
        ddp = DistributedDataParallel(model, process_group=group)
        return ddp, lambda last: nullcontext() if last else ddp.no_sync()
    if wrapper == "fsdp":
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        mesh = DeviceMesh.from_group(group, "cpu")
        for module in (model.image, model.text, model):
            fully_shard(module, mesh=mesh)
    return model, lambda last: nullcontext()


def training(
    group: Group, steps: Sequence[Sequence[int]], wrapper: str, made: type[Model | Sigmoid] = Model,
    strategy: str = "gather",
) -> Errors:  # fmt: skip
    """Errors of the gradients accumulated over the steps (rows of each rank), of the losses and of every buffer."""
    torch.manual_seed(4)
    start = made(group, strategy).state_dict()
    data = [batch(sum(rows)) for rows in steps]

    def run(dtype: torch.dtype, wrapper: str | None) -> dict[str, Tensor]:
        model = made(None if wrapper is None else group, strategy).to(dtype)
        model.load_state_dict(start)
        called, context = _averaged_by(wrapper, model, group)
        found: dict[str, Tensor] = {}
        for i, (whole, rows) in enumerate(zip(data, steps, strict=True)):
            inputs = [whole[name] if wrapper is None else mine(whole[name], rows, group) for name in ("xv", "xt")]
            with context(i + 1 == len(steps)):
                loss = called(*(t.to(dtype) for t in inputs))
                loss.backward()
            found[f"loss {i}"] = loss.detach() if wrapper is None else averaged(loss, group)
        for name, p in model.named_parameters():
            grad = p.grad.full_tensor() if wrapper == "fsdp" else p.grad
            found[name] = averaged(grad, group) if wrapper == "loop" else grad
        return found | dict(model.named_buffers())

    truth, one, actual = run(torch.float64, None), run(torch.float32, None), run(torch.float32, wrapper)
    magnitudes = {name: float("loss " in name or name.endswith("out.bias")) for name in truth}
    return {
        name: (error(actual[name], t.double(), magnitudes[name]), error(one[name], t.double(), magnitudes[name]))
        for name, t in truth.items()
    }


# ------------------------------------------------------------------------------------------------ properties
def bits(group: Group) -> list[bytes]:
    """The moments as this rank has them, twice."""
    data, rows = batch(13), (6, 7)
    x, z = mine(data["xv"], rows, group).float(), mine(data["zv"], rows, group).float()
    runs = [torch.stack(ck.critic_moments(x, z, critic("relu"), process_group=group)) for _ in range(2)]
    return [t.detach().numpy().tobytes() for t in runs]


def noise(group: Group, rows: Sequence[int]) -> bool:
    """Whether ranks seeded alike draw one process's noise, each for its rows."""
    z = batch(sum(rows))["zv"].float()
    torch.manual_seed(9)
    whole = noisy(z, 0.3)
    torch.manual_seed(9)
    part = noisy(mine(z, rows, group), 0.3, None, Shards(group, dist.get_rank(group), tuple(rows)))
    return torch.equal(part, mine(whole, rows, group))


def meters(group: Group, n: int, d: int, dtype: torch.dtype, strategy: str, loss: str) -> list[dict[str, Any]]:
    """(calls, bytes) of the forward and of the backward of a loss on n rows per rank."""
    data = batch(n * dist.get_world_size(group), dtype, d)
    rows = (n,) * dist.get_world_size(group)
    x, y = (mine(data[name], rows, group).requires_grad_() for name in ("zv", "zt"))
    with traffic() as forward:
        if loss == "clip":
            out = ck.clip_loss(x, y, 5.0, process_group=group, strategy=strategy)
        elif loss == "siglip":
            out = ck.siglip_loss(x, y, 5.0, -2.0, process_group=group, strategy=strategy)
        else:
            module = ck.nn.ConcatCritic(d, d, HIDDEN)
            out = ck.mutual_information(x, y, module, process_group=group)
    with traffic() as backward:
        out.backward()
    return [{kind: (meter.calls[kind], meter.bytes[kind]) for kind in meter.calls} for meter in (forward, backward)]


def side_by_side(group: Group, name: str, n: int, d: int) -> tuple[dict[str, float], dict[str, float]]:
    """What bench/sharded.py finds of an implementation, on all processes: gradients and bytes."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    budget = ck.stash_budget()
    found = measured.ratios(rank, world, name, n, d), measured.measure(rank, world, name, n, d, torch.float32)
    ck.set_stash_budget(budget)
    return found


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def largest(group: Group, n: int, d: int, strategy: str) -> int:
    """Elements of the largest tensor that clip_loss makes, forward and backward, outside its kernels."""
    rows = (n,) * dist.get_world_size(group)
    data = batch(sum(rows), torch.float32, d)
    x, y = (mine(data[name], rows, group).requires_grad_() for name in ("zv", "zt"))
    ck.set_stash_budget(0)
    with Largest() as mode:
        ck.clip_loss(x, y, 5.0, process_group=group, strategy=strategy).backward()
    return mode.numel


def half(group: Group, strategy: str, autocast: bool) -> Errors:
    """Errors of bfloat16 features against the same features in float64; under autocast they come in float32."""
    rows = (9, 4, 11)
    data = batch(sum(rows), torch.bfloat16)
    leaves = [data["zv"].double().requires_grad_(), data["zt"].double().requires_grad_()]
    ck.clip_loss(*leaves, 14.25).backward()
    parts = [mine(data[n], rows, group).to(torch.float32 if autocast else torch.bfloat16) for n in ("zv", "zt")]
    parts = [t.requires_grad_() for t in parts]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ck.clip_loss(*parts, 14.25, process_group=group, strategy=strategy).backward()
    return {
        str(i): error(part.grad / 3, mine(leaf.grad, rows, group))
        for i, (part, leaf) in enumerate(zip(parts, leaves, strict=True))
    }


def nan(group: Group, strategy: str) -> list[bool]:
    """Whether the loss is NaN on this rank when rank 1 has one in a feature, and whether it was before."""
    rows = (4, 4)
    data = batch(8, torch.float32)
    losses = []
    for value in (0.5, float("nan")):
        data["zt"][5, 2] = value
        parts = [mine(data[name], rows, group) for name in ("zv", "zt")]
        losses.append(ck.clip_loss(*parts, 5.0, process_group=group, strategy=strategy).isnan().item())
    return losses


def headers(group: Group) -> tuple[int, int, int]:
    """Headers of two equal calls under "every call" and under "first call", then of a call of other rows and an old."""
    x = torch.randn(4, D)

    def exchanged(*rows: int) -> int:
        with traffic() as meter:
            for n in rows:
                ck.clip_loss(x[:n], x[:n], 5.0, process_group=group)
        return meter.calls["header"]

    always = exchanged(4, 4)
    set_header_check("first call")
    first, other = exchanged(4, 4), exchanged(3, 4)
    set_header_check("every call")
    return always, first, other


def module_losses(group: Group) -> dict[str, tuple[float, list[float]]]:
    """nn.ClipLoss constructed as open_clip is: the value on this rank, and the features' gradients, over world."""
    rows = (5, 3)
    data = batch(8, torch.float32)
    found = {}
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    for local in (False, True):
        parts = [mine(data[name], rows, group).clone().requires_grad_() for name in ("zv", "zt")]
        loss_fn = ck.nn.ClipLoss(local_loss=local, gather_with_grad=True, process_group=group)
        loss = loss_fn(*parts, 5.0)
        loss.backward()
        found[f"local_loss={local}"] = loss.item(), parts[1].grad.div(world).flatten().tolist()
    whole = [data[name].clone().requires_grad_() for name in ("zv", "zt")]
    loss = ck.nn.ClipLoss()(*whole, 5.0)
    loss.backward()
    found["one process"] = loss.item(), whole[1].grad.split(list(rows))[rank].flatten().tolist()
    return found


def as_open_clip(group: Group) -> str:
    """rank and world_size of the default group, and others."""
    x = batch(4, torch.float32)["zv"]
    good = ck.nn.ClipLoss(rank=dist.get_rank(), world_size=dist.get_world_size())(x, x, 5.0)
    expected = ck.clip_loss(x.repeat(4, 1), x.repeat(4, 1), 5.0)
    torch.testing.assert_close(good, expected)
    return said(lambda: ck.nn.ClipLoss(rank=1, world_size=7)(x, x, 5.0))


def compiled(group: Group) -> list[str]:
    """torch.compile runs the loss in a graph break, and refuses with fullgraph."""
    x = batch(8, torch.float32)["zv"][dist.get_rank(group) * 4 :][:4]

    def loss(x: Tensor) -> Tensor:
        return ck.clip_loss(x * 1.0, x, 5.0, process_group=group) * 2

    torch.testing.assert_close(torch.compile(loss, backend="eager")(x), loss(x))
    torch.compiler.reset()
    return [said(lambda: torch.compile(loss, backend="eager", fullgraph=True)(x))]


def readme(group: Group, code: str) -> Errors:
    """Errors of the gradients that the README's script for several ranks leaves, which all have other rows."""
    torch.manual_seed(dist.get_rank())
    names: dict[str, Any] = {}
    exec(code.replace("dist.init_process_group()", ""), names)  # these ranks have done it
    inputs = [names["images"], names["texts"]]
    parts = [[torch.empty_like(t) for _ in range(dist.get_world_size())] for t in inputs]
    for part, t in zip(parts, inputs, strict=True):
        dist.all_gather(part, t)
    towers = copy.deepcopy(names["model"].module).double()
    towers.zero_grad()
    images, texts = (torch.cat(part).double() for part in parts)
    x, y = F.normalize(towers.image(images), dim=1), F.normalize(towers.text(texts), dim=1)
    ck.clip_loss(x, y, towers.log_scale.exp()).backward()
    actual = dict(names["model"].module.named_parameters())
    return {name: (error(actual[name].grad, p.grad), 0.0) for name, p in towers.named_parameters()}


# ------------------------------------------------------------------------------------------------ errors
def said(call: Callable[[], Any]) -> str:
    """The error that `call` raises, with its type."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusal(group: Group, fault: str) -> str:
    """What this rank raises when the last one does something else than the others; then a call that must work."""
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    x, y, z, w = torch.randn(3, D), torch.randn(3, D), torch.randn(3, DV), torch.randn(3, DT)
    options: dict[str, Any] = {}
    if last and fault == "width":
        x, y = torch.randn(3, D + 1), torch.randn(3, D + 1)
    if last and fault == "dtype":
        x, y = x.double(), y.double()
    if last and fault == "3-d":
        x = x[None]
    if last and fault == "rows":
        y = y[:2]
    if last and fault == "option":
        options = {"one_way": True}
    if last and fault == "strategy":
        options = {"strategy": "ring"}
    if last and fault == "gradient":
        y.requires_grad_()
    scale: Any = -5.0 if last and fault == "scale" else 5.0
    if fault == "scales" and not last:
        scale = torch.full((len(x),), 5.0)
    if fault == "cibr width":
        z = torch.randn(3, DV + last)
        call = lambda: objective(group)(x, y, 5.0, z, w)  # noqa: E731
    elif fault == "loss" and last:
        call = lambda: ck.critic_moments(x, y, ck.nn.SeparableCritic(D, D), process_group=group)  # noqa: E731
    elif fault == "critic":
        call = lambda: ck.critic_moments(  # noqa: E731
            z, x, critic("relu"), negatives=ck.shifts(2 + last), process_group=group
        )
    else:
        call = lambda: ck.clip_loss(x, y, scale, process_group=group, **options)  # noqa: E731
    text = said(call)
    good = torch.ones(2, D)
    assert ck.clip_loss(good, good, 5.0, process_group=group).isfinite()
    return text


def silence(group: Group, seconds: float) -> tuple[str, float]:
    """What a rank says, and when, if the last one never calls; in a group of its own with a short timeout."""
    ranks = list(range(dist.get_world_size(group)))
    short = dist.new_group(ranks, timeout=timedelta(seconds=seconds), use_local_synchronization=True)
    x = torch.ones(2, D)
    ck.clip_loss(x, x, 5.0, process_group=short)
    if dist.get_rank(group) == ranks[-1]:
        time.sleep(seconds + 2)
        return "", 0.0
    began = time.monotonic()
    return said(lambda: ck.clip_loss(x, x, 5.0, process_group=short)), time.monotonic() - began


def death(rank: int, store: str, results: Any) -> None:
    """Two processes of their own; the second dies between two calls."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    x = torch.ones(2, D)
    ck.clip_loss(x, x, 5.0, process_group=dist.group.WORLD)
    if rank == 1:
        import os

        os._exit(1)
    began = time.monotonic()
    text = said(lambda: ck.clip_loss(x, x, 5.0, process_group=dist.group.WORLD))
    results.put((text, time.monotonic() - began))


def merged(group: Group) -> list[float]:
    """merge.statistics and merge.mean of (3, 1, 5) rows: errors against those of the whole."""
    rows = (3, 1, 5)
    x = batch(9)["xv"] * 50 + 1000
    part, shards = mine(x, rows, group), Shards(group, dist.get_rank(group), rows)
    var, mean = torch.var_mean(part, 0, unbiased=False)
    mean, var = merge.statistics(mean, var, shards)
    return [
        error(mean, x.mean(0)),
        error(var, x.var(0, unbiased=False)),
        error(merge.mean(part[:, 0], shards), x[:, 0].mean()),
    ]
