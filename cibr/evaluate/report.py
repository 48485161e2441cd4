"""The whole evaluation of a model on the sets named, as one dictionary of per cent and nats, and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cibr.config import RunConfig
from cibr.data import DataOptions, Dataset, kind_of, open_dataset
from cibr.data.listing import TEMPLATE
from cibr.data.standard import STANDARD, spoken, templates
from cibr.errors import UsageError
from cibr.evaluate.encode import Images, encode_captions, encode_classes, encode_images, encode_pairs
from cibr.evaluate.information import ROWS, information
from cibr.evaluate.probes import cka, linear_probe, mutual_knn, same_style_neighbours, within_class_share
from cibr.evaluate.retrieval import DEPTHS, recalls
from cibr.evaluate.zero_shot import check_prompts, zero_shot
from cibr.models import Model

PROBE_ROWS = 4000  # more make a probe slow and no better
NOISE_STD = 0.25  # of the noisy probe and of the estimates: CIBR's default
SPLITS = ("held_out", "unseen", "unseen_held_out", "train")  # of the emoji
NOTHING_NAMED = "say what to evaluate on: --zero-shot NAME=SPEC, --retrieval NAME=SPEC, or both"
Specs = Mapping[str, str]


class Set:
    """A data set to evaluate on, opened; a model encodes its images once, whatever is asked of them."""

    def __init__(self, options: DataOptions, split: str) -> None:
        self.options, self.dataset = options, open_dataset(options, split)
        self._images: tuple[Model, Images] | None = None

    def images(self, model: Model) -> Images:
        if self._images is None or self._images[0] is not model:
            self._images = model, encode_images(model, self.dataset, self.options)
        return self._images[1]

    def labels(self, model: Model) -> Tensor:
        """(n,) int64 of the images that could be read."""
        assert self.dataset.labels is not None
        return self.dataset.labels[self.images(model).rows]

    def styles(self, model: Model) -> Tensor | None:
        """(n,) int64 index into the sorted styles of the set, where it has any."""
        styles = self.dataset.styles
        if styles is None:
            return None
        known = {name: k for k, name in enumerate(sorted(set(styles)))}
        return torch.tensor([known[styles[row]] for row in self.images(model).rows.tolist()])


def evaluate(
    model: Model,
    *,
    zero_shot: Specs | None = None,
    retrieval: Specs | None = None,
    probe: bool = False,
    options: DataOptions | None = None,
    own: Mapping[str, Set] | None = None,
) -> dict[str, Any]:
    """{"zero_shot": {NAME: {"top1", ...}}, "retrieval": {NAME: {"image_to_text@1", ...}}, "sets": {NAME: ...}}.

    The model is in evaluation mode. Both mappings go from a name to a SPEC as of `--data`; a name among the paper's
    seven gives a set without prompts of its own those of that one. `options` are those of the run. Without any set
    named it is `own`, which `own_sets` finds for a run. `probe` adds "probe", "information" and, of emoji,
    "style_probe". Every set is opened before any is encoded. Raises UsageError for what is not there and for weights
    that are not finite.
    """
    check_weights(model)
    base = options or DataOptions(data="none")
    sets: dict[tuple[str, str], Set] = {}
    if zero_shot or retrieval:
        classified = {name: opened(sets, base, spec, "test") for name, spec in (zero_shot or {}).items()}
        searched = {name: opened(sets, base, spec, "test") for name, spec in (retrieval or {}).items()}
    else:
        if own is None:
            raise UsageError(NOTHING_NAMED)
        searched = dict(own)
        classified = {name: chosen for name, chosen in own.items() if chosen.dataset.class_names is not None}
    for name, chosen in classified.items():
        use_prompts(name, chosen.dataset)
    report: dict[str, Any] = {
        "zero_shot": {name: score_classes(model, chosen) for name, chosen in classified.items()},
        "retrieval": {name: score_retrieval(model, chosen) for name, chosen in searched.items()},
    }
    every = {**classified, **searched}
    report["sets"] = {name: describe(model, chosen) for name, chosen in every.items()}
    return {**report, **probes(model, every)} if probe else report


def check_weights(model: Model) -> None:
    """A NaN compares as greater than nothing, so its ranks would be perfect."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UsageError(f"the weights {name} are NaN or infinite: nothing can be measured of a run that diverged")


def opened(sets: dict[tuple[str, str], Set], base: DataOptions, spec: str, split: str) -> Set:
    """The set of a SPEC, one object however often it is asked for."""
    if (spec, split) not in sets:
        sets[spec, split] = Set(for_data(base, spec), split)
    return sets[spec, split]


