"""Distributions whose mutual information is known exactly, for `python bench/ mi`.

A model samples named variables and knows the information between any two groups of them, in nats:

    gaussians    x, z in 20 dimensions, correlation rho in each: I(x; z) = -10 log(1 - rho^2)
    chain        z - xv - xt, CIBR's: xt = r xv + sqrt(1 - r^2) e,  z = xv + sigma e'
    CCMI         x - y given z: y = x + u + 0.1 e with u = z_1 (model F, z uniform) or w.z (model G, z Gaussian);
                 x is independent of z, so I(x; y, z) = I(x; y | z) = 1/2 log 101 whatever the width of z
    bmi          the tasks of Czyz et al. (NeurIPS 2023), by their definitions in benchmark-mi 0.1.3

Gaussian information is 1/2 log(|S_x| |S_z| / |S|); maps of x alone or z alone that can be undone leave it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Generator, Tensor

STAIRCASE = (2.0, 4.0, 6.0, 8.0, 10.0)  # nats
CHAINS = ((1, 0.8, 0.5), (5, 0.8, 1.0), (10, 0.6, 1.0))  # d, r, sigma
CCMI_WIDTHS = (20, 100)

Sample = dict[str, Tensor]  # name -> (n, d) float32
Group = tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """`sample(n, generator)` draws n independent rows; `information(left, right)` is I(left; right) in nats."""

    name: str
    sample: Callable[[int, Generator], Sample]
    information: Callable[[Group, Group], float]


def correlation_for(information: float, d: int) -> float:
    """The correlation per dimension that gives d pairs of unit Gaussians `information` nats in all."""
    return math.sqrt(-math.expm1(-2 * information / d))


def gaussian_information(covariance: Tensor, left: Tensor, right: Tensor) -> float:
    """covariance (D, D) float64; left, right: indices of the two groups -> nats, by determinants."""

    def logdet(index: Tensor) -> Tensor:
        return torch.linalg.slogdet(covariance[index][:, index])[1]

    return (logdet(left) + logdet(right) - logdet(torch.cat([left, right]))).item() / 2


def gaussian(name: str, widths: dict[str, int], covariance: Tensor) -> Model:
    """Zero-mean Gaussian variables of the given widths, in the order of `covariance` (D, D) float64."""
    root = torch.linalg.cholesky(covariance)
    index = dict(zip(widths, torch.arange(len(covariance)).split(list(widths.values())), strict=True))

    def sample(n: int, generator: Generator) -> Sample:
        rows = torch.randn(n, len(root), dtype=torch.float64, generator=generator) @ root.T
        return {variable: rows[:, i].float() for variable, i in index.items()}

    def information(left: Group, right: Group) -> float:
        return gaussian_information(covariance, *(torch.cat([index[v] for v in group]) for group in (left, right)))

    return Model(name, sample, information)


def paired(name: str, d: int, rho: float, pairs: int) -> Model:
    """x and z of width d with unit variance; the first `pairs` dimensions of one correlate with those of the other."""
    cross = torch.zeros(d, dtype=torch.float64)
    cross[:pairs] = rho
    eye = torch.eye(d, dtype=torch.float64)
    covariance = torch.cat([torch.cat([eye, cross.diag()], 1), torch.cat([cross.diag(), eye], 1)])
    return gaussian(name, {"x": d, "z": d}, covariance)


def gaussians(information: float, d: int = 20) -> Model:
    return paired(f"Gaussians {d}x{d}, I = {information:g}", d, correlation_for(information, d), d)


def chain(d: int, r: float, sigma: float) -> Model:
    """xv ~ N(0, I_d), xt = r xv + sqrt(1 - r^2) e, z = xv + sigma e': Z - Xv - Xt is Markov."""
    blocks = torch.tensor([[1, r, 1], [r, 1, r], [1, r, 1 + sigma**2]], dtype=torch.float64)
    covariance = torch.kron(blocks, torch.eye(d, dtype=torch.float64))
    return gaussian(f"chain d = {d}, r = {r:g}, sigma = {sigma:g}", {"xv": d, "xt": d, "z": d}, covariance)


