"""`python bench/ family`, `alignment` and `omib`: formulas, drawings, verdicts, and one tiny run of each."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import bench
from bench.experiments import alignment, alignment_claims, family, omib, omib_choice, sprites, toy
from bench.experiments.alignment_claims import NO, UNTESTED, YES
from bench.experiments.frame import conduct
from bench.experiments.omib_stack import Stack
from cibr.omib import entropy, train
from cibr.omib.options import OmibOptions

RESULTS = Path(bench.__file__).parent / "results"


# ------------------------------------------------------------------------------------------- family
@pytest.mark.parametrize("p", [0.0, 0.2, 0.9])
def test_the_familys_truth_is_the_toys(p):
    """The toy has eight private columns, of which the four that z sees count."""
    weight = torch.zeros(toy.Z_DIM, toy.X_DIM)
    weight[:4, :4] = math.sqrt((1 - p) / 4) * torch.eye(4)
    weight[4:, 4:8] = math.sqrt(p / 4) * torch.eye(4)
    cmi, shared = toy.closed_form(weight, torch.eye(toy.X_DIM))
    point = family.closed(p, toy.RHO, toy.SIGMA)
    assert point.truth == pytest.approx(cmi, abs=1e-6)
    assert point.own == pytest.approx(cmi + shared, abs=1e-6)


def test_bounds_by_sampling():
    point = family.closed(0.3, 0.7)
    n, sigma = 200_000, family.SIGMA
    s, e, n_v, n_t = torch.randn(4, n, 4, generator=torch.Generator().manual_seed(0))
    a, b = math.sqrt(0.7 / 4), math.sqrt(0.3 / 4)
    mu_v = torch.cat([a * s, b * n_v], 1)
    mu_t = torch.cat([a * (0.7 * s + math.sqrt(1 - 0.49) * e), b * n_t], 1)
    assert (mu_v - mu_t).square().sum(1).mean().item() / (2 * sigma**2) == pytest.approx(point.align, rel=0.01)
    best = torch.cat([0.7 * mu_t[:, :4], torch.zeros(n, 4)], 1)  # E[mu_v | x_t]
    assert (mu_v - best).square().sum(1).mean().item() / (2 * sigma**2) == pytest.approx(point.variance, rel=0.01)
    kl = (8 * sigma**2 + mu_v.square().sum(1) - 8 - 8 * math.log(sigma**2)) / 2
    assert kl.mean().item() == pytest.approx(point.prior, rel=0.01)


def test_what_is_no_bound_is_found():
    points = [family.closed(p, 0.9) for p in family.PRIVATE]
    assert not family.missed(points)
    assert len(family.missed([replace(points[1], align=points[1].truth / 2)])) == 1
    assert len(family.missed([replace(points[1], ceb=points[1].truth + 0.01)])) == 1


def test_family_runs(tmp_path, monkeypatch, capsys):
    for name, value in (("MINE_AT", (0.2,)), ("MINE_ROWS", 512), ("MINE_STEPS", 3)):
        monkeypatch.setattr(family, name, value)
    assert conduct(family.run, True, tmp_path / "f.json", tmp_path / "f.png") == 0
    assert "PASS" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "f.json").read_text())["by_p"][2]["mine"]) == 1


# ------------------------------------------------------------------------------------------- drawings
def test_drawings_are_what_their_factors_say():
    factors = sprites.sample(400, 3)
    images = sprites.draw(factors)
    assert images.shape == (400, 32, 32) and images.min() >= 0 and images.max() == 1
    area, line = images.sum((1, 2)), (torch.arange(32) + 0.5) / 16 - 1
    for name, weights in (("x", images.sum(1)), ("y", images.sum(2))):
        centre = (weights * line).sum(1) / area
        expected = sprites.REACH * (2 * factors[name] / 15 - 1)
        round_ones = factors["shape"] < 2  # the heart's centre of mass is not its origin
        assert (centre - expected)[round_ones].abs().max() < 0.02
    squares = factors["shape"] == 0
    side = 1.6 * sprites.RADIUS * (0.5 + factors["scale"] / 10) * 16
    assert (area.sqrt() / side - 1)[squares].abs().max() < 0.05


def test_no_image_is_twice_in_a_sample():
    factors = sprites.sample(36_864, 0)
    number = sum(factors[name] * 100**k for k, name in enumerate(sprites.FACTORS))
    assert len(number.unique()) == 36_864
    with pytest.raises(ValueError, match="36864 images, not 36865"):
        sprites.sample(36_865, 0)
    some = {name: values[:500] for name, values in factors.items()}
    assert len(sprites.draw(some).flatten(1).unique(dim=0)) == 500  # orientations differ for squares, too


# ------------------------------------------------------------------------------------------- alignment
def test_unique_rate_has_its_ends(monkeypatch):
    for name, value in {"ROWS": 1500, "TRAIN": 900, "PROBE_ROWS": 900}.items():
        monkeypatch.setattr(alignment, name, value)
    labels = torch.arange(alignment.ROWS) % 16
    told = torch.nn.functional.normalize(torch.eye(16)[labels] + 0.01 * torch.randn(alignment.ROWS, 16), dim=1)
    assert alignment.unique_rate(told, labels, 16) > 0.95
    assert abs(alignment.unique_rate(torch.randn(alignment.ROWS, 4), labels, 16)) < 0.05


def test_kept_counts_images_at_their_own_text():
    texts = torch.eye(3)[torch.tensor([0, 1, 2, 0])]
    zt = texts @ torch.eye(3)
    assert alignment.kept(zt[[0, 1, 2, 1]], zt, texts) == 75


def made(depth: int, learnt: bool, tau: float, beta: float, seed: int, nuisance: float, end: float, nats: float):
    alike = (1 - nuisance, nuisance, 1.0)
    return alignment.Trial(depth, learnt, tau, beta, seed, {"y": nuisance}, 90.0, end, 0.9, nats, 3.0, *alike)


def test_verdicts():
    """Depth helps, temperature does not; homeostasis; biased CKA falls with nuisance, the debiased one rises."""
    trials = []
    for seed, jitter in enumerate((0.0, 0.001, 0.002)):
        for depth, tau in itertools.product((2, 4, 6), (0.07, 1.0)):
            trials.append(made(depth, False, tau, 0.0, seed, 0.5 - 0.05 * depth + jitter * tau, tau, 15.0))
        trials.append(made(4, False, 0.07, 3.0, seed, 0.1 + jitter, 0.07, 10.0))
        for beta in (0.0, 0.1, 3.0):
            trials.append(made(4, True, 0.07, beta, seed, 0.3 + jitter, 0.05 - 0.01 * beta, 15.0 - jitter))
    found = {claim.text.partition(" (")[0]: claim for claim in alignment_claims.claims(trials)}
    assert {text[:30]: claim.verdict for text, claim in found.items()} == {
        "a deeper encoder leaves less n": YES,
        "a higher temperature leaves le": NO,
        "beta removes nuisance, tempera": NO,  # the second of that name: learnt
        "homeostasis: the learnt temper": YES,
        "homeostasis: entropy is kept w": YES,
        "homeostasis: InfoNCE is kept w": NO,  # constant here
        "the paper's best beta, .1, kee": YES,
        "nuisance goes with low alignme": NO,  # by mutual k-NN, which is constant here
        "CIDEr of captions rises from 9": UNTESTED,
    }
    by_cka = [claim.verdict for claim in alignment_claims.claims(trials) if "low alignment" in claim.text]
    assert by_cka[:2] == [YES, NO]
    assert "URR 0.4" in found["a deeper encoder leaves less nuisance"].evidence


def test_alignment_runs(tmp_path, monkeypatch, capsys):
    sizes = {"ROWS": 400, "TRAIN": 300, "PROBE_ROWS": 200, "KERNEL_ROWS": 60, "STEPS": 3, "BATCH": 32}
    cells = {"DEPTHS": (4,), "TEMPERATURES": (0.07, 1.0), "BETAS": (0.0, 0.1, 3.0)}
    for name, value in {**sizes, **cells}.items():
        monkeypatch.setattr(alignment, name, value)
    monkeypatch.setattr(alignment_claims, "DEPTH_PAIR", (4, 4))  # one depth is trained here
    assert conduct(alignment.run, True, tmp_path / "a.json", tmp_path / "a.png") == 0
    assert "NOT TESTABLE HERE" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "a.json").read_text())["trials"]) == 7


# ------------------------------------------------------------------------------------------- omib
def trials(factor: float, values: list[float], name: str = "III", method: str = "omib") -> list[omib.Trial]:
    return [omib.Trial(name, omib.ROWS, method, factor, seed, v, v, (1.0,), (0.5,)) for seed, v in enumerate(values)]


def test_the_best_beta_is_found_by_paired_seeds():
    best, differences = omib.peak([*trials(0.1, [0.8, 0.9]), *trials(1.0, [0.85, 0.91]), *trials(10.0, [0.6, 0.7])])
    assert best == 1.0
    assert differences[10.0] == pytest.approx((-0.23, 0.02))


def test_a_mean_below_the_papers_is_missed():
    both = [*trials(1.0, [0.895, 0.892], "I"), *trials(1.0, [0.8, 0.95]), *trials(0.1, [0.99, 0.99])]
    assert omib.missed(both) == ["III"]
    lines = omib._targets(both)
    assert lines[0].endswith("PASS") and "+0.15 from the target" in lines[0]
    assert lines[1].endswith("FAIL") and "87.50 ± 7.50, -1.50 from the target, -3.30 from the best" in lines[1]


def test_what_validation_chose_is_what_is_run():
    chosen = json.loads((RESULTS / "omib-choice.json").read_text())
    assert {method: asdict(setting) for method, setting in omib.SETTINGS.items()} == chosen["settings"]
    assert chosen["factors"] == omib.CHOSEN_FACTORS
    assert not set(omib.SEEDS) & set(omib_choice.SEEDS)


@pytest.mark.parametrize("method", ["fusion", "omib"])
def test_a_stack_trains_each_run_as_cibr_omib_does(method, monkeypatch):
    """Without noise: data, batches, learning rates, weight decay and beta of each run are its own."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    words = {
        "out": "-",
        "method": method,
        "hidden": 12,
        "latent": 8,
        "tokens": 2,
        "train_rows": 300,
        "test_rows": 100,
        "warm_up_steps": 3,
        "steps": 6,
    }
    free = (("I", 1, 1e-3, 0.0, 0.1), ("III", 2, 1e-2, 1.0, 0.0), ("I", 2, 1e-3, 0.0, 1.0), ("III", 1, 1e-2, 1.0, 0.2))
    runs = [
        OmibOptions(data=f"sim:{name}", seed=seed, lr=lr, weight_decay=decay, beta=beta, **words)
        for name, seed, lr, decay, beta in free
    ]
    stack = Stack(runs, omib_choice.opened)
    log = stack.trained(2)
    for k, (run, measured) in enumerate(zip(stack.runs, stack.measured("val"), strict=True)):
        alone = train.start(run.options)
        train.advance(alone)
        assert log[-1]["loss"][k].item() == pytest.approx(alone.log[-1]["loss"], rel=1e-4)
        assert measured["task_loss"] == pytest.approx(train.evaluate(alone, alone.data.val)["task_loss"], rel=1e-4)
    assert len({run.options for run in stack.runs}) == 4


