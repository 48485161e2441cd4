"""siglip_loss with `Negatives`, against its definition written out over all pairs, each of them once."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from cases import each_dtype, leaves, towers
from torch import Tensor

import cibr_kernels as ck
from cibr_kernels import testing
from cibr_kernels.losses.clip.options import DIRECTIONS

N, D, K = 37, 24, 3
BOTH = DIRECTIONS[:2]
CHOICES = {
    "own texts": {"texts": K},
    "own texts, images": {"texts": K, "images": 2},
    "images with images": {"directions": (*BOTH, "image_to_image")},
    "all sides": {"directions": DIRECTIONS},
    "everything": {"directions": DIRECTIONS, "texts": 2, "images": K},
}
each_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())


def make(choice: dict, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    x, y = towers(N, N, D)
    torch.manual_seed(1)
    tensors = {"x": x, "y": y, "scale": torch.tensor(10.0), "bias": torch.tensor(-4.0)}
    for name in ("texts", "images"):
        if name in choice:
            tensors[name] = F.normalize(torch.randn(N, choice[name], D), dim=2)
    wide = torch.promote_types(dtype, torch.float32)
    return {name: leaves(t, dtype=dtype if t.dim() else wide)[0] for name, t in tensors.items()}


def ours(t: dict[str, Tensor], choice: dict, **options) -> Tensor:
    own = {name: t[name] for name in ("texts", "images") if name in t}
    negatives = ck.Negatives(**{**choice, **own})
    return ck.siglip_loss(t["x"], t["y"], t["scale"], t["bias"], negatives=negatives, **options)


def definition(t: dict[str, Tensor], choice: dict, ids: Tensor | None, weights: Tensor) -> Tensor:
    """-> (n,) losses without weights are the case of ones: (n,) of which row i has half of each of its pairs."""
    t = {name: v if v.dtype == torch.float64 else v.float() for name, v in t.items()}
    same = torch.eye(N, dtype=torch.bool) if ids is None else ids[:, None] == ids
    pair_weights = (weights[:, None] + weights) / 2

    def of_negatives(a: Tensor, b: Tensor) -> Tensor:
        found = F.softplus(t["scale"] * a @ b.T + t["bias"])
        return pair_weights * found.masked_fill(same, 0.0)

    between = of_negatives(t["x"], t["y"])
    losses = (between.sum(0) + between.sum(1)) / 2
    losses = losses + weights * F.softplus(-t["scale"] * (t["x"] * t["y"]).sum(1) - t["bias"])
    for name, side in (("image_to_image", t["x"]), ("text_to_text", t["y"])):
        if name in choice.get("directions", BOTH):
            losses = losses + of_negatives(side, side).triu().sum(0) / 2 + of_negatives(side, side).triu().sum(1) / 2
    for name, side in (("texts", t["x"]), ("images", t["y"])):
        if name in t:
            logits = t["scale"] * torch.einsum("nd,nkd->nk", side, t[name]) + t["bias"]
            losses = losses + weights * F.softplus(logits).sum(1)
    return losses


@each_choice
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("more", [(), ("ids",), ("weights",), ("ids", "weights")], ids="+".join)
def test_equals_the_definition_in_float64(choice, reduction, more):
    t = make(choice)
    ids = torch.randint(0, 20, (N,)) if "ids" in more else None
    weights = torch.rand(N, dtype=torch.float64) if "weights" in more and reduction != "none" else None
    options = {"group_ids": ids, "weights": weights, "reduction": reduction}
    ones = torch.ones(N, dtype=torch.float64)
    truth = definition(t, choice, ids, ones if weights is None else weights)
    actual, upstream = ours(t, choice, **options), torch.rand(N, dtype=torch.float64)
    if reduction == "none":
        torch.testing.assert_close(actual, truth, rtol=1e-10, atol=1e-12)
        actual, truth = (actual * upstream).sum(), (truth * upstream).sum()
    else:
        truth = truth.sum() if reduction == "sum" else truth.sum() / (N if weights is None else weights.sum())
    torch.testing.assert_close(actual, truth, rtol=1e-10, atol=1e-12)
    for name, a, b in zip(t, *(torch.autograd.grad(v, t.values()) for v in (actual, truth)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@each_choice
@each_dtype
def test_kernels_against_the_definition(choice, dtype):
    t = make(choice, dtype)
    wide = {name: v.detach().double().requires_grad_() for name, v in t.items()}
    values = [ours(t, choice), *(definition(u, choice, None, u["x"].new_ones(N)).mean() for u in (t, wide))]
    held = [(v, *torch.autograd.grad(v, list(u.values()))) for v, u in zip(values, (t, t, wide), strict=True)]
    for name, *triple in zip(("loss", *t), *held, strict=True):
        testing.assert_close(name, *triple, terms=4 * N * N + D, exponent=10.0, features=dtype)


def test_no_matrix_of_all_pairs_is_stored():
    n, kept = 2048, []
    x, y = leaves(*towers(n, n, 8))
    negatives = ck.Negatives(directions=DIRECTIONS, texts=torch.randn(n, 2, 8))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ck.siglip_loss(x, y, 5.0, -5.0, negatives=negatives).backward()
    assert max(kept) <= 16 * n


@pytest.mark.parametrize("made", [ck.nn.ClipLoss, ck.nn.SigLipLoss])
def test_the_modules_take_negatives(made):
    """Of the constructor for every call, or of a call; those of a call take the place of the others."""
    x, y = towers(N, N, D)
    function = ck.clip_loss if made is ck.nn.ClipLoss else ck.siglip_loss
    sides, own = ck.Negatives(directions=DIRECTIONS), ck.Negatives(texts=torch.randn(N, K, D))
    queue, ids = {"text_negatives": torch.randn(5, D), "image_negatives": torch.randn(4, D)}, torch.arange(N) // 2
    module = made(negatives=sides)
    plain = function(x, y, 5.0, -1.0)
    for options in ({}, {"negatives": own}, {"group_ids": ids}, queue):
        value = module(x, y, 5.0, -1.0, **options)
        torch.testing.assert_close(value, function(x, y, 5.0, -1.0, **{"negatives": sides, **options}))
        assert value != plain
    if made is ck.nn.ClipLoss:
        soft = ck.SoftTargets(guide=torch.randn(N, 4), scale=1.0, share=0.5)
        value = made()(x, y, 5.0, soft_targets=soft, output_dict=True)["contrastive_loss"]
        torch.testing.assert_close(value, ck.clip_loss(x, y, 5.0, soft_targets=soft))


REFUSED = {
    "siglip_loss needs both 'image_to_text' and 'text_to_image'": {"directions": ("image_to_text",)},
    "siglip_loss has no joint": {"joint": True},
    "siglip_loss has no hardness": {"hardness": 1.0},
    "siglip_loss has no margin": {"margin": 0.1},
    "must have shape (4, k, 3)": {"texts": torch.zeros(4, 3)},
}


@pytest.mark.parametrize("words", REFUSED)
def test_refuses_in_words(words):
    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match=re.escape(words)):
        ck.siglip_loss(x, x, 5.0, negatives=ck.Negatives(**REFUSED[words]))


def test_refuses_several_positives():
    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match="negatives and group_mode 'positives' do not go together"):
        ck.siglip_loss(x, x, 5.0, negatives=ck.Negatives(), group_ids=torch.arange(4), group_mode="positives")
