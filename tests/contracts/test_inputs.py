"""Bad input is refused in the caller's words before any work; NaN and infinity never become a finite loss."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Recorded, each_dtype, each_isa, leaves, towers

import cibr_kernels as ck
from cibr_kernels import testing
from cibr_kernels.losses.penalty import TERMS

X = torch.randn(6, 4)
CRITIC = ck.nn.ConcatCritic(4, 4, 8)
CRITICS = dict.fromkeys(TERMS, CRITIC)
INPUTS = {"image_inputs": X, "text_inputs": X, "critics": CRITICS}
SEPARABLE = ck.nn.SeparableCritic(4, 4, 8, 3)


def clip(x=X, y=X, scale=5.0, **options):
    return lambda: ck.clip_loss(x, y, scale, **options)


def moments(x=X, z=X, critic=CRITIC, **options):
    return lambda: ck.critic_moments(x, z, critic, **options)


def cmi(z=X, own=X, other=X, critics=(CRITIC, CRITIC), **options):
    return lambda: ck.conditional_mutual_information(z, own, other, critics, **options)


def mi(x=X, z=X, critic=CRITIC, **options):
    return lambda: ck.mutual_information(x, z, critic, **options)


def objective(x=X, y=X, image_inputs=X, text_inputs=X, **options):
    return lambda: ck.nn.CIBRLoss(4, 4, 4, hidden=8, **options)(x, y, 5.0, image_inputs, text_inputs)


def cibr(x=X, y=X, **options):
    return lambda: ck.cibr_loss(x, y, 5.0, **{**INPUTS, **options})


REFUSED = {
    "clip integer": (clip(X.long()), TypeError, r"image_features must be float32.*got torch.int64"),
    "clip integer text": (clip(y=X.int()), TypeError, r"text_features must be float32.*got torch.int32"),
    "clip list": (clip([1.0]), TypeError, r"image_features must be a tensor, got list"),
    "clip dtypes": (clip(X.bfloat16()), TypeError, r"image_features is torch.bfloat16 .* text_.* torch.float32"),
    "clip devices": (clip(y=X.to("meta")), ValueError, r"image_features is .* on cpu but text_features is .* on meta"),
    "clip devices, image": (clip(X.to("meta")), ValueError, r"image_features is .* on meta but text_.* on cpu"),
    "clip 1-d": (clip(X[0]), ValueError, r"image_features must be 2-d .* got shape \(4,\)"),
    "clip 3-d": (clip(y=X[None]), ValueError, r"text_features must be 2-d .* got shape \(1, 6, 4\)"),
    "clip rows": (clip(X[:5]), ValueError, r"image_features has 5 rows but text_features has 6"),
    "clip widths": (clip(X[:, :3]), ValueError, r"image_features has width 3 but text_features has width 4"),
    "clip no rows": (clip(X[:0], X[:0]), ValueError, r"image_features is empty: shape \(0, 4\)"),
    "clip no columns": (clip(X[:, :0], X[:, :0]), ValueError, r"image_features is empty: shape \(6, 0\)"),
    "clip scale 0": (clip(scale=0.0), ValueError, r"logit_scale must be positive .* got 0.0"),
    "clip scale -1": (clip(scale=torch.tensor(-1.0)), ValueError, r"logit_scale must be positive .* got -1.0"),
    "clip scale shape": (clip(scale=torch.ones(2)), ValueError, "logit_scale must have one element, or 6, one per row"),
    "clip scale int": (clip(scale=torch.tensor(5)), TypeError, r"logit_scale must be floating, got torch.int64"),
    "clip scale text": (clip(scale="5"), TypeError, r"logit_scale must be a number .* got str"),
    "clip scale device": (clip(scale=torch.ones((), device="meta")), ValueError, r"logit_scale is on meta .* on cpu"),
    "clip bias": (clip(logit_bias=torch.ones(2)), ValueError, r"logit_bias must have one element, got shape \(2,\)"),
    "clip backend": (clip(backend="cuda"), ValueError, r"backend is 'cuda'; known are 'auto', 'native', .*"),
    "clip native float64": (clip(X.double(), X.double(), backend="native"), RuntimeError, r"native: .* got .*float64"),
    "moments integer": (moments(X.long()), TypeError, r"x must be float32.*got torch.int64"),
    "moments shape": (moments(z=X[0]), ValueError, r"z must be 2-d .* got shape \(4,\)"),
    "moments empty": (moments(X[:0], X[:0]), ValueError, r"x is empty: shape \(0, 4\)"),
    "moments rows": (moments(X[:5]), ValueError, r"x has 5 rows but z has 6"),
    "moments dtypes": (moments(X.double()), TypeError, r"x is torch.float64 but z is torch.float32: float64 goes with"),
    "moments widths": (moments(X[:, :3]), ValueError, r"x has width 3 but the critic was made for 4"),
    "moments width 1": (moments(z=X[:, :1]), ValueError, r"z has width 1 but the critic was made for 4"),
    "moments separable width": (moments(X[:, :1], critic=SEPARABLE), ValueError, r"x has width 1 but the critic .* 4"),
    "moments sampled width": (moments(z=X[:, :3], negatives=ck.shifts(2)), ValueError, r"z has width 3 but .* 4"),
    "moments queue width": (moments(marginals=X[:, :1]), ValueError, r"z has width 4 but marginals has width 1"),
    "moments queue dtype": (moments(marginals=X.double()), TypeError, r"z is torch.float32 but marginals is .*float64"),
    "moments float64": (moments(X.double(), X.double()), TypeError, r"z is torch.float64 but the parameters are .*32"),
    "moments float32": (
        moments(critic=ck.nn.SeparableCritic(4, 4, 8, 3).double()),
        TypeError,
        r"z is torch.float32 but the .*float64",
    ),
    "moments no forward": (moments(critic=torch.nn.Module()), TypeError, r"critic must have .* got Module"),
    "mi parts": (
        mi(critic=ck.nn.SeparableCritic.from_maps(torch.nn.Linear(4, 3), torch.nn.Linear(4, 1))),
        ValueError,
        r"embed_x gives width 3 but embed_z gives width 1",
    ),
    "mi ema": (mi(ema=torch.ones(6)), ValueError, r"ema must have one element, got shape \(6,\)"),
    "mi option": (mi(estimator="remine", rho=torch.ones(6)), TypeError, r"rho must be a number, got Tensor"),
    "mi club float64": (
        mi(X.double(), X.double(), torch.nn.Linear(4, 4), estimator="club"),
        TypeError,
        r"is torch.float64 but the par",
    ),
    "moments devices": (moments(z=X.to("meta")), ValueError, r"x is .* on cpu but z is .* on meta"),
    "moments one row": (moments(X[:1], X[:1]), ValueError, r"at least 2 rows.* got 1"),
    "moments diagonal": (moments(diagonal="skip"), ValueError, r"diagonal is 'skip'; known are 'exclude', 'include'"),
    "moments negatives": (moments(negatives="one"), ValueError, r"negatives is 'one'; known are 'all', shifts\(k\)"),
    "moments count": (moments(negatives=3), ValueError, r"negatives is 3; known are 'all', shifts\(k\)"),
    "moments shifts": (moments(negatives=ck.shifts(6)), ValueError, r"shifts\(6\) needs more than 6 rows, got 6"),
    "moments critic": (moments(critic=torch.nn.Linear(4, 4)), TypeError, r"critic must have .* got Linear"),
    "moments backend": (moments(backend="metal"), ValueError, r"backend is 'metal'"),
    "shifts 0": (lambda: ck.shifts(0), ValueError, r"k >= 1, got 0"),
    "mi estimator": (lambda: ck.mutual_information(X, X, CRITIC, estimator="no"), ValueError, r"estimator is 'no'"),
    "bound ema": (lambda: ck.bound(X[0, 0], X[0, 0], "nwj", ema=X[0, 0]), ValueError, r"ema corrects .* got .* 'nwj'"),
    "bound rows": (lambda: ck.bound(X[0], X[0, 0]), ValueError, r"J must have one element, got shape \(4,\)"),
    "bound ema rows": (lambda: ck.bound(X[0, 0], X[0, 0], ema=X[0]), ValueError, r"ema must have one element"),
    "bound dtypes": (lambda: ck.bound(X[0, 0].double(), X[0, 0]), TypeError, r"J is torch.float64 but L is .*float32"),
    "bound numbers": (lambda: ck.bound(1.0, X[0, 0]), TypeError, r"J and L must be tensors, got float and Tensor"),
    "likelihood dtypes": (
        lambda: ck.gaussian_log_likelihood(X.double(), X, torch.nn.Linear(4, 4)),
        TypeError,
        r"x is .*64 but z is .*32",
    ),
    "bound estimator": (lambda: ck.bound(X[0, 0], X[0, 0], "ceb"), ValueError, r"estimator is 'ceb'; known are 'mine'"),
    "bound a": (lambda: ck.bound(X[0, 0], X[0, 0], "tuba", a=0.0), ValueError, r"TUBA's a must be positive, got 0.0"),
    "cmi estimator": (cmi(estimator="club"), ValueError, r"estimator is 'club'"),
    "cmi decomposition": (cmi(decomposition="knn"), ValueError, r"decomposition is 'knn'; known are 'markov'"),
    "cmi critics": (cmi(critics=(CRITIC,)), ValueError, r"'markov' needs 2 critics, got 1"),
    "cmi rows": (cmi(other=X[:5]), ValueError, r"z has 6 rows but other has 5"),
    "cmi own": (cmi(own=X.long()), TypeError, r"own must be float32"),
    "cmi dtypes": (cmi(own=X.double()), TypeError, r"z is torch.float32 but own is torch.float64: float64 goes with"),
    "cmi chain dtypes": (cmi(other=X.double(), decomposition="chain"), TypeError, r"z is .*32 but other is .*64"),
    "cmi align dtypes": (
        cmi(other=X.double(), estimator="align", noise_std=1.0),
        TypeError,
        r"z is torch.float32 but other is .*float64",
    ),
    "cmi ceb parts": (
        cmi(estimator="ceb", critics=lambda t: [t], noise_std=1.0),
        TypeError,
        r"q\(other\) must be a mean.* got list",
    ),
    "cmi noise": (cmi(estimator="ceb", critics=lambda t: t), ValueError, r"'ceb' needs noise_std > 0 .* got None"),
    "cmi align width": (cmi(other=X[:, :3], estimator="align", noise_std=1.0), ValueError, r"z has .* 4 but other .*3"),
    "cmi ceb": (cmi(estimator="ceb", critics=lambda t: t[1:], noise_std=1.0), ValueError, r"q\(other\) has shape"),
    "cibr critics": (cibr(critics={"image_own": CRITIC}), ValueError, r"critics lacks image_other, .* has image_own"),
    "cibr lam": (cibr(lam=-0.5), ValueError, r"lam must not be negative, got -0.5"),
    "cibr noise": (cibr(noise_std=-0.1), ValueError, r"noise_std must not be negative, got -0.1"),
    "cibr estimator": (cibr(estimator="club"), ValueError, r"estimator is 'club'"),
    "cibr inputs": (cibr(image_inputs=X[:5]), ValueError, r"image_features has 6 rows but image_inputs has 5"),
    "cibr integer": (cibr(text_inputs=X.long()), TypeError, r"text_inputs must be float32"),
    "cibr features": (cibr(X[:5], X[:5]), ValueError, r"image_features has 5 rows but image_inputs has 6"),
    "cibr dtypes": (cibr(X.double(), X.double()), TypeError, r"image_features is .*64 but the parameters are .*32"),
    "cibr features' dtypes": (cibr(X.bfloat16()), TypeError, r"image_features is .*bfloat16 .* text_.* torch.float32"),
    "cibr devices": (cibr(image_inputs=X.to("meta")), ValueError, r"image_features is .*cpu but image_inputs .*meta"),
    "cibr widths": (cibr(X[:, :3], X[:, :3]), ValueError, r"image_features has width 3 but the critic image_own .* 4"),
    "cibr inputs' width": (cibr(text_inputs=X[:, :1]), ValueError, r"text_inputs has width 1 but .* image_other was"),
    "cibr lam rows": (cibr(lam=torch.ones(6)), ValueError, r"lam must have one element, got shape \(6,\)"),
    "cibr noise rows": (cibr(noise_std=torch.ones(4)), TypeError, r"noise_std must be a number, got Tensor"),
    "cibr ema": (cibr(ema={"image_own": X[0, 0]}), ValueError, r"ema lacks image_other, .* it has image_own"),
    "cibr ema rows": (cibr(ema=dict.fromkeys(TERMS, X[0])), ValueError, r"ema must have one element"),
    "cibr one row": (
        cibr(X[:1], X[:1], image_inputs=X[:1], text_inputs=X[:1]),
        ValueError,
        r"cibr_loss needs at least 2 rows",
    ),
    "cibr negatives": (cibr(negatives=ck.shifts(6)), ValueError, r"shifts\(6\) needs more than 6 rows, got 6"),
    "module width 1": (objective(image_inputs=X[:, :1]), ValueError, r"image_inputs has width 1 but .* made for 4"),
    "module width": (objective(text_inputs=X[:, :3]), ValueError, r"text_inputs has width 3 but .* made for 4"),
    "module features' width": (objective(X[:, :2], X[:, :2]), ValueError, r"image_features has width 2 but .* for 4"),
    "module dtypes": (objective(X.double(), X.double()), TypeError, r"image_features is .*64 but the param.*32"),
    "module mixed": (objective(X.half()), TypeError, r"image_features is .*float16 .* text_features is .*float32"),
    "module estimator": (objective(estimator="club"), ValueError, r"estimator is 'club'"),
    "module diagonal": (objective(diagonal="skip"), ValueError, r"diagonal is 'skip'"),
    "module strategy": (objective(strategy="star"), ValueError, r"strategy is 'star'"),
    "module negatives": (objective(negatives="one"), ValueError, r"negatives is 'one'"),
    "loss strategy": (lambda: ck.nn.ClipLoss(strategy="star"), ValueError, r"strategy is 'star'"),
    "standardize width": (lambda: ck.nn.Standardize(4)(X[:, :1]), ValueError, r"x has width 1 but Standardize .* 4"),
    "standardize 1-d": (lambda: ck.nn.Standardize(4)(X[0]), ValueError, r"x must be 2-d .* got shape \(4,\)"),
    "standardize integer": (lambda: ck.nn.Standardize(4)(X.long()), TypeError, r"x must be float32.* got torch.int64"),
    "average of rows": (lambda: ck.nn.LogEMA()(X[0]), ValueError, r"L must have one element, got shape \(4,\)"),
    "lme integer": (lambda: ck.log_mean_exp(X.long()), TypeError, r"scores must be a floating tensor, got torch.int64"),
    "lme number": (lambda: ck.log_mean_exp(3.0), TypeError, r"scores must be a floating tensor, got float"),
    "lme empty": (lambda: ck.log_mean_exp(X[:0]), ValueError, r"scores is empty: shape \(0, 4\)"),
    "lme mask dtype": (lambda: ck.log_mean_exp(X, mask=X), TypeError, r"mask must be bool, got torch.float32"),
    "lme mask shape": (lambda: ck.log_mean_exp(X, mask=X[0] > 0), ValueError, r"mask is \(4,\) .* scores is \(6, 4\)"),
    "lme mask empty": (lambda: ck.log_mean_exp(X, mask=X > 99), ValueError, r"mask has no True entry"),
    "lme ema": (lambda: ck.log_mean_exp(X, ema=torch.ones(2)), ValueError, r"ema must have one element"),
    "stash budget": (lambda: ck.set_stash_budget(-1), ValueError, r"must not be negative, got -1"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_bad_input_is_refused_by_name(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message), Recorded() as seen:
        call()
    assert not seen.calls


@each_isa
@each_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("one_way", [False, True])
def test_clip_loss_of_a_bad_feature_is_nan(one_way, value, dtype, isa):
    for which, row, column in ((0, 0, 0), (1, 32, 15), (0, 39, 7)):
        tensors = leaves(*towers(40, 40, 16), dtype=dtype)
        with torch.no_grad():
            tensors[which][row, column] = value
        with testing.instruction_set(isa):
            loss = ck.clip_loss(*tensors, 14.3, one_way=one_way, backend="native")
            loss.backward()
        assert loss.isnan()
        assert not all(t.grad.isfinite().all() for t in tensors)


@each_isa
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("critic", [ck.nn.ConcatCritic(16, 16, 40), ck.nn.SeparableCritic(16, 16, 40, 33)])
def test_moments_of_a_bad_feature_are_not_finite(critic, value, isa):
    for which in (0, 1):
        tensors = leaves(*towers(40, 40, 16))
        with torch.no_grad():
            tensors[which][33, 5] = value
        with testing.instruction_set(isa):
            j, el = ck.critic_moments(*tensors, critic, backend="native")
            (j - el).backward()
        assert not (j - el).isfinite()
        assert not all(t.grad.isfinite().all() for t in tensors)


@each_isa
def test_log_mean_exp_of_a_bad_score_is_not_finite(isa):
    with testing.instruction_set(isa):
        for value in (math.nan, math.inf):
            scores = torch.randn(20_000).index_fill_(0, torch.tensor([17_000]), value).requires_grad_()
            el = ck.log_mean_exp(scores, backend="native")
            el.backward()
            assert not el.isfinite() and not scores.grad.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_scale_is_nan_or_refused(value):
    assert ck.clip_loss(X, X, value).isnan()


class Wrong(torch.nn.Module):
    """A critic whose parts, or scores, have shapes that would broadcast."""

    def __init__(self, form: str) -> None:
        super().__init__()
        setattr(self, form, self.wrong)

    def wrong(self, x, z):
        if hasattr(self, "dot_parts"):
            return x[:1], z
        if hasattr(self, "additive_parts"):
            return x, z[:, :1], torch.ones(4), torch.ones(()), "relu", 0.0
        return x[:1, :1]


@pytest.mark.parametrize("form", ["additive_parts", "dot_parts", "pairwise", "paired"])
@pytest.mark.parametrize("negatives", ["all", ck.shifts(2)], ids=str)
def test_a_critics_shapes_do_not_broadcast(form, negatives):
    critic = Wrong(form)
    if form == "pairwise":
        critic.paired = critic.wrong
    with pytest.raises(TypeError, match=r"must return shape .*, got .*1"):
        ck.mutual_information(X[:, :1].expand(6, 4), X, critic, negatives=negatives, estimator="js")


with torch.inference_mode():
    DATA = {"ids": torch.arange(6) // 2, "queue": torch.randn(3, 4), "weights": torch.rand(6), "x": X.clone()}
    MASK = X > 0

TAKEN = {
    "clip ids": lambda z: ck.clip_loss(z, z, 5.0, group_ids=DATA["ids"]),
    "clip ids, positives": lambda z: ck.clip_loss(z, z, 5.0, group_ids=DATA["ids"], group_mode="positives"),
    "siglip ids": lambda z: ck.siglip_loss(z, z, 5.0, group_ids=DATA["ids"]),
    "clip weights": lambda z: ck.clip_loss(z, z, 5.0, weights=DATA["weights"]),
    "siglip weights": lambda z: ck.siglip_loss(z, z, 5.0, weights=DATA["weights"], reduction="none").sum(),
    "clip queue": lambda z: ck.clip_loss(z, z, 5.0, image_negatives=DATA["queue"]),
    "siglip queue": lambda z: ck.siglip_loss(z, z, 5.0, text_negatives=DATA["queue"]),
    "mask": lambda z: ck.log_mean_exp(z, mask=MASK),
    "marginals": lambda z: ck.mutual_information(z, z, CRITIC, marginals=DATA["queue"]),
    "ema": lambda z: ck.mutual_information(z, z, CRITIC, ema=DATA["weights"][0]),
    "X": lambda z: ck.cibr_loss(z, z, 5.0, **{**INPUTS, "image_inputs": DATA["x"]}),
}


@pytest.mark.parametrize("name", list(TAKEN))
def test_data_made_under_inference_mode_is_taken(name):
    """What gets no gradient.  Features are refused by autograd, as PyTorch's own products refuse them."""
    z = X.clone().requires_grad_()
    TAKEN[name](z).backward()
    assert z.grad.isfinite().all()


def test_an_average_of_several_numbers_is_refused():
    with pytest.raises(ValueError, match=r"ema must have one element, got shape \(6,\)"):
        mi(ema=lambda el: torch.ones(6))()


@pytest.mark.parametrize(
    ("name", "bad"), [("x", X.half()), ("text_inputs", X[:, :1]), ("y", X[:5])], ids=["x", "t", "y"]
)
def test_refused_input_moves_no_statistics(name, bad):
    loss = ck.nn.CIBRLoss(4, 4, 4, hidden=8, ema_decay=0.9)
    before = {key: t.clone() for key, t in loss.state_dict().items()}
    given = {"x": X, "y": X, "scale": 5.0, "image_inputs": X, "text_inputs": X, name: bad}
    with pytest.raises((TypeError, ValueError)):
        loss(*given.values())
    assert all(torch.equal(t, before[key]) for key, t in loss.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_cibr_loss_of_a_bad_feature_is_not_finite(value):
    for name in ("features", "inputs"):
        bad = X.index_fill(0, torch.tensor([2]), value)
        call = cibr(bad) if name == "features" else cibr(image_inputs=bad)
        assert not call().isfinite()
