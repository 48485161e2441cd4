"""The command line: `cibr data`, `cibr train`, `cibr evaluate`, `cibr plot`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import types
import typing
from pathlib import Path
from typing import Any

from cibr.config import TrainConfig, read_options
from cibr.errors import UsageError


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; exits with 2 for a request that cannot be met, with 128 + n for a run that signal n stopped."""
    options = make_parser().parse_args(arguments)
    try:
        status = options.command(options)
    except UsageError as error:
        print(f"cibr: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    raise SystemExit(status)


def make_parser() -> argparse.ArgumentParser:
    """The four commands; every field of TrainConfig is an option of `cibr train`."""
    parser = argparse.ArgumentParser(
        prog="cibr", description="Trains and evaluates CLIP-like models with CIBR's penalty."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    data = commands.add_parser("data", help="build a data set")
    emoji = data.add_subparsers(required=True, metavar="SET").add_parser("emoji", help="emoji as 11 artists drew them")
    emoji.add_argument(
        "--out", type=Path, required=True, help="folder of the set; nothing happens if it is there already"
    )
    emoji.add_argument(
        "--tarballs", type=Path, help="folder of .tgz files from `npm pack`, instead of downloading them"
    )
    emoji.add_argument("--size", type=int, default=64, help="pixels (%(default)s)")
    emoji.set_defaults(command=build_emoji)

    train = commands.add_parser("train", help="train a model", argument_default=argparse.SUPPRESS)
    train.add_argument("--config", type=Path, help="JSON file of options; those on the command line come first")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    types_of = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        name, text = f"--{field.name.replace('_', '-')}", field.metadata["help"]
        if field.default not in (None, ""):
            text = f"{text} ({field.default})"
        if types_of[field.name] is bool:
            train.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        else:
            train.add_argument(name, type=_plain_type(types_of[field.name]), help=text, metavar=field.name.upper())
    train.set_defaults(command=run_training)

    evaluate = commands.add_parser(
        "evaluate", help="zero-shot accuracy, retrieval and the vendor probe of a checkpoint"
    )
    evaluate.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, or a run for its last one")
    evaluate.add_argument("--data", type=Path, help="folder of tars; default: what the run was trained on")
    evaluate.add_argument("--json", type=Path, help="also write the numbers to this file")
    evaluate.add_argument("--probe", action=argparse.BooleanOptionalAction, default=True, help="the vendor probe")
    evaluate.add_argument("--threads", type=int, help="CPU threads; default torch's")
    evaluate.set_defaults(command=run_evaluation)

    plot = commands.add_parser("plot", help="draw a run's curves and a t-SNE of its embeddings")
    plot.add_argument("--run", type=Path, required=True, help="folder of the run; the pictures go there")
    plot.add_argument("--data", type=Path, help="folder of tars; default: what the run was trained on")
    plot.add_argument("--tsne", action=argparse.BooleanOptionalAction, default=True, help="the t-SNE")
    plot.set_defaults(command=draw)
    return parser


def _plain_type(annotation: Any) -> type:
    """`int | None` -> int."""
    if isinstance(annotation, types.UnionType):
        annotation = next(kind for kind in typing.get_args(annotation) if kind is not types.NoneType)
    return annotation


def build_emoji(options: argparse.Namespace) -> int:
    from cibr.data.emoji_build import build

    if options.size < 8:
        raise UsageError(f"--size is {options.size}, but must be at least 8 pixels")
    report = build(options.out, tarballs=options.tarballs, size=options.size)
    print(f"{report['images']} images of {report['concepts']} concepts in {len(report['styles'])} styles", end=" ")
    print(f"{'built' if report['built'] else 'were there already'} in {options.out}; licences: attribution.csv there")
    return 0


def run_training(options: argparse.Namespace) -> int:
    """Trains or resumes -> 0, or 128 + n where signal n stopped it. Raises UsageError for a changed option."""
    from cibr.run import checkpoint
    from cibr.train import train

    given = {name: value for name, value in vars(options).items() if name not in ("command", "config", "resume")}
    if "config" in options:
        given = {**read_options(options.config), **given}
    resume = "resume" in options
    found = checkpoint.find(Path(given["out"])) if resume and "out" in given else None
    if found is not None:
        started = dataclasses.asdict(checkpoint.read_about(found).config)
        started |= {name: value for name, value in given.items() if name in ("out", "data")}  # either may have moved
        changed = [name for name, value in given.items() if name in started and value not in ("auto", started[name])]
        if changed:
            was = ", ".join(f"{name} = {started[name]}" for name in changed)
            raise UsageError(f"a resumed run keeps its options, and this one was started with {was}")
        given = {**given, **started}
    outcome = train(TrainConfig.from_dict(given), resume=resume)
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes the first one speaks
        return 0 if outcome.stopped_by is None else 128 + outcome.stopped_by
    print(f"{outcome.step} steps in {outcome.seconds:.0f} s of training", end="")
    for count, what in (
        (outcome.skipped_steps, "steps without a finite loss"),
        (outcome.skipped_samples, "unreadable samples"),
    ):
        print(f", {count} {what} skipped" if count else "", end="")
    print(f"; {checkpoint.find(Path(given['out']))}")
    if outcome.stopped_by is not None:
        print(f"stopped by signal {outcome.stopped_by}; --resume goes on", file=sys.stderr)
        return 128 + outcome.stopped_by
    return 0


def run_evaluation(options: argparse.Namespace) -> int:
    from cibr.evaluate import evaluate, table

    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    if options.json is not None and not options.json.parent.is_dir():
        raise UsageError(f"--json {options.json}: there is no folder {options.json.parent}")
    report = evaluate(options.checkpoint, options.data, probe=options.probe)
    print(table(report))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def draw(options: argparse.Namespace) -> int:
    from cibr.plots import plot

    for path in plot(options.run, options.data, tsne=options.tsne):
        print(path)
    return 0
