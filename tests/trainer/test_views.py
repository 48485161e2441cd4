"""Second views and all captions: what batches hold, what objectives make of them, and that runs resume with them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toyset
from PIL import Image
from runs import RUN, config, require_same_state
from torch.nn import functional as F
from torchvision.transforms.functional import to_tensor

import cibr_kernels as ck
from cibr import models, objectives
from cibr.data import Batches, DataOptions, Dataset, open_dataset
from cibr.data.features import FeatureSet
from cibr.data.order import Partners
from cibr.errors import UsageError
from cibr.models import Batch, Features, Output
from cibr.models.model import Facts
from cibr.needs import Needs
from cibr.train import train

BOTH = Needs(second=True, captions=True)
HEADS: dict[str, Any] = {"model": "heads", "embed_dim": 8, "lam_warmup_steps": 1, "lam_ramp_steps": 1}


class Classes(Dataset):
    """Row i is of the class i mod 3 and has the colour i; class 2 has a single row, two captions a row."""

    def __init__(self) -> None:
        labels = [0, 1, 2, 0, 1, 0, 1]
        captions = [(f"{row} a", f"{row} b") for row in range(7)]
        super().__init__([str(row) for row in range(7)], captions, labels=labels, class_names=["x", "y", "z"])

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (2, 2), (index, 0, 0))


def batches(dataset: Dataset, needs: Needs = BOTH, **options: Any) -> Batches:
    made = DataOptions(data="classes:x", workers=0, **options)
    tokenizer = lambda texts: torch.tensor([[ord(c) for c in text] for text in texts])  # noqa: E731
    return Batches(dataset, made, batch_size=5, seed=0, transform=to_tensor, tokenizer=tokenizer, needs=needs)


def rows_of(batch: Batch, key: str) -> list[int]:
    return (batch[key][:, 0, 0, 0] * 255).round().long().tolist()


def test_a_second_view_is_of_the_class_and_another_row() -> None:
    dataset, seen = Classes(), set()
    for batch in islice(batches(dataset).start(0), 60):
        assert torch.equal(batch["group_ids_2"], batch["group_ids"])
        for row, other in zip(batch["index"].tolist(), rows_of(batch, "image_2"), strict=True):
            assert dataset.labels is not None and dataset.labels[row] == dataset.labels[other]
            assert (row != other) == (row != 2)  # the only one of its class is its own
            seen.add((row, other))
        words = ["".join(map(chr, text)) for text in batch["text_2"].tolist()]
        assert [int(word[0]) for word in words] == rows_of(batch, "image_2")
    assert len(seen) == 2 * 6 + 1


def test_all_captions_of_each_row() -> None:
    batch = next(batches(Classes(), Needs(captions=True)).start(0))
    assert (
        "image_2" not in batch and batch["text_all"].shape == (5, 2, 3) and batch["caption_count"].tolist() == [2] * 5
    )
    for row, texts in zip(batch["index"].tolist(), batch["text_all"].tolist(), strict=True):
        assert ["".join(map(chr, text)) for text in texts] == [f"{row} a", f"{row} b"]


def test_views_depend_on_seed_step_and_row_alone() -> None:
    """A part of the batch, and a later start, give the same rows."""
    whole = list(islice(batches(Classes()).start(0), 6))
    part = next(batches(Classes()).start(4, slice(1, 4)))
    assert all(torch.equal(part[key], whole[4][key][1:4]) for key in part)
    bare = next(batches(Classes(), Needs()).start(0))  # and asking for more changes nothing of the first
    assert all(torch.equal(bare[key], whole[0][key]) for key in bare)
    assert "group_ids_2" not in next(batches(Classes(), mask_duplicates=False).start(0))


def test_partners_are_uniform() -> None:
    groups = np.array([4, 7, 4, 4, 4, 7, 9])
    drawn = Partners(groups).of(np.full(3000, 2), np.random.default_rng(0).integers(2**63, size=3000))
    assert set(drawn) == {0, 3, 4} and np.bincount(drawn)[[0, 3, 4]].min() > 900
    assert Partners(None).of(np.array([3, 1]), np.zeros(2, np.int64)).tolist() == [3, 1]


def features(classes: bool = True) -> FeatureSet:
    """Twelve images of four classes; image i has 1 + i mod 3 captions."""
    generator = torch.Generator().manual_seed(0)
    count = torch.arange(12) % 3 + 1
    tensors = {"image_features": torch.randn(12, 6, generator=generator)}
    tensors["text_features"] = torch.randn(int(count.sum()), 5, generator=generator)
    tensors["caption_starts"] = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)])
    tensors["group_ids"] = (torch.arange(12) % 4).repeat_interleave(count)
    return FeatureSet({**tensors, "labels": torch.arange(12) % 4} if classes else tensors)


def test_features_have_views_too() -> None:
    dataset = features()
    dataset.class_names = list("abcd")
    batch = next(Batches(dataset, DataOptions(data="features:x"), batch_size=8, seed=0, needs=BOTH).start(0))
    for row, count, texts in zip(batch["index"], batch["caption_count"], batch["text_features_all"], strict=True):
        assert torch.equal(texts[:count], dataset.captions(int(row))) and not texts[count:].any()
    same = [(dataset.image_features == image).all(1).nonzero().item() for image in batch["image_features_2"]]
    assert [int(row) % 4 for row in same] == (batch["index"] % 4).tolist()
    assert all(int(row) != other for row, other in zip(batch["index"], same, strict=True))


def test_means_of_captions() -> None:
    torch.manual_seed(0)
    model = models.build(models.options_type("heads")(embed_dim=8), Facts((), 6, 5))
    batch = next(Batches(features(), DataOptions(data="features:x"), batch_size=8, seed=0, needs=BOTH).start(0))
    output = model(batch)
    assert output.captions is not None and output.image_2 is not None
    for k, row in enumerate(batch["index"].tolist()):
        several = model.encode_text(features().captions(row))
        torch.testing.assert_close(output.captions.inputs[k], several.inputs.mean(0))
        torch.testing.assert_close(output.captions.embedding[k], F.normalize(several.embedding.mean(0), dim=0))
    torch.testing.assert_close(output.image_2.embedding, model.encode_image(batch["image_features_2"]).embedding)
    again = Output.of(output.tensors())
    assert again.tensors().keys() == output.tensors().keys() and again.logit_bias is None


def unit(*shape: int) -> Features:
    z = F.normalize(torch.randn(*shape), dim=1).requires_grad_()
    return Features(torch.randn(*shape), z)


def test_controls_are_means_of_two_losses() -> None:
    torch.manual_seed(0)
    model = models.build(models.options_type("heads")(embed_dim=8), Facts((), 6, 5))
    output = Output(unit(16, 8), unit(16, 8), torch.tensor(10.0), None, unit(16, 8), unit(16, 8), unit(16, 8))
    ids, ids_2 = torch.arange(16) // 2, torch.arange(16) // 4
    batch = {"group_ids": ids, "group_ids_2": ids_2}
    z = {name: f.embedding for name, f in vars(output).items() if isinstance(f, Features)}
    one = ck.clip_loss(z["image"], z["text"], 10.0, group_ids=ids)
    expected = {
        "clip": one,
        "clip2": (one + ck.clip_loss(z["image_2"], z["text_2"], 10.0, group_ids=ids_2)) / 2,
        "meanpos": (one + ck.clip_loss(z["image"], z["captions"], 10.0, group_ids=ids)) / 2,
    }
    bare = Output(output.image, output.text, output.logit_scale, None)
    for name, value in expected.items():
        objective = objectives.build(objectives.options_type(name)(), model)
        torch.testing.assert_close(objective(output, batch)["loss"], value)
        torch.testing.assert_close(objective(bare, batch)["loss"], one)  # what evaluation has


def test_variance_is_the_scatter_within_a_concept() -> None:
    """In the mean tr Cov(z | concept) / 2 s^2 for each modality; its gradient is lam times its value's."""
    torch.manual_seed(0)
    model = models.build(models.options_type("heads")(embed_dim=3), Facts((), 6, 5))
    spread = torch.tensor([0.1, 0.2, 0.3])

    def drawn() -> Features:
        return Features(torch.zeros(20000, 3), spread * torch.randn(20000, 3))

    output = Output(drawn(), drawn(), torch.tensor(1.0), None, drawn(), drawn())
    made = objectives.options_type("variance")(lam=0.4, noise_std=0.5, lam_warmup_steps=0, lam_ramp_steps=0)
    objective = objectives.build(made, model)
    surrogate, parts = objective.penalty(output, torch.tensor(0.4), torch.tensor(0.1))  # type: ignore[operator]
    expected = spread.square().sum().item() / (2 * 0.5**2)
    assert parts["image_cmi"].item() == pytest.approx(expected, rel=0.03)
    assert parts["text_cmi"].item() == pytest.approx(expected, rel=0.03)
    z, z_2 = unit(4, 3), unit(4, 3)
    output = Output(z, unit(4, 3), torch.tensor(1.0), None, z_2, unit(4, 3))
    surrogate, parts = objective.penalty(output, torch.tensor(0.4), torch.tensor(0.1))  # type: ignore[operator]
    found = torch.autograd.grad(surrogate, z.embedding)[0]
    torch.testing.assert_close(found, 0.4 * (z.embedding - z_2.embedding).detach() / (2 * 4 * 0.5**2))


