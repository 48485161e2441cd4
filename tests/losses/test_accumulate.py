"""A batch in parts: the gradients of the whole, with dropout, running statistics, critics and ragged parts.

Several ranks are in tests/distributed/test_accumulated.py.
"""

from __future__ import annotations

import gc
import itertools
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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


def test_what_the_loss_does_not_depend_on_has_a_gradient_of_0() -> None:
    """In one part as in several: DDP waits for one of each parameter.  Leaves and views are among the tensors."""
    for rows in (3, 7, 20):  # the last is one part
        torch.manual_seed(1)
        used, unused, scale = torch.nn.Linear(12, 4), torch.nn.Linear(12, 6), torch.nn.Parameter(torch.tensor(2.0))

        def encode(x: Tensor, used: Any = used, unused: Any = unused, scale: Tensor = scale) -> list[Tensor]:
            return [used(x), *unused(x).chunk(2, dim=1), scale]

        value = ck.accumulate(
            encode, IMAGES, lambda x, left, *others: (x[:, :3] * left.detach()).square().mean(), rows=rows
        )
        assert value > 0 and used.weight.grad is not None and used.weight.grad.abs().max() > 0
        for p in (unused.weight, unused.bias, scale):
            assert p.grad is not None and not p.grad.any()
        half = ck.accumulate(encode, IMAGES, lambda x, left, *others: (x[:, :3] * left).mean(), rows=rows)
        assert half.isfinite() and unused.weight.grad[:3].any() and not unused.weight.grad[3:].any()


def test_running_statistics_count_each_row_once() -> None:
    norm = nn.BatchNorm1d(6)
    y = F.normalize(torch.randn(8, 6), dim=1)
    x = torch.randn(8, 6)

    def encode(rows: slice) -> tuple[Tensor, Tensor]:
        return F.normalize(norm(x[rows]), dim=1), y[rows]

    parts = (slice(0, 4), slice(4, 8))
    ck.accumulate(encode, parts, lambda x, y: ck.clip_loss(x, y, 5.0), model=norm)
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


# ------------------------------------------------------------------------------------------- what parts may be
IMAGES, TEXTS = torch.randn(19, 12), torch.randn(19, 10)


def gradients(model: nn.Module, step: Callable[[], Any]) -> list[Tensor]:
    """Of the parameters that have one, after the step."""
    model.zero_grad()
    step()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def in_parts(model: Towers, parts: Any, encode: Callable[[Any], Any] | None = None, **options: Any) -> list[Tensor]:
    encode = encode or (lambda part: model(*part)[:3])
    return gradients(model, lambda: ck.accumulate(encode, parts, ck.clip_loss, **options))


@pytest.fixture
def model() -> Towers:
    torch.manual_seed(3)
    return Towers()


@pytest.fixture
def truth(model: Towers) -> list[Tensor]:
    return gradients(model, lambda: ck.clip_loss(*model(IMAGES, TEXTS)[:3]).backward())


def pairs() -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(IMAGES.split(7), TEXTS.split(7), strict=True)


class Pair(NamedTuple):
    images: Tensor
    texts: Tensor


def test_parts_of_every_kind(model: Towers, truth: list[Tensor]) -> None:
    data = torch.utils.data.TensorDataset(IMAGES, TEXTS)
    named = {"images": IMAGES, "texts": TEXTS, "flag": True}

    def by_name(part: dict[str, Any]) -> dict[str, Tensor]:
        assert part["flag"] is True
        return dict(zip(("image_features", "text_features", "logit_scale"), model(part["images"], part["texts"])[:3]))  # noqa: B905

    found = [
        in_parts(model, list(pairs())),
        in_parts(model, pairs),  # a function that returns an iterator
        in_parts(model, (IMAGES, TEXTS), rows=7),
        in_parts(model, Pair(IMAGES, TEXTS), lambda pair: model(pair.images, pair.texts)[:3], rows=7),
        in_parts(model, named, by_name, rows=7),  # results by name as well
        in_parts(model, torch.cat([IMAGES, TEXTS], 1), lambda t: model(t[:, :12], t[:, 12:])[:3], rows=4),
        in_parts(model, torch.utils.data.DataLoader(data, batch_size=7)),
        in_parts(model, torch.utils.data.DataLoader(data, batch_size=7, shuffle=True)),  # the same order twice
    ]
    for each in found:
        torch.testing.assert_close(each, truth, rtol=1e-4, atol=1e-6)


