"""Validation shared by the public functions: once, before any work, in the caller's words."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def matrix(name: str, t: Tensor) -> None:
    """`t` must be a 2-d, non-empty tensor of a supported floating dtype."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {t.dtype}")
    not_transformed(name, t)
    if t.dim() != 2:
        raise ValueError(f"{name} must be 2-d (rows, features), got shape {tuple(t.shape)}")
    if t.numel() == 0:
        raise ValueError(f"{name} is empty: shape {tuple(t.shape)}")


def matrices(**tensors: Tensor) -> None:
    """Each is a `matrix`: in one call, of which small batches would notice a dozen."""
    compiling = torch.compiler.is_compiling()
    for name, t in tensors.items():
        if (
            not isinstance(t, Tensor)
            or t.dtype not in FLOATS
            or t.dim() != 2
            or t.numel() == 0
            or (not compiling and torch._C._functorch.is_gradtrackingtensor(t))
        ):
            matrix(name, t)  # says what is wrong


def matching(*, precision: bool = True, **tensors: Tensor) -> None:
    """Each is a `matrix`; all have as many rows, one device and, with `precision`, are float64 or none is."""
    matrices(**tensors)
    first, *rest = tensors.values()
    for t in rest:
        if t.shape[0] != first.shape[0]:
            same_rows(**tensors)
        if t.device != first.device or (precision and t.dtype != first.dtype):
            (one_precision if precision else same_device)(**tensors)


def not_transformed(name: str, t: Tensor) -> None:
    """`t` must not belong to torch.func.grad, vjp or jacrev, which the operators' gradients do not go through."""
    if not torch.compiler.is_compiling() and torch._C._functorch.is_gradtrackingtensor(t):
        raise RuntimeError(
            f"{name} is differentiated by torch.func (grad, vjp, jacrev), which the fused operators have no rule for: "
            "use torch.autograd.grad or backward()"
        )


def same_place(**tensors: Tensor) -> None:
    """All named tensors share one dtype (TypeError) and one device (ValueError)."""
    (first, a), *rest = tensors.items()
    for name, b in rest:
        if a.dtype != b.dtype or a.device != b.device:
            error = ValueError if a.dtype == b.dtype else TypeError
            raise error(f"{first} is {a.dtype} on {a.device} but {name} is {b.dtype} on {b.device}")


def one_precision(**tensors: Tensor) -> None:
    """All named tensors are float64 or none is (TypeError), on one device (ValueError)."""
    (first, a), *rest = tensors.items()
    for name, b in rest:
        if (a.dtype == torch.float64) != (b.dtype == torch.float64):
            raise TypeError(f"{first} is {a.dtype} but {name} is {b.dtype}: float64 goes with float64 only")
    same_device(**tensors)


def same_device(**tensors: Tensor) -> None:
    """All named tensors are on one device."""
    (first, a), *rest = tensors.items()
    for name, b in rest:
        if a.device != b.device:
            raise ValueError(f"{first} is {a.dtype} on {a.device} but {name} is {b.dtype} on {b.device}")


def same_rows(**tensors: Tensor) -> None:
    """All named tensors have as many rows: row i of one belongs to row i of the others."""
    (first, a), *rest = tensors.items()
    for name, b in rest:
        if a.shape[0] != b.shape[0]:
            raise ValueError(f"{first} has {a.shape[0]} rows but {name} has {b.shape[0]}")


def same_width(**tensors: Tensor) -> None:
    """All named tensors have as many columns."""
    (first, a), *rest = tensors.items()
    for name, b in rest:
        if a.shape[1] != b.shape[1]:
            raise ValueError(f"{first} has width {a.shape[1]} but {name} has width {b.shape[1]}")


def width(name: str, t: Tensor, expected: int, made: str) -> None:
    """`t` (n, .) has the width that the module `made` was made for."""
    if t.shape[-1] != expected:
        raise ValueError(f"{name} has width {t.shape[-1]} but {made} was made for {expected}")


def number(name: str, value: object) -> None:
    """`value` is a number and no tensor, which could broadcast."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def usable(t: Tensor) -> Tensor:
    """`t`, or a copy of it that autograd can save where `t` was made under inference_mode."""
    if torch.compiler.is_compiling() or not t.is_inference() or torch.is_inference_mode_enabled():
        return t
    return t.clone()


def scalar(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """`value` as a 0-d tensor on `like`'s device, in float32 (float64 beside float64 features)."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number or a tensor of one element, got {type(value).__name__}")
        return torch.full((), float(value), dtype=dtype, device=like.device)
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but the features are on {like.device}")
    return value if value.dim() == 0 and value.dtype == dtype else value.reshape(()).to(dtype)


def scalar_or_rows(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """As `scalar`, or a tensor of one number for each of `like`'s rows."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        return scalar(name, value, like)
    if value.shape != like.shape[:1]:
        raise ValueError(f"{name} must have one element, or {like.shape[0]}, one per row, got {tuple(value.shape)}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but the features are on {like.device}")
    return value.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """`value` is one of the known words."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}; known are {', '.join(map(repr, known))}")


def positive(name: str, value: Tensor) -> None:
    """A CPU tensor that must be above zero (NaN passes: the loss will be NaN).  Reads the values: CPU only."""
    if value.device.type == "cpu" and (least := value.item() if value.dim() == 0 else value.amin().item()) <= 0:
        raise ValueError(f"{name} must be positive (it is exp(log_scale), not log_scale), got {least}")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, features in the dtype a matmul would take; logits and sums stay float32 inside the ops."""
    kind = tensors[0].device.type
    known = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
    if known and torch.is_autocast_enabled(kind):
        return tuple(t.to(torch.get_autocast_dtype(kind)) if t.dtype != torch.float64 else t for t in tensors)
    return tensors
