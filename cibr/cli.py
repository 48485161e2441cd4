"""The command line: `cibr train | evaluate | plot | data | export`.  Parsing only.

Every flag is a field of a dataclass of options (`cibr.config.option`); a command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cibr.config import RunConfig, check, differences, flag, of_kind, option, read_options, section_types
from cibr.errors import UsageError, missing_extra
from cibr.run.atomic import full_disk_in_words


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; exits with 2 for a request that cannot be met, with 128 + n for a run that signal n stopped."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name == "data" and rest and f"data {rest[0]}" in COMMANDS:
        name, rest = f"data {rest[0]}", rest[1:]
    if name not in COMMANDS:
        if not name.startswith("-"):
            print(f"cibr: there is no command {name}\n", file=sys.stderr)
        print(USAGE + "\n".join(f"  {known:14}{about}" for known, (_, about) in COMMANDS.items()))
        raise SystemExit(0 if name in ("-h", "--help") else 2)
    try:
        with full_disk_in_words("Make room, and start again"):
            status = COMMANDS[name][0](rest)
    except UsageError as error:
        print(f"cibr: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush fails
        status = 128 + signal.SIGPIPE
    raise SystemExit(status)


def parse(
    kinds: Sequence[type], arguments: Sequence[str], *, command: str, defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The values of every field of the dataclasses `kinds`, from flags of their names; `defaults` go before their own.

    Exits with 2 for what is no option or no value of one.
    """
    try:
        import tyro
    except ImportError as error:
        raise missing_extra(error) from error
    groups: list[tuple[str, Any, Any]] = []
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        fields: list[tuple[str, Any, Any]] = []
        for field in dataclasses.fields(kind):
            text, place = field.metadata["help"], field.metadata["positional"]
            shown = tyro.conf.arg(help=text, metavar=field.name.upper() if place else None)
            annotated: Any = Annotated[hints[field.name], shown]
            if place:
                annotated = Annotated[annotated, tyro.conf.Positional]
            fields.append((field.name, annotated, (defaults or {}).get(field.name, field.default)))
        group = dataclasses.make_dataclass(kind.__name__, fields, kw_only=True)
        name = kind.__name__.removesuffix("Options").lower()
        groups.append((name, Annotated[group, tyro.conf.OmitArgPrefixes], dataclasses.field(default_factory=group)))
    flags = dataclasses.make_dataclass("Flags", groups, kw_only=True)
    flags.__doc__ = COMMANDS[command][1]
    found: Any = tyro.cli(flags, args=list(arguments), prog=f"cibr {command}")
    return {name: value for group in vars(found).values() for name, value in vars(group).items()}


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    config: str | None = option(None, "JSON or YAML file of options, named as the flags; flags come before it")
    resume: bool = option(False, "go on with the run in --out, if there is one; it keeps its options")