def test_a_penalty_on_two_views_is_capped_by_all_of_its_gradient() -> None:
    torch.manual_seed(0)
    model = models.build(models.options_type("heads")(embed_dim=8), Facts((), 6, 5))
    norms = []
    for cap in (None, 0.1):
        torch.manual_seed(1)
        output = Output(unit(16, 8), unit(16, 8), torch.tensor(10.0), None, unit(16, 8), unit(16, 8))
        made = {"lam": 9.0, "lam_warmup_steps": 0, "lam_ramp_steps": 0, "gradient_cap": cap, "contrastive": "clip"}
        parts = objectives.build(objectives.options_type("variance")(**made), model)(output, {})
        parts["loss"].backward()
        alone = torch.autograd.grad(
            ck.clip_loss(output.image.embedding, output.text.embedding, 10.0),
            [output.image.embedding, output.text.embedding],
        )
        leaves = [f.embedding.grad for f in vars(output).values() if isinstance(f, Features)]
        penalty = [g - own for g, own in zip(leaves, [*alone, 0, 0], strict=True)]  # type: ignore[operator]
        norms.append(torch.cat(penalty).norm() / torch.cat(alone).norm())
    assert norms[0] > 1 and norms[1].item() == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    "more",
    [
        {"objective": "variance", "split_by": "classes", "hold_out": "little-house", "test_share": 0.1},
        {"objective": "cibr", "condition": "all", "contrastive": "meanpos", "critic_hidden": 8},
    ],
    ids=["variance", "cibr"],
)
def test_a_run_with_views_resumes_exactly(tmp_path: Path, more: dict[str, Any]) -> None:
    """Drawings, through the convolutional tower, in parts of a batch, stopped in the middle."""
    if "hold_out" in more:
        more = {**more, "hold_out": "small"}
    toyset.build(tmp_path / "set", size=16)
    options = {"data": f"emoji:{tmp_path / 'set'}", "accumulate": 2, "lam_warmup_steps": 1, "lam_ramp_steps": 1, **more}
    settings = {name: value for name, value in RUN.items() if name not in ("data", "steps")}
    train(config(tmp_path / "whole", **settings, **options, steps=6))
    train(config(tmp_path / "parts", **settings, **options, steps=3))
    train(config(tmp_path / "parts", **settings, **options, steps=6), resume=True)
    require_same_state(tmp_path / "whole", tmp_path / "parts")


def test_what_cannot_give_several_views_says_so() -> None:
    dataset = open_dataset(DataOptions(data="webdataset:pipe:true"))
    with pytest.raises(UsageError, match="streamed, and this objective wants several views"):
        Batches(dataset, DataOptions(data="webdataset:pipe:true"), batch_size=2, seed=0, needs=BOTH)
    options = objectives.options_type("ceb")(contrastive="siglip", label_smoothing=0.1)
    model = models.build(models.options_type("heads")(embed_dim=8), Facts((), 6, 5))
    with pytest.raises(UsageError, match="siglip has none"):
        objectives.build(options, model)
