"""What tells whether a penalty can work: how much there is to see, and what it does to Z beside the contrastive loss.

capacity     1/2 log det(I + Cov(Z) / s^2)                      what critics would have to tell
log ratio    log(|p| / |c|)       p, c: gradients at all Z of the penalty (without lam) and of the contrastive loss,
cosine       <p, c> / |p| |c|     without the part along z, which normalised embeddings cannot follow
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.distributed import merge
from cibr_kernels.distributed.shards import Shards
from cibr_kernels.information.capacity import capacity, covariance
from cibr_kernels.losses.penalty import MODALITIES, Rows
from cibr_kernels.numerics import promote


def capacities(rows: Rows, noise_std: float, shards: Shards | None) -> dict[str, Tensor]:
    """ "image_capacity", "text_capacity": () nats of the rows of all ranks; infinite without noise."""
    return {
        f"{m}_capacity": capacity(covariance(getattr(rows, f"{m}_features"), shards), noise_std) for m in MODALITIES
    }


def compare_gradients(
    contrastive: Tensor, rows: Rows, surrogate: Tensor, branch: Rows, shards: Shards | None
) -> dict[str, Tensor]:
    """ "gradient_log_ratio", "gradient_cosine", (); nothing where no embedding gets a gradient.

    One backward more from each loss, to the embeddings and no further.  The cosine is NaN beside a gradient of zeros.
    """
    if not (contrastive.requires_grad and surrogate.requires_grad):
        return {}
    products = torch.zeros(3, dtype=torch.float64, device=contrastive.device)
    gradients = [
        torch.autograd.grad(end, list(at.features().values()), retain_graph=True, allow_unused=True)
        for end, at in ((surrogate, branch), (contrastive, rows))
    ]
    with torch.no_grad():
        for z, p, c in zip(branch.features().values(), *gradients, strict=True):
            p, c = (torch.zeros_like(z) if g is None else _along_the_sphere(promote(g), z) for g in (p, c))
            products += torch.stack([(p * p).sum(), (c * c).sum(), (p * c).sum()])
        if shards is not None:
            products = merge.sum_of_ranks(products, shards)
        pp, cc, pc = products.to(contrastive.dtype)
        return {"gradient_log_ratio": (pp / cc).log() / 2, "gradient_cosine": pc / (pp * cc).sqrt()}


def _along_the_sphere(g: Tensor, z: Tensor) -> Tensor:
    """g (n, d) without its part along z (n, d)."""
    return g - z * ((g * z).sum(1) / (z * z).sum(1))[:, None]