def ccmi(letter: str, dz: int, noise: float = 0.1) -> Model:
    """CCMI's models F and G with a z of width dz."""
    weight = torch.randn(dz, dtype=torch.float64, generator=Generator().manual_seed(dz))
    weight /= weight.abs().sum()

    def sample(n: int, generator: Generator) -> Sample:
        x, e = torch.randn(2, n, 1, dtype=torch.float64, generator=generator)
        if letter == "F":
            z = torch.rand(n, dz, dtype=torch.float64, generator=generator) - 0.5
            u = z[:, :1]
        else:
            z = torch.randn(n, dz, dtype=torch.float64, generator=generator)
            u = (z @ weight)[:, None]
        return {"x": x.float(), "y": (x + u + noise * e).float(), "z": z.float()}

    known: dict[tuple[Group, Group], float] = {
        (("x",), ("y", "z")): math.log1p(1 / noise**2) / 2,
        (("x",), ("z",)): 0.0,
    }
    return Model(f"CCMI {letter}, d_z = {dz}", sample, lambda left, right: known[left, right])


# --------------------------------------------------------------------------------------------------- bmi
def dense(d: int) -> Model:
    """Every two of the 2 d unit-variance coordinates have correlation 1/2."""
    covariance = (torch.eye(2 * d, dtype=torch.float64) + 1) / 2
    return gaussian(f"dense {d}x{d}", {"x": d, "z": d}, covariance)


def sparse(d: int) -> Model:
    """Two pairs of coordinates with correlation 0.8, all else independent."""
    return paired(f"sparse {d}x{d}", d, 0.8, 2)


def student_entropy(k: int, dof: float) -> float:
    """Differential entropy in nats of the k-dimensional Student-t with unit dispersion (Arellano-Valle et al. 2013)."""
    half, total = torch.tensor([dof / 2, (dof + k) / 2], dtype=torch.float64)
    tail = total * (torch.digamma(total) - torch.digamma(half))
    return (torch.lgamma(half) - torch.lgamma(total) + tail).item() + k / 2 * math.log(dof * math.pi)


def student(d: int, dof: int) -> Model:
    """x and z are the halves of a 2 d-dimensional Student-t with unit dispersion: uncorrelated, one shared scale."""

    def sample(n: int, generator: Generator) -> Sample:
        rows = torch.randn(n, 2 * d, dtype=torch.float64, generator=generator)
        scale = torch.randn(n, dof, dtype=torch.float64, generator=generator).square().mean(1, keepdim=True).sqrt()
        x, z = (rows / scale).float().split(d, 1)
        return {"x": x, "z": z}

    truth = 2 * student_entropy(d, dof) - student_entropy(2 * d, dof)
    return Model(f"student {d}x{d}, dof {dof}", sample, lambda left, right: truth)


def spiral(t: Tensor, plane: tuple[int, int]) -> Tensor:
    """(n, d) -> (n, d): each row turned in one coordinate plane by the angle |row|^2 / d."""
    i, j = plane
    angle = t.square().sum(1) / t.shape[1]
    cos, sin, turned = angle.cos(), angle.sin(), t.clone()
    turned[:, i], turned[:, j] = cos * t[:, i] - sin * t[:, j], sin * t[:, i] + cos * t[:, j]
    return turned


def half_cube(t: Tensor) -> Tensor:
    return t * t.abs().sqrt()


def mapped(
    word: str, base: Model, of_x: Callable[[Tensor], Tensor], of_z: Callable[[Tensor], Tensor] | None = None
) -> Model:
    """`base` with its x and z each put through an invertible map (`of_x` serves both where `of_z` is None)."""

    def sample(n: int, generator: Generator) -> Sample:
        rows = base.sample(n, generator)
        return {"x": of_x(rows["x"]), "z": (of_z or of_x)(rows["z"])}

    return Model(f"{word} {base.name}", sample, base.information)


def bmi_models() -> list[Model]:
    return [
        *(sparse(d) for d in (3, 5, 25)),
        *(dense(d) for d in (5, 25, 50)),
        mapped("normal-cdf", sparse(5), torch.special.ndtr),
        mapped("half-cube", sparse(5), half_cube),
        mapped("spiral", sparse(5), lambda x: spiral(x, (0, 1)), lambda z: spiral(z, (1, 2))),
        mapped("asinh", student(5, 2), torch.asinh),
    ]


@cache
def models() -> dict[str, Model]:
    """Every model of the table by its name."""
    made = [*map(gaussians, STAIRCASE), *(chain(*parameters) for parameters in CHAINS), *bmi_models()]
    made += [ccmi(letter, width) for letter in "FG" for width in CCMI_WIDTHS]
    return {model.name: model for model in made}
