"""The README's Python runs as it stands, and says what the ops compute."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import cibr_kernels as ck

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.DOTALL)


def test_the_snippet_takes_a_training_step():
    names: dict[str, Any] = {}
    exec(BLOCKS[0] + BLOCKS[1], names)
    assert names["loss"].isfinite()
    parameters = [*names["encoders"], *names["loss_fn"].parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)


def test_the_ops_equal_the_pytorch_shown():
    critic = ck.nn.ConcatCritic(6, 4, 16)
    x, z = torch.randn(50, 6), torch.randn(50, 4)
    image, text, scale = F.normalize(x, dim=1), F.normalize(x + torch.randn(50, 6), dim=1), torch.tensor(14.3)
    names = {
        "torch": torch, "F": F, "critic": critic, "x": x, "z": z, "image_features": image, "text_features": text,
        "logit_scale": scale,
    }  # fmt: skip
    exec(BLOCKS[2], names)
    torch.testing.assert_close(ck.clip_loss(image, text, scale), names["clip_loss"])
    torch.testing.assert_close(ck.mutual_information(x, z, critic), names["mutual_information"])
