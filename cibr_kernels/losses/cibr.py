"""The CIBR objective in one backward pass (2503.24182, equations 4, 6, 7).

    loss = L_CLIP + lam [ I(Zv; Xv | Xt) + I(Zt; Xt | Xv) ],    I(Z; own | other) = I(Z; own) - I(Z; other)

The four critics maximise their bounds while the encoders minimise lam times the difference.  One backward does both:
with g_s(z) = z.detach() + s (z - z.detach()), the surrogate

    L_CLIP - I(own, g_-lam(z)) - I(other, g_+lam(z))

gives the critics the gradient of -I whatever lam is, and the encoders that of lam (I_own - I_other).  X is data: it is
detached.  Z gets noise, without which the information of a deterministic encoder is infinite, and is scaled by sqrt(d).

The upper bounds of `penalty.py` need no adversary: their surrogate is the bound of g_lam(z), which ceb's networks
descend on together with the encoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cibr_kernels import checks
from cibr_kernels.distributed.shards import Agreement, Shards
from cibr_kernels.information.critics import check, view
from cibr_kernels.information.estimators import MAXIMISED, Ema, check_ema
from cibr_kernels.information.negatives import Negatives, check_negatives, check_partners
from cibr_kernels.information.pairs import DIAGONALS
from cibr_kernels.information.wrappers import dtype_for
from cibr_kernels.losses import diagnostics as diagnose
from cibr_kernels.losses import game
from cibr_kernels.losses.clip.op import clip_loss
from cibr_kernels.losses.penalty import PENALTIES, Options, Players, Rows, penalty, players
from cibr_kernels.losses.targets import check_ids

__all__ = ["agree", "cibr_loss", "objective"]


def agree(
    op: str,
    process_group: ProcessGroup | Shards | None,
    rows: Rows,
    given: Players | None,
    options: Options,
    **more: object,
) -> tuple[Shards | None, Mapping[str, Any]]:
    """Checks what only the inputs can tell; with a group, that all ranks have inputs and options that go together.

    -> who has which rows, and the critics' views, or ceb's networks.
    """
    maximised, wanted = options.estimator in MAXIMISED, players(options.estimator)
    facts = {
        "negatives": options.negatives,
        "estimator": options.estimator,
        "diagonal": options.diagonal,
        "one_way": options.one_way,
        "strategy": options.strategy,
        "noise_std": options.noise_std,
        **more,
    }
    with Agreement(op, process_group, **facts) as agreement:
        read = rows.read(x for x, _ in wanted.values())
        features, data = rows.features(), _data_of(read, options.estimator)
        checks.matching(precision=False, **features, **data)
        _check_features(features, options.estimator, rows.group_ids)
        check_ids(rows.group_ids, rows.image_features)
        seen = _seen(given, rows, wanted, read, options.estimator)
        if maximised and options.negatives != "all":
            check_negatives(options.negatives)
        described = {name: t for name, t in data.items() if name.endswith("_inputs")} if maximised else {}
        for name, t in data.items():  # a header has room for the widths of four tensors
            if name not in described:
                agreement.options[name] = (t.shape[1], t.dtype)
        agreement.options["group_ids"] = rows.group_ids is not None
        agreement.describe(**features, **described)
    shards = agreement.shards
    count, world = (rows.image_features.shape[0], 1) if shards is None else (shards.total, shards.world)
    if count < 2:
        raise ValueError(f"{op} needs at least 2 rows: one pair has no negatives, got 1")
    if maximised and options.negatives != "all":
        check_partners(options.negatives, count, world)
    return shards, seen


def _data_of(read: Mapping[str, tuple[str, Tensor | None]], estimator: str) -> dict[str, Tensor]:
    """The inputs and conditions that an estimator reads, `Rows.read`, by the caller's names, inputs first."""
    data: dict[str, Tensor] = {}
    for wanted in sorted(read, key=lambda name: name.endswith("_condition")):
        name, t = read[wanted]
        if t is None:
            more = f", or {wanted}" if name != wanted else ""
            raise ValueError(f"estimator {estimator!r} needs {name}{more}")
        data[name] = t
    return data


