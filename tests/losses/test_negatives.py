"""clip_loss with `Negatives` and `SoftTargets`, against their definitions written out over n x n logits."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from cases import each_dtype, leaves, towers
from torch import Tensor

import cibr_kernels as ck
from cibr_kernels import testing
from cibr_kernels.losses.clip.options import DIRECTIONS

N, D, K, G, ALPHA = 37, 24, 3, 6, 4.0
ONE_WAY = ("image_to_text", "image_to_image")
NEGATIVES = {
    "one way": {"directions": ("image_to_text",)},
    "simclr": {"directions": DIRECTIONS},
    "gte": {"directions": DIRECTIONS, "joint": True},
    "qwen3": {"directions": ("image_to_text", "image_to_image", "text_to_text"), "joint": True},
    "text anchors without images": {"directions": ("image_to_text", "text_to_text")},
    "own texts": {"texts": K},
    "own texts, images": {"texts": K, "images": 2, "directions": DIRECTIONS},
    "joint own texts": {"texts": 1, "directions": ONE_WAY, "joint": True},
    "hardness": {"hardness": ALPHA},
    "hardness of own": {"hardness": ALPHA, "hardness_on": "own", "texts": K},
    "hardness in batch": {"hardness": ALPHA, "hardness_on": "in_batch", "texts": K, "directions": DIRECTIONS},
    "margin": {"margin": 0.05, "directions": DIRECTIONS},
    "margin, own, harder": {"margin": 0.0, "hardness": ALPHA, "texts": K, "images": 2, "joint": True},
    "everything": {"margin": 0.1, "hardness": ALPHA, "texts": K, "images": K, "directions": DIRECTIONS, "joint": True},
}
each_choice = pytest.mark.parametrize("choice", NEGATIVES.values(), ids=NEGATIVES.keys())
each_scale = pytest.mark.parametrize("scale", [10.0, "one per pair"])
each_batch = pytest.mark.parametrize("batch", [{}, {"ids": True}, {"queue": 5}], ids=["plain", "groups", "queue"])


def make(choice: dict, scale: float | str, batch: dict, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Leaves by name, and the groups, which are none."""
    x, y = towers(N, N, D)
    torch.manual_seed(1)
    tensors = {"x": x, "y": y, "scale": torch.tensor(scale) if isinstance(scale, float) else torch.rand(N) * 9 + 1}
    for name in ("texts", "images"):
        if name in choice:
            tensors[name] = F.normalize(torch.randn(N, choice[name], D), dim=2)
    if "queue" in batch:
        tensors["queue"] = F.normalize(torch.randn(batch["queue"], D), dim=1)
    wide = torch.promote_types(dtype, torch.float32)
    made = {name: leaves(t, dtype=wide if name == "scale" else dtype)[0] for name, t in tensors.items()}
    return made | ({"ids": torch.randint(0, 20, (N,))} if "ids" in batch else {})


def ours(t: dict[str, Tensor], choice: dict, **more):
    own = {name: t[name] for name in ("texts", "images") if name in t}
    negatives = ck.Negatives(**{**choice, **own})
    return ck.clip_loss(
        t["x"], t["y"], t["scale"], negatives=negatives, group_ids=t.get("ids"), text_negatives=t.get("queue"), **more
    )


def definition(t: dict[str, Tensor], choice: dict) -> Tensor:
    """-> (n,): an exponential a candidate, every logit stored."""
    wide = {name: v if v.dtype in (torch.float64, torch.int64) else v.float() for name, v in t.items()}
    sides, scale = {"image": wide["x"], "text": wide["y"]}, wide["scale"].reshape(-1, 1)
    asked, on = choice.get("directions", DIRECTIONS[:2]), choice.get("hardness_on", "all")
    same, pairs = torch.eye(N, dtype=torch.bool), (wide["x"] * wide["y"]).sum(1, keepdim=True)
    if "ids" in wide:
        same = wide["ids"][:, None] == wide["ids"]

    def logits(cosines: Tensor, place: str) -> Tensor:
        alpha = choice.get("hardness", 0.0) if on in ("all", place) else 0.0
        false = cosines > pairs + choice.get("margin", math.inf)
        return (scale * cosines + alpha * cosines.detach()).masked_fill(false, -math.inf)

    candidates: dict[str, list[Tensor]] = {"image": [], "text": []}
    for name in asked:
        anchor, _, other = name.split("_")
        cosines = sides[anchor] @ sides[other].T
        candidates[anchor].append(logits(cosines, "in_batch").masked_fill(same, -math.inf))
    if "queue" in wide:
        candidates["image"].append(logits(wide["x"] @ wide["queue"].T, "in_batch"))
    for name, anchor in (("texts", "image"), ("images", "text")):
        if name in wide:
            candidates[anchor].append(logits(torch.einsum("nd,nkd->nk", sides[anchor], wide[name]), "own"))
    positive = scale * pairs
    rows = [torch.cat(c, 1) for c in candidates.values() if c]
    rows = [torch.cat(rows, 1)] if choice.get("joint") else rows
    return torch.stack([torch.cat([positive, r], 1).logsumexp(1) - positive[:, 0] for r in rows]).mean(0)


