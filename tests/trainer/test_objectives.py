"""Objectives and the step: open_clip's own losses and steps, and large batches computed in parts."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from runs import CIBR, config, log_of, state, tiny_clip
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import cibr_kernels as ck
from cibr import models, objectives
from cibr.config import RunConfig, option
from cibr.data import SOURCES
from cibr.data.synthetic import Synthetic
from cibr.errors import UsageError
from cibr.models.model import Facts, TemperatureOptions, Tempered, features_of
from cibr.objectives.contrastive import ClipOptions, Objective
from cibr.run.ranks import Ranks
from cibr.session import prepare, resolve
from cibr.step import take_step
from cibr.train import train
from cibr_kernels.information import capacity as information

pytestmark = pytest.mark.filterwarnings("ignore:the estimate", "ignore:cibr_kernels", "ignore:noise_std")
SETTINGS: dict[str, dict[str, Any]] = {
    "clip": {},
    "siglip": {},
    "cibr": CIBR,
    "cibr on siglip": {**CIBR, "contrastive": "siglip"},
    "cibr, separable": {**CIBR, "critic": "separable", "estimator": "infonce"},
    "cibr, chain": {**CIBR, "decomposition": "chain"},
    "cibr, joint, noise in both": {**CIBR, "decomposition": "joint", "noise_enters": "both"},
    "cibr, shifts": {**CIBR, "negatives": "shifts:3", "ema_decay": 0.9},
    "cibr, remine": {**CIBR, "estimator": "remine", "remine_rho": 0.2, "lam_text": 0.1},
    "cibr, all captions": {**CIBR, "condition": "all", "contrastive": "meanpos"},
    "clip2": {},
    "meanpos": {"label_smoothing": 0.1},
    "variance": {"lam_warmup_steps": 0, "lam_ramp_steps": 1},
    "align": {"objective": "align", "lam_warmup_steps": 0, "lam_ramp_steps": 1},
    "ceb": {"objective": "ceb", "critic_hidden": 8, "lam_warmup_steps": 0, "lam_ramp_steps": 1},
    "aib, learned": {"objective": "aib", "bottleneck": "learned", "tau": "raw"},
}


def settings(name: str) -> dict[str, Any]:
    return {"objective": name, **SETTINGS[name]}


def open_clip_step_by_hand(settings: RunConfig, loss: nn.Module) -> dict[str, Tensor]:
    """Five steps as open_clip's trainer takes them, on the batches of our run -> the weights."""
    session = prepare(resolve(settings), None, Ranks())
    model, options = session.players.model.clip, settings.optim
    named = list(model.named_parameters())
    spared = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    rest = [p for n, p in named if all(p is not q for q in spared)]
    groups = [{"params": spared, "weight_decay": 0.0}, {"params": rest, "weight_decay": options.weight_decay}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps)
    assert options.steps is not None
    for step, batch in zip(range(options.steps), session.batches.start(0), strict=False):
        warm = options.lr_warmup_steps
        lr = options.lr * (step + 1) / warm
        if step >= warm:
            lr = 0.5 * (1 + math.cos(math.pi * (step - warm) / (options.steps - warm))) * options.lr
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        found = model(batch["image"], batch["text"])
        image, text, scale, *bias = found.values() if isinstance(found, dict) else found
        loss(image, text, scale, *bias).backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
    return {f"clip.{name}": t for name, t in model.state_dict().items()}


