"""What a model is to the trainer, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cibr.models.features import Batch, Features, Output


class Model(nn.Module):
    """Two towers and a temperature.  A subclass sets the attributes below and defines what raises here.

    image_width, text_width: of X, what enters the projections; embed_dim: of Z.
    image_key, text_key: the entries of a batch that it reads.
    logit_scale: the log of the scale; logit_bias: SigLIP's, or None.
    notes: what somebody who trains it should know, a sentence each.
    """

    image_width: int
    text_width: int
    embed_dim: int
    image_key = "image"
    text_key = "text"
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None = None
    notes: tuple[str, ...] = ()

    def forward(self, batch: Batch) -> Output:
        """One batch through both towers."""
        image, text = self.encode_image(batch[self.image_key]), self.encode_text(batch[self.text_key])
        bias = None if self.logit_bias is None else self.logit_bias.float().squeeze()
        return Output(image, text, self.logit_scale.float().exp().squeeze(), bias)

    def encode_image(self, images: Tensor) -> Features:
        """(n, 3, size, size) as `transform` makes them, or (n, width) image features."""
        raise NotImplementedError

    def encode_text(self, tokens: Tensor) -> Features:
        """(n, length) int64 as `tokenizer` makes them, or (n, width) text features."""
        raise NotImplementedError

    def transform(self, train: bool) -> Callable[[Any], Tensor] | None:
        """A PIL image -> (3, size, size) float32; random where `train`.  None for a model of features."""
        raise NotImplementedError

    def tokenizer(self, texts: list[str]) -> Tensor:
        """n texts -> (n, length) int64."""
        raise NotImplementedError
