"""A batch in parts: the gradients of the whole, with dropout, running statistics, critics and ragged parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cibr_kernels as ck


class Towers(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Dropout(dropout))
        self.text = nn.Linear(10, 6)
        self.project = nn.Linear(16, 6)
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.tensor(-3.0), requires_grad=False)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        x = self.image(images)
        z, y = F.normalize(self.project(x), dim=1), F.normalize(self.text(texts), dim=1)
        return z, y, self.log_scale.exp(), self.frozen, x, texts


def clip(z: Tensor, y: Tensor, scale: Tensor, bias: Tensor, x: Tensor, texts: Tensor) -> Tensor:
    return ck.clip_loss(z, y, scale)


def siglip(z: Tensor, y: Tensor, scale: Tensor, bias: Tensor, x: Tensor, texts: Tensor) -> Tensor:
    return ck.siglip_loss(z, y, scale, bias)


def cibr() -> tuple[Callable[..., Tensor], nn.Module]:
    critics = ck.nn.CIBRLoss(6, 16, 10, hidden=8).train()
    return lambda z, y, scale, bias, x, texts: critics(z, y, scale, x, texts), critics


@pytest.mark.parametrize("name", ["clip", "siglip", "cibr"])
@pytest.mark.parametrize("sizes", [[7, 7, 5], [1, 18], [19]])
def test_gradients_are_those_of_the_whole_batch(name: str, sizes: list[int]) -> None:
    images, texts = torch.randn(19, 12), torch.randn(19, 10)
    found = []
    for parted in (False, True):
        torch.manual_seed(1)
        model = Towers()
        loss, critics = cibr() if name == "cibr" else ({"clip": clip, "siglip": siglip}[name], nn.Module())
        torch.manual_seed(2)  # of the noise, which the loss draws for the whole batch
        if parted:
            rows = torch.arange(19).split(sizes)
            value = ck.accumulate(lambda part: model(images[part], texts[part]), rows, loss)  # noqa: B023
            assert not value.requires_grad
        else:
            value = loss(*model(images, texts))
            value.backward()
        gradients = [p.grad for p in (*model.parameters(), *critics.parameters())]
        found.append((value.detach(), gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_a_part_sees_the_same_random_numbers_twice_and_the_sequence_goes_on() -> None:
    """Dropout: the gradient is that of the features which the loss has seen.  After it comes what would have come."""
    model, images, texts = Towers(dropout=0.5), torch.randn(8, 12), torch.randn(8, 10)
    seen: list[Tensor] = []

    def encode(rows: slice) -> tuple[Tensor, ...]:
        tensors = model(images[rows], texts[rows])
        seen.append(tensors[4].detach())
        return tensors

    parts = (slice(0, 3), slice(3, 8))
    torch.manual_seed(0)
    ck.accumulate(encode, parts, clip)
    following = torch.rand(3)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    torch.manual_seed(0)
    for rows in parts:
        encode(rows)
    assert torch.equal(seen[0], seen[4]) and torch.equal(torch.rand(3), following)


def test_running_statistics_count_each_row_once() -> None:
    norm = nn.BatchNorm1d(6)
    y = F.normalize(torch.randn(8, 6), dim=1)
    x = torch.randn(8, 6)

    def encode(rows: slice) -> tuple[Tensor, Tensor]:
        return F.normalize(norm(x[rows]), dim=1), y[rows]

    parts = (slice(0, 4), slice(4, 8))
    ck.accumulate(encode, parts, lambda x, y: ck.clip_loss(x, y, 5.0), buffers=norm.buffers())
    once = nn.BatchNorm1d(6)
    for rows in parts:
        once(x[rows])
    torch.testing.assert_close(dict(norm.named_buffers()), dict(once.named_buffers()))


def test_a_feature_that_is_a_view_does_not_keep_what_it_is_a_view_of() -> None:
    """As `x[:, 0]`, a ViT's class token, is of all tokens."""
    kept: list[Any] = []
    w = torch.randn(6, 6, requires_grad=True)

    def encode(rows: slice) -> tuple[Tensor, Tensor]:
        tokens = (torch.ones(4, 50, 6) @ w).contiguous()
        return tokens[:, 0], tokens[:, 1]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        kept.append(x.untyped_storage().nbytes())
        return ck.clip_loss(x, y, 1.0)

    ck.accumulate(encode, (slice(0, 4), slice(4, 8)), loss)
    assert kept == [8 * 6 * 4]
