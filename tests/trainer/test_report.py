"""The evaluation of a whole model on sets of classes and of captions, and its words for what cannot be evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toyset
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from cibr import models
from cibr.data import DataOptions, open_dataset
from cibr.data.features import save_strings
from cibr.data.strings import Strings
from cibr.errors import UsageError
from cibr.evaluate.report import Set, emoji_splits, evaluate, table
from cibr.models import Features, Model
from cibr.pictures import draw_grad_cam

pytestmark = pytest.mark.filterwarnings("ignore:.* queries score a candidate of another group")  # shapes of a colour
COLOURS = {
    "red": (1.0, 0, 0),
    "green": (0, 0.5, 0),
    "blue": (0, 0, 1.0),
    "orange": (1.0, 0.65, 0),
    "black": (0.0, 0, 0),
}


class Colours(Model):
    """Sees the mean colour of an image, and reads the names of colours: right in most cases, and known to be."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.gain = nn.Parameter(torch.ones(3))

    def encode_image(self, images: Tensor) -> Features:
        ink = (1 - images).mean((2, 3)) * self.gain  # (n, 3)
        return Features(ink, F.normalize(ink + 1e-4, dim=1))

    def encode_text(self, tokens: Tensor) -> Features:
        ink = 1 - tokens.float() / 100
        return Features(ink, F.normalize(ink + 1e-4, dim=1))

    def transform(self, train: bool) -> Callable[[Any], Tensor]:
        from torchvision.transforms.functional import to_tensor

        return to_tensor

    def tokenizer(self, texts: list[str]) -> Tensor:
        rgb = [next((COLOURS[word] for word in text.lower().split() if word in COLOURS), (0.5,) * 3) for text in texts]
        return (100 * torch.tensor(rgb)).long()


@pytest.fixture
def model() -> Model:
    return Colours().eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for colour in COLOURS:
        for k in range(12):
            (tmp_path / "set" / colour).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), colour).save(tmp_path / "set" / colour / f"{k}.png")
    (tmp_path / "set/red/broken.png").write_bytes(b"nothing")
    return tmp_path / "set"


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    images = []
    for k, colour in enumerate(COLOURS):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{k}.png")
        sentences = [{"raw": f"a {colour} thing"}, {"raw": f"all is {colour}" if k else "all is blue"}]
        images.append({"filename": f"{k}.png", "split": "test", "sentences": sentences})
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images}))
    return tmp_path / "dataset.json"


def options(spec: str, **given: Any) -> DataOptions:
    return DataOptions(data=spec, workers=0, **given)


def test_classes_and_captions(model: Model, folder: Path, captioned: Path) -> None:
    specs = {"zero_shot": {"colours": f"folder:{folder}"}, "retrieval": {"captions": f"karpathy:{captioned}"}}
    report = evaluate(model, **specs, options=options("csv:elsewhere", limit=3))
    assert report["zero_shot"]["colours"]["top1"] == 100 and report["zero_shot"]["colours"]["mean_per_class"] == 100
    about = report["sets"]["colours"]
    assert about == {**about, "data": f"folder:{folder}", "images": 60, "classes": 5}
    assert about["skipped"] == {"unreadable image (UnidentifiedImageError)": 1}
    scores = report["retrieval"]["captions"]
    assert scores["image_to_text@1"] == 100  # any caption will do
    assert scores["text_to_image@1"] == 90  # one of ten captions is of another image
    assert json.loads(json.dumps(report)) == report
    words = table(report)
    assert "colours" in words and "100.0" in words and "90.0" in words and "colours: 1 unreadable image" in words


def test_probes_of_a_folder(model: Model, folder: Path) -> None:
    found = evaluate(model, zero_shot={"colours": f"folder:{folder}"}, probe=True, options=options("none"))["probe"]
    assert found["colours"]["linear"]["accuracy"] == 100
    assert found["colours"]["within_class_share"] == pytest.approx(0, abs=1e-6)


def test_emoji_by_splits(model: Model, tmp_path: Path) -> None:
    toyset.build(tmp_path / "emoji")
    given = options(f"emoji:{tmp_path / 'emoji'}", hold_out="frame-house", unseen_fraction=0.25)
    report = evaluate(model, options=given, own=emoji_splits(given), probe=True)
    assert list(report["zero_shot"]) == list(report["retrieval"]) == ["held_out", "unseen", "unseen_held_out", "train"]
    assert report["sets"]["held_out"]["images"] == 18 and report["sets"]["unseen"]["images"] == 6 * 3
    assert report["style_probe"]["majority"] == pytest.approx(100 / 3)
    assert 0 <= report["probe"]["train"]["style_share"] <= 1 and "style_neighbours" in report["probe"]["train"]
    assert "held-out vendor, seen concepts" in table(report) and "style probe on unseen concepts" in table(report)
    seen_only = options(given.data, unseen_fraction=0.0)
    without = evaluate(model, options=seen_only, own=emoji_splits(seen_only))
    assert list(without["zero_shot"]) == ["train"]


