"""The step of a large batch in the memory of a part of it, exactly (GradCache, 2101.06983).

    1. features of every part, without a graph
    2. the loss of all of them, and its gradient with respect to the features
    3. every part again, with the same random numbers, from its features' gradient backward

Adding up the gradients of the parts' own losses is another thing: there, a row's negatives are those of its part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

P = TypeVar("P")


def accumulate(
    encode: Callable[[P], Sequence[Tensor]],
    parts: Iterable[P],
    loss: Callable[..., Tensor],
    *,
    buffers: Iterable[Tensor] = (),
) -> Tensor:
    """Leaves in `.grad` what `loss(*encode(batch)).backward()` would of the whole batch; returns the loss, detached.

    Args:
        encode: a part of the batch -> tensors.  Those of one and more dimensions have a row for each sample and are
            concatenated over parts; 0-d ones, a temperature say, are the same for all parts.
        parts: of the batch, in order, of any sizes.  One part is encoded once, with its graph.
        loss: called once with the tensors of the whole batch -> 0-d.  Its own parameters, critics say, get their
            gradients too; its random numbers follow those of the encoding.
        buffers: put back before the second encoding, so that running statistics count each row once.

    The memory is that of one part and all features.  Batch norm sees a part at a time.  Under DDP call this within
    `no_sync()` and average the gradients afterwards; FSDP2 reduces those of every part.
    """
    parts = list(parts)
    if len(parts) == 1:
        tensors = list(encode(parts[0]))
        value, gradients = _at_features(loss, tensors)
        _backward(tensors, gradients)
        return value
    kept = [(buffer, buffer.clone()) for buffer in buffers]
    states, outputs = [], []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state())
            outputs.append([t.clone() for t in encode(part)])  # a pooled feature may be a view that keeps all tokens
    value, gradients = _at_features(loss, [torch.cat(ts) if ts[0].ndim else ts[0] for ts in zip(*outputs, strict=True)])
    after = _random_state()
    for buffer, before in kept:
        buffer.copy_(before)
    rows = [[len(t) for t in tensors if t.ndim] for tensors in outputs]
    of_parts = [g.split([r[k] for r in rows]) for k, g in enumerate(g for g in gradients if g.ndim)]
    for k, (part, state) in enumerate(zip(parts, states, strict=True)):
        _set_random_state(state)
        own = (pieces[k] for pieces in of_parts)
        _backward(encode(part), [next(own) if g.ndim else g / len(parts) for g in gradients])
    _set_random_state(after)
    return value


def _at_features(loss: Callable[..., Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients with respect to the tensors; a stride-0 zero where it does not depend on one."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    value = loss(*leaves)
    value.backward()
    return value.detach(), [t.new_zeros(()).expand_as(t) if t.grad is None else t.grad for t in leaves]


def _backward(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    needed = [(t, g) for t, g in zip(tensors, gradients, strict=True) if t.requires_grad]
    if needed:
        torch.autograd.backward([t for t, _ in needed], [g for _, g in needed])


def _random_state() -> tuple[Tensor, Tensor | None]:
    """Of the CPU and of the current CUDA device, where there is one."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
