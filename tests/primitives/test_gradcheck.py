"""The specification against finite differences, in float64."""

from __future__ import annotations

import pytest
import torch
from rectangular import rectangular_clip_loss
from torch import Tensor
from torch.autograd import gradcheck

import cibr_kernels as ck
from cibr_kernels.information.dot_moments import dot_moments
from cibr_kernels.information.estimators import BOUNDS
from cibr_kernels.primitives.additive.activations import ACTIVATIONS
from cibr_kernels.primitives.additive.moments.op import additive_moments
from cibr_kernels.primitives.additive.scores.op import additive_scores

WEIGHTS = [(1.0, -1.0), (0.0, 1.0), (1.0, 0.0), (-0.3, 2.1)]
each_diagonal = pytest.mark.parametrize("include", [False, True], ids=["exclude", "include"])


def doubles(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def check(f, *inputs: Tensor) -> None:
    assert gradcheck(f, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=False)


@pytest.mark.parametrize("one_way", [False, True])
@pytest.mark.parametrize(("n", "m", "first_positive"), [(1, 1, 0), (4, 4, 0), (3, 7, 2)])
def test_clip_loss(n, m, first_positive, one_way):
    x, y = doubles((n, 3), (m, 3))
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    check(
        lambda *t: rectangular_clip_loss(*t, first_positive=first_positive, one_way=one_way, backend="reference"),
        x,
        y,
        scale,
    )


@pytest.mark.parametrize("mode", ["mask", "positives"])
@pytest.mark.parametrize("temperatures", [False, True])
def test_clip_loss_with_every_option(mode, temperatures):
    x, y, more_x, more_y = doubles((5, 3), (5, 3), (2, 3), (4, 3))
    scale, weights = (torch.rand(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = scale if temperatures else torch.tensor(1.7, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor, y: Tensor, scale: Tensor, weights: Tensor, more_x: Tensor, more_y: Tensor) -> Tensor:
        return ck.clip_loss(
            x,
            y,
            scale,
            group_ids=torch.tensor([3, 1, 3, 0, 1]),
            group_mode=mode,
            label_smoothing=0.2,
            weights=weights,
            image_negatives=more_x,
            text_negatives=more_y,
            backend="reference",
        )

    check(loss, x, y, scale, weights, more_x, more_y)


@pytest.mark.parametrize("mode", ["mask", "positives"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_siglip_loss(mode, reduction):
    x, y, more = doubles((5, 3), (5, 3), (2, 3))
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.7, -0.4))
    weights = torch.rand(5, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, weights: Tensor, more: Tensor) -> Tensor:
        return ck.siglip_loss(
            x,
            y,
            scale,
            bias,
            group_ids=torch.tensor([3, 1, 3, 0, 1]),
            group_mode=mode,
            weights=weights,
            image_negatives=more,
            reduction=reduction,
            backend="reference",
        )

    check(loss, x, y, scale, bias, weights, more)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_additive_scores(activation):
    check(
        lambda *t: additive_scores(*t, activation=activation, slope=0.3, backend="reference"),
        *doubles((3, 4), (5, 4), (4,)),
    )


@each_diagonal
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(("n", "m", "first_positive"), [(4, 4, 0), (3, 6, 2)])
def test_dot_moments(n, m, first_positive, weights, include):
    def weighted(f: Tensor, g: Tensor) -> Tensor:
        j, el = dot_moments(f, g, first_positive=first_positive, include_diagonal=include, backend="reference")
        return weights[0] * j + weights[1] * el

    check(weighted, *doubles((n, 3), (m, 3)))


@each_diagonal
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_additive_moments(activation, weights, include):
    def weighted(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        j, el = additive_moments(
            a, b, w, activation=activation, slope=0.3, first_positive=2, include_diagonal=include, backend="reference"
        )
        return weights[0] * j + weights[1] * el

    check(weighted, *doubles((3, 5), (6, 5), (5,)))


@pytest.mark.parametrize("masked", [False, True])
def test_log_mean_exp(masked):
    (scores,) = doubles((4, 5))
    mask = torch.rand(4, 5) < 0.5 if masked else None
    check(lambda s: ck.log_mean_exp(s, mask=mask, backend="reference"), scores)


@pytest.mark.parametrize("negatives", ["all", ck.shifts(2)], ids=str)
@pytest.mark.parametrize("estimator", BOUNDS)
@pytest.mark.parametrize("critic", [ck.nn.ConcatCritic(3, 2, 4, activation="tanh"), ck.nn.SeparableCritic(3, 2, 4, 3)])
def test_mutual_information_and_critic_parameters(critic, estimator, negatives):
    x, z = doubles((5, 3), (5, 2))
    critic.double()

    def estimate(x: Tensor, z: Tensor, *parameters: Tensor) -> Tensor:
        return ck.mutual_information(x, z, critic, estimator=estimator, negatives=negatives, backend="reference")

    check(estimate, x, z, *critic.parameters())


@pytest.mark.parametrize("decomposition", ["markov", "chain", "joint"])
def test_conditional_mutual_information(decomposition):
    z, own, other = doubles((5, 2), (5, 3), (5, 4))
    widths = {"markov": ((3, 2), (4, 2)), "chain": ((7, 2), (4, 2)), "joint": ((3, 6), (3, 4))}[decomposition]
    critics = [ck.nn.ConcatCritic(*w, 4, activation="softplus").double() for w in widths]

    def estimate(*t: Tensor) -> Tensor:
        return ck.conditional_mutual_information(*t, critics, decomposition=decomposition, backend="reference")

    check(estimate, z, own, other)
