"""What a training run is: frozen dataclasses of options, one per concern, checked before any work.

A field made by `option` is a flag of the command line and a key of a configuration file, under one name; its bounds are
checked wherever its value came from.  On disk a configuration is one flat JSON or YAML object.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cibr.errors import UsageError

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}


def option(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    changeable: bool = False,
    positional: bool = False,
) -> Any:
    """A field with the help text of its flag.

    Its value must be at least `least`, greater than `above`, less than `below`.  `changeable`: also when a run is
    resumed.  `positional`: given without its name.
    """
    about = {"help": text, "least": least, "above": above, "below": below}
    return dataclasses.field(default=default, metadata={**about, "changeable": changeable, "positional": positional})


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """How the weights move."""

    steps: int | None = option(
        None, "stop after so many steps; a larger number extends a run", least=1, changeable=True
    )
    seconds: float | None = option(None, "stop after so many seconds of training steps", above=0, changeable=True)
    batch_size: int = option(512, "pairs per step, over all ranks", least=2)
    accumulate: int = option(
        1, "parts that a rank's batch is computed in, with the memory of one", least=1, changeable=True
    )
    lr: float = option(1e-3, "peak learning rate", above=0)
    lr_warmup_steps: int = option(20, "steps of linear growth to the peak", least=0)
    schedule: Literal["cosine", "constant", "cooldown", "epochs"] = option(
        "cosine",
        "of the learning rate after its warm-up; epochs: CoOp's, the first one at 1e-5, then a cosine by epoch",
    )
    cooldown_steps: int = option(0, "with --schedule cooldown: last steps, of linear decay to 0", least=0)
    epoch_steps: int = option(0, "with --schedule epochs: steps of one", least=0)
    image_lr: float = option(1.0, "learning rate of the image tower, as a factor of --lr", least=0)
    text_lr: float = option(1.0, "learning rate of the text tower, as a factor of --lr", least=0)
    critic_lr: float | None = option(None, "learning rate of critics; default twice --lr, at least 1e-4", above=0)
    layer_decay: float = option(1.0, "factor of the learning rate from each block to the one below it", above=0)
    optimizer: Literal["adamw", "sgd"] = option("adamw", "what moves the weights")
    momentum: float = option(0.9, "SGD's", least=0, below=1)
    weight_decay: float = option(0.1, "AdamW's, on tensors of two and more dimensions, or SGD's, on all", least=0)
    no_decay: str = option("", "regular expression: names of parameters without weight decay besides")
    beta1: float = option(0.9, "AdamW's", least=0, below=1)
    beta2: float = option(0.999, "AdamW's", least=0, below=1)
    eps: float = option(1e-8, "AdamW's", above=0)
    update: Literal["one_backward", "alternating"] = option(
        "one_backward", "of critics and encoders: one backward moves both, or each in turns of its own"
    )
    n_critic: int = option(1, "with --update alternating: critics' turns a step, each on a batch of its own", least=1)
    clip_gradient: float | None = option(None, "largest norm of the gradient of the towers", above=0)
    ema: float | None = option(None, "keep a moving average of the weights with this decay, and evaluate that", below=1)
    stages: tuple[str, ...] = option(
        (),
        "in turn, STEPS:PATTERN[:FACTOR]: train only parameters whose names match, at FACTOR times the rate; or objects"
        " of steps, train (the pattern), lr, objective and its options",
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where, how long and how precisely a run is computed, and what it tells."""

    out: str = option("", "folder of the run: checkpoints, log.jsonl, tensorboard", changeable=True)
    seed: int = option(0, "of the weights, the batches and the noise", least=0)
    threads: int | None = option(None, "CPU threads; default torch's", least=1, changeable=True)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda where there is one", changeable=True)
    precision: Literal["auto", "fp32", "amp_bf16", "amp_fp16", "pure_bf16"] = option(
        "auto", "of the towers; auto: amp_bf16 where the hardware multiplies bfloat16, otherwise fp32"
    )
    compile: bool = option(False, "torch.compile the towers", changeable=True)
    fsdp: bool = option(False, "with torchrun: shard the towers over ranks (FSDP2) instead of copying them")
    rank_timeout: float = option(600.0, "seconds to wait for another rank before giving up", above=0, changeable=True)
    log_every: int = option(10, "steps between log entries", least=1, changeable=True)
    save_every: int = option(100, "steps between checkpoints", least=1, changeable=True)
    eval_every: int | None = option(None, "steps between evaluations on --val-data", least=1, changeable=True)
    val_data: str | None = option(None, "data to evaluate on, of the kinds of --data; default --data", changeable=True)
    val_split: str | None = option(None, "its split; for emoji held_out, unseen or unseen_held_out", changeable=True)
    keep: int = option(2, "checkpoints to keep besides the best", least=1, changeable=True)
    wandb: str | None = option(None, "also log to this Weights & Biases project", changeable=True)


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on.  Raises UsageError for values that make no sense."""

    data: Any  # cibr.data.DataOptions
    model: Any  # the Options of a model of cibr.models.MODELS
    objective: Any  # the Options of an objective of cibr.objectives.OBJECTIVES
    optim: OptimOptions
    run: RunOptions

    def __post_init__(self) -> None:
        for section in self.sections():
            check(section)
        if not self.data.data:
            raise UsageError("--data is missing")
        if not self.run.out:
            raise UsageError("--out is missing: the folder of the run")
        if self.optim.steps is None and self.optim.seconds is None:
            raise UsageError("say how long to train: --steps, --seconds, or both (the first reached ends the run)")
        if self.optim.schedule == "cooldown" and (self.optim.steps is None or self.optim.cooldown_steps < 1):
            raise UsageError("--schedule cooldown needs --cooldown-steps and --steps")
        if self.optim.n_critic > 1 and self.optim.update != "alternating":
            raise UsageError("--n-critic needs --update alternating: in one backward critics move with the encoders")
        if self.optim.schedule == "epochs" and (self.optim.steps is None or self.optim.epoch_steps < 1):
            raise UsageError("--schedule epochs needs --epoch-steps and --steps")
        if self.run.eval_every is not None and self.run.val_data is None and self.run.val_split is None:
            raise UsageError("--eval-every needs data that training does not see: --val-data or --val-split")
        from cibr.stages import stages_of

        stages_of(self)

    def sections(self) -> list[Any]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """From one flat dictionary.  Raises UsageError naming the keys that are no options."""
        values = tuples(values)
        kinds = section_types(values)
        known = {field.name for kind in kinds for field in dataclasses.fields(kind)}
        if unknown := sorted(set(values) - known):
            raise UsageError(f"unknown option {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(*(of_kind(kind, values) for kind in kinds))

    def to_dict(self) -> dict[str, Any]:
        """One flat dictionary, the inverse of `from_dict`."""
        return {name: value for section in self.sections() for name, value in dataclasses.asdict(section).items()}

    def replace(self, **values: Any) -> RunConfig:
        return RunConfig.from_dict({**self.to_dict(), **values})

    def fixed(self) -> dict[str, Any]:
        """The options that a resumed run must keep."""
        fields = (field for section in self.sections() for field in dataclasses.fields(section))
        values = self.to_dict()
        return {field.name: values[field.name] for field in fields if not field.metadata["changeable"]}


def section_types(values: Mapping[str, Any]) -> list[type]:
    """The dataclasses of a run's options, for the model and the objective that `values` names."""
    from cibr import models, objectives
    from cibr.data import DataOptions

    model = models.options_type(values.get("model", models.DEFAULT))
    objective = objectives.options_type(values.get("objective", objectives.DEFAULT))
    return [DataOptions, model, objective, OptimOptions, RunOptions]