def train(arguments: Sequence[str]) -> int:
    """Trains or resumes -> exit status.  Raises UsageError for options that do not go together, or with the run's."""
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what decides which options there are
    for name in ("--config", "--out", "--model", "--objective"):
        look.add_argument(name)
    look.add_argument("--resume", action="store_true")
    seen = look.parse_known_args(arguments)[0]
    values: dict[str, Any] = {} if seen.config is None else read_options(Path(seen.config))
    out = seen.out or values.get("out")
    stored: dict[str, Any] = {}
    if seen.resume and out and (Path(out) / "config.json").is_file():
        stored = read_options(Path(out) / "config.json")
    chosen = {name: value for name in ("model", "objective") if (value := getattr(seen, name))}
    defaults = {**stored, **values, **chosen}
    kinds = section_types(defaults)
    known = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    if stored and (changed := differences(stored, {n: v for n, v in chosen.items() if n in stored})):
        raise UsageError(f"a resumed run keeps its options, and this one was started with {', '.join(changed)}")
    if unknown := sorted(set(defaults) - known):
        raise UsageError(f"unknown option {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    for kind in kinds if defaults.get("data") else ():
        check(of_kind(kind, defaults))  # before the parser, which takes a default as it is
    given = parse(
        [StartOptions, *kinds], arguments, command="train", defaults={**defaults, "data": defaults.get("data", "")}
    )
    resume = given.pop("resume")
    del given["config"]
    from cibr.train import train

    config = RunConfig.from_dict(given)
    outcome = train(config, resume=resume)
    status = 0 if outcome.stopped_by is None else 128 + outcome.stopped_by
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first one speaks
        report(outcome, config)
    return status


def report(outcome: Any, config: RunConfig) -> None:
    """The end of a run: what came out, what was skipped, and what to do next."""
    loss = f", loss {outcome.last['loss']:.4f}" if "loss" in outcome.last else ""
    print(f"{outcome.step} steps in {outcome.seconds:.0f} s of training{loss}")
    if outcome.skipped_steps:
        print(f"{outcome.skipped_steps} steps without a finite loss or gradient skipped")
    for line in outcome.skipped_samples.splitlines():
        print(f"skipped: {line}")
    if outcome.stopped_by is not None:
        print(
            f"stopped by signal {outcome.stopped_by}; cibr train --resume --out {config.run.out} goes on",
            file=sys.stderr,
        )
    else:
        from cibr.data import kind_of

        own = kind_of(config.data.data)[0] == "emoji" or (config.run.val_data or config.run.val_split) is not None
        sets = "" if own else " --retrieval NAME=SPEC, or --zero-shot NAME=SPEC"
        print(f"next: cibr evaluate --checkpoint {config.run.out}{sets}")


@dataclass(frozen=True, kw_only=True)
class EmojiOptions:
    out: str = option("", "folder of the set; nothing happens if it is there already")
    tarballs: str | None = option(None, "folder of .tgz files from `npm pack`, instead of downloading them")
    size: int = option(64, "pixels", least=8)


def data_emoji(arguments: Sequence[str]) -> int:
    options = made(EmojiOptions, arguments, "data emoji", required=("out",))
    from cibr.data.emoji_build import build

    found = build(Path(options.out), tarballs=options.tarballs and Path(options.tarballs), size=options.size)
    print(f"{found['images']} images of {found['concepts']} concepts in {len(found['styles'])} styles", end=" ")
    print(f"{'built' if found['built'] else 'were there already'} in {options.out}; licences: attribution.csv there")
    return 0


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    model: str = option("", "packaged (towers of PyPI packages), open_clip:NAME/TAG_OR_FILE, or the folder of a run")
    out: str = option("", "file to write; it must not exist")
    split: str = option("train", "of the data")
    corrupted: bool = option(False, "damage each image first, by noise, blur, fog or coarse pixels in turn")
    precision: Literal["fp32", "amp_bf16"] = option("fp32", "of the towers; features are float32 either way")
    device: Literal["cpu", "cuda"] = option("cpu", "where the towers run")
    threads: int | None = option(None, "CPU threads; default torch's", least=1)


def data_cache(arguments: Sequence[str]) -> int:
    options, data = made_with_data(CacheOptions, arguments, "data cache", required=("model", "out"))
    import torch

    from cibr.cache import towers, write_cache

    model = towers(options.model).to(options.device)
    with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "amp_bf16"):
        found = write_cache(options.model, model, data, Path(options.out), options.split, corrupted=options.corrupted)
    print(f"{found['images']} images and {found['captions']} captions in {options.out}; {found['skipped']} skipped")
    size = min(found["images"], 512)
    print(f"next: cibr train --model heads --data features:{options.out} --batch-size {size} --steps 300 --out RUN")
    return 0


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    split: str = option("train", "of the data")


