"""Estimated information of Gaussians whose information is known, read where the critics were not trained."""

from __future__ import annotations

import math

import pytest
import torch

from cibr.errors import UsageError
from cibr.evaluate.information import information


def test_shared_and_own_information_of_gaussians() -> None:
    shared, private = torch.randn(2000, 2), torch.randn(2000, 2)
    xv, xt = torch.cat([shared, private], 1), shared + 0.5 * torch.randn(2000, 2)
    zv = 0.5 * xv  # with noise .25: 4 channels of snr 4
    zt = 0.5 * xt
    found = information((xv, zv), (xt, zt), steps=200, hidden=64, sizes=(16, 256))
    own = 4 * 0.5 * math.log(1 + 4)
    other = 2 * 0.5 * math.log((0.25 + 0.0625) / (0.25 - 0.25 / 1.25 + 0.0625))  # what Xt leaves of 0.25 is 0.05
    assert found["image_own"] == pytest.approx(own, abs=0.4) and found["image_own"] < own + 0.1
    assert found["image_other"] == pytest.approx(other, abs=0.2)
    assert found["image_cmi"] == pytest.approx(found["image_own"] - found["image_other"])
    assert found["image_ceiling"] == pytest.approx(own, rel=0.05)  # tight, for Z is Gaussian
    assert found["rows"] == 1000 and found["by_size"]["n"] == [16, 256] and len(found["by_size"]["text_own"]) == 2


def test_nothing_is_found_where_nothing_is() -> None:
    x, z = torch.randn(600, 4), torch.randn(600, 4)
    found = information((x, z), (x, z), steps=50, hidden=32)
    assert abs(found["image_own"]) < 0.3 and abs(found["text_other"]) < 0.3  # what was memorised does not count


def test_too_few_rows_and_broken_features_are_refused() -> None:
    x = torch.randn(600, 4)
    with pytest.raises(UsageError, match="needs 512 pairs, got 100"):
        information((x[:100], x[:100]), (x[:100], x[:100]))
    with pytest.raises(UsageError, match="between 2 and the 300 rows read"):
        information((x, x), (x, x), sizes=(16, 512))
    broken = x.clone()
    broken[3, 0] = math.nan
    with pytest.raises(UsageError, match="Xt are NaN or infinite in 1 of 600 rows"):
        information((x, x), (broken, x))
