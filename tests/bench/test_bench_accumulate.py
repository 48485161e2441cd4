"""`python bench/ accumulate`: every way of a step has the plain one's gradients, parameter by parameter."""

from __future__ import annotations

import pytest
import torch

from bench.experiments import accumulate


@pytest.mark.parametrize("name", ["accumulate", "gradcache"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_way_has_the_gradients_of_the_plain_step(name: str, parts: int) -> None:
    gradients = []
    for way, count in (("plain", 1), (name, parts)):
        p = accumulate.problem(8)
        norm = accumulate.step(p, way, 8, count)
        gradients.append([q.grad for q in p.parameters()])
        assert norm > 0
    for ours, plain in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
