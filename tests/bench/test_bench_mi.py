"""`python bench/ mi` and `variance`: models against formulas of their own, estimates, tables, marks and exit status."""

import json
import math
from dataclasses import replace

import pytest
import torch

import cibr_kernels as ck
from bench import cli
from bench.experiments import mi, mi_estimate, mi_tasks, variance
from bench.experiments.mi import Result, Row
from bench.experiments.mi_estimate import Job, Recipe

X, Z = ("x",), ("z",)
BMI = {model.name: model for model in mi_tasks.bmi_models()}


def rows_of(model, n: int = 200_000, seed: int = 0) -> dict[str, torch.Tensor]:
    return model.sample(n, torch.Generator().manual_seed(seed))


def covariance_of(*variables: torch.Tensor) -> torch.Tensor:
    return torch.cov(torch.cat(variables, 1).double().T)


# ---------------------------------------------------------------------------------------------------- models
def canonical_information(rows: dict[str, torch.Tensor], left: str, right: str) -> float:
    """-1/2 sum log(1 - r^2) over the canonical correlations of the sample: no determinant of a joint covariance."""
    q, p = (torch.linalg.qr((t := rows[name].double()) - t.mean(0))[0] for name in (left, right))
    return -torch.log1p(-torch.linalg.svdvals(q.T @ p).square()).sum().item() / 2


@pytest.mark.parametrize(
    ("name", "truth"),
    [
        ("sparse 3x3", 1.0217),
        ("sparse 5x5", 1.0217),
        ("dense 5x5", 0.5928),
        ("dense 25x25", 1.2922),
        ("dense 50x50", 1.6243),
        ("asinh student 5x5, dof 2", 0.4482),
        ("spiral sparse 5x5", 1.0217),
    ],
)
def test_bmi_models_have_their_published_information(name, truth):
    assert BMI[name].information(X, Z) == pytest.approx(truth, abs=5e-5)


@pytest.mark.parametrize("name", ["sparse 5x5", "dense 5x5", "dense 25x25"])
def test_gaussian_samples_have_the_stated_information(name):
    assert canonical_information(rows_of(BMI[name]), "x", "z") == pytest.approx(BMI[name].information(X, Z), abs=0.02)


@pytest.mark.parametrize("d", [5, 25, 50])
def test_dense_is_one_canonical_correlation(d):
    r = d / (d + 1)  # of the two sums: d^2 / 2 over d + d (d - 1) / 2
    assert mi_tasks.dense(d).information(X, Z) == pytest.approx(-math.log(1 - r * r) / 2, rel=1e-12)


@pytest.mark.parametrize("information", mi_tasks.STAIRCASE)
def test_staircase(information):
    model = mi_tasks.gaussians(information)
    assert model.information(X, Z) == pytest.approx(information, rel=1e-12)
    assert mi_tasks.correlation_for(2, 20) == pytest.approx(0.425757, abs=5e-7)
    rows = rows_of(model, 50_000)
    cross = rows["x"].T @ rows["z"] / 50_000
    expected = mi_tasks.correlation_for(information, 20) * torch.eye(20)
    assert cross.sub(expected).abs().max() < 0.03


@pytest.mark.parametrize(("d", "r", "sigma"), mi_tasks.CHAINS)
def test_chain_by_its_scalar_formulas(d, r, sigma):
    model, v = mi_tasks.chain(d, r, sigma), sigma**2

    def half(ratio: float) -> float:
        return d / 2 * math.log(ratio)

    own, other = half(1 + 1 / v), half((1 + v) / (1 + v - r * r))
    between, both = half(1 / (1 - r * r)), half(1 + 1 / v + r * r / (1 - r * r))
    assert model.information(Z, ("xv",)) == pytest.approx(own, rel=1e-12)
    assert model.information(Z, ("xt",)) == pytest.approx(other, rel=1e-12)
    assert model.information(("xv",), ("xt",)) == pytest.approx(between, rel=1e-12)
    assert model.information(("xv",), ("z", "xt")) == pytest.approx(both, rel=1e-12)
    assert both - between == pytest.approx(own - other, rel=1e-12)  # z - xv - xt is Markov
    assert model.information(Z, ("xv", "xt")) == pytest.approx(own, rel=1e-12)
    rows = rows_of(model)
    assert canonical_information(rows, "z", "xt") == pytest.approx(other, abs=0.03)


