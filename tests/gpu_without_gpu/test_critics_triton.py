"""The steps around critics on a GPU, in the emulator: a critic alone, the objective with four, standardised data."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from executor import emulated
from torch import Tensor

import cibr_kernels as ck
from cibr_kernels.losses import game
from cibr_kernels.nn.statistics import Standardize

N, D, HIDDEN, WIDTHS = 70, 24, 66, (20, 12)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def both(run: Any, *leaves: Tensor, capability: int = 90) -> list[str]:
    """Holds run(backend)'s outputs and gradients in the emulator to plain PyTorch's; what was launched."""
    torch.manual_seed(1)
    expected = run("reference")
    of_expected = torch.autograd.grad(sum(t.sum() for t in expected), leaves, allow_unused=True)
    torch.manual_seed(1)
    with emulated(capability) as gpu:
        found = run("triton")
        of_found = torch.autograd.grad(sum(t.sum() for t in found), leaves, allow_unused=True)
    for ours, theirs in zip((*found, *of_found), (*expected, *of_expected), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, rtol=2e-2 if ours.dtype == torch.bfloat16 else 2e-4, atol=2e-5)
    return [name for name, _ in gpu.launches]


@pytest.mark.parametrize(("activation", "capability"), [("relu", 80), ("gelu", 90)])
@pytest.mark.parametrize("what", ["both", "J", "data", "frozen"])
def test_a_critic_alone(activation: str, capability: int, what: str) -> None:
    torch.manual_seed(0)
    critic = ck.nn.ConcatCritic(WIDTHS[0], D, HIDDEN, activation=activation)
    x, z = leaf(N, WIDTHS[0]), leaf(N, D)
    if what == "data":
        x = x.detach()
    if what == "frozen":
        critic.requires_grad_(False)

    def run(backend: str) -> tuple[Tensor, ...]:
        joint, marginal = ck.critic_moments(x, z, critic, backend=backend)
        return (joint,) if what == "J" else (joint, 2 * marginal)

    leaves = [t for t in (x, z, *critic.parameters()) if t.requires_grad]
    names = both(run, *leaves, capability=capability)
    assert names[0] == "critic_parameters_kernel" and "additive_moments_finish_kernel" in names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conditions", [False, True])
def test_the_objective_with_four_critics(dtype: torch.dtype, conditions: bool) -> None:
    torch.manual_seed(0)
    zv, zt = (torch.nn.functional.normalize(torch.randn(N, D), dim=1).to(dtype).requires_grad_() for _ in range(2))
    inputs = {"image_inputs": torch.randn(N, WIDTHS[0]), "text_inputs": torch.randn(N, WIDTHS[1])}
    widths = {"image_own": WIDTHS[0], "image_other": WIDTHS[1], "text_own": WIDTHS[1], "text_other": WIDTHS[0]}
    if conditions:
        inputs |= {"image_condition": torch.randn(N, 9), "text_condition": torch.randn(N, 7)}
        widths |= {"image_other": 7, "text_other": 9}
    critics = {name: ck.nn.ConcatCritic(width, D, HIDDEN) for name, width in widths.items()}
    scale = torch.tensor(5.0, requires_grad=True)
    seen: list[dict[str, Tensor]] = []

    def run(backend: str) -> tuple[Tensor, ...]:
        loss, parts = ck.cibr_loss(
            zv, zt, scale, critics=critics, lam=0.3, return_parts=True, backend=backend, **inputs
        )
        seen.append(parts)
        return (loss,)

    leaves = zv, zt, scale, *(p for critic in critics.values() for p in critic.parameters())
    names = both(run, *leaves)
    assert "cibr_objective_kernel" in names and names.count("cibr_noise_kernel") == 2
    assert list(seen[0]) == list(seen[1]) == ["contrastive_loss", *game.PARTS]
    for name, value in seen[0].items():
        torch.testing.assert_close(seen[1][name], value, rtol=1e-4, atol=1e-5)


def test_a_backward_with_create_graph_gives_the_same_and_no_second_derivative() -> None:
    torch.manual_seed(0)
    zv, zt = leaf(N, D), leaf(N, D)
    critics = {name: ck.nn.ConcatCritic(WIDTHS[0], D, HIDDEN) for name in game.TERMS}
    data = {"image_inputs": torch.randn(N, WIDTHS[0]), "text_inputs": torch.randn(N, WIDTHS[0])}
    leaves = [zv, zt, *critics["text_own"].parameters()]
    with emulated(90):
        found = []
        for graph in (False, True):
            torch.manual_seed(1)
            loss = ck.cibr_loss(zv, zt, 5.0, critics=critics, backend="triton", **data)
            found.append(torch.autograd.grad(loss, leaves, create_graph=graph))
        for once, twice in zip(*found, strict=True):
            torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-6)
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(found[1][0].square().sum(), zv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(130, 70), (1, 3), (64, 64)])
def test_standardised_data(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    plain = Standardize(shape[1])
    device = copy.deepcopy(plain)
    batches = [5 + 3 * torch.randn(shape) for _ in range(3)]
    batches.insert(1, torch.full(shape, float("nan")))
    batches.insert(3, batches[0].clone().index_fill_(1, torch.tensor(shape[1] - 1), float("inf")))
    for batch in batches:
        expected = plain(batch.to(dtype))
        with emulated(90) as gpu:
            found = device(batch.to(dtype))
        assert [name for name, _ in gpu.launches] == [
            "standardize_columns_kernel",
            "standardize_merge_kernel",
            "standardize_move_kernel",
            "standardize_scale_kernel",
        ]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4, equal_nan=True)
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(getattr(device, name), buffer, rtol=1e-5, atol=1e-6)
