"""`cibr prompts`: few-shot prompts on a frozen model, by the protocol of CoOp and MaPLe; or CLIP's zero-shot beside it.

    coop:BASE, maple:BASE    K shots of each class, SGD by epochs, the last checkpoint; then the test split
    a run, open_clip:...     nothing is trained: the templates of the data on the same test split

`--base-to-new` trains on the first half of the classes and tests on each half, H = 2 b n / (b + n).  OUT is the folder
of a run, or looks like one to `cibr table`, which reads OUT/evaluation.json and, for the row, OUT/row.json.  The same
command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cibr import cache
from cibr.config import RunConfig, option
from cibr.data import DataOptions, open_dataset
from cibr.data.standard import STANDARD
from cibr.errors import UsageError
from cibr.evaluate import evaluate, named
from cibr.export import export
from cibr.models import Model
from cibr.run import checkpoint
from cibr.run.atomic import write_text
from cibr.table import described
from cibr.train import train

METHODS = ("coop", "maple")
EPOCHS = {1: 50, 2: 100, 4: 100}  # CoOp's by shots, otherwise 200
DEFAULTS: dict[str, dict[str, Any]] = {
    "coop": {"lr": 0.002, "batch_size": 32},
    "maple": {"lr": 0.0035, "batch_size": 4},
}
MAPLE_EPOCHS = 5
FIXED = {
    "objective": "classes",
    "optimizer": "sgd",
    "momentum": 0.9,
    "schedule": "epochs",
    "lr_warmup_steps": 0,
    "precision": "fp32",
}


@dataclass(frozen=True, kw_only=True)
class PromptsOptions:
    out: str = option("", "folder of the run")
    name: str | None = option(
        None, "of the data in tables; by default its kind, one of the paper's sets for its prompts"
    )
    base_to_new: bool = option(False, "train on the first half of the classes, test on both halves")
    zero_shot: tuple[str, ...] = option((), "NAME=SPEC of further sets with classes to test on")
    retrieval: tuple[str, ...] = option((), "NAME=SPEC of sets with captions to test on")
    seed: int = option(0, "of the shots, the vectors and the batches", least=0)
    epochs: int | None = option(
        None, "default CoOp's 50 for 1 shot, 100 for 2 and 4, otherwise 200; MaPLe's 5", least=1
    )
    batch_size: int | None = option(None, "images a step; default 32 for coop, 4 for maple", least=2)
    lr: float | None = option(None, "of SGD; default .002 for coop, .0035 for maple", above=0)
    weight_decay: float = option(5e-4, "of SGD", least=0)
    save_every: int = option(500, "steps between checkpoints", least=1)
    device: Literal["cpu", "cuda"] = option("cpu", "where the towers run")
    threads: int | None = option(None, "CPU threads; default torch's", least=1)


def method_of(model: str) -> str | None:
    """`coop:...` -> "coop"; None for a model without prompts."""
    kind = model.partition(":")[0]
    return kind if kind in METHODS else None


def run(options: PromptsOptions, data: DataOptions, model: Mapping[str, Any]) -> dict[str, Any]:
    """Trains where there is something to train, evaluates, writes OUT/evaluation.json and returns the scores.

    `model` are the options of a prompted model, or {"model": SPEC}.  Raises UsageError before any work for what cannot
    be done.
    """
    data = dataclasses.replace(data, shot_seed=data.shot_seed or options.seed)
    if options.base_to_new and model.get("class_specific"):
        raise UsageError("--base-to-new asks about new classes, and --class-specific prompts have none for them")
    if options.base_to_new and data.classes != "all":
        raise UsageError("--base-to-new chooses the classes itself: leave --classes out")
    method, name = method_of(model["model"]), options.name or name_of(data)
    sets: dict[str, Any] = {
        "zero_shot": named(options.zero_shot, "--zero-shot"),
        "retrieval": named(options.retrieval, "--retrieval"),
    }
    if name in sets["zero_shot"]:
        raise UsageError(f"--zero-shot has a set named {name}, as the data are; choose another name, or --name")
    if method is None:
        trained, row = towers(model["model"], options.out)
    else:
        trained, row = learn(options, data, model, method)
    trained = trained.to(options.device)
    own = name if method is None else f"{name}, as trained"  # names of classes stay those of training
    if options.base_to_new:
        scores = halves(trained, data, name, own)
    else:
        scores = renamed(evaluate(trained, zero_shot={own: data.data}, options=data), own, name)
    if sets["zero_shot"] or sets["retrieval"]:
        scores = merged(scores, evaluate(trained, **sets, options=data))
    for name, about in (("row.json", row), ("evaluation.json", scores)):
        write_text(Path(options.out) / name, json.dumps(about, indent=1) + "\n")
    return scores


def name_of(data: DataOptions) -> str:
    """`eurosat:DIR` -> "eurosat", `folder:a/pets` -> "pets"."""
    kind, _, place = data.data.partition(":")
    return kind if kind in (*STANDARD, "emoji") else Path(place or kind).stem


def towers(spec: str, out: str) -> tuple[Model, dict[str, Any]]:
    """A model as it is, and its row of a table; its configuration goes to OUT/config.json.

    Raises UsageError for an OUT that holds a run.
    """
    if checkpoint.find(Path(out)) is not None:
        raise UsageError(f"{out} holds a run, and its configuration would be replaced: choose another --out")
    model, config = cache.towers(spec), {"model": spec, "objective": "clip"}
    if Path(spec).is_dir():
        config = checkpoint.load_run(Path(spec)).config.to_dict()
    Path(out).mkdir(parents=True, exist_ok=True)
    write_text(Path(out) / "config.json", json.dumps({**config, "out": out}, indent=1))
    return model, {"method": config["objective"], "setting": {"base": described(config)}}


def learn(
    options: PromptsOptions, data: DataOptions, model: Mapping[str, Any], method: str
) -> tuple[Model, dict[str, Any]]:
    """The prompted model after its epochs, and its row of a table.  Raises UsageError when a signal ended the run."""
    out, base = Path(options.out), model["model"].partition(":")[2]
    data = dataclasses.replace(data, classes="base") if options.base_to_new else data
    rows = len(open_dataset(data))
    batch_size = options.batch_size or DEFAULTS[method]["batch_size"]
    batch = min(batch_size, rows)
    epochs = options.epochs or (MAPLE_EPOCHS if method == "maple" else EPOCHS.get(data.shots or 0, 200))
    config = RunConfig.from_dict(
        {
            **FIXED,
            **dataclasses.asdict(data),
            **model,
            "model": f"{method}:{exported(base, out)}",
            "out": options.out,
            "seed": options.seed,
            "batch_size": batch,
            "epoch_steps": rows // batch,
            "steps": epochs * (rows // batch),
            "lr": options.lr or DEFAULTS[method]["lr"],
            "weight_decay": options.weight_decay,
            "keep": 1,
            "save_every": options.save_every,
            "device": options.device,
            "threads": options.threads,
        }
    )
    found = checkpoint.find(out)
    if found is None or checkpoint.read_about(found)["step"] < config.optim.steps:
        outcome = train(config, resume=found is not None)
        if outcome.stopped_by is not None:
            raise UsageError(f"stopped by signal {outcome.stopped_by}; the same command goes on")
    setting = {
        **{name: value for name, value in model.items() if name != "model"},
        "base": base_of(base),
        "shots": data.shots,
        "epochs": epochs,
        "lr": config.optim.lr,
        "weight_decay": options.weight_decay,
        "batch_size": batch_size,
    }
    return checkpoint.load_run(out).model, {"method": method, "setting": setting}


def exported(base: str, out: Path) -> str:
    """A base as a specification of open_clip's: of a run's folder the model, once, as OUT/base-HASH."""
    if not Path(base).is_dir():
        return base
    found = checkpoint.find(Path(base))
    if found is None:
        raise UsageError(f"there is no checkpoint at {base}")
    folder = out / f"base-{checkpoint.sha256(found / 'model.safetensors')[:12]}"
    if not folder.exists():
        export(found, folder)
    return f"open_clip:local-dir:{folder}"


def base_of(spec: str) -> str:
    """What a base is, in words that are the same for every seed of it."""
    return described(checkpoint.load_run(Path(spec)).config.to_dict()) if Path(spec).is_dir() else spec


def halves(model: Model, data: DataOptions, name: str, own: str) -> dict[str, Any]:
    """The report of `evaluate` on both halves of the set `own`, and their harmonic mean under "base_to_new"."""
    report: dict[str, Any] = {}
    for half in ("base", "new"):
        found = evaluate(model, zero_shot={own: data.data}, options=dataclasses.replace(data, classes=half))
        report = merged(report, renamed(found, own, f"{name}, {half} classes"))
    base, new = (scores["top1"] for scores in report["zero_shot"].values())
    return {**report, "base_to_new": {name: {"base": base, "new": new, "harmonic_mean": harmonic_mean(base, new)}}}


def renamed(report: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """A report whose set `old` is called `new`."""
    return {part: {new if name == old else name: of for name, of in sets.items()} for part, sets in report.items()}


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two reports as one; their sets have different names."""
    return {part: {**one.get(part, {}), **other.get(part, {})} for part in {**one, **other}}


def harmonic_mean(base: float, new: float) -> float:
    """2 b n / (b + n), and 0 where both are."""
    return 2 * base * new / (base + new) if base + new else 0.0
