"""CIBRLoss: schedules, the count of steps, saturation, held-out estimates, conditions, and what we recommend."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cibr_kernels as ck
from cibr_kernels.information.capacity import capacity, covariance

N, D, DV, DT = 32, 8, 6, 5


def batch(seed: int = 0, n: int = N, spread: float = 9.0) -> dict[str, Tensor]:
    """zv, zt (n, D) of unit norm, around one point where `spread` is small; xv, xt."""
    g = torch.Generator().manual_seed(seed)
    zv, zt = (F.normalize(torch.ones(D) + spread * torch.randn(n, D, generator=g), dim=1) for _ in range(2))
    return {"zv": zv, "zt": zt, "xv": torch.randn(n, DV, generator=g), "xt": torch.randn(n, DT, generator=g)}


def call(module: nn.Module, b: dict[str, Tensor], **options: Any) -> Any:
    return module(b["zv"], b["zt"], 5.0, b["xv"], b["xt"], **options)


# ------------------------------------------------------------------------------------- schedules
def test_schedule_of_a_run_is_relative_to_its_length():
    schedule = ck.nn.Schedule.of_run(0.8, 100)
    assert (schedule.warmup_steps, schedule.ramp_steps) == (10, 15)
    lams = [schedule.at(step).item() for step in range(100)]
    assert lams[:10] == [0] * 10 and 0 < lams[10] < lams[24] < lams[25] == pytest.approx(0.8) and lams[99] == lams[25]
    assert torch.equal(schedule.at(torch.tensor(12)), schedule.at(12))
    module = ck.nn.CIBRLoss(D, DV, DT, hidden=8, lam=0.8, total_steps=100)
    assert module.schedule == schedule
    steps = ck.nn.CIBRLoss(D, DV, DT, hidden=8, warmup_steps=3, total_steps=100, ramp_fraction=0.5).schedule
    assert (steps.warmup_steps, steps.ramp_steps) == (3, 50)


@pytest.mark.parametrize(("steps", "warns"), [(6, True), (7, False), (70, False), (0, True)])
def test_a_lambda_that_never_reached_its_value_is_told(steps, warns):
    schedule = ck.nn.Schedule(0.5, 3, 3)
    assert bool(schedule.warning(steps)) == warns
    assert schedule.warning() == "" and ck.nn.Schedule(0.0, 3, 3).warning(1) == ""
    module = ck.nn.CIBRLoss(D, estimator="align", warmup_steps=3, ramp_steps=3)
    module.step.fill_(steps)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert module.warn_if_short() == warns
    assert len(seen) == warns
    if steps == 6:
        assert "lam reaches 0.375 of 0.5 in 6 steps" in str(seen[0].message)


def test_a_schedule_longer_than_the_run_is_told_at_once():
    with pytest.warns(UserWarning, match="lam reaches 0.0998 of 0.5 in 100 steps"):
        ck.nn.CIBRLoss(D, estimator="align", ramp_steps=500, total_steps=100, warmup_steps=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps must be positive, got 0"),
        ({"total_steps": 9, "ramp_fraction": 1.5}, r"ramp_fraction must lie in \[0, 1\], got 1.5"),
        ({"accumulation_steps": 0}, "accumulation_steps must be positive, got 0"),
        ({"estimator": "mine"}, "estimator 'mine' needs image_input_dim"),
        ({"estimator": "ceb", "image_input_dim": 3}, "estimator 'ceb' needs text_input_dim"),
        ({"estimator": "variance", "noise_std": 0.0}, "'variance' needs noise_std > 0"),
        ({"estimator": "club"}, "estimator is 'club'"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ck.nn.CIBRLoss(D, **{"estimator": "align", **options})


# ------------------------------------------------------------------------------------- steps
def test_the_step_is_the_optimisers_under_accumulation():
    """Gradients that are added up over 3 calls, and `accumulate`, which calls the loss once a step."""
    module = ck.nn.CIBRLoss(D, estimator="align", lam=0.6, warmup_steps=1, ramp_steps=2, accumulation_steps=3)
    b = batch()
    lams = [module(b["zv"], b["zt"], 5.0, output_dict=True)["lam"].item() for _ in range(12)]
    assert lams == pytest.approx([0.0] * 3 + [0.2] * 3 + [0.4] * 3 + [0.6] * 3) and module.step == 4
    once = ck.nn.CIBRLoss(D, DV, DT, hidden=8)
    rows = torch.arange(N).split(5)
    for _ in range(2):
        ck.accumulate(
            lambda r: [b[name][r] for name in ("zv", "zt", "xv", "xt")],
            rows,
            lambda zv, zt, xv, xt: call(once, {"zv": zv, "zt": zt, "xv": xv, "xt": xt}),
        )
    assert once.step == 2


def test_old_checkpoints_load():
    """State that was written before schedules: critics, statistics and "step"."""
    module = ck.nn.CIBRLoss(D, DV, DT, hidden=8)
    names = {name.split(".")[0] for name in module.state_dict()}
    assert names == {"critics", "standardize_image", "standardize_text", "step"}


# ------------------------------------------------------------------------------------- saturation
def test_saturation_is_warned_about_once_with_the_noise_that_would_do():
    module, b = ck.nn.CIBRLoss(D, DV, DT, hidden=8), batch()
    carried = {name: capacity(covariance(b[z]), 0.25).item() for name, z in (("image", "zv"), ("text", "zt"))}
    most = max(carried, key=lambda name: carried[name])
    with pytest.warns(UserWarning, match=rf"the {most} embeddings can carry {carried[most]:.2f} nats") as seen:
        call(module, b)
    assert len(seen) == 1 and seen[0].filename == __file__
    said = str(seen[0].message)
    assert f"log(n) - 1 = {math.log(N) - 1:.2f} at n = {N}" in said
    noise = float(said.split("noise_std = ")[1].split()[0])
    assert capacity(covariance(b["zv" if most == "image" else "zt"]), noise).item() == pytest.approx(
        math.log(N) - 1, rel=0.05
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(module, b)
        call(pickle.loads(pickle.dumps(module)), b)
        call(copy.deepcopy(module), b)
        quiet = ck.nn.CIBRLoss(D, DV, DT, hidden=8, noise_std=1.0)
        call(quiet, b)
        call(ck.nn.CIBRLoss(D, DV, DT, hidden=8).eval(), b)  # nothing is being trained
        ck.nn.CIBRLoss(D, estimator="align")(b["zv"], b["zt"], 5.0)  # nothing is estimated


def test_saturation_that_comes_late_is_seen():
    """Embeddings begin in a cone and spread: looked at in calls 1, 2, 4, 8."""
    module = ck.nn.CIBRLoss(D, DV, DT, hidden=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            call(module, batch(spread=0.01))
        call(module, batch())  # the third
    with pytest.warns(UserWarning, match="embeddings can carry"):
        call(module, batch())


# ------------------------------------------------------------------------------------- held-out pairs
@pytest.mark.parametrize("estimator", ["mine", "ceb", "variance"])
def test_estimates_on_held_out_pairs_move_nothing(estimator):
    module = ck.nn.CIBRLoss(D, DV, DT, hidden=8, noise_std=0.9, estimator=estimator)
    views = {"image_features2": batch(1)["zv"]} if estimator == "variance" else {}
    b = batch()
    call(module, b, **views)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    held = batch(7)
    parts = module.estimates(
        held["zv"], held["zt"], held["xv"], held["xt"], generator=torch.Generator().manual_seed(1), **views
    )
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items()) and module.training
    torch.manual_seed(1)
    seen = call(module.eval(), held, output_dict=True, **views)
    names = set(seen) - {"loss", "lam", "contrastive_loss"}
    assert names | {"image_capacity", "text_capacity"} == set(parts)
    for name in names:
        torch.testing.assert_close(parts[name], seen[name])
    torch.testing.assert_close(parts["text_capacity"], capacity(covariance(held["zt"]), 0.9))


# ------------------------------------------------------------------------------------- conditions
@pytest.mark.parametrize("estimator", ["mine", "ceb"])
def test_conditions_are_standardised_apart_and_required(estimator):
    module = ck.nn.CIBRLoss(D, DV, DT, text_condition_dim=3, hidden=8, noise_std=0.9, estimator=estimator)
    b, condition = batch(), 5 + torch.randn(N, 3)
    out = call(module, b, text_condition=condition, output_dict=True)
    assert torch.allclose(module.standardize_text_condition.mean, condition.mean(0))
    assert out["loss"].isfinite()
    with pytest.raises(ValueError, match="needs text_condition: it was made with text_condition_dim"):
        call(module, b)
    with pytest.raises(ValueError, match="has no image_condition: it was made without image_condition_dim"):
        call(module, b, text_condition=condition, image_condition=condition)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ceb_in_half_precision_keeps_its_sums(dtype):
    """Layers are cast, statistics, the embeddings' differences and the loss are not."""
    module = ck.nn.CIBRLoss(D, DV, DT, hidden=8, estimator="ceb").to(dtype)
    b = batch()
    call(module, b).backward()
    assert module.critics["image_mean"].hidden.weight.dtype == dtype
    assert module.standardize_text.mean.dtype == torch.float32
    parts = call(module.eval(), b, output_dict=True)
    assert parts["loss"].dtype == torch.float32
    assert parts["image_cmi"].item() == pytest.approx(1 / (2 * 0.25**2), rel=1e-5)  # |z|^2 = 1, and the mean still 0