def test_one_part_is_in_memory_at_a_time(model: Towers, truth: list[Tensor]) -> None:
    class Part:
        def __init__(self, tensors: tuple[Tensor, Tensor]) -> None:
            self.tensors = tensors

    alive: weakref.WeakSet[Part] = weakref.WeakSet()
    most = []

    def load() -> Iterator[Part]:
        for tensors in pairs():
            gc.collect()
            most.append(len(alive))  # before this one
            part = Part(tensors)
            alive.add(part)
            yield part
            del part

    found = in_parts(model, load, lambda part: model(*part.tensors)[:3])
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)
    assert most == [0] * 6  # three parts, twice


def test_group_ids_are_among_the_tensors(model: Towers) -> None:
    ids = torch.arange(19) // 2

    def loss(z: Tensor, y: Tensor, scale: Tensor, group_ids: Tensor) -> Tensor:
        return ck.clip_loss(z, y, scale, group_ids=group_ids)

    whole = gradients(model, lambda: loss(*model(IMAGES, TEXTS)[:3], ids).backward())
    parts = gradients(
        model, lambda: ck.accumulate(lambda p: (*model(*p[:2])[:3], p[2]), (IMAGES, TEXTS, ids), loss, rows=8)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_it(model: Towers, truth: list[Tensor], dtype: torch.dtype) -> None:
    """The weights' casts of the encoding without a graph are not those of the one with it; errors are the step's."""

    def plain() -> None:
        with torch.autocast("cpu", dtype):
            loss = ck.clip_loss(*model(IMAGES, TEXTS)[:3])
        loss.backward()

    def parted() -> None:
        with torch.autocast("cpu", dtype):
            ck.accumulate(lambda part: model(*part)[:3], (IMAGES, TEXTS), ck.clip_loss, rows=5)

    wide = torch.cat([g.flatten() for g in truth])
    errors = [
        (torch.cat([g.flatten() for g in gradients(model, step)]) - wide).norm() / wide.norm()
        for step in (plain, parted)
    ]
    assert 0 < errors[1] <= 1.5 * errors[0] < 0.1


def test_a_backward_is_outside_of_autocast(model: Towers) -> None:
    seen = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return g

    with torch.autocast("cpu", torch.bfloat16):
        ck.accumulate(
            lambda part: Watch.apply(model(*part)[0]),
            (IMAGES, TEXTS),
            lambda z: (Watch.apply(z) @ z.T).float().logsumexp(1).sum(),
            rows=10,
        )
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False] * 3