@pytest.mark.parametrize(("name", "loss"), [("clip", open_clip.ClipLoss()), ("siglip", open_clip.loss.SigLipLoss())])
def test_five_steps_are_open_clips(tmp_path: Path, name: str, loss: nn.Module) -> None:
    """`eps` above the rounding of gradients, of which Adam makes whole steps otherwise: of the keys' biases, say, whose
    gradient is 0 but for it.  Normalisation has another backward there than here, with other last digits.
    """
    ours = config(
        tmp_path / "run",
        model=tiny_clip(tmp_path),
        objective=name,
        steps=5,
        lr_warmup_steps=2,
        mask_duplicates=False,
        batch_size=24,
        eps=1e-3,
        beta2=0.98,
    )
    expected = open_clip_step_by_hand(ours, loss)
    train(ours)
    found = state(tmp_path / "run")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=5e-7, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_in_parts_gives_the_step_of_the_whole(tmp_path: Path, name: str) -> None:
    """Parts of 5, 5, 5 and 4 rows; gradients, not weights: Adam makes steps of one size from any."""
    model = tiny_clip(tmp_path, vision_cfg={**_VISION, "patch_size": 8})
    found = []
    for parts in (1, 4):
        settings_ = config(
            tmp_path / str(parts), model=model, batch_size=19, accumulate=parts, steps=3, **settings(name)
        )
        session = prepare(resolve(settings_), None, Ranks())
        players = session.players
        batch = next(session.batches.start(0))
        losses = [take_step(players, players.stages[0], [batch], step).parts for step in range(2)]
        gradients = {n: p.grad for module in (players.model, players.critics) for n, p in module.named_parameters()}
        found.append((losses, gradients, dict(players.critics.named_buffers())))
    (whole, gradients, buffers), (parted, others, more_buffers) = found
    for one, other in zip(whole, parted, strict=True):
        for part, value in one.items():
            torch.testing.assert_close(other[part], value, rtol=1e-4, atol=1e-5)
    largest = max(value.abs().max().item() for value in gradients.values() if value is not None)
    for key, value in gradients.items():
        assert value is not None and others[key] is not None, key
        scale = value.abs().max().item()  # 0 but for rounding where the loss does not depend on it
        torch.testing.assert_close(
            others[key], value, rtol=1e-3, atol=1e-4 * scale + 1e-6 * largest, msg=lambda m, k=key: f"{k}: {m}"
        )
    for key, value in buffers.items():
        torch.testing.assert_close(more_buffers[key], value, rtol=1e-4, atol=1e-5)


def peak_bytes(settings: RunConfig) -> int:
    """Of tensors made in a step, beyond what there was before it."""
    session = prepare(resolve(settings), None, Ranks())
    batch = next(session.batches.start(0))
    take_step(session.players, session.players.stages[0], [batch], 0)  # which makes what the optimiser keeps
    session.players.optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        take_step(session.players, session.players.stages[0], [batch], 1)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_parts_take_the_memory_of_one(tmp_path: Path) -> None:
    """Sixteen parts of four rows within 1.2 times of four rows alone: features are no views of all tokens."""
    model = tiny_clip(tmp_path, vision_cfg={**_VISION, "image_size": 64, "patch_size": 4, "layers": 2})
    common = {"model": model, "mask_duplicates": False, "lock_text": True}
    alone = peak_bytes(config(tmp_path / "run", batch_size=4, **common))
    parts = peak_bytes(config(tmp_path / "run", batch_size=64, accumulate=16, **common))
    assert parts < 1.2 * alone


_VISION = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16}


def test_a_part_draws_the_same_dropout_twice(tmp_path: Path) -> None:
    """Features without a graph and those of the backward are of the same patches: the loss is what is descended on."""
    model = tiny_clip(tmp_path)
    one = config(tmp_path / "run", model=model, patch_dropout=0.5, accumulate=2, batch_size=8, lr=1e-3)
    session = prepare(resolve(one), None, Ranks())
    from cibr.step import encode, slices

    batch = next(session.batches.start(0))
    part = {name: t[slices(8, 2)[1]] for name, t in batch.items()}
    first, again = (encode(session.players, part, 0, 1).image.embedding for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, encode(session.players, part, 1, 1).image.embedding)


def leaves_of(output: models.Output) -> models.Output:
    return models.Output.of({name: t.detach().requires_grad_() for name, t in output.tensors().items()})


