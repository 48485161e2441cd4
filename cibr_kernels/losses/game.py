"""The CIBR objective with four concat critics on a GPU, as one node of autograd and a plan for each direction.

    loss = contrastive + lam (own - other, of image and of text)       own, other = J - L of a critic on noisy Z

The arithmetic is that of `penalty.py` and `cibr.py`; only the noise is drawn outside, from PyTorch's generator.  The
node takes the contrastive loss as a number, whose gradient it passes on, because small batches are the host's time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cibr_kernels.dispatch import backends, library, plans, triton_call
from cibr_kernels.information import group_device
from cibr_kernels.information.critics import View
from cibr_kernels.information.group import Group, ScaledGradient, composed, wanted_of, weights_of_all
from cibr_kernels.losses.penalty import TERMS, Options, Rows
from cibr_kernels.numerics import ceil_div, promote

BLOCK = 1024
ESTIMATORS = ("mine", "dv")
HEAD = 6  # tensors of the node before data: contrastive, lam, two features, two noises
PARTS = ("image_cmi", "text_cmi", *TERMS)


@dataclass(frozen=True)
class Game:
    """What the node is told besides tensors."""

    group: Group
    which_x: tuple[int, ...]  # the data of each critic
    noise_std: float


class Task:
    """A game, and which gradients are wanted; equal ones are one object, which is a plan's key."""

    def __init__(self, game: Game, needed: tuple[bool, ...]) -> None:
        self.game, self.needed = game, needed
        count = max(game.which_x) + 1
        critics = (*needed[2:4], *(False,) * 4, *needed[HEAD + count :])  # x is data
        self.of_critics = group_device.Task(game.group, critics, wanted_of(critics, game.group))
        self.forward_key = (self, "cibr forward")
        self.data = slice(HEAD, HEAD + count)


@lru_cache
def task_of(game: Game, needed: tuple[bool, ...], names: tuple[str, ...]) -> Task:
    """names: of the backends that may be chosen."""
    return Task(game, needed)


def play(
    rows: Rows,
    options: Options,
    critics: Mapping[str, View],
    lam: Tensor,
    contrastive: Tensor,
    generator: torch.Generator | None,
    backend: str,
) -> tuple[Tensor, Tensor] | None:
    """-> the loss () and PARTS (6,), detached; None where this is not for GPUs, or a critic has to be called.

    Of all pairs of one rank, by estimators "mine" without an average and "dv"; outside of autocast.
    """
    z = rows.image_features
    if options.estimator not in ESTIMATORS or lam.requires_grad or z.dtype == torch.float64:
        return None
    if not group_device.serves(lam, backend):
        return None
    data = _data(rows)
    if any(t.dtype == torch.float64 for t in data):
        return None
    data = [t.detach().float().contiguous() for t in data]
    weights = weights_of_all([critics[name] for name in TERMS], *data)
    if weights is None or not library.only_autograd_looks_on(z, rows.text_features, contrastive):
        return None
    inner = critics["image_own"].inner
    game = _game(inner.activation, inner.slope, options.diagonal == "include", backend, _which(rows), options.noise_std)
    tensors = _tensors(rows, data, contrastive, lam, [p for own in weights for p in own])
    return _played(game, None, tensors, generator)


def replay(
    rows: Rows, options: Options, critics: nn.ModuleDict, lam: Tensor, contrastive: Tensor
) -> tuple[Tensor, Tensor] | None:
    """`play` of a call whose arguments were checked, and whose launches were recorded, before; else None.

    rows: data is float32, contiguous and without gradient, as `nn.Standardize` leaves it.
    """
    weights: list[Tensor] = []
    first: Any = critics._modules["image_own"]
    for name in TERMS:
        critic: Any = critics._modules[name]
        plain = getattr(critic, "plain_weights", None)
        own = None if plain is None else plain()
        if own is None or critic.activation != first.activation or critic.slope != first.slope:
            return None
        weights += own
    game = _game(first.activation, first.slope, options.diagonal == "include", "auto", _which(rows), options.noise_std)
    tensors = _tensors(rows, _data(rows), contrastive, lam, weights)
    grad = torch.is_grad_enabled()
    task = task_of(game, tuple([grad and t.requires_grad for t in tensors]), backends.NAMES)
    plan = plans.find(task.forward_key, tensors)
    return None if plan is None else _played(game, plan, tensors, None)


