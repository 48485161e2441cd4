"""What a model gives: two towers' features, before and after the projection, and the temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Batch = dict[str, Tensor]  # as cibr.data.batch makes it; models do not import data


@dataclass(frozen=True)
class Features:
    inputs: Tensor  # X: (n, width) fp32, pooled, what enters the projection
    embedding: Tensor  # Z = normalize(X W): (n, d) fp32, unit norm


@dataclass(frozen=True)
class Output:
    image: Features
    text: Features
    logit_scale: Tensor  # 0-d, exp already taken
    logit_bias: Tensor | None  # 0-d; None for models without one

    def tensors(self) -> list[Tensor]:
        """The four (n, width) feature tensors, then scale and, where there is one, bias."""
        features = [self.image.inputs, self.image.embedding, self.text.inputs, self.text.embedding]
        return [*features, self.logit_scale, *([] if self.logit_bias is None else [self.logit_bias])]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Output:
        """The inverse of `tensors`."""
        image_inputs, image, text_inputs, text, scale, *bias = tensors
        return cls(Features(image_inputs, image), Features(text_inputs, text), scale, bias[0] if bias else None)
