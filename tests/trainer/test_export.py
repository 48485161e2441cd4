"""Checkpoints as others load them: open_clip's local-dir; and those that version 0.1 wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from runs import config, tiny_clip

from cibr.cli import main
from cibr.errors import UsageError
from cibr.run.checkpoint import load_run
from cibr.train import train

OLD = Path(__file__).parent / "first_format_run"


def test_an_exported_run_gives_open_clip_the_same_embeddings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SigLIP with a bias that the configuration did not have, an average of the weights, and a vanished JSON file."""
    model = tiny_clip(tmp_path, custom_text=True)
    train(config(tmp_path / "run", model=model, objective="siglip", ema=0.5, steps=3))
    (tmp_path / "tiny.json").unlink()
    out = tmp_path / "exported"
    with pytest.raises(SystemExit, match="0"):
        main(["export", str(tmp_path / "run"), str(out)])
    assert f"local-dir:{out}" in capsys.readouterr().out

    ours = load_run(tmp_path / "run").model
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
    theirs.eval()
    image, texts = Image.radial_gradient("L").convert("RGB"), ["a red circle", "blue"]
    torch.testing.assert_close(ours.transform(False)(image), transform(image))
    pixels = transform(image)[None]
    tokens = tokenizer(texts)
    assert torch.equal(ours.tokenizer(texts), tokens)
    with torch.no_grad():
        assert torch.equal(ours.encode_image(pixels).embedding, theirs.encode_image(pixels, normalize=True))
        assert torch.equal(ours.encode_text(tokens).embedding, theirs.encode_text(tokens, normalize=True))
    scale, bias = ours.logits()
    assert torch.equal(scale, theirs.logit_scale.exp()) and bias is not None and torch.equal(bias, theirs.logit_bias)

    train(config(tmp_path / "next", model=f"open_clip:local-dir:{out}", steps=1))  # and we load it ourselves
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in out.iterdir())
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(tmp_path / "run"), str(out)])
    assert "is there already" in capsys.readouterr().err


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    from cibr.export import export

    with pytest.raises(UsageError, match="there is no checkpoint at"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(UsageError, match="has a model conv, and only open_clip's can be exported"):
        export(OLD, tmp_path / "out")


@torch.no_grad()
def test_a_run_of_the_first_version_loads() -> None:
    """Its embeddings are those that the version which wrote it gave; a word it did not know is left out, as then."""
    loaded = load_run(OLD)
    expected = json.loads((OLD / "expected.json").read_text())
    images = torch.linspace(0, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    tokens = loaded.model.tokenizer(["red circle", "blue zebra"])
    torch.testing.assert_close(loaded.model.encode_image(images).embedding, torch.tensor(expected["images"]))
    torch.testing.assert_close(loaded.model.encode_text(tokens).embedding, torch.tensor(expected["texts"]))
    assert loaded.model.logits()[0].item() == pytest.approx(expected["scale"])
    assert (loaded.step, loaded.config.objective.objective, loaded.config.data.data) == (4, "cibr", "emoji:toy")
    assert loaded.config.data.hold_out == "little-house" and loaded.about["test_styles"] == ["small"]


def test_a_run_of_the_first_version_is_not_resumed(tmp_path: Path) -> None:
    run = Path(shutil.copytree(OLD, tmp_path / "run"))
    with pytest.raises(UsageError, match="of an older version, whose runs can be evaluated but not resumed"):
        train(config(run), resume=True)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = Path(shutil.copytree(OLD, tmp_path / "run"))
    path = run / "checkpoints" / "step-00000004" / "model.safetensors"
    weights = load_file(path)
    weights["image_projection.weight"][0, 0] = torch.nan
    save_file(weights, path)
    with pytest.raises(UsageError, match=r"weights that are not finite, image_projection\.weight"):
        load_run(run)