def _played(
    game: Game, plan: plans.Plan | None, tensors: Sequence[Tensor], generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    for noise in tensors[4:HEAD]:
        noise.normal_(generator=generator)  # what torch.randn does
    return _Play.apply(game, plan, *tensors)  # type: ignore[no-any-return]


@lru_cache
def _game(
    activation: str, slope: float, include: bool, backend: str, which_x: tuple[int, ...], noise_std: float
) -> Game:
    group = Group((0, 0, 1, 1), (-1.0, 1.0) * 2, activation, slope, include, backend)
    return Game(group, which_x, noise_std)


def _which(rows: Rows) -> tuple[int, ...]:
    """Which of `_data` each critic reads."""
    image = 0 if rows.image_condition is None else 2
    text = 1 if rows.text_condition is None else 2 + (rows.image_condition is not None)
    return 0, text, 1, image


def _data(rows: Rows) -> list[Tensor]:
    """Inputs, then conditions that are not the inputs."""
    found = rows.image_inputs, rows.text_inputs, rows.image_condition, rows.text_condition
    return [t for t in found if t is not None]


def _tensors(
    rows: Rows, data: Sequence[Tensor], contrastive: Tensor, lam: Tensor, weights: Sequence[Tensor]
) -> list[Tensor]:
    """Those of the node, each once; room for the noise."""
    zs = [z if z.is_contiguous() else z.contiguous() for z in (rows.image_features, rows.text_features)]
    noise = [torch.empty(z.shape, dtype=torch.float32, device=z.device) for z in zs]
    return [contrastive, lam, *zs, *noise, *data, *weights]


class _Play(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, game: Game, plan: plans.Plan | None, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.task = task = task_of(game, ctx.needs_input_grad[2:], backends.NAMES)
        ctx.plan = plans.origin(plan)

        def direction(*here: Tensor) -> tuple[Tensor, ...]:
            return _forward(task, here)

        if plan is not None:
            loss, parts, *made = backends.in_range("cibr_loss_forward", "plan", plans.replay, plan, tensors)
        else:
            loss, parts, *made = plans.run(task.forward_key, direction, tensors)
        _, lam, *rest = tensors
        ctx.save_for_backward(lam, *rest[:2], *rest[4:], *made)  # without the noise
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        task: Task = ctx.task
        if g is None:
            return (None,) * (2 + len(task.needed))
        lam, zv, zt, *rest = ctx.saved_tensors
        data, made = rest[:-8], rest[-8:]
        if torch.is_grad_enabled():
            return None, None, *_differentiable(task, g, lam, (zv, zt), data, made)

        def direction(*here: Tensor) -> tuple[Tensor, ...]:
            return _backward(task, here, (zv.dtype, zt.dtype))

        dz_v, dz_t, *grads = _wanted(
            task, plans.run_after(ctx.plan, (task, "cibr backward", zv.dtype), direction, (g, lam, *made, *data), 1)
        )
        of_data = (None,) * (task.data.stop - HEAD)
        return None, None, g if task.needed[0] else None, None, dz_v, dz_t, None, None, *of_data, *grads


def _wanted(task: Task, found: Sequence[Tensor]) -> list[Tensor | None]:
    """What the backward made -> a gradient, or None, of two z and all parameters."""
    grads = group_device.in_order(found, task.of_critics)
    return [*grads[:2], *grads[6:]]


def _parts(task: Task, data: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Data and parameters -> the data of each critic, and parameters."""
    count = task.data.stop - HEAD
    return [data[i] for i in task.game.which_x], data[count:]


def _forward(task: Task, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """-> the loss, PARTS, noisy Z of both kinds, and what `group_device.forward` makes for the backward."""
    contrastive, lam, zv, zt, *noises = tensors[:HEAD]
    xs, parameters = _parts(task, tensors[HEAD:])
    zs = []
    for z, noise in zip((zv, zt), noises, strict=True):
        zs.append(torch.empty(z.shape, dtype=torch.float32, device=z.device))
        triton_call.launch(
            _kernels().cibr_noise_kernel,
            (ceil_div(z.numel(), BLOCK),),
            {
                "z": z,
                "noise": noise,
                "out": zs[-1],
                "count": z.numel(),
                "noise_std": float(task.game.noise_std),
                "root": math.sqrt(z.shape[1]),
            },
            {"BLOCK": BLOCK},
        )
    group = task.game.group
    _, _, weights = group.parts([*zs, *xs, *parameters])
    j, el, *made = group_device.forward(zs, xs, weights, group, task.of_critics.wanted.needs)
    loss, parts = torch.empty((), device=lam.device), torch.empty((len(PARTS),), device=lam.device)
    numbers = {"j": j, "el": el, "contrastive": contrastive, "lam": lam, "loss": loss, "parts": parts}
    triton_call.launch(_kernels().cibr_objective_kernel, (1,), numbers, {})
    return loss, parts, *zs, *made


def _backward(task: Task, here: Sequence[Tensor], dtypes: tuple[torch.dtype, ...]) -> tuple[Tensor, ...]:
    """The upstream gradient (), lam, what `_forward` made from Z on, data and parameters -> those that are wanted."""
    g, lam, zv, zt, *rest = here
    made, (xs, parameters) = rest[:6], _parts(task, rest[6:])
    g_j, g_l = (torch.empty(len(TERMS), dtype=torch.float32, device=g.device) for _ in range(2))
    triton_call.launch(_kernels().cibr_upstream_kernel, (1,), {"g": g, "g_j": g_j, "g_l": g_l}, {})
    group = task.game.group
    _, _, weights = group.parts([zv, zt, *xs, *parameters])
    found = group_device.backward(g_j, g_l, (zv, zt), xs, weights, made, group, task.of_critics.wanted)
    for i, (dz, dtype) in enumerate(zip(found.zs, dtypes, strict=True)):
        if dz is None:
            continue
        found.zs[i] = out = torch.empty(dz.shape, dtype=dtype, device=dz.device)
        triton_call.launch(
            _kernels().cibr_encoder_gradient_kernel,
            (ceil_div(dz.numel(), BLOCK),),
            {"dz": dz, "lam": lam, "out": out, "count": dz.numel(), "root": math.sqrt(dz.shape[1])},
            {"BLOCK": BLOCK},
        )
    return tuple(t for t in found.flat() if t is not None)


def _differentiable(
    task: Task, g: Tensor, lam: Tensor, features: Sequence[Tensor], data: Sequence[Tensor], made: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients for a backward with create_graph: operators refuse a second derivative, the node would forget."""
    xs, parameters = _parts(task, data)
    of_z, of_parameters = task.needed[2:4], task.needed[task.data.stop :]
    wanted = [t for t, need in zip((*features, *parameters), (*of_z, *of_parameters), strict=True) if need]
    with torch.enable_grad():
        zs = []
        for z, noisy in zip(features, made[:2], strict=True):
            scaled = ScaledGradient.apply(promote(z), lam * math.sqrt(z.shape[1]))
            zs.append(noisy + (scaled - scaled.detach()))
        j, el = composed([*zs, *xs, *parameters], task.game.group)
    gradients = iter(torch.autograd.grad((el - j).sum(), wanted, g, create_graph=True) if wanted else ())
    dz = [next(gradients) if need else None for need in of_z]
    rest = [next(gradients) if need else None for need in of_parameters]
    nothing = (None,) * (task.data.stop - 4)
    return [g if task.needed[0] else None, None, *dz, *nothing, *rest]


def _kernels() -> ModuleType:
    from cibr_kernels.losses import triton_game

    return triton_game
