"""Before tensors become pointers: a kernel may read and write only what is on its device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def check(kernel: str, device: torch.device, fields: Mapping[str, Any]) -> None:
    """Every tensor among `fields`, or under a descriptor, is on `device`; else RuntimeError, which names it.

    A null or foreign address would end the process.
    """
    for name, value in fields.items():
        t = getattr(value, "base", value)  # of a Triton TensorDescriptor
        if isinstance(t, Tensor) and t.device != device:
            raise RuntimeError(f"{kernel} runs on {device}, but its {name} is on {t.device}")
