"""The kinds of data sets: what each reads, how it is named, and the words for what it refuses."""

from __future__ import annotations

import ast
import io
import json
import sys
import tarfile
import time
from itertools import islice
from pathlib import Path

import bad_data
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

import cibr.data
from cibr import config
from cibr.data import Batch, Batches, DataOptions, Dataset, open_dataset
from cibr.data.check import check
from cibr.errors import UsageError

to_tensor = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])


def colour(dataset: Dataset, row: int) -> int:
    """The red of a row's image: `bad_data.good(k)` is of 40 k."""
    image = dataset.image(row)
    assert isinstance(image, Image.Image)
    return image.getpixel((3, 3))[0] // 40  # type: ignore[index,operator]


def lengths(captions: list[str]) -> Tensor:
    return torch.tensor([[len(caption)] for caption in captions])


def opened(spec: str, split: str = "train", **options: object) -> Dataset:
    return open_dataset(DataOptions(data=spec, **options), split)  # type: ignore[arg-type]


# Names


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("pairs.csv", r"did you mean --data csv:pairs\.csv\?"),
        ("a/b.tsv", r"did you mean --data csv:a/b\.tsv\?"),
        ("x.tar", r"did you mean --data webdataset:x\.tar\?"),
        ("x.safetensors", r"did you mean --data features:x\.safetensors\?"),
        ("nowhere", r"nor is there a folder nowhere\. Known are\n  emoji:DIR"),
        ("cvs:pairs", r"none of the kinds there are\. Known are"),
        ("csv:", r"none of the kinds there are\. Known are"),
        ("csv:nowhere.csv", r"there is no file nowhere\.csv"),
        ("webdataset:nowhere/*.tar", r"there is no file or folder nowhere/\*\.tar"),
        ("folder:nowhere", r"there is no folder nowhere"),
        ("emoji:nowhere", r"there is no folder nowhere; `cibr data emoji --out nowhere` builds one"),
        ("features:nowhere", r"there is no file nowhere; `cibr data cache` writes one"),
        ("synthetic:many", r"say how many samples, as in synthetic:10000"),
    ],
)
def test_data_that_is_not_there_is_refused_in_words(
    data: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        opened(data)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 0}, "--limit is 0, but must be positive"),
        ({"unseen_fraction": 1.0}, r"--unseen-fraction is 1.0, but must be less than 1"),
        ({"augment": "much"}, "--augment is 'much', but must be one of auto, model, drawing, none"),
        ({"workers": -1}, "--workers is -1"),
        ({"separator": ", "}, "--separator is ', ', but must be one character"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        config.check(DataOptions(**{"data": "synthetic:9", **options}))  # type: ignore[arg-type]


# webdataset


def test_img2datasets_layout(tmp_path: Path) -> None:
    for shard in range(2):
        members = []
        for k in range(3):
            about = {"caption": f"of json {k}", "status": "success"}
            members += [*bad_data.pair(10 * shard + k, bad_data.good(k)), (f"{10 * shard + k:03}.json", about)]
        bad_data.write_tar(
            tmp_path / f"{shard:05}.tar",
            [(name, data if isinstance(data, bytes) else json.dumps(data).encode()) for name, data in members],
        )
    for spec in (str(tmp_path), f"webdataset:{tmp_path}", f"webdataset:{tmp_path}/{{00000..00001}}.tar"):
        dataset = opened(spec)
        assert list(dataset.keys) == ["000", "001", "002", "010", "011", "012"]
        assert [colour(dataset, row) for row in range(6)] == [0, 1, 2, 0, 1, 2]
        assert dataset.captions(4) == ("caption 11",) and dataset.labels is None
    assert len(opened(f"webdataset:{tmp_path}/*1.tar")) == 3 and len(opened(f"webdataset:{tmp_path}", limit=4)) == 4
    assert opened(f"webdataset:{tmp_path}", caption_column="caption").captions(1) == ("of json 1",)


def test_several_captions_and_clip_benchmarks_layout(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    bad_data.write_tar(
        tmp_path / "test" / "0.tar",
        [
            ("s0.webp", bad_data.encode(Image.new("RGB", (8, 8)), "WEBP")),
            ("s0.cls", b"1"),
            ("s1.jpg", bad_data.encode(Image.new("RGB", (8, 8)), "JPEG")),
            ("s1.cls", b"0"),
            ("s2.png", bad_data.good()),
            ("s2.cls", b"7"),
            ("s3.png", bad_data.good()),
            ("s3.json", b'{"cls": -1}'),
        ],
    )
    (tmp_path / "classnames.txt").write_text("cat\nbig dog\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}.\nno {c}!\n")
    dataset = opened(f"webdataset:{tmp_path}", "test")
    assert dataset.class_names == ["cat", "big dog"] and dataset.labels is not None
    assert dataset.labels.tolist() == [1, 0] and dataset.group_ids.tolist() == [1, 0]
    assert dataset.templates == ["a {}.", "no {}!"] and dataset.captions(0) == ("a big dog.", "no big dog!")
    assert {dataset.draw(1, number) for number in range(4)} == {"a cat.", "no cat!"}
    assert dataset.skipped.counts == {"class that is not among the names": 2}
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a cat.\n")
    with pytest.raises(UsageError, match=r"template 'a cat\.' has no"):
        opened(f"webdataset:{tmp_path}", "test")


def test_a_caption_a_line(tmp_path: Path) -> None:
    bad_data.write_tar(tmp_path / "0.tar", [("0.png", bad_data.good()), ("0.txt", b"one\n\n two \nthree")])
    assert opened(f"webdataset:{tmp_path}/0.tar").captions(0) == ("one", "two", "three")


def test_captions_and_classes_in_json(tmp_path: Path) -> None:
    entries = [{"captions": ["a", "b"]}, {"caption": "c"}]
    members = [(f"{k}.json", json.dumps(entry).encode()) for k, entry in enumerate(entries)]
    bad_data.write_tar(tmp_path / "0.tar", [*members, ("0.png", bad_data.good()), ("1.png", bad_data.good(1))])
    dataset = opened(f"webdataset:{tmp_path}")  # members of a sample need not lie side by side
    assert dataset.captions(0) == ("a", "b") and dataset.captions(1) == ("c",) and colour(dataset, 1) == 1
    entries = [{"cls": "red_fox"}, {"cls": "ant"}, {"cls": "red_fox"}]
    members = [(f"{k}.json", json.dumps(entry).encode()) for k, entry in enumerate(entries)]
    images = [(f"{k}.png", bad_data.good()) for k in range(3)]
    bad_data.write_tar(tmp_path / "0.tar", [*members, *images])
    dataset = opened(f"webdataset:{tmp_path}")
    assert dataset.class_names == ["ant", "red fox"] and dataset.captions(0) == ("a photo of a red fox.",)
    assert dataset.group_ids.tolist() == [1, 0, 1]


def test_a_fingerprint_knows_the_content_and_not_the_folder(tmp_path: Path) -> None:
    prints = []
    for folder, image in (("a", bad_data.good(1)), ("b", bad_data.good(1)), ("c", bad_data.good(1) + b" ")):
        (tmp_path / folder).mkdir()
        bad_data.write_tar(tmp_path / folder / "0.tar", [*bad_data.pair(0), *bad_data.pair(1, image)])
        prints.append(opened(f"webdataset:{tmp_path / folder}").fingerprint())
    assert prints[0] == prints[1] != prints[2]


# streams


def take(spec: str, n: int, step: int = 0, workers: int = 0, **options: object) -> tuple[list[Batch], Batches]:
    made = DataOptions(data=spec, workers=workers, **options)  # type: ignore[arg-type]
    batches = Batches(open_dataset(made), made, batch_size=4, seed=0, transform=to_tensor, tokenizer=lengths)
    return list(islice(batches.start(step), n)), batches


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for shard in range(3):
        members = [m for k in range(7) for m in bad_data.pair(k, bad_data.good(k % 6), b"x" * (10 * shard + k + 1))]
        bad_data.write_tar(tmp_path / f"{shard}.tar", members)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_resumed_where_it_was(shards: Path, workers: int) -> None:
    spec = f"webdataset:pipe:cat {shards}/{{0..2}}.tar"
    expected, batches = take(spec, 12, workers=workers)
    assert batches.steps_per_epoch is None and not batches.skipped.total
    found, _ = take(spec, 7, step=5, workers=workers)
    for one, other in zip(found, expected[5:], strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    seen = torch.cat([batch["text"] for batch in expected])
    assert len(seen.unique()) == 21  # 48 samples of 21: an epoch holds all
    assert {tuple(batch["image"].shape) for batch in expected} == {(4, 3, 8, 8)}


def test_a_stream_counts_what_is_damaged(shards: Path) -> None:
    (shards / "0.tar").write_bytes(bad_data.flip_header(bytearray((shards / "0.tar").read_bytes())))
    whole = (shards / "1.tar").read_bytes()
    (shards / "1.tar").write_bytes(whole[: whole.index(b"004.txt") + 515])
    taken, batches = take(f"webdataset:pipe:cat {shards}/{{0..3}}.tar", 30)
    counts = batches.skipped.counts
    assert counts["damaged part of a tar"] == 1 and counts["no image"] == 1  # its text is left alone
    assert counts["stream that ends early (ReadError)"] >= 1
    assert sum(counts.values()) >= 4  # the file that is not there is one, too
    assert len(torch.cat([batch["text"] for batch in taken]).unique()) == 6 + 4 + 7


def test_a_stream_says_what_it_cannot_do(shards: Path) -> None:
    spec = f"webdataset:pipe:cat {shards}/{{0..2}}.tar"
    with pytest.raises(UsageError, match="3 shards, but 1 ranks times 4 --workers read 4"):
        take(spec, 1, workers=4)
    with pytest.raises(UsageError, match="its samples are not counted"):
        len(opened(spec))
    with pytest.raises(UsageError, match="--limit needs data that is not streamed"):
        opened(spec, limit=3)


# csv


def test_csv(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for k in range(3):
        (tmp_path / "images" / f"{k}.png").write_bytes(bad_data.good(k))
    text = 'id\tfilepath\ttitle\n0\timages/0.png\ta, b\n1\timages/1.png\t"two\nlines"\n2\timages/0.png\tagain\n'
    (tmp_path / "pairs.csv").write_text(text)
    dataset = opened(f"csv:{tmp_path / 'pairs.csv'}")
    assert len(dataset) == 2  # rows of one image are its captions
    assert dataset.captions(0) == ("a, b", "again") and dataset.captions(1) == ("two\nlines",)
    assert [colour(dataset, row) for row in range(2)] == [0, 1] and dataset.keys[1] == "images/1.png"
    text = f"\ufeffwhere;what\n{tmp_path}/images/2.png;x\n"
    (tmp_path / "other.csv").write_text(text)
    columns = {"image_column": "where", "caption_column": "what", "separator": ";"}
    assert colour(opened(f"csv:{tmp_path / 'other.csv'}", **columns), 0) == 2
    before = dataset.fingerprint()
    (tmp_path / "images" / "1.png").write_bytes(bad_data.good(1) + b" ")
    assert opened(f"csv:{tmp_path / 'pairs.csv'}").fingerprint() != before


def test_forty_thousand_captions_are_listed_in_seconds(tmp_path: Path) -> None:
    rows = "".join(f"{k}.png,caption number {k} of many\n" for k in range(40_000))
    (tmp_path / "pairs.csv").write_text("filepath,title\n" + rows)
    began = time.process_time()
    dataset = opened(f"csv:{tmp_path / 'pairs.csv'}")
    assert len(dataset.group_ids.unique()) == 40_000 and len(dataset.fingerprint()) == 64
    Batches(dataset, DataOptions(data="csv:x", workers=0), batch_size=512, seed=0).order.rows(0)  # type: ignore[union-attr]
    assert time.process_time() - began < 10  # 148 s when it was quadratic; 1 s on a machine at rest


# folder


def test_folder(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 1)):
        for name in ("tabby_cat", "dog"):
            (tmp_path / split / name / "deep").mkdir(parents=True)
            for k in range(count):
                (tmp_path / split / name / "deep" / f"{k}.JPG").write_bytes(bad_data.good(k))
    (tmp_path / "train" / "dog" / "Thumbs.db").write_bytes(b"")
    dataset = opened(f"folder:{tmp_path}")
    assert dataset.class_names == ["dog", "tabby cat"] and dataset.labels is not None
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1] and dataset.captions(5) == ("a photo of a tabby cat.",)
    assert dataset.skipped.counts == {"file that is no image": 1}
    assert len(opened(f"folder:{tmp_path}", "val")) == 2
    few = opened(f"folder:{tmp_path}", limit=2)
    assert few.labels is not None and few.labels.tolist() == [0, 1]
    (tmp_path / "classnames.txt").write_text("hound\ncat\n")
    assert opened(f"folder:{tmp_path}").captions(0) == ("a photo of a hound.",)
    (tmp_path / "classnames.txt").write_text("hound\n")
    with pytest.raises(UsageError, match=r"1 names, but .* has 2 class folders"):
        opened(f"folder:{tmp_path}")


# Hugging Face


def test_hugging_face(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "2.png").write_bytes(bad_data.good(2))
    images = [{"bytes": bad_data.good(1)}, {"path": str(tmp_path / "2.png")}, {"bytes": b"x"}, None]
    columns = {"picture": images, "captions": [["a", "b"], ["c"], ["d"], [""]], "label": [1, 0, 1, 0]}
    features = datasets.Features(
        picture=datasets.Image(),
        captions=datasets.Sequence(datasets.Value("string")),
        label=datasets.ClassLabel(names=["cat", "dog"]),
    )
    table = datasets.Dataset.from_dict(columns, features)
    table.save_to_disk(tmp_path / "one")
    dataset = opened(f"hf:{tmp_path / 'one'}")
    assert dataset.captions(0) == ("a", "b") and [colour(dataset, row) for row in range(2)] == [1, 2]
    assert dataset.class_names == ["cat", "dog"] and dataset.group_ids.tolist() == [1, 0, 1]
    assert "1 unreadable image" in check(DataOptions(data=f"hf:{tmp_path / 'one'}", workers=0))
    assert dataset.skipped.counts == {"no caption": 1}
    datasets.DatasetDict(test=table.select([1])).save_to_disk(tmp_path / "two")
    assert opened(f"hf:{tmp_path / 'two'}", "test").captions(0) == ("c",)
    with pytest.raises(UsageError, match="has the splits test, not train; choose one: --hf-split"):
        opened(f"hf:{tmp_path / 'two'}")
    with pytest.raises(UsageError, match="has the columns picture, captions, label; say which it is: --caption-column"):
        opened(f"hf:{tmp_path / 'one'}", caption_column="text")
    with pytest.raises(UsageError, match="cannot be opened"):
        opened(f"hf:{tmp_path / 'nothing'}")


# cibr data check


def test_check_reads_everything_and_says_what_is_there(tmp_path: Path) -> None:
    extra = [*bad_data.pair(8, b"", b"caption 1"), *bad_data.pair(9, None, b"caption 1")]
    bad_data.tar_of(*extra)(tmp_path)
    report = check(DataOptions(data=f"webdataset:{tmp_path}", workers=0))
    assert "4 of 5 samples listed can be read" in report and "images of 8 to 8 by 8 to 8 pixels" in report
    assert "5 captions, 3 of them distinct" in report and "3 groups" in report
    assert "1 skipped:\n1 image of zero bytes (the first: 008, row 3)" in report


def test_optional_packages_are_imported_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    optional = {"datasets", "webdataset", "braceexpand", "safetensors", "transformers", "resvg_py"}
    for path in Path(cibr.data.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            )
            assert not {name.partition(".")[0] for name in names} & optional, path
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="hf:x needs a further package: pip install datasets"):
        opened("hf:x")


def test_memory_of_an_index_is_its_letters(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for k in range(300):
            for ending, data in (("png", bad_data.good()), ("txt", b"caption %d" % k)):
                member = tarfile.TarInfo(f"{k}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    dataset = opened(f"webdataset:{tmp_path}")
    held = [v for v in vars(dataset).values() if isinstance(v, list)]
    assert sum(map(len, held)) <= 2  # no Python object for each row, which a fork would copy page by page
    assert isinstance(dataset.texts.strings.bytes, np.ndarray) and dataset.captions(299) == ("caption 299",)
