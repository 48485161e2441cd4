"""siglip_loss: its definition, its options, its passes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import Recorded, each_dtype, leaves, towers
from contrastive import gradients, with_gradients, with_options
from torch import Tensor

import cibr_kernels as ck
from cibr_kernels import testing
from cibr_kernels.losses.siglip.reference import siglip_loss as reference

N, D = 37, 24
OPTIONS = {
    "plain": {},
    "mask": {"ids": True},
    "positives": {"ids": True, "mode": "positives"},
    "queues": {"text_negatives": 11, "image_negatives": 50},
    "positives, queue": {"ids": True, "mode": "positives", "image_negatives": 4},
}
each_option = pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS.keys())


def make(
    option: dict, dtype: torch.dtype = torch.float64, bias: float = -4.0
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Features, scale, bias and negatives that require gradients, by name; the groups."""
    x, y = towers(N, N, D)
    torch.manual_seed(1)
    extra = {
        name: F.normalize(torch.randn(option[name], D), dim=1)
        for name in ("image_negatives", "text_negatives")
        if name in option
    }
    made = {"x": x, "y": y, **extra}
    tensors = {name: leaves(t, dtype=dtype)[0] for name, t in made.items()}
    wide = torch.promote_types(dtype, torch.float32)
    tensors |= {"scale": leaves(torch.tensor(10.0, dtype=wide))[0], "bias": leaves(torch.tensor(bias, dtype=wide))[0]}
    return tensors, torch.randint(0, 20, (N,)) if option.get("ids") else None


def ours(tensors: dict[str, Tensor], ids: Tensor | None, option: dict, **more):
    return with_options(ck.siglip_loss, tensors, ids, option, **more)


def expected(tensors: dict[str, Tensor], ids: Tensor | None, option: dict) -> Tensor:
    return reference(
        *(tensors[k] for k in ("x", "y", "scale", "bias")),
        ids,
        option.get("mode") == "positives",
        tensors.get("image_negatives"),
        tensors.get("text_negatives"),
    )


def test_is_the_published_loss():
    tensors, _ = make({})
    logits = tensors["scale"] * tensors["x"] @ tensors["y"].T + tensors["bias"]
    labels = 2 * torch.eye(N, dtype=torch.float64) - 1
    truth = -F.logsigmoid(labels * logits).sum() / N
    torch.testing.assert_close(ours(tensors, None, {}), truth)
    torch.testing.assert_close(expected(tensors, None, {}).mean(), truth)


@each_option
def test_equals_the_definition_in_float64(option):
    tensors, ids = make(option)
    (weights,) = leaves(torch.rand(N, dtype=torch.float64))
    for used, reduction in itertools.product((None, weights), ("mean", "sum", "none")):
        losses = expected(tensors, ids, option)
        truth = losses if used is None else losses * used
        if reduction == "mean":
            truth = truth.mean() if used is None else truth.sum() / used.sum()
        truth = truth.sum() if reduction == "sum" else truth
        actual = ours(tensors, ids, option, weights=used, reduction=reduction)
        if used is not None and reduction == "none":  # pair (i, j) counts for the mean of i and j only in sums
            torch.testing.assert_close(actual, truth)
            continue
        torch.testing.assert_close(actual, truth)
        wanted = tensors if used is None else {**tensors, "weights": used}
        torch.testing.assert_close(gradients(actual.sum(), wanted), gradients(truth.sum(), wanted))


@each_option
@each_dtype
@pytest.mark.parametrize("bias", [-10.0, 15.0])
def test_kernels_against_the_definition(option, dtype, bias):
    tensors, ids = make(option, dtype, bias)
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    for reduction in ("mean", "none"):
        upstream = torch.rand(N) if reduction == "none" else torch.full((N,), 1 / N)
        eager = (expected(tensors, ids, option) * upstream).sum()
        truth = (expected(wide, ids, option) * upstream).sum()
        value = ours(tensors, ids, option, reduction=reduction)
        value = value if reduction == "mean" else (value * upstream).sum()
        assert value.dtype == torch.float32
        cosines = (wide["x"] @ wide["y"].T).detach()
        weights = (10 * cosines + bias).sigmoid() * (upstream[:, None] + upstream) / 2
        for name, a, e, t in with_gradients(tensors, wide, value, eager, truth):
            # cosines of both signs cancel in dscale: measured against the sum of absolute terms
            magnitude = (weights * cosines).abs().sum().item() if name == "scale" else 0.0
            testing.assert_close(
                f"{name} of {reduction}", a, e, t, terms=2 * N + D, exponent=25.0, features=dtype, magnitude=magnitude
            )


def test_gradients_are_made_in_the_forward_and_only_when_needed():
    tensors, _ = make({}, torch.float32)
    with Recorded() as seen:
        ours(tensors, None, {}).backward()
    assert [name for name, _, _ in seen.calls] == ["dot_softplus_total", "dot_softplus_scale"]
    with torch.no_grad(), Recorded() as seen:
        ours(tensors, None, {})
    ((_, (_, _, _, dx, dy, _, _)),) = seen.named("dot_softplus_total")
    assert dx.numel() == dy.numel() == 0
    frozen = {name: t.detach().requires_grad_(name == "bias") for name, t in tensors.items()}
    with Recorded() as seen:
        ours(frozen, None, {}).backward()
    ((_, (_, _, _, dx, dy, _, _)),) = seen.named("dot_softplus_total")
    assert dx.numel() and not dy.numel()
    torch.testing.assert_close(frozen["bias"].grad, tensors["bias"].grad)


@each_option
def test_metrics(option):
    tensors, ids = make(option, torch.float32)
    loss, metrics = ours(tensors, ids, option, return_metrics=True)
    assert torch.equal(loss, ours(tensors, ids, option))
    logits = tensors["scale"] * tensors["x"] @ tensors["y"].T + tensors["bias"]
    truth = {
        "positive_logit": logits.diagonal().mean(),
        "negative_logit": (logits.sum() - logits.diagonal().sum()) / (N * N - N),
    }
    assert not any(m.requires_grad for m in metrics.values())
    for name, value in truth.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"strategy": "ring", "reduction": "none"}, ValueError, "strategy 'ring' gives a mean or a sum"),
        ({"group_mode": "both"}, ValueError, "group_mode is 'both'; known are 'mask', 'positives'"),
        ({"text_negatives": torch.ones(3, 4)}, ValueError, "text_negatives has width 4"),
        ({"logit_scale": -1.0}, ValueError, "logit_scale must be positive"),
        ({"logit_bias": torch.ones(2)}, ValueError, "logit_bias must have one element"),
    ],
)
def test_refusals(options, error, words):
    x = torch.ones(5, 3)
    with pytest.raises(error, match=words):
        ck.siglip_loss(x, x, options.pop("logit_scale", 5.0), options.pop("logit_bias", -5.0), **options)


def test_not_a_number_is_not_hidden():
    for value in (float("nan"), float("inf")):
        x, y = towers(5, 5, 4)
        x[2, 1] = value
        assert ck.siglip_loss(x, y, 5.0, -5.0).isnan()


def test_compiles_whole():
    tensors, ids = make(OPTIONS["positives, queue"], torch.float32)

    def loss():
        value, metrics = ours(tensors, ids, OPTIONS["positives, queue"], return_metrics=True)
        return value, metrics["negative_logit"]

    eager, compiled = loss(), torch.compile(loss, fullgraph=True)()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradients(compiled[0], tensors), gradients(eager[0], tensors), rtol=1e-4, atol=1e-6)
