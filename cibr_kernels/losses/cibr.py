"""The CIBR objective in one backward pass (2503.24182, equations 4, 6, 7).

    loss = L_CLIP + lam [ I(Zv; Xv | Xt) + I(Zt; Xt | Xv) ],    I(Z; own | other) = I(Z; own) - I(Z; other)

The four critics maximise their bounds while the encoders minimise lam times the difference.  One backward does both:
with g_s(z) = z.detach() + s (z - z.detach()), the surrogate

    L_CLIP - I(own, g_-lam(z)) - I(other, g_+lam(z))

gives the critics the gradient of -I whatever lam is, and the encoders that of lam (I_own - I_other).  X is data: it is
detached.  Z gets noise, without which the information of a deterministic encoder is infinite, and is scaled by sqrt(d).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cibr_kernels import checks
from cibr_kernels.distributed.shards import Agreement, Shards
from cibr_kernels.information.critics import View, check, view
from cibr_kernels.information.estimators import MAXIMISED, Ema, check_ema, estimate
from cibr_kernels.information.negatives import Negatives, check_negatives, check_partners
from cibr_kernels.information.pairs import DIAGONALS, Pairs
from cibr_kernels.losses.clip.op import clip_loss
from cibr_kernels.numerics import promote

TERMS = {  # the critics, and what each of them sees
    "image_own": ("image_inputs", "image_features"),
    "image_other": ("text_inputs", "image_features"),
    "text_own": ("text_inputs", "text_features"),
    "text_other": ("image_inputs", "text_features"),
}


def scale_gradient(z: Tensor, factor: Tensor | float) -> Tensor:
    """The value of z with `factor` times its gradient."""
    return z.detach() + factor * (z - z.detach())


def noisy(
    z: Tensor, noise_std: float, generator: torch.Generator | None = None, shards: Shards | None = None
) -> Tensor:
    """(z + noise_std * standard normal) * sqrt(d), float32: what the critics see of a unit-norm z (n, d).

    With `shards` each rank draws the noise of the whole batch and takes its rows: ranks seeded alike get what a single
    process would draw, ranks seeded differently independent noise.
    """
    z = promote(z)
    n, d = z.shape
    total, first = (n, 0) if shards is None else (shards.total, shards.offset)
    drawn: dict[str, Any] = {} if generator is None else {"generator": generator}  # refused beside a symbolic size
    noise = torch.randn((total, d), dtype=z.dtype, device=z.device, **drawn)[first : first + n]
    return (z + noise_std * noise) * math.sqrt(d)


def agree(
    op: str, process_group: ProcessGroup | Shards | None, image_features: Tensor, text_features: Tensor,
    image_inputs: Tensor, text_inputs: Tensor, *, critics: Mapping[str, Any] | nn.ModuleDict, negatives: Negatives,
    **options: object,
) -> tuple[Shards | None, dict[str, View]]:  # fmt: skip
    """Checks what only the inputs can tell; with a group, that all ranks have inputs and options that go together.

    -> who has which rows, and the critics.
    """
    inputs = {
        "image_features": image_features, "text_features": text_features, "image_inputs": image_inputs,
        "text_inputs": text_inputs,
    }  # fmt: skip
    with Agreement(op, process_group, negatives=negatives, **options) as agreement:
        for name, t in inputs.items():
            checks.matrix(name, t)
        checks.same_rows(**inputs)
        checks.same_device(**inputs)
        if image_features.dtype != text_features.dtype:  # autocast may make them alike
            image, text = checks.autocast(image_features, text_features)
            checks.same_place(image_features=image, text_features=text)
        _check_names("critics", critics)
        check_negatives(negatives)
        seen = {name: view(critics[name]) for name in TERMS}
        for name, (x, z) in TERMS.items():
            check(seen[name], inputs[x], inputs[z], names=(x, z), made=f"the critic {name}")
        agreement.describe(**inputs)
    shards = agreement.shards
    rows, world = (image_features.shape[0], 1) if shards is None else (shards.total, shards.world)
    if rows < 2:
        raise ValueError(f"{op} needs at least 2 rows: one pair has no negatives, got 1")
    check_partners(negatives, rows, world)
    return shards, seen


def _check_names(what: str, given: Mapping[str, Any] | nn.ModuleDict) -> None:
    missing = [name for name in TERMS if name not in given]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}; it has {', '.join(given)}")


def cibr_loss(
    image_features: Tensor,  # (n, d)
    text_features: Tensor,  # (n, d)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    image_inputs: Tensor,  # (n, dv)
    text_inputs: Tensor,  # (n, dt)
    critics: Mapping[str, Any],
    lam: float | Tensor = 0.5,
    noise_std: float = 0.25,
    estimator: str = "mine",
    negatives: Negatives = "all",
    diagonal: str = "exclude",
    ema: Mapping[str, Ema] | None = None,
    one_way: bool = False,
    generator: torch.Generator | None = None,
    return_parts: bool = False,
    process_group: ProcessGroup | Shards | None = None,
    strategy: str = "gather",
    backend: str = "auto",
) -> Any:
    """CLIP loss plus lam times the two conditional information terms, a float32 scalar in nats.

    Backward gives encoders (through image_features, text_features, logit_scale) the gradient of the returned value, and
    gives each critic the gradient of *minus its own* estimate, unscaled by lam: one optimiser step moves both players.

    Args:
        image_features, text_features: (n, d) unit-norm embeddings Zv, Zt, n >= 2.
        logit_scale, logit_bias, one_way: as in `clip_loss`.
        image_inputs, text_inputs: (n, dv), (n, dt), what Z is computed from (pooled pre-projection features),
            standardised; data of any floating dtype, converted to float32 (float64 beside float64 features); no
            gradient flows into them.
        critics: {"image_own": T(Xv, Zv), "image_other": T(Xt, Zv), "text_own": T(Xt, Zt), "text_other": T(Xv, Zt)}.
        lam: weight of the penalty, a number or a 0-d tensor; 0 trains the critics only.
        noise_std: noise on Z before the critics, on its unit-norm scale; caps I(Z; X) near 1 / 2 noise_std^2 nats.
        estimator, negatives, diagonal, backend: as in `mutual_information` (an estimator that critics maximise: all but
            "club"; under "js" the reported terms are no information); ema: as there, by critic name.
        generator: draws the noise; torch's default generator otherwise.
        return_parts: also return {"contrastive_loss", "image_cmi", "text_cmi", and the four estimates}, detached.
        process_group, strategy: as in `clip_loss`; "ring" is the contrastive part's.  The information terms are those
            of all ranks' rows, the same on every rank; the mean of the losses over ranks is the whole batch's.

    Raises ValueError for shapes, missing critics, negative lam or noise, ranks that disagree; TypeError for dtypes.
    """
    checks.choice("estimator", estimator, MAXIMISED)
    checks.choice("diagonal", diagonal, DIAGONALS)
    checks.number("noise_std", noise_std)
    if ema is not None:
        _check_names("ema", ema)
        for average in ema.values():
            check_ema(estimator, average)
    if noise_std < 0:
        raise ValueError(f"noise_std must not be negative, got {noise_std}")
    if isinstance(lam, (int, float)) and lam < 0:
        raise ValueError(f"lam must not be negative, got {lam}")
    shards, seen = agree(
        "cibr_loss", process_group, image_features, text_features, image_inputs, text_inputs, critics=critics,
        negatives=negatives, estimator=estimator, diagonal=diagonal, one_way=one_way, strategy=strategy,
        noise_std=noise_std,
    )  # fmt: skip
    loss, parts = objective(
        image_features, text_features, logit_scale, logit_bias, image_inputs=image_inputs, text_inputs=text_inputs,
        critics=seen, lam=checks.scalar("lam", lam, image_features), noise_std=noise_std, estimator=estimator,
        negatives=negatives, diagonal=diagonal, ema=ema, one_way=one_way, generator=generator, shards=shards,
        strategy=strategy, backend=backend,
    )  # fmt: skip
    return (loss, parts) if return_parts else loss


def objective(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None, *,
    image_inputs: Tensor, text_inputs: Tensor, critics: Mapping[str, View], lam: Tensor, noise_std: float,
    estimator: str, negatives: Negatives, diagonal: str, ema: Mapping[str, Ema] | nn.ModuleDict | None, one_way: bool,
    generator: torch.Generator | None = None, shards: Shards | None, strategy: str, backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """`cibr_loss` after its checks -> the loss () and its parts."""
    contrastive = clip_loss(
        image_features, text_features, logit_scale, logit_bias, one_way=one_way, process_group=shards,
        strategy=strategy, backend=backend,
    )  # fmt: skip
    with torch.autocast(image_features.device.type, enabled=False):
        zv, zt = (noisy(z, noise_std, generator, shards) for z in (image_features, text_features))
        xv, xt = (checks.usable(x.detach()).to(zv.dtype) for x in (image_inputs, text_inputs))
        tensors = {"image_inputs": xv, "text_inputs": xt, "image_features": zv, "text_features": zt}
        nats = {}
        for name, (x, z) in TERMS.items():
            pairs = Pairs(
                tensors[x], scale_gradient(tensors[z], -lam if name.endswith("own") else lam), None,
                critics[name], negatives, diagonal == "include", shards, "gather", backend,
            )  # fmt: skip
            nats[name] = estimate(pairs, estimator, None if ema is None else ema[name], {})
        image_cmi = (nats["image_own"] - nats["image_other"]).detach()
        text_cmi = (nats["text_own"] - nats["text_other"]).detach()
        surrogate = -torch.stack(list(nats.values())).sum()
        loss = contrastive + lam * (image_cmi + text_cmi) + (surrogate - surrogate.detach())
    parts = {"contrastive_loss": contrastive.detach(), "image_cmi": image_cmi, "text_cmi": text_cmi}
    return loss, parts | {name: value.detach() for name, value in nats.items()}
