"""The options of `cibr omib`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cibr.config import option


@dataclass(frozen=True, kw_only=True)
class OmibOptions:
    data: str = option("", "sim:I, sim:II, sim:III, sim:III-3, cremad:DIR or mosi:FILE")
    out: str = option("", "folder of the run; an unfinished one there is gone on with")
    method: Literal["omib", "fixed", "vib", "branches", "fusion"] = option(
        "omib",
        "fixed: r = 1; vib: one bottleneck after the fusion; branches: none, but the branches; fusion: neither",
    )
    task: Literal["class", "value", "anomaly"] = option("class", "classification, regression, one-class (Deep SVDD)")
    beta: float | None = option(None, "weight of the bottlenecks; default the bound M_u of the training rows", least=0)
    entropy: Literal["gaussian", "knn", "discrete", "mine_self"] = option("gaussian", "the estimator behind that bound")
    ratio: Literal["of_means", "mean_of"] = option(
        "of_means", "rho: the ratio of means, or the mean of the rows' ratios"
    )
    warm_up_steps: int = option(100, "steps of the task-relevance branches alone", least=0)
    steps: int = option(600, "steps of the main stage; with --schedule constant a larger number extends a run", least=1)
    batch_size: int = option(128, "rows a step", least=2)
    lr: float = option(1e-3, "AdamW's, in the warm-up and at the start of the main stage", above=0)
    schedule: Literal["cosine", "constant"] = option("cosine", "of the learning rate in the main stage; cosine: to 0")
    weight_decay: float = option(0.0, "AdamW's", least=0)
    hidden: int = option(64, "units of every hidden layer", least=1)
    latent: int = option(16, "width of every code", least=1)
    tokens: int = option(4, "of a code, for the cross-attention", least=1)
    train_rows: int = option(2000, "of sim", least=2)
    test_rows: int = option(4000, "of sim, for validation and for the test each", least=2)
    eval_every: int = option(50, "steps between validations", least=1)
    save_every: int = option(200, "steps between checkpoints", least=1)
    seed: int = option(0, "of the data, the weights, the batches and the noise", least=0)
