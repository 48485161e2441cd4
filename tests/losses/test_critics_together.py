"""The four concat critics of CIBR as one node of autograd: what it computes, and when each is called instead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations

import cibr_kernels as ck
from cibr_kernels.information import group
from cibr_kernels.information.critics import view
from cibr_kernels.losses import penalty as penalties
from cibr_kernels.losses.penalty import Options, Rows, penalty

N, D = 12, 5
WIDTHS = {"image_inputs": 7, "text_inputs": 6}


def critics(hidden: int = 8, **options) -> dict[str, ck.nn.ConcatCritic]:
    torch.manual_seed(0)
    widths = {name: WIDTHS[x.replace("condition", "inputs")] for name, (x, _) in penalties.TERMS.items()}
    return {name: ck.nn.ConcatCritic(width, D, hidden, **options) for name, width in widths.items()}


def rows(dtype: torch.dtype = torch.float32) -> Rows:
    torch.manual_seed(1)
    features = [torch.nn.functional.normalize(torch.randn(N, D)).to(dtype).requires_grad_() for _ in range(2)]
    return Rows(*features, *(torch.randn(N, width) for width in WIDTHS.values()))


def outcome(given: dict, estimator: str, alone: bool, monkeypatch, **options) -> tuple[list[Tensor], bool]:
    """The surrogate, its parts and every gradient; whether the critics were taken together."""
    taken = []

    def weights_of_all(*args):
        taken.append(None if alone else group.weights_of_all(*args))
        return taken[-1]

    monkeypatch.setattr(penalties, "weights_of_all", weights_of_all)
    batch = rows()
    torch.manual_seed(2)
    seen = {name: view(critic) for name, critic in given.items()}
    ema = options.pop("ema", None)
    value, parts = penalty(batch.scaled(0.3), Options(estimator, **options), seen, ema=ema)
    leaves = [batch.image_features, batch.text_features, *(p for c in given.values() for p in c.parameters())]
    return [value, *parts.values(), *torch.autograd.grad(value, leaves)], taken[-1:] != [None] and bool(taken)


@pytest.mark.parametrize("estimator", ["mine", "nwj", "tuba", "remine"])
@pytest.mark.parametrize("options", [{"activation": "relu"}, {"activation": "elu", "slope": 0.5}], ids=str)
def test_as_one_by_one(estimator, options, monkeypatch):
    given = critics(**options)
    together, taken = outcome(given, estimator, False, monkeypatch, diagonal="include")
    alone, _ = outcome(given, estimator, True, monkeypatch, diagonal="include")
    assert taken
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_with_moving_averages(monkeypatch):
    given, found = critics(), []
    for alone in (False, True):
        ema = {name: torch.tensor(0.1 * i) for i, name in enumerate(given)}
        found.append(outcome(given, "mine", alone, monkeypatch, ema=ema)[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def hooked(given: dict) -> None:
    given["text_own"].register_forward_hook(lambda *_: None)


def hooked_inside(given: dict) -> None:
    given["text_own"].x_proj.register_forward_pre_hook(lambda *_: None)


def parametrized(given: dict) -> None:
    parametrizations.weight_norm(given["image_own"].z_proj)


def of_another_width(given: dict) -> None:
    given["text_other"] = ck.nn.ConcatCritic(WIDTHS["image_inputs"], D, 9)


def stored_in_half(given: dict) -> None:
    given["text_other"].storage = torch.bfloat16


def in_half_precision(given: dict) -> None:
    for critic in given.values():
        critic.bfloat16()


def of_its_own_form(given: dict) -> None:
    given["text_other"].out = torch.nn.Linear(8, 1)


EACH = [hooked, hooked_inside, parametrized, of_another_width, stored_in_half, in_half_precision, of_its_own_form]


@pytest.mark.parametrize("change", EACH, ids=lambda f: f.__name__)
def test_what_has_to_be_called_is_called(change, monkeypatch):
    given = critics()
    change(given)
    found, taken = outcome(given, "mine", False, monkeypatch)
    assert not taken and all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_estimates_only(bad, monkeypatch):
    given, batch = critics(), rows()
    batch.text_inputs[3, 2] = bad
    seen = {name: view(critic) for name, critic in given.items()}
    _, parts = penalty(batch, Options(), seen)
    read = {name: penalties.TERMS[name][0].replace("condition", "inputs") for name in given}
    assert {name: bool(parts[name].isnan()) for name in given} == {name: read[name] == "text_inputs" for name in given}


def test_a_second_derivative_is_refused():
    given, batch = critics(), rows()
    seen = {name: view(critic) for name, critic in given.items()}
    value, _ = penalty(batch, Options(), seen)
    (first,) = torch.autograd.grad(value, batch.image_features, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        first.sum().backward()