def test_prompts_of_the_papers_sets_are_known_by_name(model: Model, tmp_path: Path) -> None:
    for name in ("AnnualCrop", "SeaLake"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), "red").save(tmp_path / name / "a.png")
    seen: list[str] = []
    model.tokenizer = lambda texts: seen.extend(texts) or torch.rand(len(texts), 3)  # type: ignore[method-assign,assignment]
    evaluate(model, zero_shot={"eurosat": f"folder:{tmp_path}"}, options=options("none"))
    assert seen == ["a centered satellite photo of annual crop land.", "a centered satellite photo of sea or lake."]


def test_what_cannot_be_evaluated_is_refused_before_any_work(model: Model, folder: Path, captioned: Path) -> None:
    model.encode_image = None  # type: ignore[method-assign,assignment]
    with pytest.raises(UsageError, match="captions has no classes, so there is nothing to classify; --retrieval takes"):
        evaluate(model, zero_shot={"captions": f"karpathy:{captioned}"}, options=options("none"))
    with pytest.raises(UsageError, match="there is no folder"):
        evaluate(model, zero_shot={"a": f"folder:{folder}", "b": "folder:nowhere"}, options=options("none"))
    for data in ("none", "synthetic:10"):
        with pytest.raises(UsageError, match="say what to evaluate on: --zero-shot NAME=SPEC"):
            evaluate(model, options=options(data))
    with torch.no_grad():
        model.gain[1] = float("nan")  # type: ignore[operator,index]
    with pytest.raises(UsageError, match="the weights gain are NaN or infinite"):
        evaluate(model, zero_shot={"a": f"folder:{folder}"}, options=options("none"))


def test_features_do_not_fit_a_model_of_images(model: Model, tmp_path: Path) -> None:
    starts, groups = torch.tensor([0, 1, 2]), torch.tensor([0, 1])
    tensors = {"image_features": torch.rand(2, 4), "text_features": torch.rand(2, 4)}
    save_file({**tensors, "caption_starts": starts, "group_ids": groups}, tmp_path / "x.safetensors")
    assert open_dataset(options(f"features:{tmp_path}/x.safetensors")).image_width == 4
    with pytest.raises(UsageError, match="holds cached features, which the model does not take"):
        evaluate(model, retrieval={"x": f"features:{tmp_path}/x.safetensors"}, options=options("none"))


def write_features(path: Path, n: int = 40, classes: int = 4) -> Path:
    """Rows of `classes` classes, two prompts each, that a linear map of either side could match."""
    labels = torch.arange(n) % classes
    names = Strings(f"class {c}" for c in range(classes))
    prompts = torch.tensor([0.0, 0.01]).repeat(n)[:, None]
    tensors = {
        "image_features": F.one_hot(labels, 8).float() + 0.01 * torch.rand(n, 8),
        "text_features": F.one_hot(labels, 8).float().repeat_interleave(2, 0) + prompts,
        "caption_starts": 2 * torch.arange(n + 1),
        "group_ids": labels.repeat_interleave(2),
        "labels": labels,
    }
    save_strings(tensors, "class_names", names)
    save_file(tensors, path)
    return path


def test_heads_on_cached_features(tmp_path: Path) -> None:
    path = write_features(tmp_path / "x.safetensors")
    facts = models.Facts(image_width=8, text_width=8)
    heads = models.build(models.options_type("heads")(model="heads", embed_dim=8), facts).eval()
    with torch.no_grad():
        heads.text_projection.weight.copy_(heads.image_projection.weight)  # type: ignore[union-attr,operator]
    specs = {"x": f"features:{path}"}
    report = evaluate(heads, zero_shot=specs, retrieval=specs, probe=True, options=options("none"))
    assert report["zero_shot"]["x"]["top1"] == report["retrieval"]["x"]["text_to_image@1"] == 100
    assert report["sets"]["x"]["classes"] == 4 and report["probe"]["x"]["linear"]["accuracy"] == 100
    with pytest.raises(UsageError, match="Grad-CAM looks into images, and these are cached features"):
        draw_grad_cam([("heads", heads)], Set(options(specs["x"]), "test"), tmp_path / "grad_cam.png")