def _check_features(features: Mapping[str, Tensor], estimator: str, group_ids: Tensor | None) -> None:
    first = features["image_features"]
    for name, z in features.items():
        if z.dtype != first.dtype:  # autocast may make them alike
            a, b = checks.autocast(first, z)
            checks.same_place(image_features=a, **{name: b})
    checks.same_width(**features)
    seconds = [name for name in features if name.endswith("2")]
    if seconds and estimator != "variance":
        raise ValueError(f"{', '.join(seconds)}: second views belong to estimator 'variance', got {estimator!r}")
    if estimator == "variance" and not seconds and group_ids is None:
        raise ValueError("estimator 'variance' needs image_features2 or text_features2, second views, or group_ids")


def _seen(
    given: Players | None,
    rows: Rows,
    wanted: Mapping[str, tuple[str, str]],
    read: Mapping[str, tuple[str, Tensor | None]],
    estimator: str,
) -> Mapping[str, Any]:
    """wanted: the estimator's `players`; read: `Rows.read` of their data."""
    if not wanted:
        return {}
    if given is None:
        raise ValueError(f"estimator {estimator!r} needs critics: {', '.join(wanted)}")
    _check_names("critics", given, wanted)
    if estimator not in MAXIMISED:
        for name, (y, z) in wanted.items():
            called, t = read[y]
            assert t is not None
            for what, of, dim in ((called, t, "y_dim"), (z, getattr(rows, z), "z_dim")):  # nn.MeanNetwork's
                checks.width(what, of, getattr(given[name], dim, of.shape[1]), f"the network {name}")
            dtype_for(z, getattr(rows, z), given[name])
        return {name: given[name] for name in wanted}
    seen = {name: view(given[name]) for name in wanted}
    for name, (x, z) in wanted.items():
        called, t = read[x]
        assert t is not None
        check(seen[name], t, getattr(rows, z), names=(called, z), made=f"the critic {name}")
    return seen


def _check_names(what: str, given: Mapping[str, Any] | nn.ModuleDict, wanted: Mapping[str, object]) -> None:
    missing = [name for name in wanted if name not in given]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}; it has {', '.join(given)}")


