"""Calls of clip_loss and siglip_loss whose tensors have names and whose options come from a table of cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def with_options(
    loss: Callable[..., Any], tensors: Mapping[str, Tensor], ids: Tensor | None, option: Mapping[str, Any], **more: Any
) -> Any:
    """`loss` of the features "x" and "y", "scale", "bias" if there is one, the groups, and extra negatives by name."""
    operands = [tensors[name] for name in ("x", "y", "scale", "bias") if name in tensors]
    negatives = {name: t for name, t in tensors.items() if name.endswith("negatives")}
    return loss(*operands, group_ids=ids, group_mode=option.get("mode", "mask"), **negatives, **more)


def gradients(value: Tensor, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Of each of the tensors, in their order."""
    return list(torch.autograd.grad(value, list(tensors.values())))


def with_gradients(
    tensors: Mapping[str, Tensor], wide: Mapping[str, Tensor], value: Tensor, eager: Tensor, truth: Tensor
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """("loss", value, eager, truth), then the same of each tensor's gradient, by its name; the truth is of `wide`."""
    yield "loss", value, eager, truth
    each = gradients(value, tensors), gradients(eager, tensors), gradients(truth, wide)
    yield from zip(tensors, *each, strict=True)
