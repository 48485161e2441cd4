"""Small batches, whose loss and gradients are one call of C++, and operators that eager mode goes around."""

import gc
import math
from pathlib import Path

import pytest
import torch
from cases import LARGE, each_isa, leaves, towers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cibr_kernels as ck
from cibr_kernels import testing
from cibr_kernels.dispatch import backends, library, native_call
from cibr_kernels.losses.clip import fast_path as clip_plain
from cibr_kernels.losses.clip import reference as clip_reference
from cibr_kernels.losses.siglip.reference import siglip_loss as siglip_reference
from cibr_kernels.primitives.dot.lse.op import dot_lse_forward

pytestmark = pytest.mark.skipif(not ck.native_available(), reason="the compiled kernels are not built")
LAST = math.isqrt(clip_plain.FUSED_BACKWARD_BYTES // 4)  # the largest batch whose gradients are made with its loss


def clip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return ck.clip_loss(x, y, scale, bias)


def one_way(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return ck.clip_loss(x, y, scale, bias, one_way=True)


def siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return ck.siglip_loss(x, y, scale, bias)


DEFINITIONS = {
    clip: lambda x, y, s, b: clip_reference.clip_loss(x, y, s) + 0 * b,
    one_way: lambda x, y, s, b: clip_reference.clip_loss(x, y, s, 0, True) + 0 * b,
    siglip: lambda *t: siglip_reference(*t).mean(),
}
each_loss = pytest.mark.parametrize("loss", list(DEFINITIONS), ids=lambda f: f.__name__)


def inputs(n: int, d: int, scale: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    x, y = towers(n, n, d)
    return x.to(dtype), y.to(dtype), torch.tensor(scale), torch.tensor(-scale / 2)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "scale"), [(1, 5.0), (2, 100.0), (31, 14.3), (64, 100.0), (97, 1.0)])
def test_equals_float64_whatever_the_upstream_gradient(loss, dtype, n, scale):
    features = inputs(n, 40, scale, dtype)

    def run(f, tensors):
        own = leaves(*tensors)
        value = f(*own)
        return [value.detach(), *torch.autograd.grad(3.0 * value, own)]

    actual, definition = run(loss, features), DEFINITIONS[loss]
    eager, truth = run(definition, features), run(definition, tuple(t.double() for t in features))
    for what, a, e, t in zip(("loss", "dx", "dy", "dscale", "dbias"), actual, eager, truth, strict=True):
        magnitude = max(1.0, t.abs().max().item()) if t.dim() < 2 else 0.0
        testing.assert_close(what, a, e, t, terms=n + 40, exponent=1.5 * scale, features=dtype, magnitude=3 * magnitude)


@each_loss
@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_loss_alone_is_that_of_a_training_step(loss, dtype, isa):
    for n in (1, 33, 97):
        own = leaves(*inputs(n, 40, 14.3, dtype))
        with testing.instruction_set(isa):
            expected = loss(*own)
            with torch.no_grad():
                torch.testing.assert_close(loss(*own), expected.detach(), rtol=1e-6, atol=0)


@each_loss
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 3), (3,)], ids=str)
def test_gradients_of_some_inputs(loss, needed):
    tensors = inputs(33, 20, 10.0)
    everything = leaves(*tensors)
    expected = torch.autograd.grad(loss(*everything), everything)
    some = [t.clone().requires_grad_(i in needed) for i, t in enumerate(tensors)]
    found = torch.autograd.grad(loss(*some), [some[i] for i in needed])
    for i, gradient in zip(needed, found, strict=True):
        torch.testing.assert_close(gradient, expected[i], rtol=1e-5, atol=1e-7)


def test_both_sides_of_the_largest_small_batch_agree():
    for n in (LAST, LAST + 1):
        x, y, scale, _ = inputs(n, 16, 20.0)
        found = []
        for budget in (LARGE, 0):  # at once, where it is small enough; never
            ck.set_stash_budget(budget)
            own = leaves(x, y, scale)
            found.append(torch.autograd.grad(ck.clip_loss(*own), own))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


