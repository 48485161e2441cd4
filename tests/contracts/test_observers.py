"""Who looks on sees the operators, or is refused in words: tracers, modes, counters, profilers, other derivatives."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from cases import leaves, towers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import cibr_kernels as ck
from cibr_kernels.dispatch import pointers

N, D, H = 24, 8, 16
IDS = torch.arange(N) % 10
Loss = Callable[..., Tensor]


def critics() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(5)
    return ck.nn.ConcatCritic(D, D, H), ck.nn.SeparableCritic(D, D, H, D)


CONCAT, SEPARABLE = critics()


def information(critic: nn.Module, estimator: str, negatives: Any = "all") -> Loss:
    return lambda x, y, **k: ck.mutual_information(x, y, critic, estimator=estimator, negatives=negatives, **k)


LOSSES: dict[str, Loss] = {
    "clip_loss": lambda x, y, **k: ck.clip_loss(x, y, 9.0, **k),
    "clip_loss of groups": lambda x, y, **k: ck.clip_loss(x, y, 9.0, group_ids=IDS, label_smoothing=0.1, **k),
    "siglip_loss": lambda x, y, **k: ck.siglip_loss(x, y, 9.0, -5.0, **k),
    "siglip_loss, each": lambda x, y, **k: ck.siglip_loss(x, y, 9.0, -5.0, reduction="none", **k).square().sum(),
    "log_mean_exp": lambda x, y, **k: ck.log_mean_exp(x @ y.T, **k),
    "mine": information(CONCAT, "mine"),
    "mine, shifts": information(CONCAT, "mine", ck.shifts(2)),
    "mine, derangements": information(SEPARABLE, "mine", ck.derangement(2)),
    "mine, separable": information(SEPARABLE, "mine"),
    "js": information(CONCAT, "js"),
    "smile, separable": information(SEPARABLE, "smile"),
    "smile, shifts": information(CONCAT, "smile", ck.shifts(2)),
    "infonce": information(CONCAT, "infonce"),
    "infonce, separable": information(SEPARABLE, "infonce"),
}
each_loss = pytest.mark.parametrize("name", list(LOSSES))


def gradients(loss: Loss, wrap: Callable[[Loss], Loss] = lambda loss: loss) -> list[Tensor]:
    """The value and its gradients, of features and critics."""
    torch.manual_seed(1)
    x, y = leaves(*towers(N, N, D))
    value = wrap(loss)(x, y)
    parameters = [*CONCAT.parameters(), *SEPARABLE.parameters()]
    found = torch.autograd.grad(value, [x, y, *parameters], allow_unused=True)
    return [value.detach(), *(g for g in found if g is not None)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def in_checkpoint(reentrant: bool) -> Callable[[Loss], Loss]:
    return lambda loss: lambda x, y: checkpoint(loss, x, y, use_reentrant=reentrant)


def under_hooks(loss: Loss) -> Loss:
    def hooked(x: Tensor, y: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: [t], list.pop):  # each can be unpacked once
            return loss(x, y)

    return hooked


def on_cpu(loss: Loss) -> Loss:
    def saved(x: Tensor, y: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return loss(x, y)

    return saved


@each_loss
@pytest.mark.parametrize(
    "wrap", [in_checkpoint(False), under_hooks, on_cpu], ids=["checkpoint", "saved tensors once", "save_on_cpu"]
)
def test_saved_tensors_are_read_once(name, wrap):
    assert_same(gradients(LOSSES[name], wrap), gradients(LOSSES[name]))


@each_loss
def test_reentrant_checkpoint(name):
    """Such a checkpoint knows backward() alone."""
    found = []
    for wrap in (in_checkpoint(True), lambda loss: loss):
        torch.manual_seed(1)
        x, y = leaves(*towers(N, N, D))
        wrap(LOSSES[name])(x, y).backward()
        found.append([x.grad, y.grad])
    assert_same(*found)


@each_loss
def test_reference_has_every_derivative(name):
    """The second one against differences of the first, the forward one against backward's."""
    critics = [c.double() for c in (CONCAT, SEPARABLE)]
    try:
        x, y = (t.double() for t in towers(N, N, D))
        along, step = torch.randn(N, D, dtype=torch.float64), 1e-6

        def value(x: Tensor) -> Tensor:
            torch.manual_seed(1)
            return LOSSES[name](x, y, backend="reference")

        def penalty(x: Tensor, graph: bool = False) -> tuple[Tensor, Tensor, Tensor]:
            x = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(value(x), x, create_graph=True)
            return g.square().sum(), g, x

        size, g, at = penalty(x)
        (second,) = torch.autograd.grad(size, at)
        difference = (penalty(x + step * along)[0] - penalty(x - step * along)[0]).detach() / (2 * step)
        torch.testing.assert_close((second * along).sum(), difference, rtol=1e-5, atol=1e-8)
        with fwd.dual_level():
            tangent = fwd.unpack_dual(value(fwd.make_dual(x, along))).tangent
        torch.testing.assert_close(tangent, (g * along).sum())
    finally:
        for critic in critics:
            critic.float()


@each_loss
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_refused_in_words(name, requires_grad):
    x, y = towers(N, N, D)
    with fwd.dual_level():
        dual = fwd.make_dual(x.requires_grad_(requires_grad), torch.ones_like(x))
        with pytest.raises(RuntimeError, match=r"forward-mode derivatives .* use backend='reference'"):
            LOSSES[name](dual, y)
        LOSSES[name](x.detach(), y)  # what has no tangent goes on