def for_data(base: DataOptions, spec: str) -> DataOptions:
    """A run's options for a SPEC: its limit, shots and classes are of its own data."""
    return base if spec == base.data else dataclasses.replace(base, data=spec, limit=None, shots=None, classes="all")


def own_sets(config: RunConfig) -> dict[str, Set]:
    """What a run is evaluated on by itself: emoji on their splits, others on their validation data.

    Raises UsageError for a run that has neither.
    """
    if kind_of(config.data.data)[0] == "emoji":
        return emoji_splits(config.data)
    if config.run.val_data is None and config.run.val_split is None:
        raise UsageError(NOTHING_NAMED)
    return {"validation": validation_set(config)}


def validation_set(config: RunConfig) -> Set:
    """The data that training is watched on."""
    spec = config.data.data if config.run.val_data is None else config.run.val_data
    return Set(for_data(config.data, spec), config.run.val_split or "test")


def emoji_splits(base: DataOptions) -> dict[str, Set]:
    """The splits of a run's emoji that have drawings."""
    found = {}
    for split in SPLITS:
        if (split.endswith("held_out") and base.hold_out is None) or (
            split.startswith("unseen") and not base.unseen_fraction
        ):
            continue
        found[split] = Set(base, split)
    return found


def use_prompts(name: str, dataset: Dataset) -> None:
    """Gives a set of the paper's whose prompts are not its own those that it is known by, and checks them."""
    if dataset.class_names is None:
        raise UsageError(f"{name} has no classes, so there is nothing to classify; --retrieval takes captions")
    if name in STANDARD and dataset.templates == [TEMPLATE]:
        dataset.templates = templates(name)
        dataset.class_names = [spoken(one) for one in dataset.class_names]
    if not dataset.text_width:
        check_prompts(dataset.class_names, dataset.templates or ())


def score_classes(model: Model, chosen: Set) -> dict[str, float]:
    images = chosen.images(model)
    return zero_shot(images.features.embedding, encode_classes(model, chosen.dataset), chosen.labels(model))


def score_retrieval(model: Model, chosen: Set) -> dict[str, float]:
    """Images among captions, several an image; in a set of classes, among the classes."""
    images = chosen.images(model)
    if chosen.dataset.labels is not None:
        classes = encode_classes(model, chosen.dataset)
        return recalls(images.features.embedding, chosen.labels(model), classes, torch.arange(len(classes)))
    captions, row = encode_captions(model, chosen.dataset, images.rows)
    return recalls(images.features.embedding, images.rows, captions, row)


def describe(model: Model, chosen: Set) -> dict[str, Any]:
    """What was evaluated on: counts, and the samples that were left out by reason."""
    about: dict[str, Any] = {"data": chosen.options.data, "images": len(chosen.images(model).rows)}
    if chosen.dataset.class_names is not None:
        about["classes"] = len(chosen.dataset.class_names)
    return {**about, "skipped": dict(chosen.dataset.skipped.counts)}


def probes(model: Model, every: Mapping[str, Set]) -> dict[str, Any]:
    """Of each set what can be asked of it: classes, styles, and the likeness and information of distinct pairs."""
    report: dict[str, Any] = {"probe": {}, "information": {}}
    for name, chosen in every.items():
        report["probe"][name] = {**probe_classes(model, chosen), **probe_styles(model, chosen)}
        image, text = encode_pairs(model, chosen.dataset, chosen.images(model), PROBE_ROWS)
        if len(image.embedding) > 11:
            report["probe"][name] |= {
                "cka_embeddings": cka(image.embedding, text.embedding),
                "cka_inputs": cka(image.inputs, text.inputs),
                "mutual_knn": mutual_knn(image.embedding, text.embedding),
            }
        if len(image.embedding) >= 2 * ROWS:
            sides = (image.inputs, image.embedding), (text.inputs, text.embedding)
            report["information"][name] = information(*sides, noise_std=NOISE_STD)
    if "train" in every and "unseen" in every and every["train"].dataset.styles is not None:
        report["style_probe"] = style_probe(model, every["train"], every["unseen"])
    return report


