"""The claims of 2506.04870 on drawings whose factors are known, `python bench/ alignment`.

Modality one is an image (bench/experiments/sprites.py), modality two the one-hots of the factors KEPT.  Orientation and
y are nuisances: in the image alone.  An MLP of so many hidden layers encodes the image; the objective is `aib`,
image to text.  A learnt temperature is tau itself, as in the paper's code: by its logarithm it moves too slowly.

    depth 2, 4, 6 x temperature .07 to 1, fixed, beta 0        what encoder and temperature leave
    beta 0 to 3 x temperature learnt or fixed at .07, depth 4  what the bottleneck removes, and homeostasis

URR of a nuisance of k values: (log k - CE) / log k, CE of a logistic regression on z, trained on training rows and read
on test rows: 1 if z tells it exactly, 0 if z says nothing, below 0 where the regression overfits.
"""

from __future__ import annotations

import math
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cibr_kernels as ck
from bench.experiments import alignment_claims, sprites
from bench.experiments.frame import Outcome
from cibr import objectives
from cibr.evaluate import probes
from cibr.models import Features, Output
from cibr.models.model import Facts, TemperatureOptions, Tempered, features_of
from cibr.objectives.alignment_ib import AlignmentBottleneck, AlignmentOptions
from cibr_kernels.information.capacity import capacity, covariance

KEPT, NUISANCES = ("shape", "scale", "x"), ("orientation", "y")
ROWS, TRAIN, PROBE_ROWS, KERNEL_ROWS = 10_000, 7_500, 3_000, 1_000
WIDTH, EMBED, BATCH, STEPS, LR = 128, 64, 128, 600, 1e-3
SEEDS, QUICK_SEEDS = (0, 1, 2, 3, 4), (0,)
DEPTHS, TEMPERATURES = (2, 4, 6), (0.07, 0.2, 0.5, 1.0)
BETAS, DEPTH, FIRST_TAU = (0.0, 0.001, 0.01, 0.1, 0.3, 1.0, 3.0), 4, 0.07
NEIGHBOURS, NOISE = 5, 0.1


@dataclass(frozen=True)
class Trial:
    depth: int
    learnt: bool  # the temperature
    first_tau: float
    beta: float
    seed: int
    urr: dict[str, float]  # of each nuisance
    kept: float  # per cent of test images whose nearest of all texts is their own
    tau: float  # at the end
    cosine: float  # of pairs, test
    entropy: float  # nats: 1/2 logdet(I + Cov(Zv) / NOISE^2), the most that Zv can say
    told: float  # nats: log BATCH - InfoNCE, of test batches
    cka_biased: float
    cka_debiased: float
    mutual_knn: float  # per cent

    @property
    def nuisance(self) -> float:
        """The mean URR."""
        return statistics.fmean(self.urr.values())


