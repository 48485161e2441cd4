"""Tile sizes of dot_lse's Triton kernels, and how a machine is given its operands."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cibr_kernels.dispatch import triton_call


@dataclass(frozen=True)
class Config:
    """Tiles of (block_m, block_n) scores, block_k features at a time: a divisor of triton.ALIGNMENT without TMA."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Configs(NamedTuple):
    """One for each kernel that multiplies."""

    scores: Config
    gradient: Config
    online: Config


# By target and bytes of a feature.  Two blocks live on a multiprocessor: one multiplies while the other sums its tile.
# With two stages instead of three `scores` has three blocks on sm_90: 6 % faster on an H200 (`gradient`: 22 % slower).
# On sm_100 it is one, whose programs walk down a strip with specialised warps.  No entry spills a register.
_FLOAT32 = Config(64, 64, 16, 4, 4)
_FLOAT32_HIP = Config(64, 64, 16, 4, 2)
CONFIGS = {
    ("sm_80", 2): Configs(Config(128, 128, 32, 4, 4), Config(128, 128, 32, 4, 4), Config(64, 128, 32, 4, 4)),
    ("sm_90", 2): Configs(Config(128, 128, 64, 4, 2), Config(128, 128, 64, 4, 3), Config(64, 128, 64, 4, 3)),
    ("sm_100", 2): Configs(Config(128, 128, 64, 8, 5), Config(128, 128, 64, 8, 5), Config(64, 64, 64, 8, 3)),
    ("sm_120", 2): Configs(Config(128, 128, 32, 8, 4), Config(128, 128, 32, 8, 4), Config(64, 128, 32, 8, 3)),
    ("hip", 2): Configs(Config(128, 128, 32, 8, 2), Config(128, 128, 32, 8, 2), Config(64, 64, 32, 4, 2)),
    ("sm_80", 4): Configs(_FLOAT32, _FLOAT32, _FLOAT32),
    ("sm_90", 4): Configs(_FLOAT32, _FLOAT32, _FLOAT32),
    ("sm_100", 4): Configs(_FLOAT32, _FLOAT32, _FLOAT32),
    ("sm_120", 4): Configs(_FLOAT32, _FLOAT32, _FLOAT32),
    ("hip", 4): Configs(_FLOAT32_HIP, _FLOAT32_HIP, Config(64, 64, 16, 8, 2)),
}
OWNED = {  # by target, for features of 2 bytes: block_k is unused, a tile is as wide as the features (<= 128)
    "sm_80": Config(64, 64, 0, 4, 3),
    "sm_90": Config(
        64, 64, 0, 4, 2
    ),  # 14 % faster than (128, 64, 0, 8, 3) on an H200; (64, 128, 0, 4, 2) is 20 %, and spills
    "sm_100": Config(128, 64, 0, 8, 3),
    "sm_120": Config(64, 64, 0, 4, 3),
    "hip": Config(64, 32, 0, 8, 1),
}
TMA_TARGETS = ("sm_90", "sm_100", "sm_120")


def target_name(device: torch.device) -> str:
    """The key of CONFIGS for the machine that `device` is."""
    found = triton_call.target(device)
    if found.kind == "hip":
        return "hip"
    return f"sm_{max(family for family in (80, 90, 100, 120) if family <= max(found.capability, 80))}"


@dataclass(frozen=True)
class Tiles:
    """How one kernel makes tiles of scores of x and y."""

    config: Config
    tma: bool  # operands are tensor descriptors, read and written by the tensor memory accelerator
    strips: bool  # a program makes several tiles, with specialised warps: triton_forward.dot_lse_scores_kernel
    processors: int
    constants: dict[str, Any]

    @staticmethod
    def of(kernel: str, x: Tensor, strips: bool = True) -> Tiles:
        """kernel: a field of Configs; x (n, d), whose dtype matters; strips: whether there are registers for them."""
        name = target_name(x.device)
        tma = name in TMA_TARGETS and x.element_size() == 2 and has_descriptors()
        like = "sm_80" if name in TMA_TARGETS and not tma else name  # whose steps divide any aligned width
        config: Config = getattr(CONFIGS[like, x.element_size()], kernel)
        constants = {
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "TMA": tma,
            "PRECISION": "tf32" if x.dtype == torch.float32 and tf32_allowed() else "ieee",
        }
        strips = strips and tma and name == "sm_100" and kernel != "online"
        return Tiles(config, tma, strips, triton_call.target(x.device).processors, constants)

    def operands(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        c = self.config
        if not self.tma:
            return {"x": x, "y": y}
        return {"x": _descriptor(x, c.block_m, c.block_k), "y": _descriptor(y, c.block_n, c.block_k)}

    def output(self, t: Tensor) -> Any:
        """The argument for a (rows, pitch) matrix that the kernel writes."""
        return _descriptor(t, self.config.block_m, self.config.block_n) if self.tma and t.numel() else t

    def count(self, rows: int, cols: int) -> int:
        return blocks(rows, self.config.block_m) * blocks(cols, self.config.block_n)

    def strip_tiles(self, rows: int, cols: int) -> int:
        """Tiles of a strip: up to 8, while every multiprocessor gets several programs."""
        return max(1, min(8, self.count(rows, cols) // (8 * self.processors))) if self.strips else 1

    @property
    def few(self) -> int:
        """Programs of a launch that usually finds nothing to do, and does everything where it must."""
        return 2 * self.processors

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}


@lru_cache
def has_descriptors() -> bool:
    """Whether Triton has tensor descriptors made by the host: from 3.4, that of PyTorch 2.8."""
    return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None


def _descriptor(t: Tensor, rows: int, cols: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, cols])


def tf32_allowed() -> bool:
    """Whether PyTorch allows TF32 in float32 matmuls."""
    settings = torch.backends.cuda.matmul
    precision = getattr(settings, "fp32_precision", "none")  # newer than allow_tf32, which it forbids to read where set
    return precision == "tf32" if precision != "none" else settings.allow_tf32


def blocks(length: int, block: int) -> int:
    """How many blocks cover a length."""
    return (length + block - 1) // block
