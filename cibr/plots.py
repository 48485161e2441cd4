"""Pictures of a run: its loss and mutual information over time, and a t-SNE of image embeddings coloured by style."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from cibr.data import load, split
from cibr.errors import UsageError, missing_extra
from cibr.evaluate import embed, evaluation_groups
from cibr.run import checkpoint

LOSSES = ("loss", "contrastive_loss", "image_cmi", "text_cmi")
ESTIMATES = ("image_own", "image_other", "text_own", "text_other")


def plot(run: Path, data: Path | None = None, *, tsne: bool = True) -> list[Path]:
    """Writes `curves.png` and, with `tsne`, `tsne.png` into the run's folder and returns their paths.

    The t-SNE shows the unseen concepts of the training vendors and of the vendor held out.
    """
    try:
        import matplotlib
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise missing_extra(error) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if not (run / "log.jsonl").is_file():
        raise UsageError(f"{run} holds no log.jsonl; it is not the folder of a run")
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    settings = json.loads((run / "config.json").read_text())
    steps = [entry["step"] for entry in entries]
    shown = [names for names in (LOSSES, ESTIMATES) if any(names[0] in entry for entry in entries)]
    figure, axes = plt.subplots(1, len(shown), figsize=(6 * len(shown), 4), squeeze=False, layout="constrained")
    for axis, names, title in zip(axes[0], shown, ("loss and its parts", "mutual information of Z"), strict=False):
        for name in names:
            if any(name in entry for entry in entries):
                axis.plot(steps, [entry.get(name, math.nan) for entry in entries], label=name)
        axis.set(xlabel="step", ylabel="nats", title=title)
        if names is ESTIMATES:
            axis.axhline(math.log(settings["batch_size"]), color="grey", linestyle=":", label="log N")
        axis.legend()
    written = [run / "curves.png"]
    figure.savefig(written[0], dpi=120)
    plt.close(figure)
    if not tsne:
        return written

    loaded = checkpoint.load_run(run)
    model, config = loaded.model, loaded.config
    pairs = load(
        data or Path(config.data.data.removeprefix("emoji:")),
        image_size=config.model.image_size,
        limit=config.data.limit,
    )
    groups = evaluation_groups(pairs, config)
    chosen = [groups[name][0] for name in ("unseen", "unseen_held_out") if name in groups]
    rows = np.concatenate([np.empty(0, np.int64), *chosen])
    if len(rows) < 3:
        raise UsageError("a t-SNE needs at least three images of unseen concepts; --no-tsne leaves it out")
    points = embed(model, pairs, rows).numpy()
    tested = {
        pairs.styles[style] for style in split(pairs, config.data.hold_out, config.data.unseen_fraction).test_styles
    }
    flat = TSNE(perplexity=min(30, (len(rows) - 1) / 3), random_state=0).fit_transform(points)
    figure, axis = plt.subplots(figsize=(7, 6), layout="constrained")
    for s, style in enumerate(pairs.styles):
        mine = pairs.style[rows] == s
        held_out = style in tested
        if mine.any():
            marker: dict[str, Any] = {
                "marker": "x" if held_out else "o",
                "s": 14,
                "color": plt.get_cmap("tab20")(s % 20),
            }
            axis.scatter(*flat[mine].T, label=style + (" (held out)" if held_out else ""), **marker)
    axis.set(xticks=[], yticks=[], title=f"image embeddings of unseen concepts, {config.objective.objective}")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    written.append(run / "tsne.png")
    figure.savefig(written[1], dpi=120)
    plt.close(figure)
    return written