def mlp(first: int, depth: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for k in range(depth):
        layers += [nn.Linear(width if k else first, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers)


class Encoders(Tempered):
    """Pixels and one-hots; X is what enters the projections."""

    image_key, text_key = "image", "text"

    def __init__(self, options: TemperatureOptions, recipe: dict[str, Any]) -> None:
        super().__init__(options, recipe)
        self.image_width = self.text_width = WIDTH
        self.embed_dim = EMBED
        texts = sum(sprites.FACTORS[name] for name in KEPT)
        self.image_layers, self.text_layers = mlp(sprites.SIDE**2, recipe["depth"], WIDTH), mlp(texts, 2, WIDTH)
        self.image_projection, self.text_projection = (nn.Linear(WIDTH, EMBED, bias=False) for _ in range(2))

    def encode_image(self, images: Tensor) -> Features:
        x = self.image_layers(images)
        return features_of(x, self.image_projection(x))

    def encode_text(self, tokens: Tensor) -> Features:
        x = self.text_layers(tokens)
        return features_of(x, self.text_projection(x))


@dataclass(frozen=True)
class Drawings:
    images: Tensor  # (ROWS, 1024), mean 0
    texts: Tensor  # (ROWS, sum of sizes)
    factors: dict[str, Tensor]  # (ROWS,) each


def drawings(seed: int) -> Drawings:
    factors = sprites.sample(ROWS, seed)
    pixels = sprites.draw(factors).flatten(1)
    return Drawings((pixels - pixels[:TRAIN].mean(0)) / pixels[:TRAIN].std(), sprites.one_hots(factors, KEPT), factors)


def trial(
    depth: int, learnt: bool, first_tau: float, beta: float, seed: int, *, data: Drawings, steps: int = STEPS
) -> Trial:
    """One run and what its embeddings hold, by test rows."""
    torch.manual_seed(seed)
    temperature = TemperatureOptions(temperature="fixed", max_scale=None)
    model = Encoders(
        temperature, {**Encoders.new_recipe(temperature, Facts(logit_scale=1 / first_tau)), "depth": depth}
    )
    model.logit_scale.requires_grad_(False)
    options = AlignmentOptions(beta=beta, direction="image_to_text", tau="raw" if learnt else "model")
    objective = objectives.build(options, model)
    moving = [p for module in (model, objective) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(moving, lr=LR)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, int(0.4 * steps)), 0.3)
    for _ in range(steps):
        rows = torch.randint(TRAIN, (BATCH,))
        batch = {"image": data.images[rows], "text": data.texts[rows]}
        loss = objective(model(batch), batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    tau = objective.tau.item() if isinstance(objective, AlignmentBottleneck) and learnt else first_tau
    with torch.no_grad():
        output: Output = model({"image": data.images, "text": data.texts})
    zv, zt = output.image.embedding, output.text.embedding
    urr = {name: unique_rate(zv, data.factors[name], sprites.FACTORS[name]) for name in NUISANCES}
    compared = slice(TRAIN, TRAIN + KERNEL_ROWS)
    alike = probes.cka(zv[compared], zt[compared])
    return Trial(
        depth,
        learnt,
        first_tau,
        beta,
        seed,
        urr,
        kept(zv[TRAIN:], zt[TRAIN:], data.texts[TRAIN:]),
        tau,
        (zv * zt)[TRAIN:].sum(1).mean().item(),
        capacity(covariance(zv[TRAIN:]), NOISE).item(),
        told(zv[TRAIN:], zt[TRAIN:], tau),
        alike["biased"],
        alike["debiased"],
        probes.mutual_knn(zv[compared], zt[compared], NEIGHBOURS),
    )


def unique_rate(z: Tensor, labels: Tensor, values: int) -> float:
    """URR of a factor of so many values in z (ROWS, d) of unit norm."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=100))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 100 iterations, converged or not, as in the paper's code
        probe.fit(z[:PROBE_ROWS].numpy(), labels[:PROBE_ROWS].numpy())
    said = torch.from_numpy(probe.predict_log_proba(z[TRAIN:].numpy()))
    ce = F.nll_loss(said, labels[TRAIN:]).item()
    return (math.log(values) - ce) / math.log(values)


def told(zv: Tensor, zt: Tensor, tau: float) -> float:
    """log BATCH - InfoNCE in nats, the mean over whole batches."""
    starts = range(0, len(zv) - BATCH + 1, BATCH)
    losses = [ck.clip_loss(zv[s : s + BATCH], zt[s : s + BATCH], 1 / tau, one_way=True).item() for s in starts]
    return math.log(BATCH) - statistics.fmean(losses)


def kept(zv: Tensor, zt: Tensor, texts: Tensor) -> float:
    """Per cent of images nearest to their own text among all different texts."""
    _, own = texts.unique(dim=0, return_inverse=True)
    prototypes = torch.zeros(int(own.max()) + 1, zt.shape[1]).index_copy(0, own, zt)  # equal texts have equal z
    return 100 * ((zv @ prototypes.T).argmax(1) == own).double().mean().item()


def plan(seeds: Sequence[int]) -> list[tuple[int, bool, float, float, int]]:
    cells = [(depth, False, tau, 0.0) for depth in DEPTHS for tau in TEMPERATURES]
    cells += [(DEPTH, learnt, FIRST_TAU, beta) for learnt in (True, False) for beta in BETAS]
    return [(*cell, seed) for seed in seeds for cell in dict.fromkeys(cells)]


def run(quick: bool = False) -> Outcome:
    """All trials, one thread."""
    from tqdm import tqdm

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    chosen = QUICK_SEEDS if quick else SEEDS
    try:
        data = {seed: drawings(seed) for seed in chosen}
        trials = [
            trial(*cell, data=data[cell[-1]], steps=STEPS) for cell in tqdm(plan(chosen), leave=False, file=sys.stderr)
        ]
    finally:
        torch.set_num_threads(threads)
    return outcome(trials)


def outcome(trials: Sequence[Trial]) -> Outcome:
    claims = alignment_claims.claims(trials)
    numbers = {"trials": [asdict(t) for t in trials], "claims": [asdict(claim) for claim in claims]}
    text = "\n\n".join([table(trials), alignment_claims.table(claims)])
    return Outcome(text, numbers, True, lambda path: plot(path, trials))


def swept(trials: Sequence[Trial], learnt: bool) -> list[Trial]:
    return [t for t in trials if t.depth == DEPTH and t.first_tau == FIRST_TAU and t.learnt == learnt]


COLUMNS: tuple[tuple[str, str, Callable[[Trial], float]], ...] = (
    ("URR", ".3f", lambda t: t.nuisance),
    ("orient.", ".3f", lambda t: t.urr["orientation"]),
    ("y", ".3f", lambda t: t.urr["y"]),
    ("kept %", ".1f", lambda t: t.kept),
    ("tau", ".4f", lambda t: t.tau),
    ("cos", ".3f", lambda t: t.cosine),
    ("nats", ".1f", lambda t: t.entropy),
    ("told", ".2f", lambda t: t.told),
    ("CKA", ".3f", lambda t: t.cka_biased),
    ("debiased", ".3f", lambda t: t.cka_debiased),
    ("kNN %", ".1f", lambda t: t.mutual_knn),
)


def table(trials: Sequence[Trial]) -> str:
    """Means over seeds, a line a cell."""
    seeds = len({t.seed for t in trials})
    lines = [
        f"drawings, {STEPS} steps of {BATCH}, means over {seeds} seeds; URR: nuisance left in zv",
        f"{'':<28}" + "".join(f"{name:>9}" for name, _, _ in COLUMNS),
    ]
    for depth in DEPTHS:
        for tau in TEMPERATURES:
            own = [t for t in trials if (t.depth, t.learnt, t.first_tau, t.beta) == (depth, False, tau, 0.0)]
            lines.append(_line(f"depth {depth}, tau {tau:g}, beta 0", own))
    for learnt in (True, False):
        for beta in BETAS:
            own = [t for t in swept(trials, learnt) if t.beta == beta]
            lines.append(_line(f"tau {'learnt' if learnt else 'fixed '}, beta {beta:g}", own))
    return "\n".join(lines)


def _line(name: str, trials: Sequence[Trial]) -> str:
    return f"{name:<28}" + "".join(f"{statistics.fmean(map(of, trials)):>9{spec}}" for _, spec, of in COLUMNS)


def plot(path: Path, trials: Sequence[Trial]) -> None:
    """Nuisance against temperature and beta, temperature and entropy against beta, CKA against nuisance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    (by_tau, by_beta, tau), (information, nats, cka) = figure.subplots(2, 3)
    for k, depth in enumerate(DEPTHS):
        own = [t for t in trials if t.depth == depth and not t.learnt and t.beta == 0]
        _curve(by_tau, own, lambda t: t.first_tau, lambda t: t.nuisance, f"C{k}", f"depth {depth}")
    for learnt, colour in ((True, "C3"), (False, "C4")):
        own, name = swept(trials, learnt), f"tau {'learnt' if learnt else f'fixed at {FIRST_TAU}'}"
        for axis, value in (
            (by_beta, lambda t: t.nuisance),
            (tau, lambda t: t.tau),
            (information, lambda t: t.told),
            (nats, lambda t: t.entropy),
        ):
            _curve(axis, own, lambda t: t.beta, value, colour, name)
    cka.scatter([t.nuisance for t in trials], [t.cka_biased for t in trials], s=9, label="biased")
    cka.scatter([t.nuisance for t in trials], [t.cka_debiased for t in trials], s=9, label="debiased")
    cka.set(xlabel="URR of nuisances", title="CKA of the two embeddings, all runs")
    by_tau.set(xscale="log", xlabel="temperature, fixed", title="URR of nuisances, beta 0")
    by_beta.set(title="URR of nuisances, depth 4")
    tau.set(title="temperature at the end", yscale="log")
    information.set(title=f"log {BATCH} - InfoNCE, nats")
    nats.set(title=f"1/2 logdet(I + Cov(Zv) / {NOISE}²), nats")
    for axis in (by_beta, tau, information, nats):
        axis.set_xscale("symlog", linthresh=1e-3)
        axis.set(xlabel="beta", xlim=(-2e-4, 4))
    for axis in (by_tau, by_beta, cka):
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _curve(
    axis: Any, trials: Sequence[Trial], x: Callable[[Trial], float], y: Callable[[Trial], float], colour: str, name: str
) -> None:
    """Means over seeds with standard errors."""
    places = sorted({x(t) for t in trials})
    cells = [alignment_claims.mean_se([y(t) for t in trials if x(t) == place]) for place in places]
    means, errors = zip(*cells, strict=True)
    axis.errorbar(places, means, errors, marker="o", capsize=3, color=colour, label=name)
