"""The tensors and critics of a case: the same numbers in every process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import cibr_kernels as ck
from bench.cases import SCALE, Case

TERMS = ("image_own", "image_other", "text_own", "text_other")
HIDDEN = 256  # units of each critic of cibr_loss


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case; `leaves` are those whose gradients a training step needs."""

    tensors: dict[str, Tensor]
    critics: nn.ModuleDict
    leaves: tuple[Tensor, ...]


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Unit-norm features whose pairs agree in part; a critic's are normal, and so are scores."""
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(0)
    with torch.device(device):
        tensors = _tensors(case, dtype)
        torch.manual_seed(0)  # the critics' parameters
        critics = nn.ModuleDict(_critics(case))
    leaves = [tensors[name] for name in ("x", "z", "scale", "bias", "scores") if name in tensors]
    if case.backward:
        for leaf in leaves:
            leaf.requires_grad_()
    else:
        critics.requires_grad_(False)
    return Inputs(tensors, critics, (*leaves, *critics.parameters()))


def _tensors(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    n, width = case.n, case.width
    if case.op == "log_mean_exp":
        return {"scores": torch.randn(n, width).to(dtype)}
    if case.op == "critic_moments":
        return {"x": torch.randn(n, width).to(dtype), "z": torch.randn(n, width).to(dtype)}
    shared = torch.randn(n, width)
    x, z = (nn.functional.normalize(shared + torch.randn(n, width), dim=1).to(dtype) for _ in range(2))
    if case.op == "siglip_loss":  # where SigLIP starts
        return {"x": x, "z": z, "scale": torch.full((), 10.0), "bias": torch.full((), -10.0)}
    tensors = {"x": x, "z": z, "scale": torch.full((), SCALE)}
    if case.op == "cibr_loss":
        tensors |= {"image_inputs": torch.randn(n, 768), "text_inputs": torch.randn(n, 512)}
    return tensors


def _critics(case: Case) -> dict[str, nn.Module]:
    if case.op == "critic_moments":
        critic = ck.nn.ConcatCritic(case.width, case.width, case.width, activation=case.activation)
        return {"critic": critic}
    if case.op == "cibr_loss":
        widths = {"image_own": 768, "image_other": 512, "text_own": 512, "text_other": 768}
        return {name: ck.nn.ConcatCritic(widths[name], case.width, HIDDEN) for name in TERMS}
    return {}
