"""The plain siglip_loss in Triton: dot_softplus's sweep, with the positives in its kernels."""

from __future__ import annotations

from cibr_kernels.primitives.dot.softplus.triton import mean_loss as forward  # noqa: F401
