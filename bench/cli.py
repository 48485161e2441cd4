"""The command line.  The fork server starts before the heavy imports, so that both import at the same time."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import processes

QUICK_SECONDS, QUICK_STOP = 45, 56  # --quick must end within 60: no case starts after 45 s, none goes on after 56
BUDGET, BRIEF_BUDGET, QUICK_BUDGET = 6.0, 2.0, 1.0  # seconds of timing per case: named, nothing asked for, --quick
FEW_PEERS = ("eager", "open_clip", "one-logits")  # a compilation takes half a minute
EXPERIMENTS = {
    "toy": "the CIBR penalty where its optimum is known",
    "mi": "estimates of mutual information beside the truth",
    "variance": "why all pairs: the spread of log-mean-exp",
    "gradient": "how near each estimator's gradient comes to the ideal penalty's",
    "curve": "the forward of clip_loss up to N = 131072",
    "alignment": "the information bottleneck on alignment, on drawings of known factors",
    "family": "what CEB, align, OMIB and CIBR price, beside the truth",
    "omib": "fusion through bottlenecks, where the best accuracy is known",
    "omib_choice": "which options of omib validation prefers, on seeds of its own",
    "heads": "what the trainer adds to the loss and two matmuls of a head's step",
    "accumulate": "memory and time of a batch in parts, beside the plain step and GradCache",
    "scale": "bytes and gradients on real ranks, and what many GPUs would do",
}
PICTURES = ("mi", "variance", "gradient", "curve", "omib", "alignment", "family")
FILES = ("toy", "accumulate", "omib_choice", *PICTURES)  # with --json
VENDOR = {  # what holds torch's and its libraries' code back to the kernels' instruction set
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "generic": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}


def parser() -> argparse.ArgumentParser:
    """Subcommands; without one, `cases` is meant: `main` puts it there."""
    top = argparse.ArgumentParser(prog="python bench/", description="The fused ops against their peers, and more.")
    sub = top.add_subparsers(dest="command", required=True)

    cases = sub.add_parser("cases", help="the table of the CPU; what runs without a command")
    cases.add_argument("names", nargs="*", help="cases by name or how one begins (--list); none: a selection")
    cases.add_argument("--all", action="store_true", help="the extra cases too: every width and tier, slow peers")
    cases.add_argument("--quick", action="store_true", help="a few cases, at most 60 s")
    cases.add_argument("--list", action="store_true", help="print the names and stop")
    cases.add_argument("--fused", action="store_true", help="no baselines: the fused ops and their floors")
    cases.add_argument("--isa", metavar="NAME", help="the kernels' instruction set, and torch's where it is less")
    _files(cases, plot="draw time and memory against N")

    gpu = sub.add_parser("gpu", help="the same on the GPU of this machine, or without one")
    gpu.add_argument("names", nargs="*", help="the beginnings of cases' names")
    how = gpu.add_mutually_exclusive_group()
    how.add_argument("--predict", action="store_true", help="without a GPU, from what compilers make")
    how.add_argument("--columns", action="store_true", help="what P by columns saves and costs, without a GPU")
    how.add_argument("--host", action="store_true", help="launches, memory and host instructions, without a GPU")
    gpu.add_argument("--search", action="store_true", help="look for better configurations than the tables'")
    gpu.add_argument("--update", action="store_true", help="--host: record the counts")
    _files(gpu)

    for name, about in EXPERIMENTS.items():
        experiment = sub.add_parser(name, help=about)
        experiment.add_argument("--quick", action="store_true", help="fewer seeds, rows or repeats")
        if name in FILES:
            _files(experiment, plot="draw the picture" if name in PICTURES else "")
    sub.add_parser("picture", help="the README's, from a record").add_argument("--plot", type=Path, metavar="FILE.png")
    calls = sub.add_parser("calls", help="how far a call travels inside the package, and other costs of reading it")
    calls.add_argument("--against", type=Path, metavar="CHECKOUT", help="instructions of clip_loss over a built one's")
    calls.add_argument("--update", action="store_true", help="record those ratios")
    counts = sub.add_parser("instructions", help="of the C++ kernels, under valgrind, against their record")
    counts.add_argument("--update", action="store_true", help="record the counts")
    return top


def _files(command: argparse.ArgumentParser, plot: str = "") -> None:
    command.add_argument("--json", type=Path, metavar="FILE", help="write the machine and every number")
    if plot:
        command.add_argument("--plot", type=Path, metavar="FILE.png", help=plot)


def main(argv: Sequence[str] | None = None) -> int:
    """-> exit status: 0; 1 when an implementation disagrees with the fused op; 2 for a bad command line."""
    began = time.monotonic()
    words = list(sys.argv[1:] if argv is None else argv)
    commands = ("cases", "gpu", *EXPERIMENTS, "picture", "calls", "instructions")
    if not words or words[0] not in (*commands, "-h", "--help"):
        words.insert(0, "cases")
    top = parser()
    args = top.parse_args(words)
    if args.command == "cases":
        return _cases(args, top, commands, began)
    if args.command == "gpu":
        if args.update and not args.host:
            top.error("gpu --update belongs to gpu --host")
        from bench import gpu
        from bench.guards import host

        if args.host:
            return host.main(args.names, update=args.update)
        if args.columns:
            return gpu.columns(args.json)
        return gpu.main(args.json, predict=args.predict, search=args.search, only=args.names)
    if args.command == "picture":
        from bench import picture

        return picture.main(args.plot)
    if args.command == "calls":
        from bench.guards import against, calls

        return calls.main() if args.against is None else against.main(args.against, args.update)
    if args.command == "instructions":
        from bench.guards import instructions

        return instructions.main(update=args.update)
    from bench.experiments import frame

    experiment = importlib.import_module(f"bench.experiments.{args.command}").run
    return frame.conduct(experiment, args.quick, getattr(args, "json", None), getattr(args, "plot", None))


def _cases(args: argparse.Namespace, top: argparse.ArgumentParser, commands: Sequence[str], began: float) -> int:
    if args.isa:
        os.environ |= {"CIBR_KERNELS_ISA": args.isa, **VENDOR.get(args.isa, {})}

    from bench.cases import CASES, chosen

    if args.list:
        print("\n".join([*(f"{c.name}{'  (extra)' if c.extra else ''}" for c in CASES), *commands[1:]]))
        return 0
    for name in args.names:
        if name in commands:
            top.error(f"{name} runs alone")
        if not any(case.name.startswith(name) for case in CASES):
            plain = [c.name for c in CASES if not c.extra]
            top.error(f"no case is called {name!r}; known are {', '.join([*plain, *commands[1:]])} and more: --list")
    args.brief = not (args.names or args.all or args.quick)
    cases = chosen(CASES, args.names, everything=args.all, quick=args.quick, brief=args.brief)
    if args.quick or args.brief:
        cases = [replace(c, baselines=tuple(b for b in c.baselines if b in FEW_PEERS)) for c in cases]
    if args.quick:
        cases.sort(key=lambda case: case.n)  # what is left out for time is large
    if args.fused:
        cases = [replace(c, baselines=(), target=None) for c in cases]
    if not cases:
        top.error(f"--quick has none of {', '.join(args.names)}")
    if args.isa:
        from cibr_kernels.dispatch import backends

        known = backends.compiled().supported_isas() if backends.native_available() else []
        if args.isa not in known:
            top.error(f"--isa must be one of {', '.join(known)}, got {args.isa!r}")
    processes.start_server()  # after every refusal: it ends no sooner than its imports
    return run(cases, args, began)


def run(cases: Sequence[Any], args: argparse.Namespace, began: float) -> int:
    """Measures, prints as it goes, and writes what was asked for."""
    from tqdm import tqdm

    from bench import machine, measure, report

    if args.plot:
        try:
            report.require_matplotlib()
        except ModuleNotFoundError as error:
            print(error, file=sys.stderr)
            return 2
    about = machine.describe()
    print("\n".join(f"{key:>13}: {value}" for key, value in about.items()) + "\n", flush=True)
    results, left_out = [], []
    with tqdm(total=sum(1 + len(c.implementations) for c in cases), unit="step", file=sys.stderr, leave=False) as bar:

        def tick(label: str) -> None:
            bar.set_description(label)
            bar.update()

        for case in cases:
            if args.quick and time.monotonic() > began + QUICK_SECONDS:
                left_out.append(case.name)
                continue
            budget = QUICK_BUDGET if args.quick else BRIEF_BUDGET if args.brief else BUDGET
            budget *= 3 if case.target and not args.quick else 1
            result = measure.measure(case, budget, tick, began + QUICK_STOP if args.quick else None)
            results.append(result)
            with tqdm.external_write_mode(file=sys.stdout):
                print(report.table(result) + "\n", flush=True)
    if left_out:
        print(f"left out for time: {', '.join(left_out)}")
    if args.brief:
        print("a selection of cases and peers; `python bench/ NAME` has more, --all every one, --list their names")
    if args.json:
        report.write_json(args.json, about, results, {"left_out": left_out})
    if args.plot:
        report.plot(args.plot, about, results)
    wrong = [f"{r.case.name} {row.implementation}" for r in results for row in r.rows if row.wrong]
    if wrong:
        print(f"WRONG RESULTS: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0
