"""What the trainer adds to its arithmetic where that is least: heads on cached features, `python bench/ heads`.

    step    a batch of the memory-mapped features, norm, projections, CLIP's loss, backward, AdamW, checks, as in a run
    floor   the loss and the two projections alone, forward and backward, on features that are there already

Both on one thread, alternating, in processor time, so the ratio holds on a busy machine.  Demanded: at most 1.3 from
512 pairs on; below, AdamW, layer norm and the batch, which the floor has not, are no longer small.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cibr_kernels as ck
from bench.experiments.frame import Outcome

IMAGE, TEXT, SHARED = 1280, 384, 256  # EfficientNet-Lite0's and MiniLM's features, the head's
SIZES, QUICK_SIZES = (192, 512, 1024, 2048, 4096), (192, 1024)
ALLOWED, ALLOWED_FROM = 1.3, 512
REPEATS, WARM = 40, 3


def trainer_step(folder: Path, n: int) -> Callable[[], None]:
    """One step of a run on made-up features, its batch included."""
    from safetensors.torch import save_file

    from cibr.config import RunConfig
    from cibr.run.ranks import Ranks
    from cibr.session import prepare, resolve
    from cibr.step import take_step

    rows = 4 * n
    features = {"image_features": torch.randn(rows, IMAGE), "text_features": torch.randn(2 * rows, TEXT)}
    places = {"caption_starts": torch.arange(0, 2 * rows + 1, 2), "group_ids": torch.arange(2 * rows)}
    save_file(features | places, folder / "features.safetensors")
    options: dict[str, Any] = {"model": "heads", "objective": "clip", "batch_size": n, "steps": 1000}
    where = {"data": f"features:{folder / 'features.safetensors'}", "out": str(folder / "run")}
    config = RunConfig.from_dict({**options, **where, "threads": 1, "device": "cpu", "precision": "fp32"})
    with contextlib.redirect_stdout(io.StringIO()):
        session = prepare(resolve(config), None, Ranks())
    batches, steps = session.batches.start(0), itertools.count()

    def step() -> None:
        take_step(session.players, session.players.stages[0], [next(batches)], next(steps))

    return step


def floor_step(n: int) -> Callable[[], None]:
    """Rows of about unit norm without a normalisation, so that the loss takes the same path as the trainer's."""
    image, text = nn.Linear(IMAGE, SHARED, bias=False), nn.Linear(TEXT, SHARED, bias=False)
    x, y = (torch.randn(n, width) * (3 / SHARED) ** 0.5 for width in (IMAGE, TEXT))
    scale, ids = nn.Parameter(torch.tensor(1 / 0.07).log()), torch.arange(n)

    def step() -> None:
        image.weight.grad = text.weight.grad = scale.grad = None
        ck.clip_loss(image(x), text(y), scale.exp(), group_ids=ids).backward()

    return step


def seconds(work: Callable[[], None]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def run(quick: bool) -> Outcome:
    """Medians over alternating repeats."""
    lines = [f"{'pairs':>6} {'step, ms':>10} {'floor, ms':>10} {'ratio':>7}    processor time, one thread"]
    found = []
    threads = torch.get_num_threads()
    for n in QUICK_SIZES if quick else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            step, floor = trainer_step(Path(folder), n), floor_step(n)
            times = [(seconds(step), seconds(floor)) for _ in range(WARM + (REPEATS if n < 2000 else REPEATS // 4))][
                WARM:
            ]
        ours, least = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(a / b for a, b in times)
        lines.append(f"{n:6} {1e3 * ours:10.2f} {1e3 * least:10.2f} {ratio:7.2f}")
        found.append({"pairs": n, "step_ms": 1e3 * ours, "floor_ms": 1e3 * least, "ratio": ratio})
    torch.set_num_threads(threads)
    met = all(row["ratio"] <= ALLOWED for row in found if row["pairs"] >= ALLOWED_FROM)
    lines.append(f"at most {ALLOWED} from {ALLOWED_FROM} pairs on: {'met' if met else 'MISSED'}")
    return Outcome("\n".join(lines), {"heads": found}, met)
