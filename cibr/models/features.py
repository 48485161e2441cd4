"""What a model gives: two towers' features, before and after the projection, and the temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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

    def copy(self) -> Output:
        """In memory of its own: pooled features are often views that would keep all tokens alive."""
        return Output.of([t.clone() for t in self.tensors()])

    def leaves(self) -> Output:
        """The same numbers without their history, to be differentiated by."""
        return Output.of([t.detach().requires_grad_() for t in self.tensors()])

    def gradients(self) -> list[Tensor]:
        """Of `tensors`, once a loss of them has gone backward; zeros where it does not depend on them."""
        return [torch.zeros_like(t) if t.grad is None else t.grad for t in self.tensors()]


def concatenate(outputs: Sequence[Output]) -> Output:
    """The output of a batch from those of its parts, in order."""
    *features, scale = zip(*(output.tensors()[:5] for output in outputs), strict=True)
    rows = [torch.cat(parts) for parts in features]
    bias = outputs[0].logit_bias
    return Output.of([*rows, scale[0], *([] if bias is None else [bias])])
