"""The default for drawings: a small convolutional image tower and open_clip's text transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cibr.config import option
from cibr.errors import UsageError
from cibr.models.batch_norm import BatchNorm
from cibr.models.features import Features
from cibr.models.model import SPECS, Facts, TemperatureOptions, Tempered, features_of
from cibr.models.text import Vocabulary


@dataclass(frozen=True, kw_only=True)
class ConvOptions(TemperatureOptions):
    model: str = option("conv", SPECS)
    image_size: int = option(64, "pixels", least=8)
    conv_width: int = option(32, "channels of the first convolution; the last has eight times as many", least=1)
    text_tower_width: int = option(128, "width of the text transformer, a multiple of 32", least=32)
    text_layers: int = option(2, "its layers", least=1)
    context_length: int = option(16, "its tokens, start and end included", least=3)
    embed_dim: int = option(256, "width of the common space", least=1)


class ConvTower(nn.Module):
    """Seven 3x3 convolutions with batch norm; at 64 pixels it learns in minutes on two cores, where a ViT does not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = [width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
        strides = [2, 2, 1, 2, 1, 2, 1]
        layers: list[nn.Module] = []
        for before, after, stride in zip([3, *channels], channels, strides, strict=False):
            convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
            layers += [convolution, BatchNorm(after), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.output_dim = channels[-1]

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, size, size) floats in [0, 1] -> (n, output_dim), averaged over positions."""
        return self.layers((0.5 - images).contiguous(memory_format=torch.channels_last)).mean((2, 3))


class Conv(Tempered):
    """Recipe besides: the BPE ids of its vocabulary."""

    Options = ConvOptions

    def __init__(self, options: ConvOptions, recipe: dict[str, Any]) -> None:
        from open_clip.transformer import TextTransformer

        super().__init__(options, recipe)
        width = options.text_tower_width
        if width % 32:
            raise UsageError(f"--text-tower-width is {width}, but must be a multiple of 32 (the width of a head)")
        self.vocabulary = Vocabulary(recipe["bpe_ids"], options.context_length)
        self.image_tower = ConvTower(options.conv_width).to(memory_format=torch.channels_last)
        self.text_tower = TextTransformer(
            options.context_length,
            len(self.vocabulary),
            width,
            heads=width // 32,
            layers=options.text_layers,
            output_dim=None,
        )
        self.image_width, self.text_width, self.embed_dim = self.image_tower.output_dim, width, options.embed_dim
        self.image_projection = nn.Linear(self.image_width, self.embed_dim, bias=False)
        self.text_projection = nn.Linear(self.text_width, self.embed_dim, bias=False)

    @classmethod
    def new_recipe(cls, options: ConvOptions, facts: Facts) -> dict[str, Any]:
        if facts.image_width is not None:
            raise UsageError("--model conv takes images, but the data are cached features; --model heads takes those")
        if not any(True for _ in facts.texts):
            raise UsageError(
                "--model conv makes its vocabulary of the captions, which a stream does not tell beforehand"
            )
        bpe_ids = Vocabulary.of(facts.texts, options.context_length).bpe_ids
        return {**super().new_recipe(options, facts), "bpe_ids": bpe_ids}

    def encode_image(self, images: Tensor) -> Features:
        inputs = self.image_tower(images)
        return features_of(inputs, self.image_projection(inputs))

    def encode_text(self, tokens: Tensor) -> Features:
        inputs = self.text_tower(tokens)
        return features_of(inputs, self.text_projection(inputs))

    def transform(self, train: bool) -> Callable[[Any], Tensor]:
        """To `image_size` pixels in [0, 1]; where `train`, a random part of at least nine tenths."""
        from torchvision.transforms import v2

        size, bicubic = (self.options.image_size,) * 2, v2.InterpolationMode.BICUBIC
        resize: v2.Transform = v2.Resize(size, bicubic)
        if train:
            resize = v2.RandomResizedCrop(size, (0.9, 1.0), interpolation=bicubic)
        return v2.Compose([resize, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])

    def tokenizer(self, texts: list[str]) -> Tensor:
        return self.vocabulary(texts)
