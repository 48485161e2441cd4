"""Batches: functions of seed and step, whatever the workers and ranks; what cannot be read is replaced and counted."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from cibr.data import Batch, Batches, DataOptions, Dataset, SkipSample, in_order, open_dataset, training_transform
from cibr.data.order import Order, random_numbers
from cibr.data.transforms import redraw
from cibr.errors import UsageError

to_tensor = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])


def lengths(captions: list[str]) -> Tensor:
    return torch.tensor([[len(caption)] for caption in captions])


class Numbers(Dataset):
    """Row i is an image of the colour i with captions `i a` and `i b`; rows in `bad` cannot be read."""

    def __init__(self, n: int, bad: tuple[int, ...] = (), captions: list[tuple[str, ...]] | None = None) -> None:
        super().__init__([f"{i:03}" for i in range(n)], captions or [(f"{i} a", f"{i} b") for i in range(n)])
        self.bad, self.tried = bad, 0

    def image(self, index: int) -> Image.Image:
        if index in self.bad:
            self.tried += 1
            raise SkipSample("a bad one")
        return Image.new("RGB", (4, 4), (index, 0, 0))


def batches(dataset: Dataset, *, workers: int = 0, batch_size: int = 8, seed: int = 0, **options: object) -> Batches:
    made = DataOptions(data="numbers", workers=workers, **options)  # type: ignore[arg-type]
    return Batches(dataset, made, batch_size=batch_size, seed=seed, transform=to_tensor, tokenizer=lengths)


def take(stream: Iterator[Batch], n: int) -> list[Batch]:
    return list(islice(stream, n))


def same(one: Batch, other: Batch) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_depends_on_seed_and_step_alone(workers: int) -> None:
    dataset = open_dataset(DataOptions(data="synthetic:100"))
    transform = v2.Compose([v2.RandomResizedCrop(16, antialias=True), to_tensor])

    def make(seed: int, workers: int = 0) -> Batches:
        options = DataOptions(data="synthetic:100", workers=workers)
        return Batches(dataset, options, batch_size=10, seed=seed, transform=transform, tokenizer=lengths)

    expected = take(make(0).start(0), 25)  # two epochs and a half
    found = take(make(0, workers).start(7), 18)  # resumed
    assert all(same(a, b) for a, b in zip(found, expected[7:], strict=True))
    parts = [take(make(0, workers).start(3, part), 1)[0] for part in (slice(0, 4), slice(4, 10))]  # on two ranks
    assert same({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, expected[3])
    assert not same(take(make(1).start(0), 1)[0], expected[0])
    assert expected[0]["image"].shape == (10, 3, 16, 16) and expected[0]["text"].shape == (10, 1)


def test_batches_leave_the_global_random_state_alone() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    for workers in (0, 1):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        take(batches(Numbers(20), workers=workers).start(0), 2)
        assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_an_epoch_sees_every_row_once() -> None:
    made = batches(Numbers(24))
    assert made.steps_per_epoch == 3
    for epoch in (0, 1):
        rows = torch.cat([batch["index"] for batch in take(made.start(3 * epoch), 3)])
        assert sorted(rows.tolist()) == list(range(24))
    assert not torch.equal(take(made.start(0), 1)[0]["index"], take(made.start(3), 1)[0]["index"])


def test_one_caption_of_several_is_drawn_anew_in_every_step() -> None:
    dataset = Numbers(8)
    drawn = {
        (step, text) for step in range(20) for text in [dataset.draw(0, int(random_numbers(0, step, np.array([0]))[0]))]
    }
    assert {text for _, text in drawn} == {"0 a", "0 b"}
    counts = np.bincount(random_numbers(0, 5, np.arange(100_000)) % 5)
    assert (abs(counts - 20_000) < 5 * 20_000**0.5).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_replaced_and_counted_once(workers: int) -> None:
    bad = (2, 5, 11)
    made = batches(Numbers(24, bad), workers=workers)
    taken = take(made.start(0), 12)  # four epochs
    for batch in taken:
        assert len(set(batch["index"].tolist())) == 8  # others of the order, no row twice
        assert (batch["image"][:, 0, 0, 0] * 255).round().int().tolist() == batch["index"].tolist()
    assert not set(torch.cat([batch["index"] for batch in taken]).tolist()) & set(bad)
    assert made.skipped.counts == {"a bad one": 3} and made.skipped.first["a bad one"][:3] in ("002", "005", "011")
    assert made.dataset.tried == (0 if workers else 3)  # type: ignore[attr-defined]  # each once in a process
    part = next(batches(Numbers(24, bad)).start(4, slice(2, 7)))
    assert same(part, {key: value[2:7] for key, value in taken[4].items()})


def test_what_ranks_cannot_read_is_counted_together_and_once() -> None:
    """Two ranks of halves of a batch: the second epoch shows either what the other has found in the first."""
    ranks = [batches(Numbers(24, (2, 5, 11, 17))) for _ in range(2)]
    parts = [ranks[k].start(0, slice(4 * k, 4 * k + 4)) for k in range(2)]
    for steps in (1, 2, 9):
        for part in parts:
            take(part, steps)
        both = ranks[0]._news | ranks[1]._news
        for rank in ranks:
            rank.share(both.union)
        assert ranks[0].skipped.counts == ranks[1].skipped.counts
    assert [rank.skipped.counts for rank in ranks] == [{"a bad one": 4}] * 2


class Deadly(Numbers):
    """Row 5 ends the process that reads it, as a fault in a decoder would."""

    def image(self, index: int) -> Image.Image:
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().image(index)


def test_a_worker_that_dies_ends_in_words() -> None:
    with pytest.raises(UsageError, match=r"batches died \(DataLoader worker .*\); fewer --workers"):
        next(batches(Deadly(24), workers=1, batch_size=24).start(0))


def test_workers_leave_signals_to_the_parent() -> None:
    stream = batches(Numbers(24), workers=1).start(0)
    next(stream)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(worker.pid, number)
    assert len(take(stream, 20)) == 20


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_ends_in_words(workers: int) -> None:
    with pytest.raises(UsageError, match=r"^4 samples in a row cannot be read, the last, .*: a bad one$"):
        next(batches(Numbers(24, tuple(range(24))), workers=workers).start(0))


def test_equal_captions_share_a_group_and_can_be_let_go() -> None:
    dataset = Numbers(8, captions=[("A dog ",), ("a dog",), *((str(i),) for i in range(6))])
    batch = next(batches(dataset).start(0))
    ids = dict(zip(batch["index"].tolist(), batch["group_ids"].tolist(), strict=True))
    assert ids[0] == ids[1] and len(set(ids.values())) == 7
    assert "group_ids" not in next(batches(dataset, mask_duplicates=False).start(0))


def test_classes_are_groups() -> None:
    dataset = open_dataset(DataOptions(data="synthetic:2000"))
    assert dataset.labels is not None
    made = Batches(dataset, DataOptions(data="synthetic:2000", workers=0), batch_size=64, seed=0, transform=to_tensor)
    batch = next(made.start(0))
    assert torch.equal(batch["group_ids"], dataset.labels[batch["index"]]) and "text" not in batch


def test_too_few_samples_and_a_single_group_are_refused() -> None:
    with pytest.raises(UsageError, match="--batch-size 8 is more than the 7 samples there are"):
        batches(Numbers(7))
    with pytest.raises(UsageError, match="all 9 samples of numbers have the same caption or class"):
        batches(Numbers(9, captions=[("same",)] * 9))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"hold_out": "google"}, "--hold-out is an option of emoji and features data, not of synthetic"),
        (
            {"caption_column": "title"},
            "--caption-column is an option of csv and hf and webdataset data",
        ),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(option: dict[str, str], words: str) -> None:
    options = DataOptions(data="synthetic:9", workers=0, **option)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=words):
        Batches(open_dataset(options), options, batch_size=3, seed=0)


def test_an_order_of_groups_takes_one_row_of_each() -> None:
    groups = np.array([7, 7, 7, 3, 3, 9, 9, 9, 9, 1])
    order = Order(10, 4, 0, groups)
    drawn = [order.rows(step) for step in range(200)]
    assert all(sorted(groups[rows]) == [1, 3, 7, 9] for rows in drawn)
    assert set(np.concatenate(drawn)) == set(range(10))
    with pytest.raises(UsageError, match=r"--batch-size 5 is more than the 4 concepts"):
        Order(10, 5, 0, groups)


def test_a_batch_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a DataLoader does it where there is a GPU: page-locked memory cannot be had without one."""
    from torch.utils.data._utils.pin_memory import pin_memory

    from cibr.data.steps import Made

    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor, *device: tensor + 1)
    pinned = pin_memory(Made({"index": torch.zeros(2)}, [("a", "bad")], "why"))
    assert pinned.batch["index"].tolist() == [1, 1] and pinned.bad == [("a", "bad")] and pinned.error == "why"


