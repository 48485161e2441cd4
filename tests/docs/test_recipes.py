"""The pages of docs/recipes: each script runs where its packages are, prints what its page shows, and is short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from scripts import run_script
from shown import assert_printed
from test_docs import BLOCK, here

import cibr_kernels as ck

ROOT = Path(__file__).parents[2]
PAGES = {
    path.stem: path.read_text() for path in sorted((ROOT / "docs" / "recipes").glob("*.md")) if path.stem != "index"
}
LINES, TOLERANCE = 20, 0.1


def script(page: str) -> tuple[tuple[str, ...], int, str]:
    """-> what a page's script needs, on how many ranks it runs, its code."""
    (block,) = BLOCK.finditer(PAGES[page])
    key, value, code = block.groups()
    return tuple(re.split(r",\s*", value)) if key == "needs" else (), int(value) if key == "ranks" else 1, code


def output(page: str) -> str:
    (text,) = re.findall(r"^```text\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)
    return text


@pytest.mark.parametrize("page", PAGES)
def test_a_recipe_is_short(page: str) -> None:
    _, _, code = script(page)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= LINES
    compile(code, page, "exec")


@pytest.mark.parametrize("page", PAGES)
def test_a_recipe_prints_what_its_page_shows(page: str, tmp_path: Path) -> None:
    needs, ranks, code = script(page)
    absent = [need for need in needs if not here(need)]
    if absent:
        pytest.skip(
            f"{', '.join(absent)} cannot be imported here; its output was recorded once (docs/recipes/index.md)"
        )
    for world in (ranks, 1) if ranks > 1 else (None,):  # the same batch on several, and on one
        assert_printed(output(page), run_script(code, tmp_path, world), TOLERANCE)


def test_the_task_api_of_open_clips_main_branch_takes_our_losses() -> None:
    """CLIPTask.training_forward: `self.loss(**model_out, output_dict=True)`, then the sum of what ends in "_loss"."""
    features = torch.nn.functional.normalize(torch.randn(2, 6, 4), dim=2)
    out = {"image_features": features[0], "text_features": features[1], "logit_scale": torch.tensor(14.3)}
    for loss, more in ((ck.nn.ClipLoss(), {}), (ck.nn.SigLipLoss(), {"logit_bias": torch.tensor(-10.0)})):
        losses = loss(**out, **more, output_dict=True)
        total = sum(value for key, value in losses.items() if key.endswith("_loss"))
        torch.testing.assert_close(total, loss(*out.values(), *more.values()))
