"""The penalties without an adversary, conditions and diagnostics of cibr_loss, against closed forms in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import leaves, towers
from torch import Tensor, nn
from torch.nn import functional as F

import cibr_kernels as ck
from cibr_kernels.information.capacity import capacity, covariance, noise_for
from cibr_kernels.losses.penalty import noisy

N, D, DV, DT, S = 24, 5, 7, 6, 0.3
F64 = torch.float64


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Unit-norm leaves zv, zt, their second views zv2, zt2, a scale, and data xv, xt; float64."""
    torch.manual_seed(4)
    zv, zt = towers(N, N, D)
    seconds = (F.normalize(z + 0.3 * torch.randn(N, D), dim=1) for z in (zv, zt))
    tensors = leaves(zv, zt, *seconds, torch.tensor(6.0), dtype=F64)
    return dict(zip(("zv", "zt", "zv2", "zt2", "scale"), tensors, strict=True)) | {
        "xv": torch.randn(N, DV, dtype=F64),
        "xt": torch.randn(N, DT, dtype=F64),
    }


def networks() -> nn.ModuleDict:
    torch.manual_seed(5)
    made = nn.ModuleDict({"image_mean": ck.nn.MeanNetwork(DT, D, 9), "text_mean": ck.nn.MeanNetwork(DV, D, 9)})
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)  # they start at 0, where nothing could go wrong
    return made.double()


def loss(b: dict[str, Tensor], estimator: str, **options: Any) -> Any:
    return ck.cibr_loss(b["zv"], b["zt"], b["scale"], **{"estimator": estimator, "noise_std": S, **options})


