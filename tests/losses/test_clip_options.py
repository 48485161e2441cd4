"""clip_loss with groups, extra negatives, label smoothing, weights, temperatures, reductions and metrics."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import each_dtype, leaves, towers
from contrastive import gradients, with_gradients, with_options
from torch import Tensor

import cibr_kernels as ck
from cibr_kernels import testing
from cibr_kernels.losses.clip.reference import direction

N, D = 37, 24
OPTIONS = {
    "mask": {"ids": True},
    "positives": {"ids": True, "mode": "positives"},
    "smoothing": {"smoothing": 0.1},
    "text queue": {"text_negatives": 11},
    "image queue": {"image_negatives": 50},
    "queues": {"text_negatives": 5, "image_negatives": 9},
    "temperatures": {"temperatures": True},
    "mask, smoothing, queue": {"ids": True, "smoothing": 0.2, "text_negatives": 7},
    "positives, smoothing, queues": {
        "ids": True,
        "mode": "positives",
        "smoothing": 0.2,
        "text_negatives": 7,
        "image_negatives": 3,
    },
    "everything": {
        "ids": True,
        "mode": "positives",
        "smoothing": 0.2,
        "temperatures": True,
        "text_negatives": 7,
        "image_negatives": 3,
    },
    "mask, temperatures, queue": {"ids": True, "temperatures": True, "image_negatives": 6},
}
each_option = pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS.keys())


def make(option: dict, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], Tensor | None]:
    """Features, scale and negatives that require gradients, by name; the groups."""
    x, y = towers(N, N, D)
    torch.manual_seed(1)
    tensors = {"x": x, "y": y, "scale": torch.rand(N) * 9 + 1 if option.get("temperatures") else torch.tensor(10.0)}
    for name in ("text_negatives", "image_negatives"):
        if name in option:
            tensors[name] = F.normalize(torch.randn(option[name], D), dim=1)
    made = {
        name: leaves(t, dtype=dtype if t.dim() == 2 else torch.promote_types(dtype, torch.float32))[0]
        for name, t in tensors.items()
    }
    return made, torch.randint(0, 20, (N,)) if option.get("ids") else None


def ours(tensors: dict[str, Tensor], ids: Tensor | None, option: dict, **more):
    return with_options(ck.clip_loss, tensors, ids, option, label_smoothing=option.get("smoothing", 0.0), **more)


def expected(tensors: dict[str, Tensor], ids: Tensor | None, option: dict) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """-> losses (n,) of both directions' mean, each direction's, the largest other logits of each."""
    shared = option.get("mode") == "positives", option.get("smoothing", 0.0)
    x, y = (t if t.dtype == torch.float64 else t.float() for t in (tensors["x"], tensors["y"]))
    extra = {name: t.to(x.dtype) for name, t in tensors.items() if name.endswith("negatives")}
    image, top = direction(x, y, tensors["scale"], extra.get("text_negatives"), ids, *shared)
    text, text_top = direction(y, x, tensors["scale"], extra.get("image_negatives"), ids, *shared)
    return (image + text) / 2, [image, text], [top, text_top]


@each_option
@pytest.mark.parametrize("one_way", [False, True])
def test_equals_the_definition_in_float64(option, one_way):
    if one_way and "image_negatives" in option:
        option = {k: v for k, v in option.items() if k != "image_negatives"}
    tensors, ids = make(option)
    both, (image, _), _ = expected(tensors, ids, option)
    truth, weights = image if one_way else both, torch.rand(N, dtype=torch.float64)
    actual = ours(tensors, ids, option, reduction="none", weights=weights, one_way=one_way)
    torch.testing.assert_close(actual, truth * weights)
    every = gradients(actual.sum(), tensors), gradients((truth * weights).sum(), tensors)
    torch.testing.assert_close(*every)


@each_option
@each_dtype
def test_kernels_against_the_definition(option, dtype):
    tensors, ids = make(option, dtype)
    eager = expected(tensors, ids, option)[0].mean()
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    truth = expected(wide, ids, option)[0].mean()
    value = ours(tensors, ids, option)
    assert value.dtype == torch.float32
    for name, a, e, t in with_gradients(tensors, wide, value, eager, truth):
        testing.assert_close(name, a, e, t, terms=2 * N + D, exponent=10.0, features=dtype)


@each_option
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_metrics(option, backend):
    tensors, ids = make(option, torch.float32)
    tensors["x"].data[3] = tensors["y"].data[5]  # an image that is nearer to another text than to its own
    bias = torch.tensor(-3.0)
    plain = ours(tensors, ids, option, backend=backend, logit_bias=bias)
    loss, metrics = ours(tensors, ids, option, backend=backend, logit_bias=bias, return_metrics=True)
    assert torch.equal(loss, plain) and not any(m.requires_grad or m.dim() for m in metrics.values())
    _, _, highest = expected(tensors, ids, option)
    x, y, scale = (tensors[k].detach() for k in ("x", "y", "scale"))
    positives = scale * (x * y).sum(1)
    for name, top in zip(("image_to_text_top1", "text_to_image_top1"), highest, strict=True):
        assert metrics[name].item() == pytest.approx((positives > top).float().mean().item())
        assert metrics[name].item() < 1
    assert metrics["positive_logit"].item() == pytest.approx(positives.mean().item() - 3, rel=1e-5)
    others = []
    for a, b, extra in ((x, y, tensors.get("text_negatives")), (y, x, tensors.get("image_negatives"))):
        columns = b if extra is None else torch.cat([b, extra.detach()])
        logits = scale.reshape(-1, 1) * (a @ columns.T)
        others.append((logits.sum() - positives.sum()) / (logits.numel() - N))
    assert metrics["negative_logit"].item() == pytest.approx(torch.stack(others).mean().item() - 3, rel=1e-4)


def test_a_batch_without_other_options_is_cross_entropy():
    tensors, _ = make({})
    logits = tensors["scale"] * tensors["x"] @ tensors["y"].T
    labels, weights = torch.arange(N), torch.rand(N, dtype=torch.float64)
    for smoothing, reduction in itertools.product((0.0, 0.3), ("mean", "sum", "none")):
        each = [F.cross_entropy(t, labels, reduction="none", label_smoothing=smoothing) for t in (logits, logits.T)]
        truth = (each[0] + each[1]) / 2 * weights
        truth = {"mean": truth.sum() / weights.sum(), "sum": truth.sum(), "none": truth}[reduction]
        value = ours(tensors, None, {"smoothing": smoothing}, weights=weights, reduction=reduction)
        torch.testing.assert_close(value, truth)


def test_weights_have_gradients_and_doubling_them_changes_nothing():
    tensors, _ = make({})
    (weights,) = leaves(torch.rand(N, dtype=torch.float64))
    value = ours(tensors, None, {}, weights=weights)
    torch.testing.assert_close(value, ours(tensors, None, {}, weights=2 * weights))
    (grad,) = torch.autograd.grad(value, weights)
    each = ours(tensors, None, {}, reduction="none")
    torch.testing.assert_close(grad, (each - value) / weights.sum())


def test_masked_duplicates_count_nothing():
    """A batch in which every pair comes twice has the loss of the batch without the copies."""
    x, y = (t.double() for t in towers(9, 9, 5))
    twice = [torch.cat([t, t]) for t in (x, y)]
    value = ck.clip_loss(*twice, 7.0, group_ids=torch.arange(9).repeat(2))
    once, copies = ck.clip_loss(x, y, 7.0), ck.clip_loss(*twice, 7.0)
    assert copies > once  # the copies are negatives
    logits = 7.0 * x @ y.T
    rest = [torch.cat([t, t.masked_fill(torch.eye(9, dtype=torch.bool), -torch.inf)], 1) for t in (logits, logits.T)]
    truth = sum((t.logsumexp(1) - logits.diagonal()).mean() for t in rest) / 2
    torch.testing.assert_close(value, truth)


def test_groups_of_one_are_no_groups():
    for dtype in (torch.float32, torch.float64):
        x, y = (t.to(dtype) for t in towers(N, N, D))
        for mode in ("mask", "positives"):
            ids = torch.randperm(N) * 10**12 - 5 * 10**12
            torch.testing.assert_close(
                ck.clip_loss(x, y, 20.0, group_ids=ids, group_mode=mode), ck.clip_loss(x, y, 20.0), rtol=1e-6, atol=0
            )


def test_one_group_has_no_negatives():
    x, y = leaves(*towers(6, 6, 4))
    loss = ck.clip_loss(x, y, 5.0, group_ids=torch.zeros(6, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and x.grad.count_nonzero() == y.grad.count_nonzero() == 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"group_ids": torch.zeros(5)}, TypeError, "group_ids must be a tensor of integers, got torch.float32"),
        ({"group_ids": torch.zeros(4, dtype=torch.long)}, ValueError, r"group_ids must have shape \(5,\)"),
        ({"group_mode": "supcon"}, ValueError, "group_mode is 'supcon'; known are 'mask', 'positives'"),
        ({"weights": torch.ones(5, 1)}, ValueError, r"weights must have shape \(5,\)"),
        ({"weights": torch.ones(5, dtype=torch.long)}, TypeError, "weights must be a floating tensor"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must lie in \[0, 1\), got 1.0"),
        ({"reduction": "max"}, ValueError, "reduction is 'max'; known are 'mean', 'sum', 'none'"),
        ({"text_negatives": torch.ones(3, 4)}, ValueError, "text_negatives has width 4 but image_features has width 3"),
        ({"text_negatives": torch.ones(3)}, ValueError, "text_negatives must be 2-d"),
        ({"text_negatives": torch.ones(3, 3).double()}, TypeError, "text_negatives is torch.float64 on cpu"),
        ({"one_way": True, "image_negatives": torch.ones(2, 3)}, ValueError, "image_negatives are candidates of text"),
        ({"strategy": "ring", "text_negatives": torch.ones(2, 3)}, ValueError, "strategy 'ring' has no extra"),
        ({"logit_scale": torch.ones(4)}, ValueError, "logit_scale must have one element, or 5, one per row"),
        ({"logit_scale": torch.tensor([1.0, 2, 3, 4, -5])}, ValueError, "logit_scale must be positive"),
    ],
)
def test_refusals(options, error, words):
    x = torch.ones(5, 3)
    with pytest.raises(error, match=words):
        ck.clip_loss(x, x, options.pop("logit_scale", 5.0), **options)


@pytest.mark.parametrize(
    ("option", "backend"),
    [
        ("mask, smoothing, queue", "aot_eager"),
        ("positives, smoothing, queues", "aot_eager"),
        ("temperatures", "aot_eager"),
        ("everything", "inductor"),
    ],
)
def test_compiles_whole(option, backend):
    option = OPTIONS[option]
    tensors, ids = make(option, torch.float32)

    def loss():
        value, metrics = ours(tensors, ids, option, return_metrics=True)
        return value, metrics["image_to_text_top1"]

    eager, compiled = loss(), torch.compile(loss, fullgraph=True, backend=backend)()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradients(compiled[0], tensors), gradients(eager[0], tensors), rtol=1e-4, atol=1e-6)
