"""What a model is to the trainer, whatever it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cibr.config import option
from cibr.models.features import Batch, Features, Output, unit_rows
from cibr.needs import ALL, SECOND

SPECS = "conv; open_clip:NAME[/TAG_OR_FILE]; open_clip:local-dir:DIR; open_clip:FILE.json; heads; coop:BASE; maple:BASE"


@dataclass(frozen=True, kw_only=True)
class TemperatureOptions:
    """The options of the logits that every model has."""

    temperature: Literal["learnable", "fixed"] = option("learnable", "of the logits")
    initial_scale: float | None = option(None, "scale of the logits at the start; default the model's", above=0)
    max_scale: float | None = option(100.0, "the scale is clamped to it after each step; None: never", above=0)


@dataclass(frozen=True)
class Facts:
    """What a new model may have to know of the data."""

    texts: Iterable[str] = field(default=(), repr=False)  # that occur in training
    image_width: int | None = None  # of cached features; None for images
    text_width: int | None = None
    class_names: Sequence[str] = ()
    logit_scale: float = 1 / 0.07  # at the start, if the model has no own
    logit_bias: float | None = None  # None: the objective needs none


class Model(nn.Module):
    """Two towers and a temperature.

    A subclass is made from its Options and its recipe, what else it takes to make it again (a JSON object, kept in
    every checkpoint).  It sets the attributes below and defines what raises here.

    image_width, text_width: of X, what enters the projections; embed_dim: of Z.
    image_key, text_key: the entries of a batch that it reads.
    notes: what somebody who trains it should know, a sentence each.
    objective: the only one that it can be trained by; None for a model that is for any.
    """

    Options: type = TemperatureOptions
    image_width: int
    text_width: int
    embed_dim: int
    image_key = "image"
    text_key = "text"
    image_prefix = "image_"  # of the names of the image tower's parameters
    notes: tuple[str, ...] = ()
    objective: str | None = None

    def __init__(self, options: Any, recipe: dict[str, Any]) -> None:
        super().__init__()
        self.options, self.recipe = options, recipe

    @classmethod
    def new_recipe(cls, options: Any, facts: Facts) -> dict[str, Any]:
        """Raises UsageError for data that the model cannot be trained on."""
        raise NotImplementedError

    def load_pretrained(self) -> None:
        """Weights that a new run starts from, where the options name some."""

    def forward(self, batch: Batch) -> Output:
        """One batch through both towers, and what else it has of each row (`cibr.needs`)."""
        if self.image_key + SECOND not in batch:
            image, text = self.encode_image(batch[self.image_key]), self.encode_text(batch[self.text_key])
            return Output(image, text, *self.logits(), captions=self.mean_of_captions(batch))
        keys = (self.image_key, self.text_key)
        both = (torch.cat([batch[key], batch[key + SECOND]]) for key in keys)  # one call: one batch of a batch norm's
        image, text = self.encode_image(next(both)), self.encode_text(next(both))
        n, captions = len(batch[self.image_key]), self.mean_of_captions(batch)
        return Output(image[:n], text[:n], *self.logits(), image[n:], text[n:], captions)

    def mean_of_captions(self, batch: Batch) -> Features | None:
        """The means over all captions of each row, where the batch has them."""
        texts = batch.get(self.text_key + ALL)
        if texts is None:
            return None
        n, most = texts.shape[:2]
        row, place = (torch.arange(most, device=texts.device) < batch["caption_count"][:, None]).nonzero(as_tuple=True)
        features = self.encode_text(texts[row, place])
        count = batch["caption_count"][:, None]
        inputs, embedding = (
            t.new_zeros(n, t.shape[1]).index_add(0, row, t) / count for t in (features.inputs, features.embedding)
        )
        return Features(inputs, F.normalize(embedding, dim=1))

    def logits(self) -> tuple[Tensor, Tensor | None]:
        """Scale and, where there is one, bias of the logits, 0-d float32."""
        scale, bias = self.temperature()
        return scale.float().exp().squeeze(), None if bias is None else bias.float().squeeze()

    def encode_image(self, images: Tensor) -> Features:
        """(n, 3, size, size) as `transform` makes them, or (n, width) image features."""
        raise NotImplementedError

    def encode_text(self, tokens: Tensor) -> Features:
        """(n, length) int64 as `tokenizer` makes them, or (n, width) text features."""
        raise NotImplementedError

    def classifier(self, class_names: Sequence[str]) -> Tensor | None:
        """(classes, d) from prompts of the model's own; None: the data's templates are its prompts."""
        return None

    def transform(self, train: bool) -> Callable[[Any], Tensor]:
        """A PIL image -> (3, size, size) float32; random where `train`.  A model of features has none."""
        raise NotImplementedError

    def tokenizer(self, texts: list[str]) -> Tensor:
        """n texts -> (n, length) int64."""
        raise NotImplementedError

    def temperature(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """The log of the scale and, where there is one, the bias of the logits; 0-d or of one element."""
        raise NotImplementedError

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keeps the scale within the options' `max_scale`, as CLIP does after each step."""
        if self.options.max_scale is not None:
            self.temperature()[0].clamp_(0, math.log(self.options.max_scale))


class Tempered(Model):
    """A model whose temperature is its own, not a part's.  Its recipe has "logit_scale" and "logit_bias"."""

    def __init__(self, options: Any, recipe: dict[str, Any]) -> None:
        super().__init__(options, recipe)
        bias = recipe["logit_bias"]
        self.logit_scale = nn.Parameter(torch.tensor(math.log(recipe["logit_scale"])))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))

    @classmethod
    def new_recipe(cls, options: Any, facts: Facts) -> dict[str, Any]:
        return {"logit_scale": facts.logit_scale, "logit_bias": facts.logit_bias}

    def temperature(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        return self.logit_scale, self.logit_bias


def features_of(inputs: Tensor, projected: Tensor) -> Features:
    """X (n, width) and X W (n, d), of any float dtype -> Features."""
    return Features(inputs.float(), unit_rows(projected.float()))
