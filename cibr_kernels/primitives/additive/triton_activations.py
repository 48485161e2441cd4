"""Activations and their slopes for Triton kernels: phi(t) and phi'(t), float32, as csrc/additive/activations.h.

Names are those of `additive.activations.ACTIVATIONS`; `slope` is leaky_relu's negative slope and elu's alpha.
Powers and quotients are the approximate ones (2 ulp; exp2 flushes subnormals and so needs no guards); where one would
cancel (elu, tanh, softplus near 0) a polynomial keeps the digits: a critic with small pre-activations loses nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _exponential(x):
    """e^x and e^x - 1 for x <= 0."""
    e = tl.exp2(1.44269504 * x)
    p = x * (1 / 5040) + (1 / 720)
    p = p * x + (1 / 120)
    p = p * x + (1 / 24)
    p = p * x + (1 / 6)
    p = p * x + 0.5
    p = p * x * x + x
    return e, tl.where(x > -0.35, p, e - 1.0)


@triton.jit
def _gelu(t):
    # the tail Phi(-|t|) = e^(-t^2/2) Q(k), k = 1 / (1 + 0.295 |t|), to 7e-9: one exponential for it and the density
    bell = tl.exp2(-0.72134752 * t * t)
    k = 1.0 / (1.0 + 0.295 * tl.abs(t))
    q = k * 0.0370176277 - 0.171475517
    q = q * k + 0.245919325
    q = q * k - 0.0879610357
    q = q * k + 0.146015642
    q = q * k + 0.0933838832
    q = q * k + 0.119510624
    q = q * k + 0.117589458
    tail = bell * (q * k)
    cdf = tl.where(t > 0.0, 1.0 - tail, tail)
    return t * cdf, cdf + t * (bell * 0.398942280)


@triton.jit
def _gated(t, z, dz):
    """t sigma(z), z' = dz: with u = e^-|z|, sigma is 1 / (1 + u) or u / (1 + u)."""
    u = tl.exp2(-1.44269504 * tl.abs(z))
    r = 1.0 / (1.0 + u)
    rest = u * r
    sigma = tl.where(z > 0.0, r, rest)
    return t * sigma, sigma + t * (rest * r) * dz


@triton.jit
def _gelu_tanh(t):
    x = tl.minimum(tl.maximum(t, -10.25), 10.25)  # sigma is 0 or 1 there, and t^3 cannot overflow
    square = x * x
    return _gated(t, x * (1.595769122 + 0.0713548163 * square), 1.595769122 + 0.214064449 * square)


@triton.jit
def _elu(t, alpha):
    e, e_minus_one = _exponential(tl.minimum(t, 0.0))
    return tl.where(t > 0.0, t, alpha * e_minus_one), tl.where(t > 0.0, 1.0, alpha * e)


@triton.jit
def _softplus(t):
    # log(1 + u) = 2 atanh(z), z = u / (2 + u) <= 1/3, its series refitted (5e-9)
    u = tl.exp2(-1.44269504 * tl.abs(t))
    z = u / (2.0 + u)
    square = z * z
    p = square * 0.280247430 + 0.279990883
    p = p * square + 0.400217020
    p = p * square + 0.666664131
    return tl.maximum(t, 0.0) + z * (2.0 + square * p), tl.where(t > 0.0, 1.0, u) / (1.0 + u)


@triton.jit
def _tanh(t):
    # |phi| = (1 - u) / (1 + u), phi' = 4 u / (1 + u)^2, u = e^(-2 |t|): no digits cancel in 1 - phi^2
    u, u_minus_one = _exponential(-2.0 * tl.abs(t))
    r = 1.0 / (1.0 + u)
    minus_magnitude = u_minus_one * r
    return tl.where(t > 0.0, -minus_magnitude, minus_magnitude), 4.0 * u * (r * r)


@triton.jit
def value_and_slope(t, slope, ACTIVATION: tl.constexpr):
    """phi(t), phi'(t); what the caller does not use is not computed."""
    if ACTIVATION == "relu":
        return tl.maximum(t, 0.0), tl.where(t > 0.0, 1.0, 0.0)
    elif ACTIVATION == "leaky_relu":
        return tl.where(t > 0.0, t, slope * t), tl.where(t > 0.0, 1.0, slope)
    elif ACTIVATION == "gelu":
        return _gelu(t)
    elif ACTIVATION == "gelu_tanh":
        return _gelu_tanh(t)
    elif ACTIVATION == "silu":
        return _gated(t, t, 1.0)
    elif ACTIVATION == "elu":
        return _elu(t, slope)
    elif ACTIVATION == "softplus":
        return _softplus(t)
    else:
        tl.static_assert(ACTIVATION == "tanh")
        return _tanh(t)
