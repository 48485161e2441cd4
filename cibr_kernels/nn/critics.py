"""Critics: T(x, z) of a pair, in the two forms that have kernels over all pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from cibr_kernels import checks
from cibr_kernels.information.wrappers import hooked, in_its_dtype
from cibr_kernels.numerics import WIDE, promote
from cibr_kernels.primitives.additive.activations import ACTIVATIONS

GLOBAL_HOOKS = (  # those of every module
    hooks._global_forward_pre_hooks,
    hooks._global_forward_hooks,
    hooks._global_backward_pre_hooks,
    hooks._global_backward_hooks,
)
_METHODS = ("forward", "paired", "pairwise", "score_parts", "pair_parts", "additive_parts", "dot_parts")


class _PartOfLinear(nn.Linear):
    """Some columns of a linear layer of `fan_in` columns, with its start."""

    def __init__(self, in_features: int, out_features: int, fan_in: int, bias: bool) -> None:
        self.fan_in = fan_in
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        """Draws new weights: uniform, those of nn.Linear(fan_in, out_features)."""
        limit = 1 / math.sqrt(self.fan_in)
        for p in self.parameters():
            nn.init.uniform_(p, -limit, limit)


class _Scores(nn.Linear):
    """A linear layer to one number, in float32 (float64), that gives its weights to kernels that do its work."""

    def forward(self, t: Tensor | None) -> Any:
        """t (..., h) -> (..., 1); None -> w (h,), c (), as parametrizations, pruning and FSDP leave them to a call."""
        if t is not None:
            return F.linear(promote(t), promote(self.weight), promote(self.bias))
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        # sums of one row: copies, because FSDP may let go of the weights when this call ends
        return self.weight.sum(0, dtype=dtype), self.bias.sum(dtype=dtype)


def _have_hooks(*modules: nn.Module) -> bool:
    """Anybody's, torch's own among them."""
    return any(m._forward_pre_hooks or m._forward_hooks or m._backward_pre_hooks or m._backward_hooks for m in modules)


class _Critic(nn.Module):
    """What critics share: widths, a call, and when estimators may look inside instead of calling."""

    x_dim: int | None
    z_dim: int | None
    overridden: frozenset[str] = frozenset()  # methods that a subclass of a critic has of its own

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        kind = next(c for c in cls.__mro__ if _Critic in c.__bases__)
        cls.overridden = frozenset(m for m in _METHODS if getattr(cls, m, None) is not getattr(kind, m, None))

    def forward(self, x: Tensor, z: Tensor, *, parts: str | None = None) -> Any:
        """x (n, x_dim), z (n, z_dim) -> (n,) scores of matching rows, float32 (float64).

        parts: for estimators, the name of a method whose result to give instead; n may then differ between x and z.
        """
        return self.paired(x, z) if parts is None else self._parts(x, z, parts)

    def _parts(self, x: Tensor, z: Tensor, form: str) -> tuple[Any, ...]:
        raise NotImplementedError

    def paired(self, x: Tensor, z: Tensor) -> Tensor:
        """x (..., x_dim), z (..., z_dim) -> (...): the critic on matching rows."""
        raise NotImplementedError

    def _called_only(self) -> bool:
        """Whether a call does something that its parts do not show."""
        return hooked(self) or "forward" in self.overridden or "forward" in self.__dict__

    def _through(self, layer_x: nn.Module, layer_z: nn.Module, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """layer_x(x), layer_z(z), each in the dtype of its layer."""
        for name, t, made in (("x", x, self.x_dim), ("z", z, self.z_dim)):
            if made is not None and t.shape[-1] != made:
                checks.width(name, t, made, "the critic")
        if type(layer_x) is not _PartOfLinear or layer_x.weight.dtype != x.dtype:
            x = in_its_dtype("x", x, layer_x)
        if type(layer_z) is not _PartOfLinear or layer_z.weight.dtype != z.dtype:
            z = in_its_dtype("z", z, layer_z)
        return layer_x(x), layer_z(z)


class ConcatCritic(_Critic):
    """T(x, z) of an MLP on [x, z] whose first layer is split so that pairs add, with one or two hidden layers.

        layers 1    w . phi(a + b) + c2    a = Wx x, b = Wz z + c    all pairs without n x n x hidden
        layers 2    w . phi(W2 phi(a + b) + b2) + c2    shifts(k) in O(n hidden); all pairs in panels of rows: slow

    Args: x_dim, z_dim and hidden widths; activation, one of relu, leaky_relu, gelu, gelu_tanh, silu, elu, softplus,
    tanh; slope, leaky_relu's negative slope or elu's alpha (defaults: torch's); layers, the number of hidden layers.
        storage: bfloat16 or float16 to keep a and b in half the memory, bfloat16 their gradients too; scores and sums
            stay float32.  Not the default: it rounds a and b, an error of the input that nothing undoes (in bfloat16
            scores of standard deviation 1.1 move by 0.0024, at most 0.011).  One hidden layer only.

    Layers compute in the dtype of their parameters, everything after them in float32.  Where a call does more than the
    weights show (hooks on the critic or on `out`, another module as `out`, a method that a subclass has of its own),
    estimators call the critic on panels of rows: slower, never something else.
    Raises ValueError for other names, layers, dtypes and non-positive widths.
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        hidden: int = 512,
        layers: int = 1,
        *,
        activation: str = "relu",
        slope: float | None = None,
        storage: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if storage not in (None, torch.float32, torch.bfloat16, torch.float16) or (storage and layers == 2):
            raise ValueError(
                f"storage must be float32, bfloat16 or float16, of one hidden layer, got {storage} with layers={layers}"
            )
        if layers not in (1, 2):
            raise ValueError(f"ConcatCritic has one or two hidden layers, got layers={layers}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; known are {', '.join(map(repr, ACTIVATIONS))}")
        if min(x_dim, z_dim, hidden) < 1:
            raise ValueError(f"widths must be positive, got x_dim={x_dim}, z_dim={z_dim}, hidden={hidden}")
        self.x_dim, self.z_dim, self.hidden = x_dim, z_dim, hidden
        self.activation = activation
        self.slope = (1.0 if activation == "elu" else 0.01) if slope is None else slope
        self.storage = storage
        self.x_proj = _PartOfLinear(x_dim, hidden, x_dim + z_dim, bias=False)
        self.z_proj = _PartOfLinear(z_dim, hidden, x_dim + z_dim, bias=True)
        self.inner = nn.Linear(hidden, hidden) if layers == 2 else None
        self.out = _Scores(hidden, 1)

    @property
    def form(self) -> str:
        """How estimators get at this critic: the first of `information.critics.FORMS` to miss nothing, or "call"."""
        if self._called_only():
            return "call"
        if type(self) is not ConcatCritic and not self.overridden.isdisjoint(("paired", "pairwise")):
            return "pairwise"
        shown = self.inner is None and isinstance(self.out, _Scores) and not hooked(self.out)
        return "additive_parts" if shown and "score_parts" not in self.overridden else "pair_parts"

    @property
    def additive_parts(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor, str, float]]:
        """x (n, x_dim), z (m, z_dim) -> a (n, hidden), b (m, hidden), w (hidden,), c2 (), activation, slope.

        There for the form of this name only: the scores of two layers are no such function (AttributeError).
        """
        if self.form != "additive_parts":
            raise AttributeError(
                "two layers, hooks, another `out` or an own method: additive_parts would miss something"
            )
        return partial(self, parts="additive_parts")

    def _parts(self, x: Tensor, z: Tensor, form: str) -> tuple[Any, ...]:
        a, b = self.pair_parts(x, z)
        if form == "pair_parts":
            return a, b
        if self.storage is not None and a.dtype != torch.float64:
            a, b = a.to(self.storage), b.to(self.storage)
        return a, b, *self._out_weights(), self.activation, self.slope

    def plain_weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
        """Wx, Wz, c, w (1, hidden), c2 (1,) where a call does nothing but multiply with them.

        None where another form, hooks, parametrizations, FSDP or `storage` are in the way.  Asked at every step: it
        looks into the modules' dictionaries, because their attributes take a call of Python each.
        """
        layers = self._modules
        x_proj, z_proj, out = layers["x_proj"], layers["z_proj"], layers["out"]
        if (
            type(x_proj) is not _PartOfLinear
            or type(z_proj) is not _PartOfLinear
            or type(out) is not _Scores
            or self.storage is not None
            or _have_hooks(self, x_proj, z_proj, out)
            or any(GLOBAL_HOOKS)
            or (type(self) is not ConcatCritic and hasattr(type(self), "set_requires_gradient_sync"))
            or not (self.form == "additive_parts" if type(self) is not ConcatCritic else layers.get("inner") is None)
            or "forward" in self.__dict__
        ):
            return None
        of_z, of_out = z_proj._parameters, out._parameters
        found = (
            x_proj._parameters.get("weight"),
            of_z.get("weight"),
            of_z.get("bias"),
            of_out.get("weight"),
            of_out.get("bias"),
        )
        c = found[2]
        if c is None or c.dtype not in WIDE:
            return None
        dtype, device = c.dtype, c.device
        for p in found:
            if type(p) is not nn.Parameter or p.dtype != dtype or p.device != device:
                return None
        return found  # type: ignore[return-value]

    def _out_weights(self) -> tuple[Tensor, Tensor]:
        """w (hidden,), c2 (), float32 (float64): the layer's own where nobody makes or takes them around a call.

        FSDP2 makes a class of its own of what it shards; FSDP1, parametrizations and pruning put tensors where the
        parameters were.
        """
        out = self.out
        weight = out.weight
        if (
            type(out) is not _Scores
            or type(weight) is not nn.Parameter
            or weight.dtype not in WIDE
            or hasattr(type(self), "set_requires_gradient_sync")
        ):
            return out(None)
        return weight.view(-1), out.bias.view(())

    @property
    def pair_width(self) -> int:
        """Numbers that `score_parts` holds per pair for its backward."""
        return self.hidden * (2 if self.inner is None else 4)

    def pair_parts(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., x_dim), z (..., z_dim) -> a (..., hidden), b (..., hidden), float32 (float64)."""
        a, b = self._through(self.x_proj, self.z_proj, x, z)
        return (a, b) if a.dtype in WIDE and b.dtype in WIDE else (promote(a), promote(b))

    def score_parts(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b (..., hidden), which broadcast -> scores (...)."""
        phi = ACTIVATIONS[self.activation][0]
        hidden = phi(a + b, self.slope)
        if self.inner is not None:
            hidden = phi(promote(self.inner(in_its_dtype("hidden", hidden, self.inner))), self.slope)
        if not isinstance(self.out, _Scores):
            hidden = in_its_dtype("hidden", hidden, self.out)
        return promote(self.out(hidden).squeeze(-1))

    def pairwise(self, x: Tensor, z: Tensor) -> Tensor:
        """x (n, x_dim), z (m, z_dim) -> (n, m): the eager definition, which builds (n, m, hidden)."""
        return self.paired(x[:, None], z[None])

    def paired(self, x: Tensor, z: Tensor) -> Tensor:
        """x (..., x_dim), z (..., z_dim) -> (...): the critic on matching rows."""
        return self.score_parts(*self.pair_parts(x, z))


