"""What every loss promises besides its value: cached gradients, determinism, one row, huge shapes, torch.func."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import leaves, towers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import cibr_kernels as ck
from cibr_kernels.primitives.additive.scores.op import additive_scores
from cibr_kernels.primitives.dot.lse.op import dot_lse
from cibr_kernels.primitives.dot.softplus.op import dot_softplus

N, D = 24, 8
IDS = torch.arange(N) % 10
CONCAT, DEEP = ck.nn.ConcatCritic(D, D, 16), ck.nn.ConcatCritic(D, D, 16, layers=2)
SEPARABLE = ck.nn.SeparableCritic(D, D, 16, 8)


def information(critic: nn.Module, **options) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: ck.mutual_information(x, y, critic, **options)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "clip_loss": lambda x, y: ck.clip_loss(x, y, 9.0),
    "clip_loss of groups": lambda x, y: ck.clip_loss(x, y, 9.0, group_ids=IDS, label_smoothing=0.1),
    "clip_loss of many positives": lambda x, y: ck.clip_loss(x, y, 9.0, group_ids=IDS, group_mode="positives"),
    "siglip_loss": lambda x, y: ck.siglip_loss(x, y, 9.0, -5.0),
    "siglip_loss of groups": lambda x, y: ck.siglip_loss(x, y, 9.0, -5.0, group_ids=IDS, weights=torch.ones(N)),
    "mine": information(CONCAT),
    "mine, one shuffle": information(CONCAT, negatives=ck.shifts(1)),
    "mine, two layers": information(DEEP, negatives=ck.shifts(3)),
    "mine, separable": information(SEPARABLE),
    "infonce": information(CONCAT, estimator="infonce"),
    "js": information(SEPARABLE, estimator="js"),
    "log_mean_exp": lambda x, y: ck.log_mean_exp(x @ y.T),
}
each_loss = pytest.mark.parametrize("name", list(LOSSES))


@each_loss
def test_gradients_of_cached_features_equal_the_whole_ones(name):
    """GradCache: features in chunks without a graph, the loss on all of them, then each chunk again with its part."""
    torch.manual_seed(0)
    image, text = nn.Linear(5, D), nn.Linear(7, D)
    x, y = torch.randn(N, 5), torch.randn(N, 7)

    def features(chunk: slice) -> tuple[Tensor, Tensor]:
        return F.normalize(image(x[chunk]), dim=1), F.normalize(text(y[chunk]), dim=1)

    parameters = [*image.parameters(), *text.parameters()]
    whole = LOSSES[name](*features(slice(None)))
    expected = torch.autograd.grad(whole, parameters)

    chunks = [slice(start, start + 7) for start in range(0, N, 7)]
    with torch.no_grad():
        cached = [torch.cat(parts) for parts in zip(*map(features, chunks), strict=True)]
    cached = leaves(*cached)
    loss = LOSSES[name](*cached)
    loss.backward()
    for chunk in chunks:
        for part, whole_part in zip(features(chunk), cached, strict=True):
            assert whole_part.grad is not None
            part.backward(whole_part.grad[chunk])
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close([p.grad for p in parameters], list(expected), rtol=1e-4, atol=1e-6)


@each_loss
def test_runs_when_only_deterministic_algorithms_may(name):
    inputs = towers(N, N, D)
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            x, y = leaves(*inputs)
            value = LOSSES[name](x, y)
            results.append([value.detach(), *torch.autograd.grad(value, (x, y))])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_loss
def test_functional_transforms_are_refused_in_words(name):
    x, y = towers(N, N, D)
    with pytest.raises(RuntimeError, match=r"differentiated by torch.func .* use torch.autograd.grad"):
        torch.func.grad(lambda t: LOSSES[name](t, y))(x)


def test_one_pair():
    x, y = leaves(*towers(1, 1, D))
    for options in ({}, {"group_ids": torch.tensor([3])}, {"weights": torch.ones(1)}, {"reduction": "none"}):
        loss = ck.clip_loss(x, y, 5.0, **options)
        assert loss.sum().item() == 0
        assert all(g.count_nonzero() == 0 for g in torch.autograd.grad(loss.sum(), (x, y)))
        loss = ck.siglip_loss(x, y, 5.0, -1.0, **options)
        torch.testing.assert_close(loss.sum(), F.softplus(1.0 - 5.0 * (x * y).sum()))
    _, metrics = ck.clip_loss(x, y, 5.0, return_metrics=True)
    assert metrics["image_to_text_top1"] == 1 and metrics["negative_logit"].isnan()


def test_shapes_past_32_bits_without_memory():
    """n d, m h and n m above 2^31 (and 2^32): what the operators promise, computed on tensors without memory."""
    n, m, d = 2**33 + 1, 2**34 + 3, 3
    with FakeTensorMode():
        x, y = torch.empty(n, d, requires_grad=True), torch.empty(m, d, requires_grad=True)
        scale = torch.ones((), requires_grad=True)
        rows, cols, positives = dot_lse(x, y, scale, first_positive=2, backend="native")
        assert (rows.shape, cols.shape, positives.shape) == ((n,), (m,), (n,))
        (rows.sum() + cols.sum() + positives.sum()).backward()
        assert x.grad.shape == x.shape and y.grad.shape == y.shape
        total = dot_softplus(x, y, scale, scale, torch.empty(n), torch.empty(m), first_positive=2, backend="native")
        assert [g.shape for g in torch.autograd.grad(total, (x, y, scale))] == [x.shape, y.shape, ()]
        scores = additive_scores(x[: 2**20], y[: 2**20], torch.empty(d), backend="native")
        assert scores.numel() == 2**40
        loss = ck.clip_loss(x[:, :2], torch.empty(n, 2), scale, group_ids=torch.empty(n, dtype=torch.int64))
        assert loss.shape == ()