def test_penalties_give_encoders_and_critics_their_own_gradients(tmp_path: Path) -> None:
    """At lam 0 critics move and encoders see the contrastive loss only; cibr is cibr_kernels' own loss."""
    torch.manual_seed(0)
    model = models.build(models.options_type("heads")(embed_dim=8), Facts((), 6, 5))
    for name in ("cibr", "align", "ceb"):
        options = objectives.options_type(name)(lam=0.5, lam_warmup_steps=1, lam_ramp_steps=0)
        objective = objectives.build(options, model)
        batch = {"image_features": torch.randn(32, 6), "text_features": torch.randn(32, 5)}
        for lam in (0.0, 0.5):
            leaves = leaves_of(model(batch))
            torch.manual_seed(1)
            parts = objective(leaves, batch)
            assert parts["lam"].item() == lam
            parts["loss"].backward()
            alone = leaves_of(model(batch))
            ck.clip_loss(alone.image.embedding, alone.text.embedding, alone.logit_scale).backward()
            same = torch.allclose(leaves.image.embedding.grad, alone.image.embedding.grad, atol=1e-7)  # type: ignore[arg-type]
            assert same == (lam == 0)
        still = [n for n, p in objective.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
        assert all(n.endswith("out.bias") for n in still)  # a constant in the scores is no information


def test_each_modality_has_its_weight() -> None:
    """Without the text's, its embeddings see the contrastive loss alone."""
    torch.manual_seed(0)
    model = models.build(models.options_type("heads")(embed_dim=8), Facts((), 6, 5))
    options = objectives.options_type("ceb")(lam=0.5, lam_text=0.0, lam_warmup_steps=0, lam_ramp_steps=0)
    batch = {"image_features": torch.randn(32, 6), "text_features": torch.randn(32, 5)}
    leaves, alone = leaves_of(model(batch)), leaves_of(model(batch))
    objectives.build(options, model)(leaves, batch)["loss"].backward()
    ck.clip_loss(alone.image.embedding, alone.text.embedding, alone.logit_scale).backward()
    torch.testing.assert_close(leaves.text.embedding.grad, alone.text.embedding.grad)
    assert not torch.allclose(leaves.image.embedding.grad, alone.image.embedding.grad)  # type: ignore[arg-type]


def test_the_penaltys_gradient_can_be_capped() -> None:
    """At the embeddings: what is added to the contrastive gradient is a tenth of it, in the same direction."""
    torch.manual_seed(0)
    model = models.build(models.options_type("heads")(embed_dim=8), Facts((), 6, 5))
    batch = {"image_features": torch.randn(32, 6), "text_features": torch.randn(32, 5)}
    found = {}
    for cap in (None, 0.1, 1e6):
        torch.manual_seed(1)
        options = objectives.options_type("cibr")(
            lam=20.0, lam_warmup_steps=0, lam_ramp_steps=0, critic_hidden=8, gradient_cap=cap
        )
        objective, leaves = objectives.build(options, model), leaves_of(model(batch))
        parts = objective(leaves, batch)
        parts["loss"].backward()
        critics = torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])
        found[cap] = (torch.cat([leaves.image.embedding.grad, leaves.text.embedding.grad]), critics, parts)  # type: ignore[list-item]
    alone = leaves_of(model(batch))
    ck.clip_loss(alone.image.embedding, alone.text.embedding, alone.logit_scale).backward()
    own = torch.cat([alone.image.embedding.grad, alone.text.embedding.grad])  # type: ignore[list-item]
    penalty, capped = found[None][0] - own, found[0.1][0] - own
    ratio = penalty.norm() / own.norm()
    assert ratio > 0.1 and found[0.1][2]["gradient_ratio"].item() == pytest.approx(ratio.item(), rel=1e-4)
    torch.testing.assert_close(capped, penalty * 0.1 / ratio, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found[1e6][0], found[None][0])
    for cap in (0.1, 1e6):  # critics are not held
        torch.testing.assert_close(found[cap][1], found[None][1])


def test_what_critics_cannot_see_is_said() -> None:
    """The capacity is a Gaussian's information, d/2 log(1 + v / s^2) for variance v in each of d directions."""
    model = models.build(models.options_type("heads")(embed_dim=64), Facts((), 6, 5))
    objective = objectives.build(objectives.options_type("cibr")(noise_std=0.25), model)
    z = torch.nn.functional.normalize(torch.randn(20_000, 64), dim=1)
    capacity = information.capacity(information.covariance(z), 0.25).item()
    assert capacity == pytest.approx(32 * math.log(1 + 1 / 64 / 0.25**2), rel=1e-3)
    means = dict.fromkeys(("image_own", "image_other", "text_own", "text_other"), 1.0)
    assert not objective.warning({**means, "image_capacity": 3.0, "text_capacity": 3.0}, 512)
    said = objective.warning({**means, "image_capacity": capacity, "text_capacity": 3.0}, 512)
    assert "log(n) - 1 = 5.2 nats in batches of 512" in said and "can carry 7.1 (image) and 3.0 (text)" in said
    assert "image_own is estimated at 9.0" in objective.warning(
        {**means, "image_own": 9.0, "image_capacity": 3.0, "text_capacity": 3.0}, 512
    )
    assert not objective.warning({"seconds": 3.0}, 512)


