"""OMIB: closed forms, the two stages, resuming, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cibr import cli
from cibr.errors import UsageError
from cibr.omib import METHODS, Omf, dynamic_ratio, omib_beta_bounds, sim, standard_kl, tasks, train
from cibr.omib.bounds import beta_bounds
from cibr.omib.entropy import entropies
from cibr.omib.model import Code, Fusion, Output
from cibr.omib.options import OmibOptions

SMALL = {
    "train_rows": 200,
    "test_rows": 200,
    "warm_up_steps": 12,
    "steps": 36,
    "eval_every": 12,
    "hidden": 16,
    "latent": 8,
    "tokens": 2,
    "lr": 3e-3,
}


def options(out: Path | str = "unused", **values) -> OmibOptions:
    return OmibOptions(**{"data": "sim:III", "out": str(out), **SMALL, **values})


# ------------------------------------------------------------------------------------------- closed forms
def test_kl_is_that_of_torch():
    code = Code(torch.randn(5, 3), torch.randn(5, 3))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(code.mean, code.log_std.exp()), torch.distributions.Normal(0.0, 1.0)
    ).sum(1)
    torch.testing.assert_close(standard_kl(code), expected)


@pytest.mark.parametrize("ratio", ["of_means", "mean_of"])
def test_r_is_the_papers_tanh(ratio):
    d1, d2, d3 = torch.rand(3, 50) + 0.1
    r = dynamic_ratio([d1, d2, d3], ratio)
    for value, d in zip(r, (d1, d2, d3), strict=True):
        rho = d.mean() / d1.mean() if ratio == "of_means" else (d / d1).mean()
        assert value.item() == pytest.approx(1 - math.tanh(math.log(rho)), rel=1e-5)
    assert r[0].item() == pytest.approx(1)


def test_r_has_its_ends_where_one_divergence_vanishes():
    zero, one = torch.zeros(4), torch.ones(4)
    assert dynamic_ratio([one, zero])[1].item() == pytest.approx(2)
    assert dynamic_ratio([zero, one])[1].item() == pytest.approx(0, abs=1e-6)
    assert dynamic_ratio([zero, zero])[1].item() == pytest.approx(1)


def test_the_readings_of_rho_differ():
    d1, d2 = torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0])
    assert dynamic_ratio([d1, d2], "of_means")[1].item() == pytest.approx(1)
    assert dynamic_ratio([d1, d2], "mean_of")[1].item() == pytest.approx(2 / (1 + (5 / 3) ** 2))


def test_divergence_is_of_the_branch_from_the_fused_head():
    branch, fused = torch.randn(2, 6, 3)
    expected = torch.nn.functional.kl_div(
        fused.log_softmax(1), branch.log_softmax(1), log_target=True, reduction="none"
    ).sum(1)  # torch's first argument is the second distribution
    torch.testing.assert_close(tasks.build("class", classes=3).divergence(branch, fused, 1), expected)
    regression = tasks.build("value")
    torch.testing.assert_close(
        regression.divergence(branch[:, :1], fused[:, :1], 1), (branch - fused)[:, 0].square() / 2
    )


def test_bounds():
    found = omib_beta_bounds(10.0, 12.0, 4.0, r=0.5)
    assert found.lower == pytest.approx(1 / 66)
    assert found.upper == pytest.approx(1 / 54)
    assert found.upper_by_ratio == pytest.approx(1 / 27)
    assert omib_beta_bounds(10.0, 12.0, 4.0).upper_by_ratio is None
    assert beta_bounds([10.0, 12.0, 8.0], 5.0).upper == pytest.approx(1 / (5 * 25))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((-1.0, 0.5, 0.0), "sum of entropies is -0.5"),
        ((2.0, 2.0, 4.0), "joint entropy is 0"),
        ((2.0, 2.0, -0.1), "cannot be negative"),
        ((math.inf, 2.0, 1.0), "must be finite"),
        ((2.0, 2.0, 1.0, 2.0), "between 0 and 2"),
    ],
)
def test_bounds_refuse_sums_that_are_not_positive(values, words):
    with pytest.raises(UsageError, match=words):
        omib_beta_bounds(*values)


@pytest.mark.parametrize("name", sim.SPECS)
def test_entropies_of_the_generator_are_those_of_its_covariance(name):
    spec = sim.named(name)
    data = sim.draw(spec, "class", train=40_000, test=2, seed=1)
    own, shared = spec.entropies()
    measured, total = entropies(data.train.views, "gaussian")
    assert measured == pytest.approx(own, abs=0.3)
    assert total == pytest.approx(shared, rel=0.03)


@pytest.mark.parametrize("name", sim.SPECS)
def test_bayes_accuracy_is_reached_by_regression_and_by_nothing_more(name):
    """Least squares on 200,000 rows is the best predictor of a Gaussian t, up to its estimation."""
    spec = sim.named(name)
    data = sim.draw(spec, "value", train=60_000, test=60_000, seed=2)
    for seen in ([0], list(range(len(spec.own)))):
        x, z = (torch.cat([split.views[i] for i in seen], 1) for split in (data.train, data.test))
        said = z @ torch.linalg.lstsq(x, data.train.target[:, None]).solution[:, 0]
        accuracy = ((said > 0) == (data.test.target > 0)).double().mean().item()
        assert accuracy == pytest.approx(spec.accuracy(seen), abs=0.005)
    assert spec.accuracy() == pytest.approx(spec.bayes, abs=1e-9)


def test_the_first_example_of_bayes_accuracy():
    """|w|^2 fully visible and s = 0.2939 give .909; a half of it, without noise in the views, .7373."""
    spec = sim.Spec(0.0, (0.5, 0.5), 1 - math.atan(0.2939) / math.pi)
    assert spec.accuracy() == pytest.approx(0.909, abs=5e-4)
    assert spec.accuracy([0]) == pytest.approx(0.7373, abs=5e-4)


def test_anomalies_have_the_area_that_the_page_states():
    data = sim.draw(sim.Spec(0.0, (1.0, 0.0), 0.9, b=2), "anomaly", train=2, test=40_000, seed=0)
    v, y = data.test.views[0].double(), data.test.target
    spread = [torch.cov(v[y == label].T) for label in (0, 1)]
    direction = torch.linalg.eigh(spread[1] - spread[0])[1][:, -1]  # along which anomalies vary more
    score = (v @ direction).abs()
    above = torch.searchsorted(score[y == 0].sort().values, score[y == 1]).double().mean() / (y == 0).sum()
    assert above.item() == pytest.approx(2 / math.pi * math.atan(sim.GROWTH), abs=0.01)


# ------------------------------------------------------------------------------------------- entropies
def test_knn_and_gaussian_find_known_information():
    torch.manual_seed(0)
    x = torch.randn(4000, 2)
    z = 0.8 * x + 0.6 * torch.randn(4000, 2)
    for kind in ("gaussian", "knn"):
        own, shared = entropies([x, z], kind)
        assert own == pytest.approx([2 * sim.FULL_ENTROPY] * 2, abs=0.05)
        assert shared == pytest.approx(-math.log(1 - 0.64), abs=0.08)


def test_discrete_counts():
    x = torch.arange(16)[:, None] % 4
    own, shared = entropies([x.float(), (x // 2).float()], "discrete")
    assert own == pytest.approx([math.log(4), math.log(2)])
    assert shared == pytest.approx(math.log(2))


def test_mine_of_itself_warns_and_says_what_the_rows_are():
    torch.manual_seed(0)
    rows = torch.randn(512, 4)
    with pytest.warns(UserWarning, match="infinite"):
        small = entropies([rows, rows], "mine_self")[0][0]
    assert 1 < small <= math.log(256)  # an entropy of 5.68, an information of infinity


@pytest.mark.parametrize(
    ("view", "kind", "words"),
    [
        (torch.randn(9, 2), "shannon", "known are"),
        (torch.randn(9, 2), "discrete", "whole numbers"),
        (torch.ones(9, 2), "knn", "equal neighbours"),
        (torch.randn(9, 12), "gaussian", "singular"),
        (torch.full((9, 2), math.nan), "knn", "not finite"),
        (torch.randn(3, 2), "knn", "eight rows"),
    ],
)
def test_entropies_refuse(view, kind, words):
    with pytest.raises(UsageError, match=words):
        entropies([view, view], kind)


# ------------------------------------------------------------------------------------------- tasks
def test_svdd_centre_and_score():
    task = tasks.build("anomaly", width=2)
    task.start([torch.tensor([[1.0, -0.01], [3.0, -0.03]]), torch.zeros(2, 2)])
    torch.testing.assert_close(task.centres, torch.tensor([[2.0, -0.1], [0.1, 0.1]]))
    rows = torch.tensor([[2.0, -0.1], [2.0, 1.9], [5.0, -0.1]])
    torch.testing.assert_close(task.loss(rows, torch.zeros(3)), torch.tensor([0.0, 4.0, 9.0]))
    assert task.metrics(rows, torch.tensor([0, 1, 1])) == {"auc": 1.0}


def test_a_one_class_network_has_no_bias():
    model = Fusion([6, 6], tasks.build("anomaly"))
    assert not [name for name, _ in model.named_parameters() if "bias" in name]


def test_mosis_measures():
    found = tasks.build("value").metrics(
        torch.tensor([[1.0], [-1.0], [2.0], [0.5]]), torch.tensor([2.0, -1.0, -1.0, 0.0])
    )
    assert found["mae"] == pytest.approx((1 + 0 + 3 + 0.5) / 4)
    assert found["acc2"] == pytest.approx(2 / 3)  # the neutral one is left out
    assert found["f1"] == pytest.approx(1 / 3 * (2 / 3) + 2 / 3 * (2 / 3))


# ------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize(
    ("method", "task", "name"),
    [
        *((method, "class", "III") for method in METHODS),
        ("fusion", "value", "I"),
        ("omib", "value", "III-3"),
        ("vib", "anomaly", "I"),
        ("branches", "anomaly", "II"),
        ("omib", "anomaly", "III-3"),
    ],
)
def test_every_method_and_every_task_learns(method, task, name):
    run = train.start(options(data=f"sim:{name}", task=task, method=method, beta=0.003))
    first = train.take_step(run)["loss"].item()
    warm = run.options.warm_up_steps if run.model.method.branches else 0
    train.advance(run, warm)
    assert not [entry for entry in run.log if "task_loss" in entry]
    if warm:
        assert run.log[-1]["loss"] < first
    train.advance(run)
    main = [entry for entry in run.log if "task_loss" in entry]
    assert main[-1]["task_loss"] < main[0]["task_loss"]
    assert len(run.model.branch_heads) == (len(run.data.widths) if warm else 0)
    ratios = [key for key in main[-1] if key.startswith("r_")]
    codes = {"each": len(run.data.widths), "fused": 1, "none": 0}[run.model.method.bottleneck]
    assert len(ratios) == max(0, codes - 1)
    if method == "fixed":
        assert all(main[-1][key] == 1 for key in ratios)
    if method == "omib":
        assert all(0 < main[-1][key] < 2 for key in ratios)


def test_default_beta_is_the_upper_bound():
    run = train.start(options(train_rows=2000))
    own, shared = sim.named("III").entropies()
    assert run.bounds is not None and run.objective.beta == run.bounds.upper
    assert run.bounds.upper == pytest.approx(omib_beta_bounds(*own, shared).upper, rel=0.05)


def test_the_bottleneck_is_weighed_by_beta_and_r():
    torch.manual_seed(0)
    task, target = tasks.build("class"), torch.tensor([0, 1, 1])
    output = Output(
        torch.randn(3, 2),
        (torch.randn(3, 2), torch.randn(3, 2)),
        (Code(*torch.randn(2, 3, 4)), Code(*torch.randn(2, 3, 4))),
    )
    parts = Omf(task, METHODS["omib"], beta=0.1)(output, {"target": target})
    r = dynamic_ratio([task.divergence(b, output.fused, 1) for b in output.branches])
    kl = [standard_kl(code).mean() for code in output.codes]
    losses = [task.loss(p, target).mean() for p in (output.fused, *output.branches)]
    torch.testing.assert_close(parts["loss"], sum(losses) + 0.1 * (kl[0] + r[1] * kl[1]))


def test_a_run_goes_on_where_it_was(tmp_path, capsys):
    whole = train.train(options(tmp_path / "whole"))
    part = options(tmp_path / "part")
    run = train.start(part)
    train.advance(run, 31)
    (tmp_path / "part").mkdir()
    train.save(run, tmp_path / "part" / train.CHECKPOINT)
    assert train.train(part) == whole
    assert (tmp_path / "part" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()
    with pytest.raises(UsageError, match=r"lr = 0\.003"):
        train.train(replace(part, lr=0.1))


def test_the_rate_is_constant_in_the_warm_up_and_then_falls_to_nothing(tmp_path):
    run = train.start(options(lr=0.01))
    rates = [train.rate(run, step) for step in range(12 + 36 + 1)]
    assert rates[:13] == [0.01] * 13
    assert rates[12 + 18] == pytest.approx(0.005) and rates[-1] == pytest.approx(0)
    constant = train.start(options(lr=0.01, schedule="constant"))
    assert {train.rate(constant, step) for step in range(60)} == {0.01}
    assert train.rate(train.start(options(method="fusion", lr=0.01)), 18) == pytest.approx(0.005)  # no warm-up
    train.advance(run, 13)
    assert run.optimizer.param_groups[0]["lr"] == 0.01
    train.advance(run)
    assert 0 < run.optimizer.param_groups[0]["lr"] < 1e-4


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_more_steps_extend_a_run_of_a_constant_rate_alone(tmp_path, schedule):
    short = options(tmp_path / "run", schedule=schedule)
    train.train(short)
    if schedule == "cosine":
        with pytest.raises(UsageError, match="steps = 36"):
            train.train(replace(short, steps=48))
    else:
        train.train(replace(short, steps=48))
        assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["step"] == 12 + 48


def test_a_checkpoint_from_before_there_was_a_schedule_is_of_a_constant_rate(tmp_path):
    run = train.start(options(schedule="constant"))
    train.advance(run, 14)
    train.save(run, path := tmp_path / "old.pt")
    old = torch.load(path, weights_only=True)
    del old["options"]["schedule"], old["options"]["weight_decay"]
    torch.save(old, path)
    with pytest.raises(UsageError, match="schedule = constant"):
        train.load(train.start(options()), path)
    train.load(again := train.start(options(schedule="constant")), path)
    assert again.step == 14


def test_weight_decay_is_adamws():
    weights = [sum(p.square().sum() for p in decayed(decay).model.parameters()) for decay in (0.0, 3.0)]
    assert weights[1] < 0.95 * weights[0]


def decayed(weight_decay: float) -> train.Run:
    run = train.start(options(weight_decay=weight_decay, lr=1e-2))
    train.advance(run)
    return run


def test_codes_may_be_wider_than_the_encoders():
    run = train.start(options(hidden=6, latent=8))
    train.advance(run, 14)
    assert run.step == 14 and all(p.isfinite().all() for p in run.model.parameters())


def test_the_command(tmp_path, capsys):
    small = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with pytest.raises(SystemExit) as end:
        cli.main(["omib", "--data", "sim:III", "--method", "vib", "--out", str(tmp_path / "run"), *small])
    assert end.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "run" / "result.json").read_text())
    assert printed["ceiling"]["accuracy"] == 0.908 and 0.4 < printed["last"]["accuracy"] < 0.95


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"data": "sim:IV"}, "known are sim:I"),
        ({"data": "web:x"}, "must be one of"),
        ({"latent": 7}, "multiple of"),
        ({"data": "mosi:nowhere", "task": "value"}, "there is no nowhere"),
        ({"data": "mosi:x"}, "--task must be value"),
        ({"data": "cremad:nowhere"}, "there is no folder nowhere/AudioWAV"),
        ({"data": "cremad:nowhere", "task": "value"}, "--task must be class or anomaly"),
    ],
)
def test_wrong_requests(values, words):
    with pytest.raises(UsageError, match=words):
        train.start(options(**values))


def test_data_that_do_not_fit():
    data = sim.draw(sim.named("III"), "class", train=20, test=20, seed=0)
    short = replace(data.test, views=(data.test.views[0][:, 1:], data.test.views[1]))
    with pytest.raises(UsageError, match="view 0 of the test split"):
        train.start(options(beta=0.0), replace(data, test=short))
    with pytest.raises(UsageError, match="normal rows only"):
        train.start(options(beta=0.0, task="anomaly"), data)
    with pytest.raises(UsageError, match="from 0 to 1"):
        train.start(options(beta=0.0), replace(data, val=replace(data.val, target=data.val.target + 1)))
