"""Pictures of runs: which are drawn, what stands in them, and words for what is no run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
import toyset

from cibr import models, pictures
from cibr.data import DataOptions
from cibr.errors import UsageError
from cibr.evaluate.report import Set
from cibr.plots import group_runs, metric_name, plot_logs, read_run


def write_run(folder: Path, objective: str = "clip", *, seed: int = 0, evaluated: bool = True, **config: Any) -> Path:
    folder.mkdir(parents=True)
    options = {"objective": objective, "seed": seed, "out": str(folder), "batch_size": 64, **config}
    (folder / "config.json").write_text(json.dumps(options))
    entries: list[dict[str, Any]] = []
    for step in (10, 20, 30):
        entry: dict[str, Any] = {"step": step, "loss": 4 - step / 20 + seed}
        if objective == "cibr":
            parts = ("image_cmi", "text_cmi", "image_own", "image_other", "text_own", "text_other")
            entry |= {"contrastive_loss": 3.0, **dict.fromkeys(parts, 0.5)}
        entries.append(entry)
        if evaluated:
            found = {"zero_shot": {"held_out": {"top1": step + seed, "top5": 50.0}}, "loss": 2.0}
            entries.append({"step": step, "eval": found})
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def test_seeds_are_one_line_and_the_rest_is_told_apart(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"a{seed}", seed=seed) for seed in (0, 1)]
    paths += [write_run(tmp_path / f"b{lam}", "cibr", lam=lam, noise_std=0.25) for lam in (0.5, 0.1)]
    groups = group_runs([read_run(path) for path in paths])
    assert [(group.label, len(group.runs)) for group in groups] == [("clip", 2), ("cibr, λ 0.1", 1), ("cibr, λ 0.5", 1)]
    write_run(tmp_path / "later", "cibr", seed=1, lam=0.1, noise_std=0.25, later_option="default")
    assert len(group_runs([read_run(path) for path in [*paths, tmp_path / "later"]])) == 3
    steps, values = groups[0].values("loss")
    assert steps.tolist() == [10, 20, 30] and values.tolist() == [[3.5, 3.0, 2.5], [4.5, 4.0, 3.5]]
    assert groups[0].last("zero_shot/held_out/top1").tolist() == [30, 31]


def test_what_is_drawn_is_what_was_logged(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "clip"), *(write_run(tmp_path / f"c{lam}", "cibr", lam=lam) for lam in (0.1, 0.5))]
    written = plot_logs(paths, tmp_path / "out")
    assert [path.name for path in written] == ["curves.png", "parts.png", "recall.png", "lambda.png", "final.png"]
    assert all(path.stat().st_size > 5000 for path in written)
    bare = write_run(tmp_path / "bare", evaluated=False)
    assert [path.name for path in plot_logs([bare], tmp_path / "out")] == ["curves.png"]


def test_the_last_evaluation_may_be_a_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", evaluated=False)
    (run / "evaluation.json").write_text(json.dumps({"step": 30, "retrieval": {"flickr": {"text_to_image@1": 12.5}}}))
    assert read_run(run).final == {"step": 30, "retrieval/flickr/text_to_image@1": 12.5}
    assert metric_name("retrieval/flickr/text_to_image@1") == "flickr: text to image R@1 (%)"
    assert metric_name("zero_shot/held_out/top1") == "held-out vendor, seen concepts: top-1 (%)"
    assert [path.name for path in plot_logs([run], tmp_path / "out")] == ["curves.png", "final.png"]


def test_a_half_written_last_line_is_left_out_and_no_run_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", evaluated=False)
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 40, "lo')
    assert [entry["step"] for entry in read_run(run).log] == [10, 20, 30]
    with pytest.raises(UsageError, match="it is not the folder of a run"):
        plot_logs([tmp_path / "nowhere"], tmp_path / "out")
    (run / "log.jsonl").write_text("")
    with pytest.raises(UsageError, match="has logged nothing yet"):
        plot_logs([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


VISION = {
    "vit": {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 64},
    "resnet": {"layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "image_size": 64},
    "timm": {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64},
    "timm-vit": {"timm_model_name": "vit_tiny_patch16_224", "timm_proj": "linear", "image_size": 224},
}


def towers(kind: str, folder: Path) -> models.Model:
    """A new model, its weights drawn with torch's seed."""
    spec = "conv" if kind == "conv" else runs.tiny_clip(folder, vision_cfg=VISION[kind])
    given = {**(runs.CONV if kind == "conv" else {}), "model": spec}
    given |= {"image_size": 64} if kind == "conv" else {}
    facts = models.Facts(texts=[concept.replace("-", " ") for concept in toyset.CONCEPTS])
    return models.build(models.options_type(spec)(**given), facts).eval()


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Set:
    folder = toyset.build(tmp_path_factory.mktemp("toy"))
    return Set(DataOptions(data=f"emoji:{folder}", workers=0), "all")


@pytest.mark.parametrize("kind", ["conv", *VISION])
def test_grad_cam_of_every_kind_of_tower(kind: str, drawings: Set, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = towers(kind, tmp_path).requires_grad_(False)  # as after --lock-image
    maps, images = pictures.grad_cam(model, drawings, list(range(0, 96, 12)))
    size = 224 if kind == "timm-vit" else 64
    assert maps.shape == (8, size, size) and images[0].shape == (size, size, 3)
    assert maps.min() >= 0 and maps.max() <= 1 and images[0].min() == 0 and images[0].max() == 1
    spread = maps.reshape(8, -1).std(1)
    assert (spread > 0).any()  # a map of zeros is what the last block's output would give


def test_the_map_of_tokens_leaves_out_what_is_no_patch() -> None:
    tokens = torch.arange(10.0).view(1, 10, 1)
    assert pictures.patches(tokens).squeeze().tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert torch.equal(pictures.patches(tokens[:, 1:]), pictures.patches(tokens))


def test_pictures_of_models(drawings: Set, tmp_path: Path) -> None:
    torch.manual_seed(0)
    labelled = [("one", towers("conv", tmp_path)), ("two", towers("conv", tmp_path))]
    pictures.draw_tsne(labelled, [drawings], tmp_path / "tsne.png")
    pictures.draw_grad_cam(labelled, drawings, tmp_path / "grad_cam.png")
    assert (tmp_path / "tsne.png").stat().st_size > 5000 and (tmp_path / "grad_cam.png").stat().st_size > 5000
    one, two = (pictures.gathered(model, [drawings])[0] for _, model in labelled)
    assert not torch.equal(one, two)  # each run its own embeddings


def test_a_t_sne_needs_classes(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "pairs.csv").write_text("filepath,title\na.png,a picture\n")
    pairs = Set(DataOptions(data=f"csv:{tmp_path}/pairs.csv", workers=0), "test")
    with pytest.raises(UsageError, match="has no classes to tell points apart by"):
        pictures.draw_tsne([("run", towers("conv", tmp_path))], [pairs], tmp_path / "tsne.png")
    assert not (tmp_path / "tsne.png").exists()
