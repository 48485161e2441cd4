"""Projections of features of frozen towers, which trains in seconds: a linear map of each, or an MLP before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cibr.config import option
from cibr.errors import UsageError
from cibr.models.features import Features
from cibr.models.model import SPECS, Facts, TemperatureOptions, Tempered, features_of


@dataclass(frozen=True, kw_only=True)
class HeadsOptions(TemperatureOptions):
    model: str = option("heads", SPECS)
    head_hidden: int = option(0, "units of a hidden layer before each projection; 0: a linear head", least=0)
    head_dropout: float = option(0.0, "of the features, in training", least=0, below=1)
    embed_dim: int = option(256, "width of the common space", least=1)


class Head(nn.Module):
    """Layer norm without parameters, dropout and, with `hidden`, one layer of GELU: what X is made by."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.LayerNorm(width, elementwise_affine=False), nn.Dropout(dropout)]
        if hidden:
            layers += [nn.Linear(width, hidden), nn.GELU()]
        self.layers, self.output_dim = nn.Sequential(*layers), hidden or width

    def forward(self, features: Tensor) -> Tensor:
        """(n, width) -> (n, output_dim)."""
        return self.layers(features)


class Heads(Tempered):
    """Recipe besides: the widths of the features."""

    Options = HeadsOptions
    image_key, text_key = "image_features", "text_features"

    def __init__(self, options: HeadsOptions, recipe: dict[str, Any]) -> None:
        super().__init__(options, recipe)
        self.image_head = Head(recipe["image_width"], options.head_hidden, options.head_dropout)
        self.text_head = Head(recipe["text_width"], options.head_hidden, options.head_dropout)
        self.image_width, self.text_width = self.image_head.output_dim, self.text_head.output_dim
        self.embed_dim = options.embed_dim
        self.image_projection = nn.Linear(self.image_width, self.embed_dim, bias=False)
        self.text_projection = nn.Linear(self.text_width, self.embed_dim, bias=False)

    @classmethod
    def new_recipe(cls, options: HeadsOptions, facts: Facts) -> dict[str, Any]:
        if facts.image_width is None or facts.text_width is None:
            raise UsageError(
                "--model heads takes cached features: `cibr data cache` makes them, --data features:FILE reads them"
            )
        widths = {"image_width": facts.image_width, "text_width": facts.text_width}
        return {**super().new_recipe(options, facts), **widths}

    def encode_image(self, images: Tensor) -> Features:
        inputs = self.image_head(images.to(self.image_projection.weight.dtype))
        return features_of(inputs, self.image_projection(inputs))

    def encode_text(self, tokens: Tensor) -> Features:
        inputs = self.text_head(tokens.to(self.text_projection.weight.dtype))
        return features_of(inputs, self.text_projection(inputs))