def test_in_order_reads_every_row_once() -> None:
    dataset = Numbers(10, bad=(4,))
    found = list(in_order(dataset, DataOptions(data="numbers", workers=1), batch_size=4, transform=to_tensor))
    assert torch.cat([batch["index"] for batch in found]).tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert [len(batch["image"]) for batch in found] == [4, 3, 2]
    assert dataset.skipped.counts == {"a bad one": 1} and dataset.skipped.first == {"a bad one": "004, row 4"}


def test_a_fingerprint_changes_with_names_captions_and_classes_only() -> None:
    prints = {
        Numbers(8).fingerprint(),
        Numbers(9).fingerprint(),
        Numbers(8, captions=[("x",)] * 8).fingerprint(),
        Dataset(["000"], [("ab",)]).fingerprint(),
        Dataset(["000"], [("a", "b")]).fingerprint(),
        Dataset(["000", "001"], [("a", "b"), ("c",)]).fingerprint(),
        Dataset(["000", "001"], [("a",), ("b", "c")]).fingerprint(),
        Dataset(["000"], [("ab",)], labels=[0], class_names=["a"]).fingerprint(),
        Dataset(["000"], [("ab",)], labels=[0], class_names=["b"]).fingerprint(),
    }
    assert len(prints) == 9 and Numbers(8).fingerprint() in prints


