"""Image-text models, whatever they are made of: two towers that keep what enters their projections."""

from __future__ import annotations

from cibr.models.conv import MAX_LOG_SCALE, BatchNorm, ConvTower, TwoTower
from cibr.models.features import Batch, Features, Output, concatenate
from cibr.models.model import Model

__all__ = ["MAX_LOG_SCALE", "Batch", "BatchNorm", "ConvTower", "Features", "Model", "Output", "TwoTower", "concatenate"]