def test_cibr_is_the_loss_of_cibr_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.build(models.options_type("heads")(embed_dim=8), Facts((), 6, 5))
    ours = objectives.build(
        objectives.options_type("cibr")(critic_hidden=16, lam_warmup_steps=0, lam_ramp_steps=0), model
    )
    theirs = ck.nn.CIBRLoss(8, 6, 5, hidden=16)
    theirs.critics.load_state_dict(ours.critics.state_dict())
    batch = {"image_features": torch.randn(32, 6), "text_features": torch.randn(32, 5)}
    one, other = leaves_of(model(batch)), leaves_of(model(batch))
    torch.manual_seed(1)
    ours(one, batch)["loss"].backward()
    torch.manual_seed(1)
    z = other.image.embedding, other.text.embedding
    theirs(*z, other.logit_scale, other.image.inputs, other.text.inputs).backward()
    for a, b in zip(one.tensors().values(), other.tensors().values(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": "some"}, "--negatives is 'some', but must be all, or shifts:K"),
        ({"negatives": "shifts:0"}, "--negatives is 'shifts:0'"),
        ({"ema_decay": 0.9, "estimator": "nwj"}, "--ema-decay belongs to --estimator mine"),
    ],
)
def test_options_of_cibr_that_make_no_sense(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(config(tmp_path / "run", **{**CIBR, **options}))


# A new objective, model and data source


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearOptions(ClipOptions):
    objective: str = option("near", "names")
    margin: float = option(0.5, "of the cosine", least=0)


class Near(Objective):
    Options = NearOptions

    def forward(self, output: models.Output, batch: Any) -> dict[str, Tensor]:
        cosine = (output.image.embedding * output.text.embedding).sum(1)
        return {"loss": (1 + self.options.margin - cosine).relu().mean()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColourOptions(TemperatureOptions):
    model: str = option("colour", "names")


class Colour(Tempered):
    Options = ColourOptions
    image_width, text_width, embed_dim = 3, 3, 3

    def __init__(self, options: Any, recipe: dict[str, Any]) -> None:
        super().__init__(options, recipe)
        self.words, self.image_projection = nn.Embedding(256, 3), nn.Linear(3, 3)

    def encode_image(self, images: Tensor) -> models.Features:
        return features_of(images.mean((2, 3)), self.image_projection(images.mean((2, 3))))

    def encode_text(self, tokens: Tensor) -> models.Features:
        x = self.words(tokens).mean(1)
        return features_of(x, x)

    def transform(self, train: bool) -> Any:
        from torchvision.transforms.functional import to_tensor

        return to_tensor

    def tokenizer(self, texts: list[str]) -> Tensor:
        return torch.tensor([list(text.encode()[:8].ljust(8)) for text in texts])


def test_a_new_objective_model_and_source_is_a_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = dataclasses.replace(SOURCES["synthetic"], open=lambda place, options, split: Synthetic(int(place)))
    monkeypatch.setitem(SOURCES, "drawn", kind)
    monkeypatch.setitem(objectives.OBJECTIVES, "near", Near)
    monkeypatch.setitem(models.MODELS, "colour", Colour)
    given = {"objective": "near", "margin": 0.25, "model": "colour", "data": "drawn:50", "lr": 0.01, "steps": 30}
    outcome = train(config(tmp_path / "run", **given))
    assert outcome.last["loss"] < log_of(tmp_path / "run")[0]["loss"] - 0.1
    with pytest.raises(UsageError, match=r"unknown option marge; known are .*margin"):
        config(tmp_path / "other", **{**given, "marge": 1})
