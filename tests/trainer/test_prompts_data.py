"""What prompts are trained on and how: shots, halves of the classes, SGD by epochs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import config

from cibr.config import OptimOptions
from cibr.data import DataOptions, Dataset, open_dataset
from cibr.errors import UsageError
from cibr.evaluate.report import opened
from cibr.rates import make_optimizer, rate

COUNTS = {"ant": 9, "bee": 2, "cow": 6, "dog": 7, "eel": 8}


def draw(root: Path, *splits: str) -> str:
    """A folder data set, with these splits or without any."""
    for number, split in enumerate(splits or ("",)):
        for c, (name, count) in enumerate(COUNTS.items()):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                image = Image.new("RGB", (8, 8), (40 * c, 20 * k, 100 * number))
                image.save(root / split / name / f"{split}{k}.png")
    return f"folder:{root}"


def chosen(data: str, split: str = "train", **options: object) -> Dataset:
    return open_dataset(DataOptions(data=data, **options), split)  # type: ignore[arg-type]


def counted(dataset: Dataset) -> dict[str, int]:
    """Images of each class, by name; what the pixels say agrees with the label."""
    assert dataset.labels is not None and dataset.class_names is not None
    names = [dataset.class_names[label] for label in dataset.labels.tolist()]
    for row, name in enumerate(names):
        assert dataset.keys[row].startswith(name)
        assert dataset.image(row).getpixel((0, 0))[0] == 40 * list(COUNTS).index(name)
        assert dataset.captions(row) == (f"a photo of a {name}.",) == (dataset.draw(row, 5),)
    return dict(Counter(names))


def test_k_shots_of_each_class_by_the_seed(tmp_path: Path) -> None:
    data = draw(tmp_path, "train", "test")
    shots = chosen(data, shots=4)
    assert counted(shots) == {"ant": 4, "bee": 2, "cow": 4, "dog": 4, "eel": 4}
    assert counted(chosen(data, "test", shots=4)) == COUNTS
    assert set(shots.keys) < set(chosen(data, shots=7).keys)
    other = chosen(data, shots=4, shot_seed=1)
    assert list(shots.keys) == list(chosen(data, shots=4).keys) != list(other.keys)
    assert counted(other) == counted(shots) and shots.fingerprint() != other.fingerprint()


def test_base_and_new_classes_are_halves_numbered_from_0(tmp_path: Path) -> None:
    data = draw(tmp_path, "train", "test")
    base, new = chosen(data, "test", classes="base"), chosen(data, "test", classes="new")
    assert counted(base) == {"ant": 9, "bee": 2, "cow": 6} and counted(new) == {"dog": 7, "eel": 8}  # rounded up
    assert base.class_names == ["ant", "bee", "cow"] and new.class_names == ["dog", "eel"]
    assert sorted(set(new.labels.tolist())) == [0, 1]
    assert counted(chosen(data, classes="base", shots=3)) == {"ant": 3, "bee": 2, "cow": 3}


def test_a_set_without_splits_is_halved_between_training_and_tests(tmp_path: Path) -> None:
    data = draw(tmp_path)
    train, test = chosen(data, shots=100), chosen(data, "test", shots=100)
    assert counted(train) == {"ant": 5, "bee": 1, "cow": 3, "dog": 4, "eel": 4}
    assert sorted([*train.keys, *test.keys]) == sorted(chosen(data).keys)
    assert set(chosen(data, shots=2, shot_seed=3).keys) < set(train.keys)
    assert counted(chosen(data)) == counted(chosen(data, "test")) == COUNTS  # nothing was asked for


def test_a_runs_choice_is_of_its_own_data_only(tmp_path: Path) -> None:
    own, foreign = draw(tmp_path / "own"), draw(tmp_path / "foreign")
    base = DataOptions(data=own, shots=2, classes="new")
    assert counted(opened({}, base, own, "test").dataset) == {"dog": 3, "eel": 4}
    assert counted(opened({}, base, foreign, "test").dataset) == COUNTS


def test_what_has_no_classes_or_none_left(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("filepath,title\na.png,one\nb.png,two\n")
    for options in ({"shots": 2}, {"classes": "base"}):
        with pytest.raises(UsageError, match="choose among images with classes, which csv:"):
            chosen(f"csv:{tmp_path / 'pairs.csv'}", **options)
    (tmp_path / "one" / "only").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "only" / "a.png")
    with pytest.raises(UsageError, match="it has 1 classes"):
        chosen(f"folder:{tmp_path / 'one'}", classes="new")


def test_the_schedule_is_coops() -> None:
    """An epoch at 1e-5, then torch's own cosine of as many epochs as there are, from its start."""
    options = OptimOptions(steps=15, epoch_steps=3, lr=0.002, lr_warmup_steps=0, schedule="epochs", optimizer="sgd")
    rates = [options.lr * rate(options, step, step / 15) for step in range(15)]
    assert rates[:3] == [1e-5] * 3
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.002)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for epoch in range(1, 5):
        assert rates[3 * epoch : 3 * epoch + 3] == pytest.approx([optimizer.param_groups[0]["lr"]] * 3)
        optimizer.step()
        cosine.step()


def test_sgd_has_momentum_and_decays_every_tensor(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    model.image_prefix = "none"  # type: ignore[assignment]
    options = OptimOptions(steps=1, optimizer="sgd", lr=0.1, weight_decay=0.5, momentum=0.8)
    optimizer = make_optimizer(options, model, torch.nn.Module())  # type: ignore[arg-type]
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[0]["momentum"] == 0.8
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5]
    assert optimizer.param_groups[0]["names"] == ["model.weight", "model.bias"]
    with pytest.raises(UsageError, match="--schedule epochs needs --epoch-steps and --steps"):
        config(tmp_path, schedule="epochs")