def data_check(arguments: Sequence[str]) -> int:
    options, data = made_with_data(CheckOptions, arguments, "data check")
    from cibr.data.check import check

    print(check(data, options.split))
    return 0


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    checkpoint: str = option("", "a checkpoint, or a run for its last one")
    zero_shot: tuple[str, ...] = option(
        (), "NAME=SPEC of sets with classes, a SPEC as of --data; default the run's own: emoji's splits, --val-data"
    )
    retrieval: tuple[str, ...] = option((), "NAME=SPEC of sets with captions")
    probe: bool = option(False, "also probes, shares of variance, CKA, and estimated information")
    json: str | None = option(None, "also write the numbers to this file; RUN/evaluation.json is where plots look")
    device: Literal["cpu", "cuda"] = option("cpu", "where the towers run, in float32")
    threads: int | None = option(None, "CPU threads; default torch's", least=1)


def evaluate(arguments: Sequence[str]) -> int:
    """Prints a report of a checkpoint on named sets, and writes it as JSON -> exit status."""
    options = made(EvaluateOptions, arguments, "evaluate", required=("checkpoint",))
    if options.json is not None and not Path(options.json).parent.is_dir():
        raise UsageError(f"--json {options.json}: there is no folder {Path(options.json).parent}")
    from cibr.evaluate import evaluate_run, named, table
    from cibr.run.atomic import write_text

    sets = {"zero_shot": named(options.zero_shot, "--zero-shot"), "retrieval": named(options.retrieval, "--retrieval")}
    found = evaluate_run(Path(options.checkpoint), **sets, probe=options.probe, device=options.device)
    print(table(found))
    if options.json is not None:
        write_text(Path(options.json), json.dumps(found, indent=1) + "\n")
    return 0


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    runs: tuple[str, ...] = option(
        (), "folders of runs; those that differ in their seed alone are one line", positional=True
    )
    out: str = option("", "folder for the pictures")
    data: str | None = option(None, "SPEC of images to show the models; default what the first run held out")
    tsne: bool = option(True, "t-SNE of image embeddings, by class and by style")
    grad_cam: bool = option(False, "what in an image speaks for its caption")
    information: bool = option(False, "estimates of information against the batch they are read from")


def plot(arguments: Sequence[str]) -> int:
    options = made(PlotOptions, arguments, "plot", required=("runs", "out"))
    from cibr.pictures import plot

    written = plot(
        [Path(run) for run in options.runs],
        Path(options.out),
        data=options.data,
        tsne=options.tsne,
        with_grad_cam=options.grad_cam,
        with_information=options.information,
    )
    print("\n".join(map(str, written)))
    return 0


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    file: str = option("", "YAML or JSON file: configurations, seeds, sets, metrics", positional=True)
    out: str = option("", "folder for the runs, compare.md and compare.json; what is done there is not done again")
    jobs: int = option(1, "processes; give runs `threads: 1` then", least=1)
    keep_checkpoints: bool = option(False, "keep the weights of each run when it has been scored")


def compare(arguments: Sequence[str]) -> int:
    options = made(CompareOptions, arguments, "compare", required=("file", "out"))
    from cibr.compare import run_comparison
    from cibr.compare.table import markdown

    found = run_comparison(Path(options.file), Path(options.out), jobs=options.jobs, keep=options.keep_checkpoints)
    print(f"\n{markdown(found)}")
    return 0


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    out: str = option("", "folder for the emoji, the runs, the table and the pictures")
    tarballs: str | None = option(None, "folder of .tgz files from `npm pack`, instead of downloading them")
    steps: int = option(200, "of each run", least=1)
    threads: int | None = option(None, "CPU threads; default torch's", least=1)


def demo(arguments: Sequence[str]) -> int:
    options = made(DemoOptions, arguments, "demo", required=("out",))
    from cibr.demo import demo

    written = demo(Path(options.out), tarballs=options.tarballs and Path(options.tarballs), steps=options.steps)
    print("\n".join(map(str, written)))
    return 0


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    run: str = option("", "a run, for its last checkpoint, or a checkpoint", positional=True)
    out: str = option("", "folder to write; it must not exist", positional=True)


def export(arguments: Sequence[str]) -> int:
    options = made(ExportOptions, arguments, "export", required=("run", "out"))
    from cibr.export import export

    export(Path(options.run), Path(options.out))
    print(f"{options.out}: open_clip.create_model_and_transforms('local-dir:{options.out}') loads it")
    return 0


