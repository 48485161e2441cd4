"""Operators: one opaque call for torch.compile, a plain function call in eager mode.

A custom operator of torch.library passes through Python layers for dispatch, fakes and autograd, which cost more than a
loss of 64 rows.  `Operator` registers one and goes around it where none of those layers has anything to do: no compiler
or tracer, no mode, no functorch transform, no tensor subclass.  Both ways run the same function.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list))
_INSTEAD = "use backend='reference', plain PyTorch, which has them and takes the memory of every pair"


class Operator:
    """`function` as the operator torch.ops.cibr_kernels.<its name>; its signature is the operator's schema.

    serves: the public functions that call it, for messages.
    """

    def __init__(self, function: Callable[..., Any], serves: str) -> None:
        self.function, self.name, self.serves = function, function.__name__, serves
        function.__annotations__ = _of_old(function)
        self.registered = torch.library.custom_op(f"cibr_kernels::{self.name}", function, mutates_args=())
        self.registered.register_autograd(self._no_derivative, setup_context=lambda ctx, inputs, output: None)
        self._node: type[torch.autograd.Function] | None = None
        parameters = list(inspect.signature(function).parameters)
        self._backend = parameters.index("backend") if "backend" in parameters else None
        self.__doc__ = function.__doc__

    def _no_derivative(self, ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            f"{self.serves}: second derivatives (a gradient penalty, create_graph=True) are not there, the operator "
            f"cibr_kernels.{self.name} has no formula for its own; {_INSTEAD}"
        )

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """The shapes of the outputs, for compilers."""
        self.registered.register_fake(fake)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As in torch.library: setup_context(ctx, inputs, output), backward(ctx, *gradients).

        `backward` reads ctx.saved_tensors once: checkpoints make them anew at every access, or refuse the second.
        Without a formula a derivative is refused in words.
        """
        self.registered.register_autograd(backward, setup_context=setup_context)
        function = self.function

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._node = type(self.name, (torch.autograd.Function,), methods)

    def __call__(self, *inputs: Any) -> Any:
        """Goes around the dispatcher where it can.  A backward with create_graph goes through it: that refuses a second
        derivative, which a function would forget.  The reference, asked for by name, is differentiated as it stands."""
        if not only_autograd_looks_on(*inputs):
            if not (has_tangents(inputs) and self._is_reference(inputs)):
                self._refuse_tangents(inputs)
                return self.registered(*inputs)
            return self.function(*inputs)
        if torch.autograd._profiler_enabled():
            with torch.profiler.record_function(f"cibr_kernels::{self.name}"):
                return self._around(*inputs)
        return self._around(*inputs)

    def _around(self, *inputs: Any) -> Any:
        if self._is_reference(inputs) or not torch.is_grad_enabled() or not any(map(_needs_gradient, inputs)):
            return self.function(*inputs)
        return self.registered(*inputs) if self._node is None else self._node.apply(*inputs)

    def _is_reference(self, inputs: tuple[Any, ...]) -> bool:
        return self._backend is not None and inputs[self._backend] == "reference"

    def _refuse_tangents(self, inputs: tuple[Any, ...]) -> None:
        if has_tangents(inputs):
            raise RuntimeError(
                f"{self.serves}: forward-mode derivatives (torch.autograd.forward_ad) are not there, the operator "
                f"cibr_kernels.{self.name} has no formula for them; {_INSTEAD}"
            )


def _of_old(function: Callable[..., Any]) -> dict[str, Any]:
    """Types of its arguments as PyTorch 2.6 knows them: List[Tensor], not list[Tensor]."""
    old: Any = typing.List  # noqa: UP006
    hints = typing.get_type_hints(function).items()
    return {name: old[typing.get_args(hint)] if typing.get_origin(hint) is list else hint for name, hint in hints}


def operator(serves: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator: the function becomes an `Operator`.  serves: the public functions that call it."""
    return lambda function: Operator(function, serves)


def _needs_gradient(t: Any) -> bool:
    return isinstance(t, Tensor) and t.requires_grad


def has_tangents(inputs: tuple[Any, ...]) -> bool:
    """Whether forward-mode AD is on and follows one of them."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in inputs)


def with_gradients(
    name: str, forward: Callable[..., tuple[Any, ...]], general: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """A scalar of tensors whose gradients are made with it, as one node of autograd called `name`.  Only where
    `only_autograd_looks_on`.

    forward(*tensors, *options, needs): -> the scalar, and for each tensor its gradient, unread where `needs` has False;
        in float32 for float16 tensors, whose range it would leave before the upstream gradient has scaled it.
    general(*tensors, *options): the same scalar made of operators, for a backward with create_graph: they refuse a
    second derivative, which this node would forget.
    """

    def make(ctx: Any, *inputs: Any) -> Tensor:
        value, *grads = forward(*inputs, ctx.needs_input_grad)
        ctx.options = inputs[len(grads) :]
        ctx.save_for_backward(*inputs[: len(grads)], *grads)
        return value

    def scale(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        saved, needs, options = ctx.saved_tensors, ctx.needs_input_grad, ctx.options  # each access makes them anew
        count = len(saved) // 2
        tensors, grads, needs = saved[:count], saved[count:], needs[:count]
        if torch.is_grad_enabled():
            wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
            made = iter(torch.autograd.grad(general(*tensors, *options), wanted, g, create_graph=True))
            grads = tuple(next(made) if need else None for need in needs)
        elif g.device.type != "cpu" or g.item() != 1.0:  # what loss.backward() asks for
            grads = [t * g if need else None for t, need in zip(grads, needs, strict=True)]
        if tensors[0].dtype == torch.float16:
            grads = [t if t is None else t.to(own.dtype) for t, own in zip(grads, tensors, strict=True)]
        return *[t if need else None for t, need in zip(grads, needs, strict=True)], *(None,) * len(options)

    methods = {"forward": staticmethod(make), "backward": staticmethod(scale)}
    node: type[torch.autograd.Function] = type(name, (torch.autograd.Function,), methods)
    return node.apply


def or_zeros(gradients: tuple[Tensor | None, ...], like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of outputs, zeros for those that nobody used.

    Where ctx.set_materialize_grads(False) spares those of outputs that have no gradient, such as n x m exponentials.
    """
    return tuple(torch.zeros_like(t) if g is None else g for g, t in zip(gradients, like, strict=True))


def is_exporting() -> bool:
    """Under torch.export, whose programs serve every size they were promised (torch 2.7 and later can tell)."""
    return getattr(torch.compiler, "is_exporting", bool)()


def only_autograd_looks_on(*inputs: Any) -> bool:
    """Nobody but autograd, backward, wants to see a call with these inputs."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._is_tracing():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if forward_ad._current_level >= 0 and has_tangents(inputs):
        return False
    if torch._C._len_torch_function_stack() and not _only_devices():
        return False
    return _PLAIN.issuperset(map(type, inputs))


def _only_devices() -> bool:
    """The modes of __torch_function__ are those of `with torch.device(...)`, which operators do not heed."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())
