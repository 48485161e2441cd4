"""The Triton kernels of the CIBR objective around its critics: noise on Z, the objective's numbers, gradients to Z."""

from __future__ import annotations

import triton
import triton.language as tl

from cibr_kernels.dispatch.triton_call import SIZES


@triton.jit(do_not_specialize=SIZES)
def cibr_noise_kernel(z, noise, out, count, noise_std, root, BLOCK: tl.constexpr):
    """out = (z + noise_std noise) root, of count numbers.  Grid: (its blocks,)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    here = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    here += noise_std * tl.load(noise + at, mask=inside, other=0.0)
    tl.store(out + at, here * root, mask=inside)


@triton.jit
def cibr_objective_kernel(j, el, contrastive, lam, loss, parts):
    """The estimates j - el (4,) of own and other, of image and text, and the loss ().

    parts (6,): own - other of image and of text, then the estimates.  One program.
    """
    nats = tl.arange(0, 4)
    each = tl.load(j + nats) - tl.load(el + nats)
    tl.store(parts + 2 + nats, each)
    signed = tl.where(nats % 2 == 0, each, -each)
    image = tl.sum(tl.where(nats < 2, signed, 0.0), 0)
    text = tl.sum(tl.where(nats < 2, 0.0, signed), 0)
    tl.store(parts, image)
    tl.store(parts + 1, text)
    tl.store(loss, tl.load(contrastive) + tl.load(lam) * (image + text))


@triton.jit
def cibr_upstream_kernel(g, g_j, g_l):
    """The gradients of minus the sum of the four estimates, times g (): g_j (4,) = -g, g_l (4,) = g.  One program."""
    at, here = tl.arange(0, 4), tl.load(g)
    tl.store(g_j + at, tl.zeros((4,), tl.float32) - here)
    tl.store(g_l + at, tl.zeros((4,), tl.float32) + here)


@triton.jit(do_not_specialize=SIZES)
def cibr_encoder_gradient_kernel(dz, lam, out, count, root, BLOCK: tl.constexpr):
    """out = dz root lam, of count numbers: an encoder's gradient from that at the critics' Z.  Grid: (its blocks,)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    here = tl.load(dz + at, mask=inside, other=0.0) * root * tl.load(lam)
    tl.store(out + at, here.to(out.dtype.element_ty), mask=inside)
