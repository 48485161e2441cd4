"""Pictures that need the model itself: where embeddings lie, what a tower looks at, what estimates make of the batch.

tsne.png          image embeddings of each run by class and by style
grad_cam.png      what in an image speaks for its caption, a column a run
information.png   estimates of information against the rows they are read from, beside log n
"""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cibr.compare.picture import draw_comparison, opened
from cibr.config import RunConfig
from cibr.data import kind_of
from cibr.errors import UsageError, missing_extra
from cibr.evaluate.encode import concatenated, encode_pairs, encode_texts
from cibr.evaluate.information import ROWS, information
from cibr.evaluate.report import PROBE_ROWS, Set, emoji_splits, validation_set
from cibr.models import Model
from cibr.plots import COLOURS, ESTIMATES, LINES, MARKS, figure, group_runs, plot_logs, read_run
from cibr.run import checkpoint

POINTS = 1500  # of a t-SNE: more are a cloud
CLASSES = 8  # told apart in it; the others are grey
EXAMPLES = 6  # images of a Grad-CAM picture
Labelled = Sequence[tuple[str, Model]]  # a run's label and its model


def draw_tsne(models: Labelled, sets: Sequence[Set], path: Path) -> None:
    """A row a run: by class, and by style where the sets have any. The same images, rows of all sets together.

    Raises UsageError for fewer than ten images or no classes.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise missing_extra(error) from error
    if any(one.dataset.class_names is None for one in sets):
        raise UsageError(f"{sets[0].options.data} has no classes to tell points apart by")
    styled = all(one.dataset.styles is not None for one in sets)
    with figure(path, 1 + styled, rows=len(models), width=6.0, height=5.0, legend=False) as axes:
        for row, (label, model) in zip(axes, models, strict=True):
            embedding, classes, styles = gathered(model, sets)
            if len(embedding) < 10:
                raise UsageError(f"a t-SNE needs at least ten images, got {len(embedding)}")
            flat = TSNE(perplexity=min(30, (len(embedding) - 1) / 3), random_state=0).fit_transform(embedding.numpy())
            commonest = [name for name, _ in Counter(classes).most_common(CLASSES)]
            scatter(row[0], flat, classes, commonest, f"{label}: by class")
            if styled:
                scatter(row[1], flat, styles, sorted(set(styles)), f"{label}: by style")


def gathered(model: Model, sets: Sequence[Set]) -> tuple[Tensor, list[str], list[str]]:
    """Embeddings (n, d), class names and styles of at most POINTS images of the sets, chosen the same every time."""
    embedding = torch.cat([one.images(model).features.embedding for one in sets])
    classes, styles = [], []
    for one in sets:
        names, drawn_by = one.dataset.class_names or [], one.dataset.styles
        classes += [names[label] for label in one.labels(model).tolist()]
        styles += [drawn_by[row] if drawn_by else "" for row in one.images(model).rows.tolist()]
    chosen = torch.randperm(len(embedding), generator=torch.Generator().manual_seed(0))[:POINTS].sort().values
    return embedding[chosen], [classes[k] for k in chosen], [styles[k] for k in chosen]


def scatter(axis: Any, flat: np.ndarray, names: Sequence[str], shown: Sequence[str], title: str) -> None:
    """Points (n, 2) by name, each of `shown` in a mark and a colour of its own, the rest in grey."""
    there = np.array(names)
    rest = ~np.isin(there, shown)
    axis.scatter(*flat[rest].T, s=4, color="0.8", linewidths=0)
    for k, name in enumerate(shown):
        look = {"marker": MARKS[k % len(MARKS)], "facecolor": COLOURS[k % len(COLOURS)] if k % 2 else "none"}
        axis.scatter(
            *flat[there == name].T, s=18, edgecolor=COLOURS[k % len(COLOURS)], linewidths=0.7, label=name, **look
        )
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=10)
    axis.spines[:].set_visible(False)
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_grad_cam(models: Labelled, chosen: Set, path: Path) -> None:
    """A row an image, with its caption: the image, then for each run what speaks for the caption."""
    rows = torch.randperm(len(chosen.dataset), generator=torch.Generator().manual_seed(0))[:EXAMPLES].tolist()
    with figure(path, 1 + len(models), rows=len(rows), width=2.2, height=2.4, legend=False) as axes:
        for column, (label, model) in enumerate(models, start=1):
            maps, images = grad_cam(model, chosen, rows)
            for axis, image, heat in zip(axes[:, column], images, maps, strict=True):
                axis.imshow(image.mean(2), cmap="gray", vmin=0, vmax=1)
                axis.imshow(heat, cmap="inferno", alpha=0.55, vmin=0, vmax=1)
            axes[0, column].set_title(label, fontsize=9)
            for axis, image, row in zip(axes[:, 0], images, rows, strict=True):
                axis.imshow(image)
                axis.set_title(textwrap.shorten(str(chosen.dataset.captions(row)[0]), 34), fontsize=7)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)


def grad_cam(model: Model, chosen: Set, rows: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Maps (n, size, size) in [0, 1] of what in the images speaks for their first captions, and the images so cut.

    The score is 100 cos(image, caption). Raises UsageError for a model of features and an unknown image tower.
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise missing_extra(error) from error
    if model.image_key != "image" or chosen.dataset.image_width is not None:
        raise UsageError("Grad-CAM looks into images, and these are cached features; --no-grad-cam leaves it out")
    transform = model.transform(False)
    layer, reshape = target_layer(model)
    texts = encode_texts(model, concatenated([chosen.dataset.captions(row)[:1] for row in rows])).embedding
    inputs = torch.stack([transform(chosen.dataset.image(row)) for row in rows])
    targets = [ClassifierOutputTarget(k) for k in range(len(rows))]
    cam = GradCAM(Scores(model, texts), [layer], reshape_transform=reshape)
    with torch.random.fork_rng(devices=()), torch.enable_grad(), cam:
        maps = cam(inputs.clone().requires_grad_(), targets)  # or a locked tower has no gradients
    low, high = inputs.amin((1, 2, 3), keepdim=True), inputs.amax((1, 2, 3), keepdim=True)
    shown = ((inputs - low) / (high - low).clamp(min=1e-6)).permute(0, 2, 3, 1).numpy()  # undoes any mean and std
    return maps, list(shown)


class Scores(nn.Module):
    """images -> 100 cos of each with each text: what Grad-CAM differentiates."""

    def __init__(self, model: Model, texts: Tensor) -> None:
        super().__init__()
        self.model, self.texts = model, texts

    def forward(self, images: Tensor) -> Tensor:
        return 100 * self.model.encode_image(images).embedding @ self.texts.T


def target_layer(model: Model) -> tuple[nn.Module, Callable[[Tensor], Tensor] | None]:
    """Where Grad-CAM looks, and what makes a map (n, channels, height, width) of a transformer's tokens.

    A convolutional tower: its last layer of maps. A transformer: the input of the last block's attention, since of its
    output the class token alone is used, whose gradient says nothing of the patches. Raises UsageError for others.
    """
    towers = {name: module for name, module in model.named_modules() if not name.startswith("text")}
    blocks = [
        module for name, module in towers.items() if name.endswith(("visual.transformer.resblocks", "trunk.blocks"))
    ]
    if blocks:
        last = blocks[0][-1]  # type: ignore[index]
        return last.ln_1 if hasattr(last, "ln_1") else last.norm1, patches
    image = [m for name, m in towers.items() if name.endswith(("visual.layer4", "image_tower.layers"))]
    if image:
        return image[0][-1], None  # type: ignore[index]
    convolutions = [m for name, m in towers.items() if "visual" in name and isinstance(m, nn.Conv2d)]
    if not convolutions:
        raise UsageError("the image tower has neither convolutions nor blocks that Grad-CAM knows")
    return convolutions[-1], None


def patches(tokens: Tensor) -> Tensor:
    """(n, [class tokens] + side^2, channels) -> (n, channels, side, side)."""
    side = int(tokens.shape[1] ** 0.5)
    return tokens[:, tokens.shape[1] - side * side :].unflatten(1, (side, side)).permute(0, 3, 1, 2)


def draw_information(models: Labelled, chosen: Set, path: Path) -> None:
    """A panel a run: the four estimates read from 8, 16, 32, ... held-out rows at a time. Raises UsageError for few."""
    with figure(path, len(models), width=4.4) as axes:
        for axis, (label, model) in zip(axes[0], models, strict=True):
            image, text = encode_pairs(model, chosen.dataset, chosen.images(model), PROBE_ROWS)
            held = len(image.embedding) - len(image.embedding) // 2
            sizes = [2**k for k in range(3, 13) if 2**k <= max(held, ROWS)]
            sides = (image.inputs, image.embedding), (text.inputs, text.embedding)
            found = information(*sides, sizes=sizes)
            axis.plot(sizes, np.log(sizes), color="0.6", linewidth=1, label="log n")
            for k, (name, title) in enumerate(ESTIMATES.items()):
                look = {"color": COLOURS[k // 2 * 2], "linestyle": LINES[k % 2], "marker": MARKS[k], "markersize": 4}
                axis.plot(sizes, found["by_size"][name], label=title, linewidth=1.4, **look)
            axis.set_xscale("log", base=2)
            axis.set(xlabel="rows n that an estimate is read from", ylabel="estimated information (nats)")
            ceilings = f"most possible: images {found['image_ceiling']:.1f}, texts {found['text_ceiling']:.1f} nats"
            axis.set_title(f"{label}\n{ceilings}", fontsize=9)


def plot(
    runs: Sequence[Path],
    out: Path,
    *,
    data: str | None = None,
    tsne: bool = True,
    with_grad_cam: bool = False,
    with_information: bool = False,
) -> list[Path]:
    """Draws into `out` what the logs of the runs allow, then what was asked for of their models; returns the files.

    A folder of `cibr compare` stands for all of its runs, and has a picture of its differences.
    Models are shown the images of the SPEC `data`, by default those of the first run's data that are held out.
    Raises UsageError for what is no run, and for data that do not fit.
    """
    runs, comparisons = opened(runs)
    by_seed = {name for found in comparisons for name in found["by_seed"]}
    written = plot_logs(runs, out, by_seed)
    for number, found in enumerate(comparisons):
        written.append(out / f"comparison{number or ''}.png")
        draw_comparison(found, written[-1])
    if not (tsne or with_grad_cam or with_information):
        return written
    groups = group_runs([read_run(path) for path in runs], by_seed)
    without = [group.runs[0].path for group in groups if checkpoint.find(group.runs[0].path) is None]
    if without and not (with_grad_cam or with_information):
        kept = "`cibr compare --keep-checkpoints` keeps them"
        print(f"tsne.png is left out: there is no checkpoint at {without[0]}; {kept}", file=sys.stderr)
        return written
    loaded = [(group.label, checkpoint.load_run(group.runs[0].path)) for group in groups]  # of seeds the first
    models = [(label, run.model) for label, run in loaded]
    base = loaded[0][1].config.data
    sets = [Set(dataclasses.replace(base, data=data), "test")] if data else list(held_out(loaded[0][1].config).values())
    if tsne and any(one.dataset.class_names is None for one in sets):
        print(f"tsne.png is left out: {sets[0].options.data} has no classes to tell points apart by", file=sys.stderr)
    elif tsne:
        draw_tsne(models, sets, out / "tsne.png")
        written.append(out / "tsne.png")
    if with_grad_cam:
        draw_grad_cam(models, sets[0], out / "grad_cam.png")
        written.append(out / "grad_cam.png")
    if with_information:
        draw_information(models, sets[0], out / "information.png")
        written.append(out / "information.png")
    return written


def held_out(config: RunConfig) -> dict[str, Set]:
    """What training has not seen: of emoji the concepts kept from it, in all styles; of others validation or test."""
    if kind_of(config.data.data)[0] != "emoji":
        return {"validation": validation_set(config)}
    every = emoji_splits(config.data)
    return {name: every[name] for name in ("unseen", "unseen_held_out") if name in every} or every
