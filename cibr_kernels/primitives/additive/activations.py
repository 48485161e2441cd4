"""The activations of an additive critic: their names, numbers, functions and slopes, for every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SQRT_HALF, INV_SQRT_2PI = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)
GELU_C = math.sqrt(2 / math.pi)


class Activation(NamedTuple):
    """phi(t, slope) and its derivative; slope is leaky_relu's negative slope and elu's alpha."""

    value: Callable[[Tensor, float], Tensor]
    derivative: Callable[[Tensor, float], Tensor]


def _gelu_tanh_slope(t: Tensor) -> Tensor:
    u = torch.tanh(GELU_C * (t + 0.044715 * t**3))
    return (1 + u) / 2 + t * (1 - u * u) / 2 * GELU_C * (1 + 3 * 0.044715 * t * t)


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(lambda t, s: t.relu(), lambda t, s: (t > 0).to(t.dtype)),
    "leaky_relu": Activation(lambda t, s: F.leaky_relu(t, s), lambda t, s: torch.where(t > 0, 1.0, s).to(t.dtype)),
    "gelu": Activation(
        lambda t, s: F.gelu(t),
        lambda t, s: torch.special.ndtr(t) + t * torch.exp(-t * t / 2) * INV_SQRT_2PI,
    ),
    "gelu_tanh": Activation(lambda t, s: F.gelu(t, approximate="tanh"), lambda t, s: _gelu_tanh_slope(t)),
    "silu": Activation(lambda t, s: F.silu(t), lambda t, s: torch.sigmoid(t) * (1 + t * torch.sigmoid(-t))),
    "elu": Activation(
        lambda t, s: F.elu(t, s), lambda t, s: torch.where(t > 0, 1.0, s * t.clamp(max=0).exp()).to(t.dtype)
    ),
    "softplus": Activation(lambda t, s: F.softplus(t), lambda t, s: torch.sigmoid(t)),
    "tanh": Activation(lambda t, s: torch.tanh(t), lambda t, s: 1 - torch.tanh(t) ** 2),
}
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}  # `enum Activation` of csrc/additive/activation_names.h