def cibr_loss(
    image_features: Tensor,  # (n, d)
    text_features: Tensor,  # (n, d)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    image_inputs: Tensor | None = None,  # (n, dv)
    text_inputs: Tensor | None = None,  # (n, dt)
    critics: Mapping[str, Any] | None = None,
    lam: float | Tensor = 0.5,
    noise_std: float = 0.25,
    estimator: str = "mine",
    negatives: Negatives = "all",
    diagonal: str = "exclude",
    ema: Mapping[str, Ema] | None = None,
    image_condition: Tensor | None = None,  # (n, any)
    text_condition: Tensor | None = None,  # (n, any)
    image_features2: Tensor | None = None,  # (n, d)
    text_features2: Tensor | None = None,  # (n, d)
    group_ids: Tensor | None = None,  # (n,) integers
    one_way: bool = False,
    generator: torch.Generator | None = None,
    return_parts: bool = False,
    diagnostics: bool = False,
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
            gradient flows into them.  "variance" and "align" read none.
        critics: {"image_own": T(Xv, Zv), "image_other": T(Xt, Zv), "text_own": T(Xt, Zt), "text_other": T(Xv, Zt)}; of
            "ceb" {"image_mean": Xt -> mean of Zv, "text_mean": Xv -> mean of Zt}, which *minimise* their bounds.
        lam: weight of the penalty, a number or a 0-d tensor; 0 trains the critics only.
        noise_std: noise on Z before the critics, on its unit-norm scale; caps I(Z; X) near 1 / 2 noise_std^2 nats.  The
            upper bounds draw none: they are divided by 2 noise_std^2.
        estimator: one that critics maximise (all of `mutual_information` but "club"; under "js" the reported terms are
            no information), or an upper bound in closed form, O(n d): "ceb", "variance", "align".
        negatives, diagonal, backend: as in `mutual_information`; ema: as there, by critic name.
        image_condition, text_condition: data that stands for X where the *other* modality's term is conditioned on it
            (the mean over all captions, say); the inputs where None.
        image_features2, text_features2: embeddings of a second image and text of each row's concept, for "variance".
            The contrastive loss is then the mean of both views'; a modality without a second view keeps its first.
        group_ids: (n,), rows of one concept: no negatives of each other, and, for "variance" in a modality without
            second views, the groups whose scatter counts.  Rows alone in theirs do not.
        generator: draws the noise; torch's default generator otherwise.
        return_parts: also return {"contrastive_loss", "image_cmi", "text_cmi", and the four estimates}, detached.
        diagnostics: among the parts also `losses/diagnostics.py`: "image_capacity", "text_capacity",
            "gradient_log_ratio", "gradient_cosine".  A backward more to Z, and O(n d^2).
        process_group, strategy: as in `clip_loss`; "ring" is the contrastive part's.  The information terms are those
            of all ranks' rows, the same on every rank; the mean of the losses over ranks is the whole batch's.

    Raises ValueError for shapes, missing critics, negative lam or noise, ranks that disagree; TypeError for dtypes.
    """
    checks.choice("estimator", estimator, PENALTIES)
    checks.choice("diagonal", diagonal, DIAGONALS)
    options = Options(estimator, negatives, diagonal, noise_std, one_way, strategy)
    options.check_noise()
    if ema is not None:
        for average in ema.values():
            check_ema(estimator, average)
        _check_names("ema", ema, players(estimator))
    if isinstance(lam, (int, float)) and lam < 0:
        raise ValueError(f"lam must not be negative, got {lam}")
    if diagnostics and not return_parts:
        raise ValueError("diagnostics are among the parts: return_parts must be True")
    rows = Rows(
        image_features,
        text_features,
        image_inputs,
        text_inputs,
        image_condition,
        text_condition,
        image_features2,
        text_features2,
        group_ids,
    )
    shards, seen = agree("cibr_loss", process_group, rows, critics, options)
    loss, parts = objective(
        rows,
        logit_scale,
        logit_bias,
        options,
        seen,
        lam=checks.scalar("lam", lam, image_features),
        ema=ema,
        generator=generator,
        shards=shards,
        backend=backend,
        diagnostics=diagnostics,
    )
    return (loss, parts) if return_parts else loss


def objective(
    rows: Rows,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    options: Options,
    seen: Mapping[str, Any],
    *,
    lam: Tensor,
    ema: Mapping[str, Ema] | nn.ModuleDict | None = None,
    generator: torch.Generator | None = None,
    shards: Shards | None = None,
    backend: str = "auto",
    diagnostics: bool = False,
    contrastive: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`cibr_loss` after its checks -> the loss () and its parts.  contrastive: CLIP's part where it is there."""
    if contrastive is None:
        contrastive = _contrastive(rows, logit_scale, logit_bias, options, shards, backend)
    with torch.autocast(rows.image_features.device.type, enabled=False):
        if shards is None and ema is None and not diagnostics and options.negatives == "all":
            played = game.play(rows, options, seen, lam, contrastive, generator, backend)
            if played is not None:
                return played[0], parts_of(contrastive, played[1])
        branch = rows.scaled(lam)
        surrogate, parts = penalty(branch, options, seen, ema=ema, generator=generator, shards=shards, backend=backend)
        if diagnostics:
            parts |= diagnose.capacities(rows, options.noise_std, shards)
            parts |= diagnose.compare_gradients(contrastive, rows, surrogate, branch, shards)
        loss = contrastive + lam * (parts["image_cmi"] + parts["text_cmi"]) + (surrogate - surrogate.detach())
    return loss, {"contrastive_loss": contrastive.detach(), **parts}


def parts_of(contrastive: Tensor, played: Tensor) -> dict[str, Tensor]:
    """played: what `game` gives besides the loss."""
    named = zip(game.PARTS, played.unbind(0), strict=True)
    return {"contrastive_loss": contrastive.detach(), **dict(named)}


def _contrastive(
    rows: Rows,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    options: Options,
    shards: Shards | None,
    backend: str,
) -> Tensor:
    """CLIP's loss, the mean of both views' where there are second ones."""

    def of(image: Tensor, text: Tensor) -> Tensor:
        return clip_loss(
            image,
            text,
            logit_scale,
            logit_bias,
            one_way=options.one_way,
            group_ids=rows.group_ids,
            process_group=shards,
            strategy=options.strategy,
            backend=backend,
        )

    first = of(rows.image_features, rows.text_features)
    image, text = rows.image_features2, rows.text_features2
    if image is None and text is None:
        return first
    second = of(rows.image_features if image is None else image, rows.text_features if text is None else text)
    return (first + second) / 2
