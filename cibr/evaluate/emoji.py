"""What a checkpoint can do: zero-shot classification, retrieval both ways, and how much of the style is left in Z."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cibr.config import RunConfig
from cibr.data import Pairs, load, split
from cibr.errors import missing_extra
from cibr.models import Model
from cibr.run import checkpoint

DEPTHS = (1, 5, 10)


def recalls(images: Tensor, image_concept: np.ndarray, texts: Tensor, text_concept: np.ndarray) -> dict[str, float]:
    """Retrieval in per cent, R@1, R@5 and R@10, of unit-norm images (n, d) and texts (m, d) by concepts (n,) and (m,).

    `image_to_text@k`: the image's concept is among its k nearest texts; with one text per concept this is zero-shot
    top-k accuracy over m classes. `text_to_image@k`: one of the text's k nearest images is of its concept; texts
    without any image are not asked.
    """
    similarity = images @ texts.T
    asked = np.isin(text_concept, image_concept)
    result: dict[str, float] = {}
    for name, scores, mine, theirs in (
        ("image_to_text", similarity, image_concept, text_concept),
        ("text_to_image", similarity.T[torch.from_numpy(asked)], text_concept[asked], image_concept),
    ):
        nearest = scores.topk(min(max(DEPTHS), scores.shape[1]), dim=1).indices.numpy()
        hit = theirs[nearest] == mine[:, None]
        result |= {f"{name}@{k}": 100 * float(hit[:, :k].any(1).mean()) for k in DEPTHS}
    return result


def style_probe(
    train: np.ndarray, train_style: np.ndarray, test: np.ndarray, test_style: np.ndarray
) -> dict[str, float]:
    """Accuracy in per cent of a logistic regression from embeddings (n, d) to styles (n,), and of the majority."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise missing_extra(error) from error
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that stops at max_iter is good enough for a probe
        probe.fit(train, train_style)
    majority = np.bincount(test_style).max() / len(test_style)
    return {"accuracy": 100 * float(probe.score(test, test_style)), "majority": 100 * float(majority)}


@torch.no_grad()
def embed(model: Model, pairs: Pairs, rows: np.ndarray, batch_size: int = 256) -> Tensor:
    """(len(rows), embed_dim) fp32 unit-norm image embeddings, on the CPU."""
    device = model.temperature()[0].device
    batches = [pairs.images[rows[i : i + batch_size]].to(device) for i in range(0, len(rows), batch_size)]
    return torch.cat([model.encode_image(batch.float() / 255).embedding.cpu() for batch in batches])


def evaluation_groups(pairs: Pairs, config: RunConfig) -> dict[str, tuple[np.ndarray, list[int]]]:
    """The rows and classes of each split that `pairs` has images for."""
    parts = split(pairs, config.data.hold_out, config.data.unseen_fraction)
    seen, unseen, styles = parts.seen, parts.unseen, {"train": parts.train_styles, "test": parts.test_styles}
    groups = {
        "held_out": (pairs.rows(seen, styles["test"]), seen),
        "unseen": (pairs.rows(unseen, styles["train"]), unseen),
        "unseen_held_out": (pairs.rows(unseen, styles["test"]), unseen),
        "train": (pairs.rows(seen, styles["train"]), seen),
    }
    return {name: (rows, list(concepts)) for name, (rows, concepts) in groups.items() if len(rows)}


def evaluate(path: Path, data: Path | None = None, *, probe: bool = True) -> dict[str, Any]:
    """The checkpoint (or the last one of the run) at `path` on `data`, by default the set it was trained on.

    Texts are the labels; numbers are per cent. Of the splits, `held_out` is the vendor not trained on, in the seen
    concepts; `unseen` the concepts not trained on, of the vendors trained on; `unseen_held_out` both; `train` neither.
    Raises UsageError when there is no checkpoint or no data.
    """
    run = checkpoint.load_run(path)
    model, config = run.model, run.config
    folder = data or Path(config.data.data.removeprefix("emoji:"))
    pairs = load(folder, image_size=config.model.image_size, limit=config.data.limit)
    groups = evaluation_groups(pairs, config)
    report: dict[str, Any] = {
        "checkpoint": str(checkpoint.find(path)),
        "objective": config.objective.objective,
        "hold_out": config.data.hold_out,
        "skipped_samples": pairs.skipped,
        "splits": {},
    }
    embeddings = {name: embed(model, pairs, rows) for name, (rows, _) in groups.items()}
    for name, (rows, concepts) in groups.items():
        with torch.no_grad():
            texts = model.encode_text(model.tokenizer([pairs.concepts[c].label for c in concepts])).embedding
        scores = recalls(embeddings[name], pairs.concept[rows], texts, np.array(concepts))
        report["splits"][name] = {"images": len(rows), "classes": len(concepts), **scores}
    if probe and "train" in groups and "unseen" in groups and len(set(pairs.style[groups["train"][0]])) > 1:
        report["style_probe"] = style_probe(
            embeddings["train"].numpy(),
            pairs.style[groups["train"][0]],
            embeddings["unseen"].numpy(),
            pairs.style[groups["unseen"][0]],
        )
    return report


TITLES = {
    "held_out": "held-out vendor, seen concepts",
    "unseen": "training vendors, unseen concepts",
    "unseen_held_out": "held-out vendor, unseen concepts",
    "train": "training images",
}


def table(report: dict[str, Any]) -> str:
    """The report of `evaluate` to read: per cent, one split a line."""
    columns = [f"{way}@{k}" for way in ("image_to_text", "text_to_image") for k in DEPTHS]
    heads = ["images", "classes", "top-1", "top-5", "top-10", "R@1", "R@5", "R@10"]
    lines = [
        f"{report['checkpoint']}: {report['objective']}, held out: {report['hold_out'] or 'no vendor'}",
        "",
        f"{'':34}{'':>16}{'zero-shot, image->text':>24}{'text->image':>24}",
        f"{'per cent':34}" + "".join(f"{head:>8}" for head in heads),
    ]
    for name, scores in report["splits"].items():
        numbers = "".join(f"{scores[column]:8.1f}" for column in columns)
        lines.append(f"{TITLES[name]:34}{scores['images']:8d}{scores['classes']:8d}{numbers}")
    if "style_probe" in report:
        probe = report["style_probe"]
        lines += [
            "",
            f"vendor probe on unseen concepts: {probe['accuracy']:.1f} (commonest style {probe['majority']:.1f})",
        ]
    if report["skipped_samples"]:
        lines.append(f"{report['skipped_samples']} unreadable samples skipped")
    return "\n".join(lines)