def test_the_choice_is_the_best_mean_of_each_method(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(omib_choice, "SCHEDULE", {"warm_up_steps": 1, "steps": 2, "test_rows": 50})
    monkeypatch.setattr(omib_choice, "ROWS", 60)
    monkeypatch.setattr(omib_choice, "GRID", (omib_choice.Setting(8, 1e-3, 0.0), omib_choice.Setting(8, 3e-3, 1.0)))
    monkeypatch.setattr(omib_choice, "FACTORS", (0.1, 1.0))
    assert conduct(omib_choice.run, True, tmp_path / "c.json", None) == 0
    found = json.loads((tmp_path / "c.json").read_text())
    for method, setting in found["settings"].items():
        accuracy = {json.dumps(t["setting"]): t["accuracy"] for t in found["grid"] if t["method"] == method}
        assert len(accuracy) == 2 and accuracy[json.dumps(setting)] == max(accuracy.values())
    assert found["factors"].keys() == {"vib", "fixed", "omib"}
    assert capsys.readouterr().out.count("<- chosen") == 5 + 3


def test_bounds_depend_on_units(monkeypatch):
    monkeypatch.setattr(entropy, "MINE_STEPS", 3)
    found = omib.bounds_by_estimator(rows=300)
    assert found["gaussian, columns times 1"] == pytest.approx(1, abs=0.3)
    assert found["gaussian, columns times 10"] < 0.5
    assert "the sum of entropies is -" in str(found["gaussian, columns times 0.1"])


@pytest.mark.parametrize(("target", "status"), [(0.999, 1), (0.0, 0)])
def test_omib_runs(tmp_path, monkeypatch, capsys, target, status):
    schedule = {"warm_up_steps": 1, "steps": 2, "test_rows": 50, "latent": 8, "tokens": 2}
    monkeypatch.setattr(omib_choice, "SCHEDULE", schedule)
    for name, value in (
        ("ROWS", 60),
        ("FEW", 40),
        ("FACTORS", (1.0, 10.0)),
        ("FEW_FACTORS", (1.0,)),
        ("SEEDS", (0, 1)),
        ("TARGETS", {"I": target, "III": target}),
    ):
        monkeypatch.setattr(omib, name, value)
    monkeypatch.setattr(omib, "bounds_by_estimator", lambda: {"gaussian": 1.0})
    assert conduct(omib.run, False, tmp_path / "o.json", tmp_path / "o.png") == status
    assert capsys.readouterr().out.count("FAIL") == 2 * status
    methods = {t["method"] for t in json.loads((tmp_path / "o.json").read_text())["trials"]}
    assert methods == {"omib", "fixed", "vib", "branches", "fusion"} and (tmp_path / "o.png").stat().st_size > 1000