def gradients(value: Tensor, b: dict[str, Tensor]) -> list[Tensor]:
    wanted = [b[name] for name in ("zv", "zt", "zv2", "zt2", "scale")]
    found = torch.autograd.grad(value, wanted, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


# ------------------------------------------------------------------------------------- variance
@pytest.mark.parametrize("one_way", [False, True])
@pytest.mark.parametrize("given", [("zv2", "zt2"), ("zv2",), ("zt2",)], ids=str)
def test_variance_of_two_views(batch, given, one_way):
    b, lam = batch, 0.7
    views = {"image_features2": "zv2", "text_features2": "zt2"}
    value, parts = loss(
        b,
        "variance",
        lam=lam,
        one_way=one_way,
        return_parts=True,
        **{option: b[name] for option, name in views.items() if name in given},
    )
    zv2, zt2 = (b[name] if name in given else b[name[:2]] for name in ("zv2", "zt2"))
    image, text = ((z - z2).square().sum(1).mean() / (4 * S**2) for z, z2 in ((b["zv"], zv2), (b["zt"], zt2)))
    clips = [ck.clip_loss(x, y, b["scale"], one_way=one_way) for x, y in ((b["zv"], b["zt"]), (zv2, zt2))]
    truth = sum(clips) / 2 + lam * (image + text)
    torch.testing.assert_close(value, truth)
    torch.testing.assert_close([parts["image_cmi"], parts["text_cmi"]], [image.detach(), text.detach()])
    torch.testing.assert_close(gradients(value, b), gradients(truth, b))


def test_variance_within_groups(batch):
    """Uneven groups, and two rows alone in theirs, which do not count."""
    b, ids = batch, torch.tensor([3] * 2 + [-7] * 5 + [10**12] * 3 + [0, 9] + [4] * 12)[torch.randperm(N)]
    value, parts = loss(b, "variance", lam=1.0, group_ids=ids, return_parts=True)

    def scatter(z: Tensor) -> Tensor:
        groups = [z[ids == i] for i in ids.unique() if (ids == i).sum() > 1]
        within = [len(g) * g.var(0).sum() for g in groups]  # var: unbiased
        return sum(within) / sum(map(len, groups)) / (2 * S**2)

    truth = ck.clip_loss(b["zv"], b["zt"], b["scale"], group_ids=ids) + scatter(b["zv"]) + scatter(b["zt"])
    torch.testing.assert_close(value, truth)
    torch.testing.assert_close(parts["image_cmi"], scatter(b["zv"]).detach())
    torch.testing.assert_close(gradients(value, b), gradients(truth, b))


def test_groups_of_two_are_two_views(batch):
    b, ids = batch, torch.arange(N).repeat(2)
    views = loss(b, "variance", image_features2=b["zv2"], text_features2=b["zt2"], return_parts=True)[1]
    both = {"zv": torch.cat([b["zv"], b["zv2"]]), "zt": torch.cat([b["zt"], b["zt2"]]), "scale": b["scale"]}
    grouped = loss(both, "variance", group_ids=ids, return_parts=True)[1]
    for name in ("image_cmi", "text_cmi"):
        torch.testing.assert_close(grouped[name], views[name])


def test_rows_that_are_all_alone_have_no_penalty(batch):
    value, parts = loss(batch, "variance", group_ids=torch.arange(N), return_parts=True)
    assert parts["image_cmi"] == 0 and parts["text_cmi"] == 0
    truth = ck.clip_loss(batch["zv"], batch["zt"], batch["scale"])
    torch.testing.assert_close(gradients(value, batch), gradients(truth, batch))


def test_variance_is_an_unbiased_upper_bound():
    """z = A y + B e: tr B B^T / 2 s^2, above 1/2 log det(I + B B^T / s^2) and close to it where s is large."""
    torch.manual_seed(0)
    n, d = 200_000, 6
    a, b = torch.randn(d, d, dtype=F64) / 3, torch.randn(d, d, dtype=F64) / 40
    y, *noise = torch.randn(3, n, d, dtype=F64)
    z, second = (y @ a.T + t @ b.T for t in noise)
    trace, exact = (b @ b.T).trace() / (2 * S**2), torch.logdet(torch.eye(d) + b @ b.T / S**2) / 2
    value = ck.conditional_mutual_information(z, z, second, None, estimator="variance", noise_std=S)
    assert value.item() == pytest.approx(trace.item(), rel=0.01)
    assert exact < trace < 1.15 * exact
    best = ck.conditional_mutual_information(z, z, y, lambda y: y @ a.T, estimator="ceb", noise_std=S)
    assert value.item() == pytest.approx(best.item(), rel=0.01)  # ceb at its optimum is the same number


# ------------------------------------------------------------------------------------- ceb and align
@pytest.mark.parametrize("conditions", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.5, 3.0])
def test_ceb_has_two_losses_that_do_not_see_each_other(batch, lam, conditions):
    b, means = batch, networks()
    data = {"image_inputs": b["xv"], "text_inputs": b["xt"]}
    yv, yt = b["xv"], b["xt"]
    if conditions:
        yv, yt = torch.randn_like(yv), torch.randn_like(yt)
        data = {"image_condition": yv, "text_condition": yt}
    value = loss(b, "ceb", critics=means, lam=lam, **data)
    mv, mt = means["image_mean"](yt), means["text_mean"](yv)

    def bound(z: Tensor, m: Tensor) -> Tensor:
        return (z - m).square().sum(1).mean() / (2 * S**2)

    encoders = ck.clip_loss(b["zv"], b["zt"], b["scale"])
    encoders = encoders + lam * (bound(b["zv"], mv.detach()) + bound(b["zt"], mt.detach()))
    torch.testing.assert_close(value, encoders)
    torch.testing.assert_close(gradients(value, b), gradients(encoders, b))
    theirs = bound(b["zv"].detach(), mv) + bound(b["zt"].detach(), mt)
    weights = list(means.parameters())
    found, truth = (torch.autograd.grad(t, weights, retain_graph=True) for t in (value, theirs))
    torch.testing.assert_close(found, truth)