class SeparableCritic(_Critic):
    """T(x, z) = <f(x), g(z)> with f and g two-layer ReLU MLPs into `embed_dim`, or any two modules (`from_maps`).

    f and g compute in the dtype of their first parameter, the products are summed in float32.  As with `ConcatCritic`,
    hooks on the critic, or methods of a subclass, make estimators call it on panels of rows.
    """

    def __init__(self, x_dim: int, z_dim: int, hidden: int = 512, embed_dim: int = 128) -> None:
        super().__init__()
        if min(x_dim, z_dim, hidden, embed_dim) < 1:
            raise ValueError(f"widths must be positive, got {x_dim}, {z_dim}, {hidden}, {embed_dim}")
        self.x_dim, self.z_dim = x_dim, z_dim
        self.embed_x: nn.Module = nn.Sequential(nn.Linear(x_dim, hidden), nn.ReLU(), nn.Linear(hidden, embed_dim))
        self.embed_z: nn.Module = nn.Sequential(nn.Linear(z_dim, hidden), nn.ReLU(), nn.Linear(hidden, embed_dim))

    @classmethod
    def from_maps(cls, embed_x: nn.Module, embed_z: nn.Module) -> SeparableCritic:
        """The critic <embed_x(x), embed_z(z)>; both give (rows, k)."""
        critic = cls(1, 1, 1, 1)
        critic.embed_x, critic.embed_z = embed_x, embed_z
        critic.x_dim = critic.z_dim = None
        return critic

    @property
    def form(self) -> str:
        """As `ConcatCritic.form`."""
        if self._called_only():
            return "call"
        return "dot_parts" if self.overridden.isdisjoint(("paired", "pairwise")) else "pairwise"

    @property
    def dot_parts(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """x (n, x_dim), z (m, z_dim) -> f (n, k), g (m, k), in the dtype that f and g compute in."""
        if self.form != "dot_parts":
            raise AttributeError("hooks or an own method: dot_parts would miss something")
        return partial(self, parts="dot_parts")

    def _parts(self, x: Tensor, z: Tensor, form: str) -> tuple[Any, ...]:
        f, g = self._through(self.embed_x, self.embed_z, x, z)
        if f.dim() == g.dim() and f.shape[-1] != g.shape[-1]:
            raise ValueError(f"embed_x gives width {f.shape[-1]} but embed_z gives width {g.shape[-1]}")
        return f, g

    def pairwise(self, x: Tensor, z: Tensor) -> Tensor:
        """-> (n, m) scores: the eager definition."""
        f, g = self._parts(x, z, "dot_parts")
        return promote(f) @ promote(g).T

    def paired(self, x: Tensor, z: Tensor) -> Tensor:
        """-> (n,) scores of matching rows."""
        f, g = self._parts(x, z, "dot_parts")
        return (promote(f) * promote(g)).sum(-1)