def some_rows(n: int) -> Tensor:
    """At most PROBE_ROWS of n rows, in random order, the same every time."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:PROBE_ROWS]


def probe_classes(model: Model, chosen: Set) -> dict[str, Any]:
    """Of sets with at least eight images a class: linear and noisy probe, trained on half of the images."""
    if chosen.dataset.labels is None:
        return {}
    rows = some_rows(len(chosen.images(model).rows))
    labels, z = chosen.labels(model)[rows], chosen.images(model).features.embedding[rows]
    half, classes = len(rows) // 2, len(labels.unique())
    if classes < 2 or len(rows) < 8 * classes:
        return {}
    parts = z[:half], labels[:half], z[half:], labels[half:]
    return {
        "linear": linear_probe(*parts),
        "noisy": linear_probe(*parts, noise_std=NOISE_STD),
        "within_class_share": within_class_share(z, labels),
    }


def probe_styles(model: Model, chosen: Set) -> dict[str, Any]:
    """Of drawings in several styles: what share of the variance of Z is the style's, and how it clusters."""
    styles = chosen.styles(model)
    if styles is None or len(styles.unique()) < 2:
        return {}
    rows = some_rows(len(styles))
    labels, z = chosen.labels(model)[rows], chosen.images(model).features.embedding[rows]
    return {
        "style_share": within_class_share(z, labels),
        "style_neighbours": same_style_neighbours(z, labels, styles[rows]),
    }


def style_probe(model: Model, train: Set, test: Set) -> dict[str, float]:
    """Who drew it? Asked about concepts that neither the model nor the probe has seen."""
    sides = []
    for chosen in (train, test):
        rows = some_rows(len(chosen.images(model).rows))
        names = chosen.dataset.styles or []
        number = {name: k for k, name in enumerate(sorted(set(train.dataset.styles or [])))}
        styles = torch.tensor([number[names[row]] for row in chosen.images(model).rows[rows].tolist()])
        sides += [chosen.images(model).features.embedding[rows], styles]
    return linear_probe(*sides)


TITLES = {
    "held_out": "held-out vendor, seen concepts",
    "unseen": "training vendors, unseen concepts",
    "unseen_held_out": "held-out vendor, unseen concepts",
    "train": "training images",
    "val": "validation",
}


def table(report: Mapping[str, Any]) -> str:
    """The report of `evaluate` to read: per cent, one set a line."""
    lines = []
    if report["zero_shot"]:
        heads = "".join(f"{head:>10}" for head in ("images", "classes", "top-1", "top-5", "per class"))
        lines += [f"{'zero-shot, per cent':34}{heads}"]
        for name, scores in report["zero_shot"].items():
            about = report["sets"][name]
            numbers = "".join(f"{scores[key]:10.1f}" for key in ("top1", "top5", "mean_per_class"))
            lines.append(f"{TITLES.get(name, name):34}{about['images']:10d}{about['classes']:10d}{numbers}")
    if report["retrieval"]:
        ways = ("image_to_text", "text_to_image")
        heads = "".join(f"{f'R@{k}':>9}" for _ in ways for k in DEPTHS)
        lines += ["", f"{'':34}{'image to text':>27}{'text to image':>27}", f"{'retrieval, per cent':34}{heads}"]
        for name, scores in report["retrieval"].items():
            numbers = "".join(f"{scores[f'{way}@{k}']:9.1f}" for way in ways for k in DEPTHS)
            lines.append(f"{TITLES.get(name, name):34}{numbers}")
    lines += probe_lines(report)
    for name, about in report["sets"].items():
        lines += [f"{name}: {count} {reason}" for reason, count in about["skipped"].items()]
    return "\n".join(lines).strip("\n")


def probe_lines(report: Mapping[str, Any]) -> list[str]:
    """The probes in words."""
    lines = [""] if "probe" in report else []
    for name, found in report.get("probe", {}).items():
        parts = []
        for kind in ("linear", "noisy"):
            if kind in found:
                parts.append(f"{kind} probe {found[kind]['accuracy']:.1f} %")
        if "style_share" in found:
            same = found["style_neighbours"]
            parts.append(f"style {100 * found['style_share']:.0f} % of the variance")
            parts.append(f"{same['same_style']:.0f} % of neighbours of one style (chance {same['chance']:.0f})")
        if "cka_embeddings" in found:
            both = found["cka_embeddings"]
            parts.append(f"CKA {both['debiased']:.2f} debiased ({both['biased']:.2f} biased)")
            parts.append(f"mutual 10-NN {found['mutual_knn']:.0f} %")
        lines += [f"{TITLES.get(name, name)}: {', '.join(parts)}"] if parts else []
    for name, found in report.get("information", {}).items():
        keys = ("image_own", "image_other", "text_own", "text_other")
        numbers = ", ".join(f"{key.replace('_', ' ')} {found[key]:.2f}" for key in keys)
        lines.append(f"{TITLES.get(name, name)}: nats of information, {numbers}; log n {found['log_rows']:.2f}")
    if "style_probe" in report:
        probe = report["style_probe"]
        lines.append(f"style probe on unseen concepts {probe['accuracy']:.1f} % (commonest {probe['majority']:.1f} %)")
    return lines
