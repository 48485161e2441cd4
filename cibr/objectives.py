"""What is minimised: a name for each objective and how its module is made.

An objective is a module called as `objective(image, text, logit_scale)` with the two towers' `Features`. It returns the
parts of the loss by name; `loss` carries the gradient, the others are for the log. Its parameters, if any, are critics.
Modules with a `process_group` take the rows of all its ranks; the loss is then this rank's part, to be averaged.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.distributed import ProcessGroup

import cibr_kernels as ck
from cibr.config import TrainConfig
from cibr.models import Features, TwoTower


class Clip(nn.Module):
    process_group: ProcessGroup | None = None

    def forward(self, image: Features, text: Features, logit_scale: Tensor) -> dict[str, Tensor]:
        loss = ck.clip_loss(image.embedding, text.embedding, logit_scale, process_group=self.process_group)
        return {"loss": loss, "contrastive_loss": loss.detach()}


class Cibr(nn.Module):
    """CLIP's loss and lam * (I(Z_v; X_v | X_t) + I(Z_t; X_t | X_v)), the mutual information in nats."""

    def __init__(self, config: TrainConfig, model: TwoTower) -> None:
        super().__init__()
        self.loss = ck.nn.CIBRLoss(
            model.image_projection.out_features,
            model.image_projection.in_features,
            model.text_projection.in_features,
            hidden=config.critic_hidden,
            lam=config.lam,
            noise_std=config.noise_std,
            warmup_steps=config.lam_warmup_steps,
            ramp_steps=config.lam_ramp_steps,
        )

    def forward(self, image: Features, text: Features, logit_scale: Tensor) -> dict[str, Tensor]:
        return self.loss(image.embedding, text.embedding, logit_scale, image.inputs, text.inputs, output_dict=True)


OBJECTIVES: dict[str, Callable[[TrainConfig, TwoTower], nn.Module]] = {
    "clip": lambda config, model: Clip(),
    "cibr": Cibr,
}
