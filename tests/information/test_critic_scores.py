"""Random partners, and all pairs in panels: which rows meet, what memory it takes, and the gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Recorded, leaves
from estimators import CONTRASTS, CRITICS, DX, DZ, N, all_scores, check, data, formula, made
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cibr_kernels as ck
from cibr_kernels.information.negatives import derangement, permutation
from cibr_kernels.information.scores import KINDS, LEAST_ROWS, TEMPORARIES, additive_contrast


# ------------------------------------------------------------------------------------- random partners
class Witness(nn.Module):
    """Sees which rows meet: x and z hold their row's number."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def paired(self, x: Tensor, z: Tensor) -> Tensor:
        self.seen.append(torch.cat([x, z], 1).long())
        return x.sum(-1) * 0


def partners(negatives: Any, n: int) -> list[list[tuple[int, int]]]:
    """The pairs of the positives, then of each draw."""
    rows, witness = torch.arange(n)[:, None].float(), Witness()
    ck.critic_moments(rows, rows, witness, negatives=negatives)
    return [sorted(map(tuple, draw.tolist())) for draw in witness.seen]


@pytest.mark.parametrize("n", [2, 3, 8, 50])
def test_derangements_have_no_fixed_points_and_share_no_pair(n):
    k = min(n - 1, 6)
    positives, *draws = partners(derangement(k), n)
    assert positives == [(i, i) for i in range(n)] and len(draws) == k
    for draw in draws:
        assert [i for i, _ in draw] == sorted(j for _, j in draw) == list(range(n))
        assert all(i != j for i, j in draw)
    assert len({pair for draw in draws for pair in draw}) == k * n


def test_permutations_are_whole_and_may_have_fixed_points():
    positives, *draws = partners(permutation(200), 5)
    assert positives == [(i, i) for i in range(5)] and len(draws) == 200
    assert all(sorted(j for _, j in draw) == list(range(5)) for draw in draws)
    fixed = sum(i == j for draw in draws for i, j in draw) / 200
    assert 0.6 < fixed < 1.4  # one per permutation on average


def test_partners_of_a_derangement_are_uniform():
    g = torch.Generator().manual_seed(0)
    counts = torch.zeros(4, 4)
    for _ in range(600):
        for i, j in partners(derangement(1, generator=g), 4)[1]:
            counts[i, j] += 1
    off = counts[~torch.eye(4, dtype=torch.bool)]
    assert (off - 200).abs().max() < 5 * math.sqrt(200)


@pytest.mark.parametrize("make", [derangement, permutation])
@pytest.mark.parametrize("name", ["relu", "separable", "two layers", "callable"])
def test_random_partners_come_from_the_generator(name, make):
    x, z, _ = data()
    critic, g = made(name), torch.Generator()
    values = []
    for seed in (1, 1, 2):
        g.manual_seed(seed)
        values.append(ck.mutual_information(x, z, critic, negatives=make(3, generator=g)).item())
    assert values[0] == values[1] != values[2]
    assert make(3, generator=g) == make(3) and "generator" not in repr(make(3, generator=g))


@pytest.mark.parametrize("make", [derangement, permutation])
@pytest.mark.parametrize("estimator", ["dv", *CONTRASTS])
@pytest.mark.parametrize("name", list(CRITICS))
def test_random_partners_equal_the_formula_on_their_pairs(name, estimator, make):
    x, z, _ = data()
    rows = partners(make(4, generator=torch.Generator().manual_seed(11)), N)[1:]
    index = torch.tensor([[j for _, j in draw] for draw in rows])  # (4, n)

    def ours(critic: nn.Module, x: Tensor, z: Tensor) -> Tensor:
        chosen = make(4, generator=torch.Generator().manual_seed(11))
        return ck.mutual_information(x, z, critic, estimator=estimator, negatives=chosen)

    def truth(critic: nn.Module, x: Tensor, z: Tensor) -> Tensor:
        scores = all_scores(critic, x, z)
        positives, chosen = scores.diagonal(), scores.gather(1, index.T)
        if estimator == "dv":
            return positives.mean() - chosen.exp().mean().log()
        return formula(estimator, positives, chosen, columns=torch.cat([positives[:, None], chosen], 1))

    check(ours, truth, made(name), (x, z))


# ------------------------------------------------------------------------------------- memory, panels, operators
class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return out