# ------------------------------------------------------------------------------------- what we recommend
def test_recommended_shrinks_the_variance_within_concepts():
    """Linear towers, concepts with three noisy images each: without parameters of its own, by steps of the encoders."""
    torch.manual_seed(0)
    concepts = torch.randn(20, 6)
    ids = torch.arange(20).repeat_interleave(3)

    def share(tower: nn.Module) -> float:
        z = F.normalize(tower(images), dim=1).reshape(20, 3, D)
        return (z.var(1).sum(-1).mean() / z.flatten(0, 1).var(0).sum()).item()

    found = {}
    images = torch.cat([concepts[ids], torch.randn(60, 6)], 1)
    for lam in (0.0, 0.4):
        torch.manual_seed(1)
        image, text = nn.Linear(12, D), nn.Linear(6, D)
        module = ck.nn.CIBRLoss.recommended(D, total_steps=150, lam=lam)
        assert not list(module.parameters())
        optimiser = torch.optim.Adam([*image.parameters(), *text.parameters()], 1e-2)
        for _ in range(150):
            optimiser.zero_grad()
            zv, zt = (F.normalize(tower(x), dim=1) for tower, x in ((image, images), (text, concepts[ids])))
            module(zv, zt, 10.0, group_ids=ids).backward()
            optimiser.step()
        found[lam] = share(image)
        assert not module.warn_if_short()
    assert found[0.4] < 0.5 * found[0.0], found


def test_the_papers_objective_is_the_default():
    module = ck.nn.CIBRLoss(D, DV, DT)
    assert module.options.estimator == "mine" and module.options.negatives == "all" and module.schedule.value == 0.5
    assert module.current_lam() == 0.5 and len(module.critics) == 4
    ours = ck.nn.CIBRLoss.recommended(D, total_steps=1000)
    assert ours.options.estimator == "variance" and (ours.schedule.warmup_steps, ours.schedule.ramp_steps) == (100, 150)