def omib(arguments: Sequence[str]) -> int:
    from cibr.omib.options import OmibOptions

    options = made(OmibOptions, arguments, "omib", required=("data", "out"))
    from cibr.omib.train import train

    print(json.dumps(train(options), indent=1))
    return 0


def table(arguments: Sequence[str]) -> int:
    from cibr.table import TableOptions, table

    options = made(TableOptions, arguments, "table", required=("runs",))
    print(table([Path(run) for run in options.runs], metric=options.metric, out=options.out and Path(options.out)))
    return 0


@dataclass(frozen=True, kw_only=True)
class FrozenOptions:
    model: str = option("", "coop:BASE or maple:BASE to train; a run or open_clip:NAME/FILE to test by its templates")


def prompts(arguments: Sequence[str]) -> int:
    """Trains prompts, or tests a model as it is, and prints what it can do -> exit status."""
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    look.add_argument("--model", default="")
    spec = look.parse_known_args(arguments)[0].model
    from cibr import models
    from cibr.data import DataOptions
    from cibr.prompts import PromptsOptions, method_of, run

    kinds = [FrozenOptions if method_of(spec) is None else models.options_type(spec), PromptsOptions, DataOptions]
    values = parse(kinds, arguments, command="prompts")
    model, options, data = (of_kind(kind, values) for kind in kinds)
    for one, required in ((model, ("model",)), (options, ("out",)), (data, ("data",))):
        checked(one, required)
    from cibr.evaluate import table

    found = run(options, data, dataclasses.asdict(model))
    print(table(found))
    for name, score in found.get("base_to_new", {}).items():
        print(f"{name}: base {score['base']:.1f}, new {score['new']:.1f}, H {score['harmonic_mean']:.1f}")
    return 0


def made(kind: type, arguments: Sequence[str], command: str, *, required: Sequence[str] = ()) -> Any:
    """`kind` from its flags, checked.  Raises UsageError for a required option that is missing."""
    options = kind(**parse([kind], arguments, command=command))
    return checked(options, required)


def made_with_data(kind: type, arguments: Sequence[str], command: str, *, required: Sequence[str] = ()) -> Any:
    """`kind` and the DataOptions from their flags, checked."""
    from cibr.data import DataOptions

    values = parse([kind, DataOptions], arguments, command=command)
    return checked(of_kind(kind, values), required), checked(of_kind(DataOptions, values), ("data",))


def checked(options: Any, required: Sequence[str]) -> Any:
    """`options`, with their number of threads set.  Raises UsageError for what makes no sense, or is missing."""
    check(options)
    for name in required:
        if not getattr(options, name):
            text = next(field.metadata["help"] for field in dataclasses.fields(options) if field.name == name)
            raise UsageError(f"{flag(name)} is missing: {text}")
    if getattr(options, "threads", None) is not None:
        import torch

        torch.set_num_threads(options.threads)
    return options


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (train, "train a model, or resume a run"),
    "evaluate": (evaluate, "what a checkpoint can do: zero-shot, retrieval, probes"),
    "prompts": (prompts, "few-shot prompts, CoOp and MaPLe, on a frozen open_clip model"),
    "table": (table, "several runs in the layout of the paper's tables, mean and standard error"),
    "compare": (compare, "run configurations on seeds and say what their differences are worth"),
    "plot": (plot, "draw curves, recall and embeddings of several runs"),
    "demo": (demo, "emoji, two runs, a table and pictures, in one go"),
    "data emoji": (data_emoji, "build the set of emoji: eleven styles of six vendors"),
    "data cache": (data_cache, "compute the features of frozen towers once, to train heads on"),
    "data check": (data_check, "read a whole data set and say what is there, what is skipped, and why"),
    "export": (export, "write a run's model as a folder that open_clip loads"),
    "omib": (omib, "fuse modalities for a label through a bottleneck each, or by one of OMIB's relatives"),
}
USAGE = """cibr COMMAND [OPTIONS]: trains and evaluates CLIP-like models.  `cibr COMMAND --help` lists its options.

"""