def trained(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: v for name, v in t.items() if v.requires_grad}


@each_choice
@each_scale
@each_batch
def test_equals_the_definition_in_float64(choice, scale, batch):
    t = make(choice, scale, batch)
    weights = torch.rand(N, dtype=torch.float64)
    actual, truth = ours(t, choice, reduction="none"), definition(t, choice)
    torch.testing.assert_close(actual, truth, rtol=1e-10, atol=1e-12)
    for name, a, b in zip(
        trained(t),
        *(torch.autograd.grad((weights * v).sum(), trained(t).values()) for v in (actual, truth)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@each_choice
@each_dtype
def test_kernels_against_the_definition(choice, dtype):
    t = make(choice, 10.0, {}, dtype)
    wide = {name: v.detach().double().requires_grad_() for name, v in t.items()}
    value, eager, truth = ours(t, choice), definition(t, choice).mean(), definition(wide, choice).mean()
    assert value.dtype == torch.float32
    held = [(v, *torch.autograd.grad(v, list(u.values()))) for v, u in ((value, t), (eager, t), (truth, wide))]
    for name, *triple in zip(("loss", *t), *held, strict=True):
        testing.assert_close(name, *triple, terms=4 * N + D, exponent=10.0 + ALPHA, features=dtype)


def test_all_sides_of_two_views_are_simclr():
    x, y = leaves(*towers(N, N, D))
    loss = ck.clip_loss(x, y, 5.0, negatives=ck.Negatives(directions=DIRECTIONS))
    torch.testing.assert_close(loss, ck.nn.NTXentLoss(temperature=0.2)(x, y))


def test_one_row_has_no_negatives_and_no_gradient():
    x, y = leaves(*towers(1, 1, D))
    loss = ck.clip_loss(x, y, 5.0, negatives=ck.Negatives(directions=DIRECTIONS, joint=True))
    loss.backward()
    assert loss.item() == 0 and not x.grad.any() and not y.grad.any()


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("one_way", [False, True])
@each_scale
def test_soft_targets_equal_the_definition(share, one_way, scale):
    t = make({}, scale, {"queue": 5})
    guide = F.normalize(torch.randn(N, G, dtype=torch.float64), dim=1)
    soft = ck.SoftTargets(guide=guide, scale=7.0, share=share)
    actual = ck.clip_loss(
        t["x"], t["y"], t["scale"], soft_targets=soft, one_way=one_way, text_negatives=t["queue"], reduction="none"
    )
    target = (1 - share) * torch.eye(N, dtype=torch.float64) + share * (7 * guide @ guide.T).softmax(1)
    scales = t["scale"].reshape(-1, 1)
    image = scales * (t["x"] @ torch.cat([t["y"], t["queue"]]).T)
    losses = [image.logsumexp(1) - (target * image[:, :N]).sum(1)]
    if not one_way:
        text = scales * (t["y"] @ t["x"].T)
        losses.append(text.logsumexp(1) - (target * text).sum(1))
    truth = torch.stack(losses).mean(0)
    torch.testing.assert_close(actual, truth, rtol=1e-10, atol=1e-12)
    weights = torch.rand(N, dtype=torch.float64)
    for a, b in zip(
        *(torch.autograd.grad((weights * v).sum(), list(t.values())) for v in (actual, truth)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@each_dtype
def test_soft_targets_by_the_kernels(dtype):
    x, y = leaves(*towers(N, N, D), dtype=dtype)
    guide = F.normalize(torch.randn(N, G), dim=1)

    def eager(x: Tensor, y: Tensor, guide: Tensor) -> Tensor:
        target = 0.5 * torch.eye(N, dtype=guide.dtype) + 0.5 * (7 * guide @ guide.T).softmax(1)
        logits = 10 * x.to(guide.dtype) @ y.to(guide.dtype).T
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    soft = ck.SoftTargets(guide=guide, scale=7.0, share=0.5)
    wide = leaves(x, y, dtype=torch.float64)
    values = ck.clip_loss(x, y, 10.0, soft_targets=soft), eager(x, y, guide), eager(*wide, guide.double())
    held = [(v, *torch.autograd.grad(v, t)) for v, t in zip(values, ([x, y], [x, y], wide), strict=True)]
    for name, *triple in zip(("loss", "x", "y"), *held, strict=True):
        testing.assert_close(name, *triple, terms=2 * N + D + G, exponent=10.0, features=dtype)


def test_no_matrix_of_all_pairs_is_stored():
    """The largest tensor that autograd keeps has n rows."""
    n, kept = 2048, []
    x, y = leaves(*towers(n, n, 8))
    negatives = ck.Negatives(directions=DIRECTIONS, hardness=1.0, texts=torch.randn(n, 2, 8))
    soft = ck.SoftTargets(guide=torch.randn(n, 4), scale=1.0, share=0.5)
    before = ck.stash_budget()
    ck.set_stash_budget(0)
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            (ck.clip_loss(x, y, 5.0, negatives=negatives) + ck.clip_loss(x, y, 5.0, soft_targets=soft)).backward()
    finally:
        ck.set_stash_budget(before)
    assert max(kept) <= 16 * n


@pytest.mark.parametrize("options", [{"negatives": ck.Negatives(directions=DIRECTIONS, hardness=2.0)}, {"soft": 1}])
def test_compiled(options):
    def f(x: Tensor, y: Tensor, guide: Tensor) -> Tensor:
        soft = {"soft_targets": ck.SoftTargets(guide=guide, scale=2.0, share=0.5)} if "soft" in options else options
        return ck.clip_loss(x, y, 5.0, **soft)

    guide = torch.randn(N, G)
    plain, made = (leaves(*towers(N, N, D)) for _ in range(2))
    torch.compile(f, backend="aot_eager", fullgraph=True)(*made, guide).backward()
    f(*plain, guide).backward()
    for a, b in zip(plain, made, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


X = F.normalize(torch.randn(4, 3), dim=1)
REFUSED = {
    "directions has 'image'": lambda: ck.Negatives(directions=("image",)),
    "directions lacks 'image_to_text'": lambda: ck.Negatives(directions=("text_to_image",)),
    "hardness must be finite and not negative, got -1": lambda: ck.Negatives(hardness=-1),
    "hardness_on is 'batch'": lambda: ck.Negatives(hardness_on="batch"),
    "give texts or images": lambda: ck.Negatives(hardness=1, hardness_on="own"),
    "hard negatives of text_to_image": lambda: ck.Negatives(directions=ONE_WAY, images=torch.zeros(4, 1, 3)),
    "must have shape (4, k, 3)": lambda: loss(negatives=ck.Negatives(texts=torch.zeros(4, 3))),
    "negatives and one_way": lambda: loss(negatives=ck.Negatives(), one_way=True),
    "negatives and label_smoothing": lambda: loss(negatives=ck.Negatives(), label_smoothing=0.1),
    "negatives and return_metrics": lambda: loss(negatives=ck.Negatives(), return_metrics=True),
    "negatives and soft_targets": lambda: loss(negatives=ck.Negatives(), soft_targets=soft(X)),
    "negatives and group_mode 'positives'": lambda: loss(
        negatives=ck.Negatives(), group_ids=torch.arange(4), group_mode="positives"
    ),
    "soft_targets and group_ids": lambda: loss(soft_targets=soft(X), group_ids=torch.arange(4)),
    "soft_targets and label_smoothing": lambda: loss(soft_targets=soft(X), label_smoothing=0.1),
    "guide has 3 rows but image_features has 4": lambda: loss(soft_targets=soft(X[:3])),
    "strategy 'ring' has no margin of Negatives: where shards are uneven": lambda: loss(
        negatives=ck.Negatives(margin=0.1), strategy="ring"
    ),
    "scale of SoftTargets must be positive": lambda: ck.SoftTargets(guide=X, scale=0.0, share=0.5),
    "share of SoftTargets must lie in": lambda: ck.SoftTargets(guide=X, scale=1.0, share=1.5),
}


def soft(guide: Tensor) -> ck.SoftTargets:
    return ck.SoftTargets(guide=guide, scale=1.0, share=0.5)


def loss(**options):
    return ck.clip_loss(X, X, 5.0, **options)


@pytest.mark.parametrize("words", REFUSED)
def test_refuses_in_words(words):
    with pytest.raises(ValueError, match=re.escape(words)):
        REFUSED[words]()