class Seen(nn.Module):
    """A separable critic that only says `pairwise`, and how large its panels were."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def pairwise(self, x: Tensor, z: Tensor) -> Tensor:
        self.rows.append(len(x))
        return x[:, :DZ] @ z.T


@pytest.mark.parametrize("estimator", ["dv", *CONTRASTS])
@pytest.mark.parametrize("name", ["relu", "separable", "two layers", "pairwise", "callable"])
def test_nothing_of_all_pairs_is_made_under_a_small_budget(name, estimator):
    n, critic = 400, made(name)
    if name in ("relu", "separable") and not ck.native_available():
        pytest.skip("the reference of the kernels is n x m")
    x, z = leaves(torch.randn(n, DX), torch.randn(n, DZ))
    ck.set_stash_budget(40 * n * 4)
    with Largest() as mode:
        ck.mutual_information(x, z, critic, estimator=estimator).backward()
    assert mode.numel < n * n / 4


@pytest.mark.parametrize("kind", KINDS)
def test_additive_panels_stay_within_the_budget(kind):
    n, m, rows = 200, 210, 50
    a, b, w, bias = leaves(torch.randn(n, 5), torch.randn(m, 5), torch.randn(5), torch.randn(()))
    ck.set_stash_budget(rows * m * 4 * TEMPORARIES)
    with Recorded() as seen:
        additive_contrast(a, b, w, bias, kind)[0].backward()
    ((arguments, _),) = seen.named("additive_contrast_forward")
    assert arguments[10] == rows
    ck.set_stash_budget(0)
    with Recorded() as seen:
        additive_contrast(a, b, w, bias, kind)
    assert seen.named("additive_contrast_forward")[0][0][10] == LEAST_ROWS


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_any_panel_gives_the_same_loss_and_gradients(kind, include):
    torch.manual_seed(0)
    inputs = torch.randn(70, 5), torch.randn(83, 5), torch.randn(5), torch.randn(())
    results = []
    for budget in (1 << 40, 0, 30 * 83 * 4 * TEMPORARIES):
        ck.set_stash_budget(budget)
        tensors = leaves(*inputs, dtype=torch.float64)
        loss, positives, clamped = additive_contrast(
            *tensors, kind, clamp=0.7, first_positive=9, include_diagonal=include, activation="gelu"
        )
        results.append([loss, positives, clamped, *torch.autograd.grad(loss, tensors)])
    for other in results[1:]:
        for p, q in zip(results[0], other, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    a, b, w, bias = (t.double() for t in inputs)
    s = F.gelu(a[:, None] + b[None]) @ w + bias
    torch.testing.assert_close(results[0][1], s.diagonal(9))
    kept = torch.ones(70, 83, dtype=torch.bool) if include else ~torch.ones(70, 83).triu(9).tril(9).bool()
    expected = s.clamp(-0.7, 0.7).exp().mul(kept).sum(1).log()
    torch.testing.assert_close(results[0][2], expected)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_additive_contrast_gradcheck_and_opcheck(kind, include):
    torch.manual_seed(1)
    ck.set_stash_budget(0)
    inputs = leaves(torch.randn(20, 4), torch.randn(23, 4), torch.randn(4), torch.randn(()), dtype=torch.float64)

    def loss(*tensors: Tensor) -> Tensor:
        return additive_contrast(*tensors, kind, activation="tanh", first_positive=2, include_diagonal=include)[0]

    assert torch.autograd.gradcheck(loss, inputs)
    grads = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        sum(g.square().sum() for g in grads).backward()
    arguments = (*inputs, kind, 2.0, "tanh", 0.01, 2, include, 16, True, True, True, True, "auto")
    torch.library.opcheck(torch.ops.cibr_kernels.additive_contrast_forward.default, arguments)


@pytest.mark.parametrize("subset", range(16))
def test_additive_contrast_makes_only_needed_gradients(subset):
    tensors = [torch.randn(20, 4), torch.randn(23, 4), torch.randn(4), torch.randn(())]
    for k, t in enumerate(tensors):
        t.requires_grad_(bool(subset >> k & 1))
    loss = additive_contrast(*tensors, "js")[0]
    assert loss.requires_grad == bool(subset)
    if subset:
        loss.backward()
    assert [t.grad is not None for t in tensors] == [t.requires_grad for t in tensors]
