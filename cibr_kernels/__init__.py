"""Fused, memory-efficient all-pairs losses: CLIP, mutual information by MINE, and CIBR.

    import cibr_kernels as ck
    loss = ck.clip_loss(image_features, text_features, logit_scale)

Importing this pulls in torch and nothing heavier.
"""

import torch  # noqa: F401  (before the compiled module: torch's wheel carries the OpenMP runtime they share)

from cibr_kernels import distributed, nn
from cibr_kernels.dispatch import backends, flops
from cibr_kernels.dispatch.backends import native_available
from cibr_kernels.information.estimators import (
    bound,
    conditional_mutual_information,
    gaussian_log_likelihood,
    mutual_information,
)
from cibr_kernels.information.moments import critic_moments, derangement, permutation, shifts
from cibr_kernels.losses.accumulate import accumulate
from cibr_kernels.losses.cibr import cibr_loss
from cibr_kernels.losses.clip.op import clip_loss
from cibr_kernels.losses.clip.options import Negatives, SoftTargets
from cibr_kernels.losses.siglip.op import siglip_loss
from cibr_kernels.losses.warmup import warmup
from cibr_kernels.primitives.dot.lse.op import set_stash_budget, stash_budget
from cibr_kernels.primitives.log_mean_exp.op import log_mean_exp

__version__ = "0.1.0"
__all__ = [
    "Negatives",
    "SoftTargets",
    "accumulate",
    "bound",
    "cibr_loss",
    "clip_loss",
    "conditional_mutual_information",
    "critic_moments",
    "derangement",
    "distributed",
    "gaussian_log_likelihood",
    "log_mean_exp",
    "mutual_information",
    "native_available",
    "nn",
    "permutation",
    "set_stash_budget",
    "shifts",
    "siglip_loss",
    "stash_budget",
    "warmup",
]

backends.warn_if_missing()
flops.install()