def of_kind(kind: type, values: Mapping[str, Any]) -> Any:
    """The dataclass `kind` from those of `values` that are its fields."""
    names = [field.name for field in dataclasses.fields(kind) if field.name in values]
    return kind(**{name: values[name] for name in names})


def check(options: Any) -> None:
    """Raises UsageError for a field of a wrong type or out of its bounds."""
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value, name = getattr(options, field.name), flag(field.name)
        if not _fits(value, hints[field.name]):
            raise UsageError(f"{name} is {value!r}, but must be {_describe(hints[field.name])}")
        if value is None:
            continue
        least, above, below = (field.metadata[bound] for bound in ("least", "above", "below"))
        if least is not None and not value >= least:
            words = {0: "not be negative", 1: "be positive"}.get(least, f"be at least {least}")
            raise UsageError(f"{name} is {value}, but must {words}")
        if above is not None and not value > above:
            raise UsageError(f"{name} is {value}, but must be {'positive' if above == 0 else f'more than {above}'}")
        if below is not None and not value < below:
            raise UsageError(f"{name} is {value}, but must be less than {below}")


def flag(name: str) -> str:
    """`batch_size` -> `--batch-size`."""
    return f"--{name.replace('_', '-')}"


def _fits(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return value in arguments
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, kind) for kind in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, annotation) and not (annotation is int and isinstance(value, bool))


def _describe(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(kind) for kind in arguments)
    if origin is tuple:
        return f"a list, each item {_describe(arguments[0])}"
    return WORDS.get(annotation, annotation.__name__)


def read_options(path: Path) -> dict[str, Any]:
    """The options in a JSON or YAML file, such as a run's config.json.  Raises UsageError for what is neither."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    try:
        if path.suffix in (".yaml", ".yml"):
            import yaml

            values = yaml.load(text, yaml_loader())
        else:
            values = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold one object of options")
    return tuples({name.replace("-", "_"): value for name, value in values.items()})


def yaml_loader() -> Any:
    """A safe one that reads 1e-3 as a number, as YAML 1.2 and everybody who writes a learning rate do."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))
    return Loader


def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """With tuples, which frozen dataclasses hold, for the lists that JSON has; an object in one as its text."""

    def item(value: Any) -> Any:
        return json.dumps(value) if isinstance(value, dict) else value

    return {name: tuple(map(item, value)) if isinstance(value, list) else value for name, value in values.items()}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[str]:
    """The names whose values differ, old ones in words."""
    return [f"{name} = {old.get(name)}" for name in new if old.get(name) != new[name]]
