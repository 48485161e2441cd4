"""The tensors and critics of a case: the same numbers in every process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import cibr_kernels as ck
from bench.registry import SCALE, Case

TERMS = ("image_own", "image_other", "text_own", "text_other")
HIDDEN = 256  # units of each critic of cibr_loss


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case; `leaves` are those whose gradients a training step needs."""

    tensors: dict[str, Tensor]
    critics: nn.ModuleDict
    leaves: tuple[Tensor, ...]


def make_inputs(case: Case) -> Inputs:
    """Unit-norm features whose pairs agree in part."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    torch.manual_seed(0)  # the critics' parameters
    n, dtype = case.n, getattr(torch, case.dtype)
    if case.op == "critic_moments":
        x, z = normal(n, case.width).to(dtype), normal(n, case.width).to(dtype)
        critic = ck.nn.ConcatCritic(case.width, case.width, case.width, activation=case.activation)
        critics, tensors = nn.ModuleDict({"critic": critic}), {"x": x, "z": z}
    else:
        shared = normal(n, case.width)
        x, z = (nn.functional.normalize(shared + normal(n, case.width), dim=1).to(dtype) for _ in range(2))
        tensors = {"x": x, "z": z, "scale": torch.tensor(SCALE)}
        if case.op == "siglip_loss":
            tensors |= {"scale": torch.tensor(10.0), "bias": torch.tensor(-10.0)}  # where SigLIP starts
        critics = nn.ModuleDict()
        if case.op == "cibr_loss":
            tensors |= {"image_inputs": normal(n, 768), "text_inputs": normal(n, 512)}
            widths = {"image_own": 768, "image_other": 512, "text_own": 512, "text_other": 768}
            critics.update({name: ck.nn.ConcatCritic(widths[name], case.width, HIDDEN) for name in TERMS})
    leaves = [tensors[name] for name in ("x", "z", "scale", "bias") if name in tensors]
    if case.backward:
        for leaf in leaves:
            leaf.requires_grad_()
    else:
        critics.requires_grad_(False)
    return Inputs(tensors, critics, (*leaves, *critics.parameters()))
