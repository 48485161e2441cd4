"""The command line.  The fork server starts before the heavy imports, so that both import at the same time."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import processes

QUICK_SECONDS, QUICK_STOP = 45, 56  # --quick must end within 60: no case starts after 45 s, none goes on after 56
BUDGET, QUICK_BUDGET = 6.0, 1.0  # seconds of timing per case


def commands() -> dict[str, Callable[[argparse.Namespace], int]]:
    """What is not a table of CPU cases, by name."""

    def run_toy(args: argparse.Namespace) -> int:
        from bench import toy

        return toy.main(args.json)

    def run_gpu(args: argparse.Namespace) -> int:
        from bench import gpu, host

        if args.host:
            return host.main(args.names[1:], update=args.update)
        return gpu.main(args.json, predict=args.predict, search=args.search, only=args.names[1:])

    def run_scale(args: argparse.Namespace) -> int:
        from bench import scale

        return scale.main(args)

    def run_mi(args: argparse.Namespace) -> int:
        from bench import mi

        return mi.main(args.json, args.plot, quick=args.quick)

    def run_variance(args: argparse.Namespace) -> int:
        from bench import variance

        return variance.main(args.json, args.plot, quick=args.quick)

    def run_curve(args: argparse.Namespace) -> int:
        from bench import curve

        return curve.main(args.json, args.plot, quick=args.quick)

    def run_picture(args: argparse.Namespace) -> int:
        from bench import picture

        return picture.main(args.plot)

    def run_instructions(args: argparse.Namespace) -> int:
        from bench import instructions

        return instructions.main(update=args.update)

    return {
        "instructions": run_instructions,
        "curve": run_curve,
        "picture": run_picture,
        "toy": run_toy,
        "gpu": run_gpu,
        "scale": run_scale,
        "mi": run_mi,
        "variance": run_variance,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """-> exit status: 0; 1 when an implementation disagrees with the fused op; 2 for a bad command line."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python bench/", description="The fused ops against their eager peers: time, peak memory, agreement."
    )
    parser.add_argument("names", nargs="*", help="cases by name or the beginning of one, or a command; see --list")
    parser.add_argument("--all", action="store_true", help="the extra cases too: every width and tier, slow peers")
    parser.add_argument(
        "--quick", action="store_true", help="a few cases, at most 60 s; curve, mi, variance: fewer rows, seeds"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the machine and every number")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw time and memory against N, or the command's picture"
    )
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--update", action="store_true", help="instructions, gpu --host: record the counts")
    parser.add_argument("--predict", action="store_true", help="gpu: predict, without a GPU, from what compilers make")
    parser.add_argument("--host", action="store_true", help="gpu: launches, memory and host instructions, without one")
    parser.add_argument("--search", action="store_true", help="gpu: look for better configurations than the tables'")
    args = parser.parse_args(argv)
    known = commands()
    of_gpu = args.predict or args.search or args.host
    if of_gpu and not args.names:
        args.names = ["gpu"]
    command = args.names[0] if args.names and args.names[0] in known else None
    if of_gpu and command != "gpu":
        parser.error("--predict, --search and --host belong to gpu: python bench/ gpu --predict")
    if args.update and command != "instructions" and not args.host:
        parser.error("--update belongs to instructions and gpu --host: python bench/ instructions --update")
    if not command and not args.list:
        processes.start_server()

    from bench.registry import CASES, chosen

    if args.list:
        print("\n".join([*(f"{c.name}{'  (extra)' if c.extra else ''}" for c in CASES), *known]))
        return 0
    if command == "gpu":
        return known[command](args)
    for name in args.names:
        if name in known and len(args.names) > 1:
            parser.error(f"{name} runs alone")
        if name not in known and not any(case.name.startswith(name) for case in CASES):
            plain = [c.name for c in CASES if not c.extra]
            parser.error(f"no case is called {name!r}; known are {', '.join([*plain, *known])} and more: --list")
    if command:
        return known[command](args)

    cases = chosen(CASES, args.names, everything=args.all, quick=args.quick)
    if args.quick:  # a compilation takes a third of the time there is
        slow = ("compiled", "max-autotune", "cut-cross-entropy")
        cases = [replace(c, baselines=tuple(b for b in c.baselines if b not in slow)) for c in cases]
        cases.sort(key=lambda case: case.n)  # what is left out for time is large
    if not cases:
        parser.error(f"--quick has none of {', '.join(args.names)}")
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
            budget = QUICK_BUDGET if args.quick else BUDGET * (3 if case.target else 1)
            result = measure.measure(case, budget, tick, began + QUICK_STOP if args.quick else None)
            results.append(result)
            with tqdm.external_write_mode(file=sys.stdout):
                print(report.table(result) + "\n", flush=True)
    if left_out:
        print(f"left out for time: {', '.join(left_out)}")
    if args.json:
        report.write_json(args.json, about, results, {"left_out": left_out})
    if args.plot:
        report.plot(args.plot, about, results)
    wrong = [f"{r.case.name} {row.implementation}" for r in results for row in r.rows if row.wrong]
    if wrong:
        print(f"WRONG RESULTS: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0