# Augmentations


def test_training_transforms() -> None:
    def model(train: bool) -> v2.Transform:
        return v2.RandomErasing(p=1.0) if train else v2.Identity()

    assert isinstance(training_transform("model", model), v2.RandomErasing)
    assert isinstance(training_transform("none", model), v2.Identity)
    random.seed(0)
    drawing = open_dataset(DataOptions(data="synthetic:1")).image(0)
    assert isinstance(drawing, Image.Image)
    found = training_transform("drawing", model)(drawing)
    assert found.size == (64, 64) and found.tobytes() != drawing.tobytes()  # type: ignore[attr-defined]


def test_redraw_keeps_white_paper_and_grey_drawings() -> None:
    paper = Image.new("RGB", (16, 16), "white")
    grey = paper.copy()
    grey.paste((77, 77, 77), (4, 4, 12, 12))
    for seed in range(20):
        random.seed(seed)
        assert redraw(paper).getcolors() == [(256, (255, 255, 255))]
        found = np.asarray(redraw(grey)).astype(int)
        assert np.ptp(found, axis=2).max() <= 1 and found.min() < 100  # recolouring mixes channels


def test_redraw_moves_and_recolours() -> None:
    page = Image.new("RGB", (32, 32), "white")
    page.paste((255, 0, 0), (8, 8, 24, 24))
    found = []
    for seed in range(200):
        random.seed(seed)
        found.append(np.asarray(redraw(page)).astype(float))
    ink = np.stack([(255 - drawing).sum(2) > 60 for drawing in found])
    centres = np.array([np.argwhere(drawing).mean(0) for drawing in ink])
    areas = ink.sum((1, 2))
    assert np.ptp(centres, axis=0).min() > 2 and areas.min() < 0.6 * 256 and areas.max() > 1.2 * 256
    red = np.array([drawing[16, 16, 0] > 250 and drawing[16, 16, 1] < 5 for drawing in found])
    assert 0.3 < red.mean() < 0.7  # half keep their colour


def test_a_caption_words_list(tmp_path: Path) -> None:
    assert "a red circle on white, top left" in set(open_dataset(DataOptions(data="synthetic:10")).words())
