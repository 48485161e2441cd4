"""`--split-by`: who trains, validates and tests; damaged images."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import toyset
from PIL import Image

from cibr.data import DataOptions, Dataset, open_dataset
from cibr.data.corruptions import KINDS, Corrupted
from cibr.data.split import divide
from cibr.errors import UsageError

OF_CLASSES = ("train", "val", "test", "seen", "held_out", "unseen_held_out")


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"emoji:{toyset.build(tmp_path_factory.mktemp('set'), size=16)}"


def keys(data: str, split: str, **options: Any) -> list[str]:
    return list(open_dataset(DataOptions(data=data, **options), split).keys)


def names(rows: list[str]) -> set[str]:
    return {row.rsplit("_", 1)[0] for row in rows}


def test_rows_are_divided_at_random() -> None:
    options = {"data": "synthetic:50", "split_by": "rows", "split_seed": 3}
    found = [keys(split=split, **options) for split in ("train", "val", "test")]  # type: ignore[arg-type]
    assert [len(part) for part in found] == [35, 5, 10]
    assert sorted(itertools.chain(*found)) == sorted(keys("synthetic:50", "train"))
    assert keys(split="test", **options) == found[2]  # type: ignore[arg-type]
    assert set(keys(split="test", **{**options, "split_seed": 4})) != set(found[2])  # type: ignore[arg-type]


def test_no_class_is_in_two_of_train_val_and_test(drawings: str) -> None:
    options = {"data": drawings, "split_by": "classes", "val_share": 0.25, "test_share": 0.25, "split_seed": 1}
    found = {s: keys(split=s, **options) for s in ("train", "val", "test", "seen")}  # type: ignore[arg-type]
    assert [len(names(found[s])) for s in ("train", "val", "test")] == [12, 6, 6]
    assert not names(found["train"]) & names(found["val"]) and not names(found["val"]) & names(found["test"])
    assert names(found["seen"]) == names(found["train"]) and not set(found["seen"]) & set(found["train"])
    assert len(found["train"]) == 3 * 12 and len(found["seen"]) == 12  # of four drawings one is kept back
    fewer = keys(split="train", **options, shots=2)  # type: ignore[arg-type]
    assert len(fewer) == 24 and set(fewer) < set(found["train"])


def test_a_style_is_held_out_of_seen_and_unseen_classes(drawings: str) -> None:
    options = {"data": drawings, "split_by": "classes", "hold_out": "thick,small", "test_share": 0.25}
    found = {s: keys(split=s, **options) for s in OF_CLASSES if s != "seen"}  # type: ignore[arg-type]
    held = {s: {row.rsplit("_", 1)[1] for row in rows} for s, rows in found.items()}
    assert held["train"] == held["val"] == held["test"] == {"plain", "framed"}
    assert held["held_out"] == held["unseen_held_out"] == {"thick", "small"}
    assert names(found["held_out"]) == names(found["train"]) and names(found["unseen_held_out"]) == names(found["test"])


def test_a_split_is_a_set_of_its_own(drawings: str) -> None:
    options = DataOptions(data=drawings, split_by="classes", test_share=0.25)
    whole, part = open_dataset(DataOptions(data=drawings), "all"), open_dataset(options, "test")
    assert part.class_names is not None and len(part.class_names) == 6 and part.distinct_groups
    assert part.labels is not None and part.labels.unique().tolist() == list(range(6))
    for row in range(len(part)):
        k = list(whole.keys).index(part.keys[row])
        one, other = part.sample(row), whole.sample(k)
        assert one.captions == other.captions and one.style == other.style and one.image == other.image
        assert part.class_names[one.label] == whole.class_names[other.label]  # type: ignore[index]
        assert part.draw(row, 77) == whole.draw(k, 77)
    assert part.fingerprint() != open_dataset(options, "train").fingerprint()
    assert set(part.words()) == set(whole.words())


@pytest.mark.parametrize(
    ("options", "split", "words"),
    [
        ({"split_by": "classes"}, "seen_held_out", "has no split 'seen_held_out'; it has train, val, test, seen"),
        ({"split_by": "classes"}, "held_out", "the split held_out is of a style: --hold-out names it"),
        ({"split_by": "classes", "hold_out": "google"}, "train", "'google' is no style here; known are framed, plain"),
        ({"split_by": "rows", "hold_out": "plain"}, "train", "belong to --split-by classes"),
        ({"split_by": "classes", "test_share": 0.01}, "test", "the split test of .* has no row"),
    ],
)
def test_what_cannot_be_divided(drawings: str, options: dict[str, Any], split: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        open_dataset(DataOptions(data=drawings, **options), split)


def test_shares_that_leave_nothing() -> None:
    with pytest.raises(UsageError, match="leave nothing to train on"):
        DataOptions(data="synthetic:9", split_by="rows", val_share=0.5, test_share=0.5)
    with pytest.raises(UsageError, match="has no classes: --split-by rows divides it"):
        divide(Grey(), DataOptions(data="grey", split_by="classes"), "train")
    with pytest.raises(UsageError, match="is streamed, so it cannot be divided"):
        open_dataset(DataOptions(data="webdataset:pipe:true", split_by="rows"), "train")


class Grey(Dataset):
    def __init__(self) -> None:
        super().__init__([str(k) for k in range(8)], [("a",)] * 8)

    def image(self, index: int) -> Image.Image:
        side = (np.arange(24) * 37 % 256).astype(np.uint8)
        return Image.fromarray(np.broadcast_to(side[:, None, None], (24, 24, 3)).copy())


def test_every_kind_of_damage_is_one_and_the_same_every_time() -> None:
    damaged, whole = Corrupted(Grey()), np.asarray(Grey().image(0)).astype(float)
    seen = [np.asarray(damaged.image(row)).astype(float) for row in range(8)]
    for row, image in enumerate(seen):
        assert image.shape == whole.shape and 2 < np.abs(image - whole).mean() < 140, KINDS[row % 4].__name__
        assert np.array_equal(image, np.asarray(damaged.image(row)))
    assert not np.array_equal(seen[0], seen[4])  # noise of each row's own
    assert len(np.unique(seen[3])) == 8  # pixels thrice as large
    np.testing.assert_allclose(seen[2], 255 - 0.4 * (255 - whole), atol=1)