def test_a_mean_network_starts_where_a_normalised_embedding_feels_nothing():
    z = F.normalize(torch.randn(N, D), dim=1).requires_grad_()
    network = ck.nn.MeanNetwork(DT, D, 9)
    bound = ck.conditional_mutual_information(z, z, torch.randn(N, DT), network, estimator="ceb", noise_std=S)
    bound.backward()
    along = (z.grad * z).sum(1, keepdim=True) * z
    torch.testing.assert_close(z.grad, along.detach())
    assert network.out.weight.grad.any()


def test_align_prices_the_distance_of_a_pair(batch):
    value, parts = loss(batch, "align", lam=0.4, return_parts=True)
    nats = (1 - (batch["zv"] * batch["zt"]).sum(1)).mean() / S**2
    truth = ck.clip_loss(batch["zv"], batch["zt"], batch["scale"]) + 0.4 * 2 * nats
    torch.testing.assert_close(value, truth)
    torch.testing.assert_close(parts["image_cmi"], nats.detach())
    zv, zt = batch["zv"], batch["zt"]
    along = (zv - zt) / (N * S**2)  # of |zv - zt|^2 / 2 s^2, not of the cosine: they differ along z
    clip = torch.autograd.grad(ck.clip_loss(zv, zt, batch["scale"]), zv)[0]
    torch.testing.assert_close(torch.autograd.grad(value, zv)[0], clip + 0.4 * 2 * along.detach())


# ------------------------------------------------------------------------------------- conditions
@pytest.mark.parametrize("estimator", ["mine", "infonce"])
def test_conditions_stand_for_the_other_modalitys_inputs_only(batch, estimator):
    b = {name: t.detach() for name, t in batch.items()}
    yv, yt = torch.randn(N, 4, dtype=F64), torch.randn(N, 3, dtype=F64)
    widths = {"image_own": DV, "image_other": 3, "text_own": DT, "text_other": 4}
    torch.manual_seed(6)
    critics = {name: ck.nn.ConcatCritic(w, D, 12).double() for name, w in widths.items()}
    parts = loss(
        b,
        estimator,
        critics=critics,
        image_inputs=b["xv"],
        text_inputs=b["xt"],
        image_condition=yv,
        text_condition=yt,
        generator=torch.Generator().manual_seed(1),
        return_parts=True,
    )[1]
    g = torch.Generator().manual_seed(1)
    zv, zt = noisy(b["zv"], S, g), noisy(b["zt"], S, g)
    for name, z, own, other in (("image", zv, b["xv"], yt), ("text", zt, b["xt"], yv)):
        pair = critics[f"{name}_own"], critics[f"{name}_other"]
        cmi = ck.conditional_mutual_information(z, own, other, pair, estimator=estimator)
        torch.testing.assert_close(parts[f"{name}_cmi"], cmi.detach())


