"""Modules: critics, drop-ins for open_clip's and lightly's losses, the CIBR objective and all it has to remember."""

from cibr_kernels.nn.cibr import CIBRLoss
from cibr_kernels.nn.contrastive import ClipLoss, NTXentLoss, SigLipLoss
from cibr_kernels.nn.critics import ConcatCritic, SeparableCritic
from cibr_kernels.nn.means import MeanNetwork
from cibr_kernels.nn.schedule import Schedule
from cibr_kernels.nn.statistics import LogEMA, Standardize

__all__ = [
    "CIBRLoss",
    "ClipLoss",
    "ConcatCritic",
    "LogEMA",
    "MeanNetwork",
    "NTXentLoss",
    "Schedule",
    "SeparableCritic",
    "SigLipLoss",
    "Standardize",
]