@pytest.mark.parametrize("letter", "FG")
def test_ccmi_by_the_residual_of_a_regression(letter):
    """y - x - u has variance 0.01 whatever z is, and x is independent of z: I(x; y | z) = 1/2 log 101."""
    model = mi_tasks.ccmi(letter, 20)
    rows = rows_of(model, 100_000)
    y, known = rows["y"].double(), torch.cat([rows["x"], rows["z"]], 1).double()
    fit = torch.linalg.lstsq(known, y).solution
    of_z = torch.linalg.lstsq(rows["z"].double(), y).solution
    left, unexplained = (y - known @ fit).var().item(), (y - rows["z"].double() @ of_z).var().item()
    truth = model.information(X, ("y", "z"))
    assert truth == pytest.approx(math.log(101) / 2, rel=1e-12) and model.information(X, Z) == 0
    assert math.log(unexplained / left) / 2 == pytest.approx(truth, abs=0.01)
    assert covariance_of(rows["x"], rows["z"])[0, 1:].abs().max() < 0.02
    assert fit[0].item() == pytest.approx(1, abs=0.01)
    assert fit[1:].abs().sum().item() == pytest.approx(1, abs=0.02)  # z_1, or weights of L1 norm 1


def test_student_information_is_the_mean_log_density_ratio():
    d, dof, n = 5, 2, 400_000
    rows = rows_of(mi_tasks.student(d, dof), n)

    def log_density(t: torch.Tensor) -> torch.Tensor:  # without the terms that mi_tasks computes in closed form
        k = t.shape[1]
        constant = math.lgamma((dof + k) / 2) - math.lgamma(dof / 2) - k / 2 * math.log(dof * math.pi)
        return constant - (dof + k) / 2 * torch.log1p(t.double().square().sum(1) / dof)

    x, z = rows["x"], rows["z"]
    ratio = log_density(torch.cat([x, z], 1)) - log_density(x) - log_density(z)
    truth = mi_tasks.student(d, dof).information(X, Z)
    assert ratio.mean().item() == pytest.approx(truth, abs=5 * ratio.std().item() / math.sqrt(n))


