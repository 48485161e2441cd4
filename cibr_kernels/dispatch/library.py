"""Operators: one opaque call for torch.compile, a plain function call in eager mode.

A custom operator of torch.library passes through Python layers for dispatch, fakes and autograd, which cost more than a
loss of 64 rows.  `Operator` registers one and goes around it where none of those layers has anything to do: no compiler
or tracer, no dispatch mode, no functorch transform, no tensor subclass.  Both ways run the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list))


class Operator:
    """`function` as the operator torch.ops.cibr_kernels.<its name>; its signature is the operator's schema."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.registered = torch.library.custom_op(f"cibr_kernels::{function.__name__}", function, mutates_args=())
        self._node: type[torch.autograd.Function] | None = None
        self.__doc__ = function.__doc__

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """The shapes of the outputs, for compilers."""
        self.registered.register_fake(fake)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As in torch.library: setup_context(ctx, inputs, output), backward(ctx, *gradients)."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        function = self.function

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._node = type(function.__name__, (torch.autograd.Function,), methods)

    def __call__(self, *inputs: Any) -> Any:
        """Goes around the dispatcher where it can.  A backward with create_graph goes through it: that refuses a second
        derivative, which a function would forget."""
        if not only_autograd_looks_on(*inputs):
            return self.registered(*inputs)
        if not torch.is_grad_enabled() or not any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
            return self.function(*inputs)
        return self.registered(*inputs) if self._node is None else self._node.apply(*inputs)


def operator(function: Callable[..., Any]) -> Operator:
    """Decorator: the function becomes an `Operator`."""
    return Operator(function)


def with_gradients(forward: Callable[..., tuple[Any, ...]], general: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A scalar of tensors whose gradients are made with it, as one node of autograd.  Only where
    `only_autograd_looks_on`.

    forward(*tensors, *options, needs): -> the scalar, and for each tensor its gradient, unread where `needs` has False.
    general(*tensors, *options): the same scalar made of operators, for a backward with create_graph: they refuse a
    second derivative, which this node would forget.
    """

    class WithGradients(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            value, *grads = forward(*inputs, ctx.needs_input_grad)
            ctx.options = inputs[len(grads) :]
            ctx.save_for_backward(*inputs[: len(grads)], *grads)
            return value

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
            saved, needs, options = ctx.saved_tensors, ctx.needs_input_grad, ctx.options  # each access makes them anew
            count = len(saved) // 2
            grads, needs = saved[count:], needs[:count]
            if torch.is_grad_enabled():
                tensors = saved[:count]
                wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
                made = iter(torch.autograd.grad(general(*tensors, *options), wanted, g, create_graph=True))
                grads = tuple(next(made) if need else None for need in needs)
            elif g.device.type != "cpu" or g.item() != 1.0:  # what loss.backward() asks for
                grads = [t * g if need else None for t, need in zip(grads, needs, strict=True)]
            return *[t if need else None for t, need in zip(grads, needs, strict=True)], *(None,) * len(options)

    WithGradients.__name__ = forward.__name__
    return WithGradients.apply


def or_zeros(gradients: tuple[Tensor | None, ...], like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of outputs, zeros for those that nobody used.

    Where ctx.set_materialize_grads(False) spares those of outputs that have no gradient, such as n x m exponentials.
    """
    return tuple(torch.zeros_like(t) if g is None else g for g, t in zip(gradients, like, strict=True))


def only_autograd_looks_on(*inputs: Any) -> bool:
    """Nobody but autograd wants to see a call with these inputs."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(map(_PLAIN.__contains__, map(type, inputs)))
