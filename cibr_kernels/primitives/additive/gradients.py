"""The gradients of an additive operator: its backward takes the upstream gradient and then what its forward took."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cibr_kernels.dispatch.library import Operator


def differentiable(forward: Operator, backward: Operator) -> None:
    """Gives `forward`(a, b, w, *options, backend) -> a tensor the gradients in a, b and w that `backward` makes.

    backward(grad, a, b, w, *options, need_a, need_b, need_w, backend) -> those of a, b and w, each empty unless needed.
    """

    def fake(grad: Tensor, a: Tensor, b: Tensor, w: Tensor, *more: Any) -> tuple[Tensor, ...]:
        *_, need_a, need_b, need_w, _ = more
        kept = (a, need_a), (b, need_b), (w, need_w)
        return tuple(torch.empty_like(t) if need else t.new_empty(0) for t, need in kept)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, w, *ctx.options, ctx.backend = inputs
        ctx.save_for_backward(a, b, w)

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        made = backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options, *needs, ctx.backend)
        nothing = (None,) * (len(ctx.options) + 1)
        return *(g if need else None for g, need in zip(made, needs, strict=True)), *nothing

    backward.register_fake(fake)
    forward.register_autograd(gradients, setup_context=setup)