def test_a_gradient_scaler(model: Towers, truth: list[Tensor]) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    found = gradients(
        model,
        lambda: ck.accumulate(
            lambda part: model(*part)[:3], (IMAGES, TEXTS), lambda *t: scaler.scale(ck.clip_loss(*t)), rows=5
        ),
    )
    torch.testing.assert_close([g / 8 for g in found], truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_encoders(backend: str) -> None:
    """Dropout's random numbers are the same in the graph without gradients and in the one with them.

    Inductor, which draws them its own way, compiles the tower that has dropout.
    """
    torch.manual_seed(3)
    model = Towers(dropout=0.5)
    if backend == "inductor":
        model.image.compile(backend=backend, dynamic=True)  # one graph for parts of any size
    compiled = model if backend == "inductor" else torch.compile(model, backend=backend)
    seen = []

    def encode(part: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        tensors = compiled(*part)[:3]
        seen.append(tensors[0].detach())
        return tensors

    def at_once() -> None:  # the loss of all rows with a graph through all parts
        torch.manual_seed(5)
        columns = zip(*(compiled(*part)[:3] for part in pairs()), strict=True)
        ck.clip_loss(*(torch.cat(c) if c[0].ndim else c[0] for c in columns)).backward()

    def parted() -> None:
        torch.manual_seed(5)
        ck.accumulate(encode, pairs, ck.clip_loss, model=compiled)

    whole, found = gradients(model, at_once), gradients(model, parted)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen[:3], seen[3:], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------- refused in words
def turned(rows: int) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    """The parts forwards, backwards, forwards, ..."""
    times = itertools.count()

    def load() -> Iterator[tuple[Tensor, Tensor]]:
        parts = list(zip(IMAGES[:18].split(rows), TEXTS[:18].split(rows), strict=True))
        return iter(parts[:: -1 if next(times) % 2 else 1])

    return load


def test_parts_that_are_others_the_second_time() -> None:
    with pytest.raises(ValueError, match=r"part \d was encoded to other tensors the second time \(relative diff"):
        in_parts(Towers(), turned(6))
    in_parts(Towers(), turned(6), check=False)
    with pytest.raises(ValueError, match=r"part \d was encoded to other tensors the second time \(other numbers"):
        in_parts(Towers(), turned(10), check=False)


def test_numbers_that_are_not_the_same_for_all_parts() -> None:
    """An auxiliary loss of a part, say, of which the loss sees the first part's."""
    with pytest.raises(ValueError, match="0-d tensors the same for all parts"):
        ck.accumulate(
            lambda x: (x, x.square().mean()), IMAGES.clone().requires_grad_(), lambda x, aux: x.sum() + aux, rows=7
        )


NUMBERS = iter((3, 2))


def fewer() -> Iterator[tuple[Tensor, Tensor]]:
    return iter([(IMAGES, TEXTS)] * next(NUMBERS))


def scaled(part: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return *part, torch.ones(1)


def first_differs(part: tuple[Tensor, Tensor], seen: list[int] = []) -> tuple[Tensor, ...]:  # noqa: B006
    seen.append(0)
    return part[: 1 + len(seen) % 2]


REFUSED: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
    "parts is a generator, which can be gone through once": (TypeError, lambda: refused(pairs())),
    "parts is one Tensor: give rows=": (TypeError, lambda: refused(IMAGES)),
    "parts is one dict: give rows=": (TypeError, lambda: refused({"images": IMAGES})),
    "parts must be an iterable or a function": (TypeError, lambda: refused(7)),
    "parts returned int": (TypeError, lambda: refused(lambda: 7)),
    "parts is empty": (ValueError, lambda: refused([])),
    "rows must be positive, got 0": (ValueError, lambda: refused((IMAGES, TEXTS), rows=0)),
    "different numbers of rows: [18, 19]": (ValueError, lambda: refused((IMAGES, TEXTS[:18]), rows=4)),
    "parts must be a tensor, or a dictionary": (TypeError, lambda: refused(["a caption"], rows=1)),
    "parts were 3 the first time and 2 the second": (ValueError, lambda: refused(fewer)),
    "encode must return tensors, got 1: str": (TypeError, lambda: refused(pairs, lambda p: (p[0], "text"))),
    "encode must return tensors, got NoneType": (TypeError, lambda: refused(pairs, lambda p: None)),
    "encode returned no tensor with rows": (ValueError, lambda: refused(pairs, lambda p: torch.tensor(1.0))),
    "a scale for all rows must be 0-d": (ValueError, lambda: refused(pairs, scaled)),
    "encode returned 2 tensors": (ValueError, lambda: refused(pairs, first_differs)),
    "loss must return a 0-d tensor, got one of shape (19, 12)": (
        ValueError,
        lambda: refused(pairs, loss=lambda x, y: x),
    ),
    "model must be a module or several, got str": (TypeError, lambda: refused(pairs, model=["towers"])),
}


def refused(parts: Any, encode: Callable[[Any], Any] = lambda part: part, loss: Any = None, **options: Any) -> None:
    ck.accumulate(
        encode, parts, loss or (lambda x, y: (x.sum() + y.sum()) * x.new_ones(()).requires_grad_()), **options
    )


@pytest.mark.parametrize("words", REFUSED)
def test_refuses_in_words(words: str) -> None:
    kind, call = REFUSED[words]
    with pytest.raises(kind, match=re.escape(words)):
        call()
