"""What an installed wheel must do where there is no compiler; run by the fresh interpreter of test_packages.py."""

from __future__ import annotations

import json
import shutil
import sys
import warnings

warnings.simplefilter("error")  # a package without its kernels says so at import

import torch  # noqa: E402

import cibr_kernels as ck  # noqa: E402
from cibr_kernels.dispatch import backends  # noqa: E402

assert ck.__file__.startswith(sys.prefix), ck.__file__
assert not any(shutil.which(name) for name in ("g++", "gcc", "cc", "clang++", "cmake", "nvcc"))
module = backends.compiled()
torch.manual_seed(0)
x, y = (torch.nn.functional.normalize(torch.randn(70, 40), dim=1) for _ in range(2))
critic = ck.nn.ConcatCritic(40, 40, 32)
for isa in module.supported_isas():
    module.set_isa(isa)
    for dtype in (torch.float32, torch.bfloat16):
        features = [t.clone().to(dtype).requires_grad_() for t in (x, y)]
        native = ck.clip_loss(*features, 14.3, backend="native")
        native.backward()
        torch.testing.assert_close(native, ck.clip_loss(*features, 14.3, backend="reference"), rtol=1e-4, atol=1e-4)
        assert all(t.grad is not None and t.grad.isfinite().all() for t in features)
    scores = [ck.mutual_information(x, y, critic, backend=name) for name in ("native", "reference")]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)
print(json.dumps({"isas": module.supported_isas(), "cuda": module.has_cuda, "optional": sorted(
    name for name in ("open_clip", "matplotlib", "sklearn") if name in sys.modules)}))  # fmt: skip
