"""What a training run is: one frozen dataclass, checked when it is made, kept as JSON beside the run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cibr.errors import UsageError


def option(default: Any, text: str) -> Any:
    """A field with the help text its command-line option shows."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every option of `cibr train`; `batch_size` is `--batch-size`. Raises UsageError for values that make no sense."""

    data: str = option("", "folder of webdataset tars, as `cibr data` builds")
    out: str = option("", "folder of the run: checkpoints, log.jsonl, tensorboard")
    objective: str = option("clip", "clip or cibr")
    hold_out: str | None = option(None, "vendor family or style that training must not see")
    unseen_fraction: float = option(0.1, "share of the concepts kept from training, of every vendor")
    limit: int | None = option(None, "use only the first so many concepts")

    steps: int | None = option(None, "stop after so many steps")
    seconds: float | None = option(None, "stop after so many seconds of training (loading and saving not counted)")
    batch_size: int = option(512, "pairs per batch, of distinct concepts")
    lr: float = option(1e-3, "peak learning rate of the encoders; cosine decay to 0")
    lr_warmup_steps: int = option(20, "steps of linear growth to the peak")
    weight_decay: float = option(0.1, "AdamW's, on matrices and kernels only")
    augment: bool = option(True, "zoom, shift, turn, mirror and recolour the training images")

    lam: float = option(0.5, "weight of CIBR's penalty")
    lam_warmup_steps: int = option(50, "steps at weight 0, in which only the critics learn")
    lam_ramp_steps: int = option(50, "steps in which the weight then grows to --lam")
    noise_std: float = option(0.25, "noise on the unit-norm embeddings that the critics see")
    critic_hidden: int = option(512, "hidden units of each critic")
    critic_lr: float | None = option(None, "learning rate of the critics; default twice --lr, at least 1e-4")

    image_size: int = option(64, "pixels")
    image_width: int = option(32, "channels of the first convolution; the last has eight times as many")
    text_width: int = option(128, "width of the text transformer, a multiple of 32")
    text_layers: int = option(2, "its layers")
    context_length: int = option(16, "its tokens, start and end included")
    embed_dim: int = option(256, "width of the common space")

    seed: int = option(0, "of the weights, the batches and the noise")
    threads: int | None = option(None, "CPU threads; default torch's")
    device: str = option("auto", "cpu, cuda, or auto: cuda where there is one")
    precision: str = option("auto", "of the convolutions: float32, bfloat16, or auto: bfloat16 where hardware has it")
    save_every: int = option(100, "steps between checkpoints")
    log_every: int = option(10, "steps between log entries")

    def __post_init__(self) -> None:
        for name in ("data", "out"):
            if not getattr(self, name):
                raise UsageError(f"--{name} is missing")
        choices = {
            "objective": ("clip", "cibr"),
            "precision": ("auto", "float32", "bfloat16"),
            "device": ("auto", "cpu", "cuda"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UsageError(f"--{name} is {getattr(self, name)!r}; known are {', '.join(known)}")
        positive = (
            "steps seconds batch_size lr critic_lr critic_hidden image_size image_width text_width text_layers "
            "embed_dim limit threads save_every log_every"
        )
        for name in positive.split():
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{name.replace('_', '-')} is {value}, but must be positive")
        for name in (
            "lam",
            "noise_std",
            "lr_warmup_steps",
            "lam_warmup_steps",
            "lam_ramp_steps",
            "weight_decay",
            "seed",
        ):
            if not getattr(self, name) >= 0:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}, but must not be negative")
        if self.steps is None and self.seconds is None:
            raise UsageError("say how long to train: --steps, --seconds, or both (the first reached ends the run)")
        if self.batch_size < 2:
            raise UsageError("--batch-size is 1, but a pair needs others to be told from: at least 2")
        if not 0 <= self.unseen_fraction < 1:
            raise UsageError(f"--unseen-fraction is {self.unseen_fraction}, but must lie in [0, 1)")
        if self.context_length < 3:
            raise UsageError(f"--context-length is {self.context_length}, but start, one token and end take 3")
        if self.text_width % 32:
            raise UsageError(f"--text-width is {self.text_width}, but must be a multiple of 32 (the width of a head)")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Raises UsageError naming the keys that are no options."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UsageError(f"unknown option {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


def read_options(path: Path) -> dict[str, Any]:
    """The options in a JSON file, as a run's config.json holds them."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {path}") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold one JSON object of options")
    return values