def test_transforms_can_be_undone():
    base = rows_of(mi_tasks.sparse(5), 2000)
    word = {name.split()[0]: rows_of(model, 2000) for name, model in BMI.items()}
    for variable, plane in (("x", (0, 1)), ("z", (1, 2))):
        t = base[variable].double()
        torch.testing.assert_close(torch.special.ndtri(word["normal-cdf"][variable].double()), t, atol=2e-3, rtol=1e-3)
        cubed = word["half-cube"][variable].double()
        torch.testing.assert_close(cubed.sign() * cubed.abs() ** (2 / 3), t, atol=1e-6, rtol=1e-5)
        turned = word["spiral"][variable].double()
        i, j = plane
        point = torch.complex(turned[:, i], turned[:, j]) * torch.exp(-1j * turned.square().sum(1) / 5)
        back = turned.clone()
        back[:, i], back[:, j] = point.real, point.imag
        torch.testing.assert_close(back, t, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(turned, t, atol=0.1)
    assert word["asinh"]["x"].abs().max() < 20 < rows_of(mi_tasks.student(5, 2), 2000)["x"].abs().max()


# ------------------------------------------------------------------------------------------------ estimation
def test_normal_scores_are_monotone_and_normal():
    train, other = torch.randn(4000, 2).exp(), torch.randn(4000, 2).exp()
    scores = mi_estimate.NormalScores(train)
    seen, unseen = scores(train), scores(other)
    for t, s in ((train, seen), (other, unseen)):
        order = t.argsort(0)
        assert (s.gather(0, order).diff(dim=0) >= 0).all()
        assert s.mean(0).abs().max() < 0.1 and (s.std(0) - 1).abs().max() < 0.1
    assert len(seen[:, 0].unique()) > 3900
    assert scores(torch.tensor([[-1e9, 1e9]])).isfinite().all()


def test_fused_pairs_are_those_of_the_critic_written_out():
    torch.manual_seed(0)
    critic = mi_estimate.EncodedCritic(3, 2, 8, 16)
    for encoder in (critic.encode_x, critic.encode_z):
        torch.nn.init.normal_(encoder[-1].weight)
    x, z = torch.randn(20, 3), torch.randn(20, 2)
    a = critic.pairs.x_proj(x) + critic.encode_x(x)
    b = critic.pairs.z_proj(z) + critic.encode_z(z)
    scores = critic.pairs.out(torch.nn.functional.softplus(a[:, None] + b[None])).squeeze(-1)
    j = scores.diagonal().mean()
    el = scores[~torch.eye(20, dtype=torch.bool)].logsumexp(0) - math.log(20 * 19)
    torch.testing.assert_close(ck.mutual_information(x, z, critic, estimator="dv"), j - el, atol=1e-5, rtol=1e-5)


def test_an_encoded_critic_starts_as_a_concat_critic():
    critic = mi_estimate.EncodedCritic(3, 2, 8, 16)
    x, z = torch.randn(20, 3), torch.randn(20, 2)
    torch.testing.assert_close(ck.mutual_information(x, z, critic), ck.mutual_information(x, z, critic.pairs))


def test_estimate_is_reproducible_and_between_nothing_and_the_truth():
    job = Job("sparse 3x3", X, Z, 100, 2000, Recipe(batch=128, steps=120))
    reading, again = mi_estimate.estimate(job), mi_estimate.estimate(job)
    assert (reading.dv, reading.infonce) == (again.dv, again.infonce)
    assert 0.6 < reading.dv < 1.15 and 0.6 < reading.infonce < 1.15
    assert mi_estimate.estimate(replace(job, seed=101)).dv != reading.dv


def test_the_held_out_half_is_not_trained_on(monkeypatch):
    """The rows of the first half train; scores are of their ranks."""
    seen = []
    monkeypatch.setattr(
        mi_estimate,
        "train",
        lambda batches, recipe: seen.append(next(batches)) or mi_estimate.EncodedCritic(3, 3, 4, 4),
    )
    mi_estimate.estimate(Job("sparse 3x3", X, Z, 0, 512, Recipe(batch=256, steps=1)))
    first = rows_of(BMI["sparse 3x3"], 512)["x"][:256]
    expected = mi_estimate.NormalScores(first)(first).sort(0).values
    torch.testing.assert_close(seen[0][0].sort(0).values, expected)


# ---------------------------------------------------------------------------------------------- tables, marks
def test_the_table_has_every_row_that_was_asked_for():
    rows = mi.rows()
    assert len({(row.section, row.label) for row in rows}) == len(rows) == 5 + 3 * 6 + 4 * 3 + 10
    bmi = [row for row in rows if row.section == "bmi"]
    assert all(row.ahead_of == "bmi MINE" and len(row.peers["bmi MINE"]) == 2 for row in bmi)
    assert [row.label for row in bmi if row.tolerance == 0.05] == list(mi.WITHIN_5)
    for row in rows:
        models = mi_tasks.models()
        total = sum(sign * models[job.model].information(job.left, job.right) for sign, job in row.terms)
        assert total == pytest.approx(row.truth, abs=1e-9)
    past = [row.label for row in rows if row.tolerance is None and row.section != "bmi"]
    assert past.count("I(x;z)") == 4 and {"I = 6", "I = 8", "I = 10"} < set(past) and "I = 4" not in past
    conditional = [row for row in rows if row.label.startswith("I(x;y|z)")]
    assert len(conditional) == 4 and all(row.truth == pytest.approx(math.log(101) / 2) for row in conditional)
    assert 0 < len(mi.quick_rows()) < len(rows)


def test_marks():
    job = Job("sparse 5x5", X, Z, 0, 10_000)
    row = Row("bmi", "sparse 5x5", 1.0, ((1, job),), 0.05, {"bmi MINE": (0.95, 0.91)}, "bmi MINE")

    def met(*values: float) -> list[bool]:
        return [passed for passed, _ in Result(row, values, values).demands()]

    assert met(0.97, 0.99) == [True, True] == met(1.04, 1.0)
    assert met(0.94, 0.94) == [False, True] and met(0.90, 0.90) == [False, False]
    assert met(math.nan) == [False, False]
    line = mi.line(Result(row, (0.95, 0.97), (0.9, 0.9)), ["bmi MINE"])
    assert (
        "PASS within 5%" in line
        and "-4.0 %" in line
        and " 0.014 " in line
        and "PASS ahead of bmi MINE" in line
        and "0.930" in line
    )


@pytest.fixture
def tiny(monkeypatch):
    recipe = Recipe(hidden=8, width=8, batch=64, steps=2)
    rows = [
        replace(row, terms=tuple((s, replace(job, samples=job.samples and 256, recipe=recipe)) for s, job in row.terms))
        for row in mi.rows()
        if row.section in ("chain d = 1, r = 0.8, sigma = 0.5", "CCMI F, d_z = 20")
        or row.label in ("I = 2", "sparse 5x5", "spiral sparse 5x5")
    ]
    monkeypatch.setattr(mi, "quick_rows", lambda: rows)
    return rows


def test_mi_from_the_command_line(tiny, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(mi, "processors", lambda: 1)
    arguments = ["mi", "--quick", "--json", str(tmp_path / "mi.json"), "--plot", str(tmp_path / "mi.png")]
    assert cli.main(arguments) == 1  # two steps are too few
    out = capsys.readouterr().out
    assert "FAIL within 5%" in out and "rows with demands missed one" in out and "bmi MINE" in out
    written = json.loads((tmp_path / "mi.json").read_text())
    assert [row["row"]["label"] for row in written["rows"]] == [row.label for row in tiny]
    assert all(len(row["dv"]) == 1 and math.isfinite(row["dv"][0]) for row in written["rows"])
    assert not list(tmp_path.glob("*.partial*"))
    assert (tmp_path / "mi.png").read_bytes().startswith(b"\x89PNG")


def test_mi_succeeds_where_demands_are_met(tiny, monkeypatch):
    exact = [Result(row, (row.truth, row.truth), (row.truth, row.truth)) for row in tiny]
    monkeypatch.setattr(mi, "measure", lambda rows, seeds, workers: (exact, 0.0))
    found = mi.run(quick=True, workers=1)
    assert found.met and "FAIL" not in found.text


def test_processes_and_one_process_read_the_same(tiny):
    rows = [row for row in tiny if row.label == "sparse 5x5"]
    assert mi.measure(rows, (0, 1), 1)[0] == mi.measure(rows, (0, 1), 2)[0]


# -------------------------------------------------------------------------------------------------- variance
def test_optimal_critic_is_the_log_density_ratio():
    d, rho = 3, 0.6
    x, z = torch.randn(50, d), torch.randn(50, d)
    eye = torch.eye(d)
    joint = torch.distributions.MultivariateNormal(
        torch.zeros(2 * d), torch.cat([torch.cat([eye, rho * eye], 1), torch.cat([rho * eye, eye], 1)])
    )
    alone = torch.distributions.MultivariateNormal(torch.zeros(d), eye)
    ratio = joint.log_prob(torch.cat([x, z], 1)) - alone.log_prob(x) - alone.log_prob(z)
    torch.testing.assert_close(variance.optimal_critic(rho, d).paired(x, z), ratio, atol=1e-5, rtol=1e-5)


def test_schemes_are_the_pairs_that_they_say():
    n = 12
    torch.manual_seed(0)
    x, z, critic = torch.randn(n, variance.D), torch.randn(n, variance.D), variance.optimal_critic(0.3, variance.D)
    scores = critic.pairwise(x, z).double()
    i = torch.arange(n)

    def expected(pairs: torch.Tensor) -> torch.Tensor:
        return (pairs.logsumexp(0) - math.log(len(pairs))).float()

    off = scores[~torch.eye(n, dtype=torch.bool)]
    by_hand = {"all pairs": off, "all + diagonal": scores.flatten()}
    by_hand |= {f"{k} shifts": torch.cat([scores[i, (i + s) % n] for s in range(1, k + 1)]) for k in (4,)}
    by_hand["1 shift"] = scores[i, (i + 1) % n]
    for scheme, pairs in by_hand.items():
        torch.testing.assert_close(variance.SCHEMES[scheme](x, z, critic), expected(pairs), atol=1e-5, rtol=1e-5)
    torch.manual_seed(5)
    permuted = variance.SCHEMES["permutation"](x, z, critic)
    torch.manual_seed(5)
    torch.testing.assert_close(permuted, expected(scores[i, torch.randperm(n)]), atol=1e-5, rtol=1e-5)


def test_theory_of_the_spread():
    chi2 = math.exp(4) - 1
    assert variance.theory("1 shift", 2, 256) == (0, pytest.approx(math.sqrt(chi2 / 256)))
    assert variance.theory("16 shifts", 2, 256)[1] == pytest.approx(math.sqrt(chi2 / 4096))
    assert variance.theory("all pairs", 2, 256)[1] == pytest.approx(math.sqrt(chi2 / 256 / 255))
    assert variance.theory("all + diagonal", 2, 256) == (pytest.approx(math.log1p(chi2 / 256)), None)


def test_variance_from_the_command_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(variance, "QUICK_REPEATS", 50)
    study = variance.study
    monkeypatch.setattr(variance, "study", lambda repeats: study(repeats, (1.0, 2.0), (64, 256)))
    arguments = ["variance", "--quick", "--json", str(tmp_path / "v.json"), "--plot", str(tmp_path / "v.png")]
    assert cli.main(arguments) == 0, capsys.readouterr().out
    cells = json.loads((tmp_path / "v.json").read_text())["cells"]
    assert len(cells) == 2 * 2 * len(variance.SCHEMES) and (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1 + 1 + 2 * 4 + 1 and out[-1].endswith("PASS")
    diagonal = next(c for c in cells if c["scheme"] == "all + diagonal" and c["n"] == 256 and c["information"] == 2)
    assert diagonal["mean"] > 0.1  # fixed points bias L up; without them it is 0
    assert abs(next(c for c in cells if c["scheme"] == "all pairs" and c["n"] == 256)["mean"]) < 0.02


def test_variance_fails_where_all_pairs_spread_more(monkeypatch):
    cells = variance.study(8, (1.0,), (64,))
    assert cells[4].scheme == "all pairs"
    worse = [*cells[:4], replace(cells[4], sd=1.0), *cells[5:]]
    assert any("all pairs spread no less than 16 shifts" in line for line in variance.missed(worse))
    assert any("theory" in line for line in variance.missed([*cells[:4], replace(cells[4], sd=1e-3), *cells[5:]]))
    monkeypatch.setattr(variance, "study", lambda repeats: worse)
    found = variance.run(quick=True)
    assert not found.met and "FAIL" in found.text