class Named(TorchFunctionMode):
    """Names of the functions called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@each_loss
def test_function_modes_see_the_operator(name):
    with Named() as seen:
        found = gradients(LOSSES[name])
    assert any(called.startswith("cibr_kernels.") for called in seen.names)
    assert_same(found, gradients(LOSSES[name]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("loss", [ck.nn.ClipLoss(), ck.nn.SigLipLoss()], ids=lambda m: type(m).__name__)
def test_a_traced_loss_is_one_of_its_inputs(loss, with_gradients):
    scale = torch.tensor(9.0)
    x, y = (t.requires_grad_(with_gradients) for t in towers(N, N, D))
    traced = torch.jit.trace(lambda x, y: loss(x, y, scale, -5.0), (x, y), check_trace=False)
    for n in (N, 9):
        x, y = (t.requires_grad_(with_gradients) for t in towers(n, n, D))
        torch.testing.assert_close(traced(x, y), loss(x, y, scale, -5.0))


EAGER: dict[str, tuple[Loss, int]] = {  # the same on n x n logits, products of n n D in forward and backward
    "clip_loss": (LOSSES["clip_loss"], 3),
    "siglip_loss": (LOSSES["siglip_loss"], 3),
    "siglip_loss, each": (LOSSES["siglip_loss, each"], 4),
    "mine, separable": (LOSSES["mine, separable"], 3),
}


@pytest.mark.parametrize("name", list(EAGER))
def test_flops_of_dot_products(name):
    loss, passes = EAGER[name]
    counted = _counted(loss)
    assert sum(v for k, v in counted.items() if "cibr_kernels" in str(k)) == passes * 2 * N * N * D


def test_flops_of_kept_exponentials_are_not_counted_twice():
    budget = ck.stash_budget()
    try:
        for size, passes in ((0, 4), (budget, 3)):
            ck.set_stash_budget(size)
            assert sum(_counted(LOSSES["clip_loss"]).values()) == passes * 2 * N * N * D
    finally:
        ck.set_stash_budget(budget)


@pytest.mark.parametrize(("name", "pairs"), [("mine", N * N), ("infonce", N * N), ("mine, shifts", 3 * N)])
def test_flops_of_additive_critics(name, pairs):
    counted = {k: v for k, v in _counted(LOSSES[name]).items() if "cibr_kernels" in str(k)}
    assert sum(counted.values()) == 4 * 2 * pairs * H  # forward, and one for each of a, b and w


def _counted(loss: Loss) -> dict[Any, int]:
    x, y = leaves(*towers(N, N, D))
    with FlopCounterMode(display=False) as counter:
        loss(x, y).backward()
    return dict(counter.get_flop_counts()["Global"])


@each_loss
def test_a_profile_has_the_names(name):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradients(LOSSES[name])
    names = {event.key for event in profile.key_averages()}
    assert any(n.startswith("cibr_kernels::") for n in names)
    if ck.native_available():
        assert any(n.endswith(".native") for n in names)


@each_loss
def test_a_default_device_changes_nothing(name):
    found = []
    for device in ("cpu", "meta"):
        torch.manual_seed(1)
        x, y = leaves(*towers(N, N, D))
        with torch.device(device):
            value = LOSSES[name](x, y)
            found.append([value.detach(), *torch.autograd.grad(value, (x, y))])
    assert_same(*found)


FACTORIES = {"empty", "zeros", "ones", "full", "arange", "tensor", "rand", "randn", "randint", "randperm", "eye"}
PACKAGE = Path(ck.__file__).parent


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(PACKAGE.rglob("*.py")) if "nn" not in p.relative_to(PACKAGE).parts],  # modules live where told
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_every_new_tensor_names_its_device(path):
    for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
        f = call.func
        if isinstance(f, ast.Attribute) and f.attr in FACTORIES and ast.unparse(f.value) == "torch":
            assert any(word.arg == "device" for word in call.keywords), f"{path.name}:{call.lineno}"


def test_what_is_elsewhere_never_becomes_a_pointer():
    here, elsewhere = torch.empty(3), torch.empty(3, device="meta")
    pointers.check("k", torch.device("cpu"), {"x": here, "n": 3, "y": None})
    with pytest.raises(RuntimeError, match="k runs on cpu, but its out is on meta"):
        pointers.check("k", torch.device("cpu"), {"x": here, "out": elsewhere})
    if ck.native_available():
        from cibr_kernels.primitives.log_mean_exp import native

        with pytest.raises(RuntimeError, match="log_mean_exp_forward runs on cpu, but its mask is on meta"):
            native.forward(here, elsewhere.bool())


def test_the_result_may_change_in_place():
    for f in (
        lambda s: ck.log_mean_exp(s),
        lambda s: ck.log_mean_exp(s, ema=0.1),
        lambda s: ck.critic_moments(s, s, CONCAT)[1],
        lambda s: ck.critic_moments(s, s, CONCAT, negatives=ck.shifts(2))[1],
        lambda s: ck.clip_loss(s, s, 3.0),
        lambda s: ck.siglip_loss(s, s, 3.0),
    ):
        (scores,) = leaves(torch.randn(N, D))
        (expected,) = torch.autograd.grad(f(scores) / 2, scores)
        torch.testing.assert_close(torch.autograd.grad(f(scores).div_(2), scores)[0], expected)