class Recorder(TorchDispatchMode):
    """Names of the operators called, and the largest tensor they made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        for t in found if isinstance(found, tuple) else (found,):
            self.largest = max(self.largest, t.numel() if isinstance(t, Tensor) else 0)
        return found


class Tagged(Tensor):
    """A subclass that changes nothing."""


def test_who_wants_to_see_the_operator_sees_it(monkeypatch):
    x, y, scale, _ = inputs(8, 4, 5.0)
    arguments = (None, None, None, 0, True, True, False, 0, "auto")
    assert library.only_autograd_looks_on(x, y, scale, *arguments)
    assert not library.only_autograd_looks_on(x.as_subclass(Tagged), y, scale, *arguments)
    with Recorder() as recorder:
        assert not library.only_autograd_looks_on(x)
        dot_lse_forward(x, y, scale, *arguments)
    assert "cibr_kernels.dot_lse_forward.default" in recorder.names
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, y, scale)]
        assert ck.clip_loss(*fake).shape == ()
    assert torch.equal(torch.func.vmap(lambda s: s + 0)(x), x)
    registered = torch.ops.cibr_kernels.dot_lse_forward(x, y, scale, *arguments)
    for a, b in zip(dot_lse_forward(x, y, scale, *arguments), registered, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_the_backward_makes_nothing_of_the_size_of_the_stash():
    ck.set_stash_budget(LARGE)
    n, d = 256, 8
    x, y, scale, _ = inputs(n, d, 5.0)
    own = leaves(x, y, scale)
    ids = torch.arange(n)  # the general path
    loss = ck.clip_loss(*own, group_ids=ids)
    with Recorder() as recorder:
        torch.autograd.grad(loss, own)
    assert "cibr_kernels.dot_lse_backward.default" in recorder.names
    assert recorder.largest < n * n  # the stash's "gradient" of zeros would be one


def test_what_is_no_field_of_a_kernel_is_refused():
    params = backends.compiled().ClipLoss()
    x = torch.randn(3, 4)
    params.fill({"x": x, "y": None, "dx": x[:0], "n": 3, "one_way": True, "scale": 2})
    assert (params.x, params.y, params.dx) == (x.data_ptr(), 0, 0)
    assert (params.n, params.one_way, params.scale) == (3, 1, 2.0)
    with pytest.raises(TypeError, match="no field 'z'"):
        params.fill({"z": x})
    with pytest.raises(ValueError, match="dx: a tensor that is not contiguous"):
        params.fill({"dx": x.T})
    with pytest.raises(ValueError, match=r"n: .*cast"):
        params.fill({"n": "3"})


def test_scratch_is_kept_within_its_limit_and_used_again():
    module = backends.compiled()
    limit = module.scratch_limit()
    try:
        module.set_scratch_limit(0)
        assert module.scratch_kept() == 0
        module.set_scratch_limit(8 << 20)
        shape = (3, 1 << 19)  # 6 MiB
        first = native_call.scratch(shape, torch.float32, torch.device("cpu"))
        assert first.isnan().all(), "torch fills fresh memory while a test runs, and so must this"
        place = first.data_ptr()
        del first
        gc.collect()
        assert 6 << 20 <= module.scratch_kept() <= 8 << 20
        again = native_call.scratch(shape, torch.float32, torch.device("cpu"))
        assert again.data_ptr() == place and module.scratch_kept() == 0
        other = native_call.scratch(shape, torch.float32, torch.device("cpu"))
        assert other.data_ptr() != place
        del again, other
        gc.collect()
        assert module.scratch_kept() <= 8 << 20
    finally:
        module.set_scratch_limit(limit)


def test_a_large_stash_budget_keeps_its_memory_unless_another_limit_was_set():
    module = backends.compiled()
    limit, budget = module.scratch_limit(), ck.stash_budget()
    try:
        assert limit == 128 << 20 and budget == 64 << 20
        for size, kept in ((300 << 20, 300 << 20), (1 << 40, 1 << 30), (0, 128 << 20)):
            ck.set_stash_budget(size)
            assert module.scratch_limit() == kept
        module.set_scratch_limit(5 << 20)
        ck.set_stash_budget(300 << 20)
        assert module.scratch_limit() == 5 << 20
    finally:
        ck.set_stash_budget(budget)
        module.set_scratch_limit(limit)


class Losses(torch.utils.data.Dataset):
    """What a worker sees: its threads before and after a loss that would like two, and the loss."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[int, int, int, float]:
        def threads() -> int:
            return len(list(Path("/proc/self/task").iterdir()))

        x, y, scale, _ = inputs(300, 128, 10.0)
        before = threads()
        value = ck.clip_loss(x, y, scale).item()
        return torch.get_num_threads(), before, threads(), value


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_a_data_loader_worker_starts_no_threads():
    torch.set_num_threads(2)
    x, y, scale, _ = inputs(300, 128, 10.0)
    expected = ck.clip_loss(x, y, scale).item()  # the pool is running when the worker is forked
    ((allowed, before, after, value),) = torch.utils.data.DataLoader(Losses(), num_workers=1, batch_size=None)
    assert allowed == 1 and before == after
    assert value == pytest.approx(expected)