# ------------------------------------------------------------------------------------- precision
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ["variance", "groups", "ceb", "align"])
def test_half_precision_features_are_promoted_before_they_are_subtracted(batch, estimator, dtype):
    """Parts are those of the rounded features in float64, to float32's rounding; under autocast as well."""
    half = {name: batch[name].detach().to(dtype).requires_grad_() for name in ("zv", "zt", "zv2", "zt2")}
    options: dict[str, Any] = {"image_features2": half["zv2"], "text_features2": half["zt2"]}
    means = networks()
    if estimator == "groups":
        options = {"group_ids": torch.arange(N) // 3}
    elif estimator != "variance":
        options = {}
    if estimator == "ceb":
        options = {"critics": means.float(), "image_inputs": batch["xv"].float(), "text_inputs": batch["xt"].float()}
    name = "variance" if estimator == "groups" else estimator
    value, parts = loss({**half, "scale": 6.0}, name, return_parts=True, **options)
    value.backward()
    assert value.dtype == torch.float32 and half["zv"].grad.dtype == dtype
    wide = {k: t.detach().double() for k, t in half.items()}
    if "image_features2" in options:
        options = {"image_features2": wide["zv2"], "text_features2": wide["zt2"]}
    if estimator == "ceb":
        options = {"critics": networks(), "image_inputs": batch["xv"].float(), "text_inputs": batch["xt"].float()}
    truth = loss({**wide, "scale": 6.0}, name, return_parts=True, **options)[1]
    assert parts["image_cmi"].item() == pytest.approx(truth["image_cmi"].item(), rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = {k: t.float() for k, t in wide.items()}
        if "image_features2" in options:
            options = {"image_features2": cast["zv2"], "text_features2": cast["zt2"]}
        if estimator == "ceb":
            options["critics"] = networks().float()
        inside = loss({**cast, "scale": 6.0}, name, return_parts=True, **options)[1]
    assert inside["image_cmi"].item() == pytest.approx(truth["image_cmi"].item(), rel=1e-5)


# ------------------------------------------------------------------------------------- diagnostics
@pytest.mark.parametrize("lam", [0.0, 0.5])
@pytest.mark.parametrize("estimator", ["variance", "mine"])
def test_diagnostics_compare_the_gradients_on_the_sphere(batch, estimator, lam):
    b = batch
    if estimator == "variance":
        options: dict[str, Any] = {"image_features2": b["zv2"], "text_features2": b["zt2"]}
        wanted = [b[name] for name in ("zv", "zt", "zv2", "zt2")]
    else:
        widths = {"image_own": DV, "image_other": DT, "text_own": DT, "text_other": DV}
        torch.manual_seed(6)
        critics = {name: ck.nn.ConcatCritic(w, D, 12).double() for name, w in widths.items()}
        options = {"critics": critics, "image_inputs": b["xv"], "text_inputs": b["xt"]}
        wanted = [b["zv"], b["zt"]]

    def run(lam: float, **more: Any) -> Any:
        return loss(b, estimator, lam=lam, generator=torch.Generator().manual_seed(2), **options, **more)

    plain, one = run(0.0), run(1.0)
    contrastive = torch.autograd.grad(plain, wanted, retain_graph=True)
    penalty = [g - c for g, c in zip(torch.autograd.grad(one, wanted, retain_graph=True), contrastive, strict=True)]

    def tangent(gradients: Any) -> Tensor:
        return torch.cat([g - (g * z).sum(1, keepdim=True) * z for g, z in zip(gradients, wanted, strict=True)])

    p, c = tangent(penalty).detach(), tangent(contrastive).detach()
    value, parts = run(lam, return_parts=True, diagnostics=True)
    torch.testing.assert_close(value, run(lam))
    torch.testing.assert_close(parts["gradient_log_ratio"], (p.norm() / c.norm()).log())
    torch.testing.assert_close(parts["gradient_cosine"], (p * c).sum() / (p.norm() * c.norm()))
    for name, z in (("image", b["zv"]), ("text", b["zt"])):
        within = torch.eye(D, dtype=F64) + torch.cov(z.T.detach(), correction=0) / S**2
        torch.testing.assert_close(parts[f"{name}_capacity"], torch.logdet(within) / 2)
    assert not any(t.requires_grad for t in parts.values())
    torch.testing.assert_close(gradients(value, b), gradients(run(lam), b))  # looking changes nothing


def test_diagnostics_of_features_without_a_gradient_have_capacities_only(batch):
    b = {name: t.detach() for name, t in batch.items()}
    parts = loss(b, "align", return_parts=True, diagnostics=True)[1]
    assert "image_capacity" in parts and "gradient_cosine" not in parts


def test_noise_for_a_capacity():
    torch.manual_seed(1)
    z = F.normalize(torch.randn(500, 12) * torch.linspace(0.1, 2, 12), dim=1)
    c = covariance(z)
    torch.testing.assert_close(c, torch.cov(z.T, correction=0), rtol=1e-4, atol=1e-6)
    for nats in (0.1, 2.0, 9.0):
        assert capacity(c, noise_for(c, nats)).item() == pytest.approx(nats, rel=1e-4)
    assert noise_for(c, 0.0) == math.inf and noise_for(torch.zeros(3, 3), 1.0) == 0.0
    assert capacity(c, 0.25).item() <= 1 / (2 * 0.25**2)


# ------------------------------------------------------------------------------------- accumulation
def test_accumulation_gives_the_gradients_of_the_whole_batch(batch):
    """Groups and views that go over the parts' borders."""
    images, texts = torch.randn(N, 2, DV), torch.randn(N, 2, DT)
    ids = torch.arange(N) % 7
    for grouped in (False, True):
        found = []
        for parts in ([N], [9, 9, 6]):
            torch.manual_seed(3)
            image, text = nn.Linear(DV, D), nn.Linear(DT, D)

            def encode(rows: Tensor) -> list[Tensor]:
                x, y = images[rows], texts[rows]
                return [F.normalize(t, dim=1) for t in (image(x[:, 0]), text(y[:, 0]), image(x[:, 1]), text(y[:, 1]))]  # noqa: B023

            def whole(zv: Tensor, zt: Tensor, zv2: Tensor, zt2: Tensor) -> Tensor:
                views = {"group_ids": ids} if grouped else {"image_features2": zv2, "text_features2": zt2}  # noqa: B023
                return ck.cibr_loss(zv, zt, 5.0, estimator="variance", **views)

            value = ck.accumulate(encode, torch.arange(N).split(parts), whole)
            found.append([value, *(p.grad for p in (*image.parameters(), *text.parameters()))])
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------- refused
X, Y = torch.randn(6, 4), torch.randn(6, 3)
REFUSED = {
    "views": ({"estimator": "variance"}, "'variance' needs image_features2 or text_features2, second views, or"),
    "whose views": ({"estimator": "align", "text_features2": X}, "text_features2: second views belong to .* 'align'"),
    "rows": ({"estimator": "variance", "image_features2": X[:5]}, "has 6 rows but image_features2 has 5"),
    "width": ({"estimator": "variance", "image_features2": Y}, "has width 4 but image_features2 has width 3"),
    "noise": ({"estimator": "variance", "group_ids": torch.arange(6), "noise_std": 0.0}, "noise_std > 0 .* got 0.0"),
    "ids": ({"estimator": "variance", "group_ids": torch.arange(5)}, r"group_ids must have shape \(6,\)"),
    "networks": ({"estimator": "ceb", "image_inputs": X, "text_inputs": Y}, "needs critics: image_mean, text_mean"),
    "a network": ({"estimator": "ceb", "image_inputs": X, "text_inputs": Y, "critics": {"text_mean": len}}, "lacks"),
    "condition": ({"estimator": "ceb", "image_inputs": X}, "'ceb' needs text_inputs, or text_condition"),
    "inputs": ({"image_inputs": X}, "'mine' needs text_inputs"),
    "condition's rows": ({"image_inputs": X, "text_inputs": X, "text_condition": X[:2]}, "but text_condition has 2"),
    "ema": ({"estimator": "align", "ema": {"image_own": torch.ones(())}}, "ema"),
    "diagnostics": ({"estimator": "align", "diagnostics": True}, "return_parts must be True"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_bad_arguments_are_refused_in_the_callers_words(name):
    options, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        ck.cibr_loss(X, X, 5.0, **options)


def test_a_network_of_another_width_is_refused_before_any_work():
    means = {"image_mean": ck.nn.MeanNetwork(4, 4, 5), "text_mean": ck.nn.MeanNetwork(4, 4, 5)}
    with pytest.raises(ValueError, match="text_inputs has width 3 but the network image_mean was made for 4"):
        ck.cibr_loss(X, X, 5.0, estimator="ceb", image_inputs=X, text_inputs=Y, critics=means)
