"""Modules: critics, drop-ins for open_clip's losses, and the CIBR objective with everything it has to remember."""

from cibr_kernels.nn.cibr import CIBRLoss
from cibr_kernels.nn.contrastive import ClipLoss, SigLipLoss
from cibr_kernels.nn.critics import ConcatCritic, SeparableCritic
from cibr_kernels.nn.statistics import LogEMA, Standardize

__all__ = ["CIBRLoss", "ClipLoss", "ConcatCritic", "LogEMA", "SeparableCritic", "SigLipLoss", "Standardize"]
