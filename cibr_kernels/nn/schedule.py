"""A weight over the steps of a run: held at 0, grown linearly, then constant."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """0 for `warmup_steps`, linear over `ramp_steps`, then `value`; steps count from 0.

    total_steps: the run's length, if it is known; `warning` then knows whether the value is reached at all.
    Raises ValueError for negative numbers, and a total_steps below 1.
    """

    value: float
    warmup_steps: int = 0
    ramp_steps: int = 0
    total_steps: int | None = None

    def __post_init__(self) -> None:
        if min(self.value, self.warmup_steps, self.ramp_steps) < 0:
            raise ValueError(f"must not be negative: {self}")
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"total_steps must be positive, got {self.total_steps}")

    @staticmethod
    def of_run(value: float, total_steps: int, warmup_fraction: float = 0.1, ramp_fraction: float = 0.15) -> Schedule:
        """Relative to the run's length: a tenth of it at 0, then growth over 15 %.

        Raises ValueError for fractions outside of [0, 1].
        """
        for name, fraction in (("warmup_fraction", warmup_fraction), ("ramp_fraction", ramp_fraction)):
            if not 0 <= fraction <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {fraction}")
        return Schedule(value, round(warmup_fraction * total_steps), round(ramp_fraction * total_steps), total_steps)

    def at(self, step: Tensor | int) -> Tensor:
        """The weight at a step, 0-d float32; a tensor is not read."""
        step = torch.as_tensor(step)
        if not self.warmup_steps and not self.ramp_steps:
            return torch.full((), self.value, dtype=torch.float32, device=step.device)
        grown = (step + (1 - self.warmup_steps)).clamp(0, self.ramp_steps + 1).float() / (self.ramp_steps + 1)
        return self.value * grown

    def warning(self, steps: int | None = None) -> str:
        """What to say if a run of `steps` (total_steps where None) ends below the value; "" if it does not."""
        steps = self.total_steps if steps is None else steps
        if (
            steps is None
            or not self.value
            or (reached := self.at(max(steps - 1, 0)).item() if steps else 0.0)
            == (self.at(self.warmup_steps + self.ramp_steps).item())
        ):
            return ""
        return (
            f"lam reaches {reached:.3g} of {self.value:.3g} in {steps} steps: it is 0 for {self.warmup_steps} of them "
            f"and grows for {self.ramp_steps}. Give total_steps, or shorter warmup_steps and ramp_steps"
        )
