"""`bench gpu` as far as a CPU goes: the measuring function, its tables and files, the command line, the search."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cases as all_cases
from bench import cli, gpu, measure, peers, report
from bench.cases import GPU_CASES, Case, Passes, gpu_case
from bench.devices import Cuda
from bench.floor import DOT_FAMILY, Gauge
from bench.measure import Result, Row, difference, turns
from bench.peers import IMPLEMENTATIONS, Implementation
from bench.static import search

ROOT = Path(__file__).resolve().parents[2]

TINY = [
    gpu_case("clip_loss", 48, 32),
    gpu_case("clip_loss", 48, 32, "float32", backward=False),
    gpu_case("clip_loss", 48, 32, "float32", stash=True),
    gpu_case("critic_moments", 24, 16, "float32"),
    gpu_case("log_mean_exp", 24, 16, "float32"),
    gpu_case("siglip_loss", 48, 32),
]


class Here(Cuda):
    """The GPU's way of measuring on the CPU: a clock that is the wall's and a peak that is a number."""

    name = "cpu"

    def available(self) -> float:
        return 1e9

    def fresh(self) -> None: ...

    def timed(self, run: Callable[[], Any]) -> tuple[float, Any]:
        began = time.perf_counter()
        result = run()
        return time.perf_counter() - began, result

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        run()
        return 1000

    def graph(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return run

    def gauge(self, case: Case) -> Gauge | None:
        made = Gauge(1e9, lambda: None, "vendor GEMM", lambda run: 1e-3)
        return made if case.op in DOT_FAMILY else None  # as of a GPU


def measured(case: Case, *baselines: str, budget: float = 0.0) -> Result:
    return measure.measure(replace(case, baselines=baselines), budget, device=Here())


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_every_implementation_that_runs_here_agrees(case, monkeypatch):
    monkeypatch.setattr(measure, "AT_LEAST", 0.0)
    names = [n for n in ("eager", "open_clip", "torch-chunked", "open_clip+graph") if (case.op, n) in IMPLEMENTATIONS]
    result = measured(case, *names)
    for row in result.rows:
        assert row.note == "" and row.seconds and min(row.seconds) > 0 and row.extra_bytes == 1000
        assert not row.wrong and (row.implementation == "fused") == (row.loss_diff is None), row
        assert (row.grad_diff is None) == (row.implementation == "fused" or not case.backward)


def test_a_wrong_implementation_is_called_wrong(monkeypatch):
    case = TINY[1]
    for factor, wrong in ((1.5, True), (math.nan, True), (1 + 1e-7, False)):
        off = replace(
            IMPLEMENTATIONS["clip_loss", "fused"], build=lambda c, f=factor: lambda inputs: f * peers.fused(c)(inputs)
        )
        monkeypatch.setitem(IMPLEMENTATIONS, ("clip_loss", "off"), off)
        result = measured(case, "off")
        assert result.rows[1].wrong is wrong and ("WRONG: differs from fused" in report.table(result)) is wrong


def test_a_peer_that_is_missing_fails_or_does_not_fit_is_a_row(monkeypatch):
    def missing(case: Case) -> peers.Loss:
        raise ModuleNotFoundError("No module named 'flash_nothing'", name="flash_nothing")

    def broken(case: Case) -> peers.Loss:
        return lambda inputs: torch.zeros(3) @ torch.zeros(4)

    for name, build, needed in (("missing", missing, 0.0), ("broken", broken, 0.0), ("huge", missing, 2e9)):
        made = Implementation(build, lambda case: None, lambda case, needed=needed: needed)
        monkeypatch.setitem(IMPLEMENTATIONS, ("clip_loss", name), made)
    result = measured(TINY[0], "missing", "broken", "huge")
    notes = [row.note for row in result.rows]
    assert notes[0] == "" and notes[1] == "failed: ModuleNotFoundError: No module named 'flash_nothing'"
    assert notes[2].startswith("failed: RuntimeError: ") and notes[3] == "needs about 2 GB, 1 GB may be used: not run"
    assert [len(row.seconds) for row in result.rows[1:]] == [0, 0, 0]


def test_a_gradient_that_a_peer_lacks_is_left_out():
    loss, one, half = torch.tensor(2.0), torch.ones(3), torch.full((3,), 0.5)
    assert difference((loss, (one, one)), loss, (None, half)) == {"loss_diff": 0.0, "grad_diff": pytest.approx(0.5)}
    assert difference((loss, (one, one)), loss / 2, (one, None)) == {"loss_diff": 0.5, "grad_diff": 0.0}
    assert difference((loss, (one,)), loss, (None,)) == {"loss_diff": 0.0, "grad_diff": None}


def test_the_fused_op_may_not_fail(monkeypatch):
    def broken(case: Case) -> peers.Loss:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(
        IMPLEMENTATIONS, ("clip_loss", "fused"), replace(IMPLEMENTATIONS["clip_loss", "fused"], build=broken)
    )
    result = measured(TINY[1], "eager")
    assert [row.wrong for row in result.rows] == [True, False] and len(result.rows[1].seconds) >= 1
    assert "RuntimeError: no such kernel  WRONG: fails" in report.table(result)


def test_implementations_take_turns_until_their_share_is_used():
    seconds: dict[str, list[float]] = {"quick": [], "slow": []}
    for name in turns(seconds, budget=4.0, rounds=3):
        seconds[name].append({"quick": 0.1, "slow": 5.0}[name])
    assert seconds == {"quick": [0.1] * 3, "slow": [5.0]}


@pytest.mark.parametrize(("at_least", "rounds"), [(0.5, 3), (2.0, 10), (100.0, 33)])
def test_short_ones_take_more_turns(at_least, rounds):
    seconds: dict[str, list[float]] = {"a": [], "b": []}
    for name in turns(seconds, budget=4.125, rounds=3, at_least=at_least):
        seconds[name].append({"a": 0.0625, "b": 0.140625}[name])
    assert len(seconds["a"]) == rounds


def test_the_table_gives_ratios_the_floor_and_what_was_predicted():
    case = gpu_case("clip_loss", 1000, 500)
    rows = [
        Row("fused", [0.001, 0.002, 0.004], 10**6, passes=Passes(2, 2), numerics="f32, f32"),
        Row("eager", [0.006], 5 * 10**6, 1e-3, 2e-3, passes=Passes(1, 2), numerics="bf16, f32"),
    ]
    result = Result(case, rows, (8e12,), "vendor GEMM")
    measure.add_floor(result)
    lines = report.table(result, {(case.name, "fused"): 1.5}).splitlines()
    assert lines[0] == "clip_loss-train-1000x500   vendor GEMM: 8000 GF/s" and len(lines) == 4
    assert len({len(line) for line in lines[1:]}) == 1 and lines[1].endswith("PREDICTED")
    times = ["fused", "2", "1", "..", "4", "1x", "1", "MB", "1x"]
    assert lines[2].split() == [*times, "4", "50", "%", "f32,", "f32", "-", "-", "1.5"]  # 4 x 1e9 / 8e12 of 1 ms
    peer = ["6", "6", "..", "6", "3x", "5", "MB", "5x", "3", "6", "%", "bf16,", "f32", "1.0e-03", "2.0e-03", "-"]
    assert lines[3].split()[1:] == peer


def test_predictions_are_those_of_the_same_processor():
    found = gpu.recorded_predictions("NVIDIA H100 80GB HBM3")
    assert found == gpu.recorded_predictions("NVIDIA H200") and found != gpu.recorded_predictions("NVIDIA B200") != {}
    assert found["clip_loss-train-65536x512", "fused"] > 10 and gpu.recorded_predictions("NVIDIA L4") == {}


def test_steps_of_small_batches_are_timed_in_a_graph_too():
    assert "fused+graph" in gpu_case("clip_loss", 4096, 512).implementations
    assert "fused+graph" not in gpu_case("clip_loss", 65536, 512).implementations


def test_results_are_named_after_the_device(tmp_path):
    about = {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.14"}
    result = Result(TINY[0], [Row("fused", [0.5], 7)], None)
    text, data = gpu.write(tmp_path, about, [result])
    assert text.name == "gpu-nvidia-h100-80gb-hbm3.txt" and "NVIDIA H100" in text.read_text()
    assert json.loads(data.read_text())["results"][0]["rows"][0]["seconds"] == [0.5]
    assert not list(tmp_path.glob("*.partial*"))


def test_cases_have_names_and_implementations():
    names = [case.name for case in GPU_CASES]
    assert len(set(names)) == len(names)
    for case in GPU_CASES:
        assert case.implementations[0] == "fused" and (case.tier != "stash" or len(case.implementations) == 1)
    passes = IMPLEMENTATIONS["clip_loss", "fused"].passes
    assert [passes(gpu_case("clip_loss", 65536, 512, stash=stash)).total for stash in (False, True)] == [4, 3]


# ------------------------------------------------------------------------------------------------ command line
def test_without_a_gpu_there_is_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["gpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == gpu.NO_GPU + "\n" and "--predict" in gpu.NO_GPU


def test_an_unknown_case_lists_the_known(capsys):
    assert cli.main(["gpu", "clip_los5", "--predict"]) == 2
    assert "clip_los5" in (err := capsys.readouterr().err) and GPU_CASES[0].name in err


def test_search_and_predict_go_together(monkeypatch):
    seen = {}

    def measure(*args, **options) -> int:
        seen.update(options)
        return 0

    monkeypatch.setattr("bench.gpu.main", measure)
    assert cli.main(["gpu", "--predict", "--search"]) == 0
    assert seen["search"] and seen["predict"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["scale", "--predict"],
        ["toy", "--plot"],
        ["clip_loss", "--search"],
        ["gpu", "--predict", "--host"],
        ["gpu", "--columns", "--predict"],
    ],
    ids=" ".join,
)
def test_a_command_refuses_the_flags_of_others(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and arguments[-1] in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--predict", "--columns"])
def test_predictions_without_triton_say_what_to_install(flag, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["gpu", flag]) == 2
    assert "pip install triton" in capsys.readouterr().err


@pytest.mark.slow
def test_predictions_are_called_that_and_count_the_passes(tmp_path, capsys, monkeypatch):
    pytest.importorskip("triton")
    from bench.static import predictions
    from bench.static.gpus import GPUS

    cases = [gpu_case("clip_loss", 4096, 512), gpu_case("clip_loss", 4096, 512, backward=False)]
    monkeypatch.setattr(all_cases, "GPU_CASES", cases)
    monkeypatch.setattr(predictions.main, "__defaults__", (cases, (90,)))
    assert cli.main(["gpu", "--predict", "--json", str(tmp_path / "p.json")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("PREDICTIONS, not measurements") and "PREDICTED ms" in out and GPUS[90].name in out
    train, forward = json.loads((tmp_path / "p.json").read_text())
    assert (train["passes"], forward["passes"]) == (pytest.approx(4.0), pytest.approx(1.0))
    for row in (train, forward):
        assert 0 < row["bound_ms"] < row["predicted_ms"] and 0 < row["percent_of_peak"] < 100 and not row["note"]


@pytest.mark.slow
def test_columns_save_what_the_allocator_counts_and_cost_little(tmp_path, capsys, monkeypatch):
    """Peaks are those of the fake device's allocator, whose record has no row for P by rows."""
    pytest.importorskip("triton")
    from bench.guards import host
    from bench.static import columns

    monkeypatch.setattr(columns.main, "__defaults__", ((90,), ((65536, 512),)))
    assert cli.main(["gpu", "--columns", "--json", str(tmp_path / "c.json")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("PREDICTIONS, not measurements") and "ratio" in out
    rows, cols = json.loads((tmp_path / "c.json").read_text())
    recorded = host.read()["counts"]["clip_loss 65536x512"]["peak_bytes"]
    assert cols["peak_bytes"] == pytest.approx(recorded, abs=1 << 16)
    assert rows["peak_bytes"] - cols["peak_bytes"] == pytest.approx(8192 * (65536 - 16384) * 2, rel=0.01)  # of P
    assert 1 < cols["milliseconds"] / rows["milliseconds"] < 1.05 and cols["moved_bytes"] > rows["moved_bytes"]
    assert cols["waves"][1] == rows["waves"][1] / 4 and cols["launches"] > rows["launches"]


# ------------------------------------------------------------------------------------------------ search
@dataclass(frozen=True)
class Tile:
    block_m: int = 32
    num_warps: int = 4
    num_stages: int = 2
    tma: bool = True


def test_neighbours_are_one_step_away_and_stay_in_range():
    found = set(search.neighbours(Tile(256, 2, 2)))
    assert found == {Tile(128, 2, 2), Tile(256, 4, 2), Tile(256, 2, 3)}


def test_the_search_climbs_to_the_best_and_never_takes_what_does_not_run():
    def seconds(tile: Tile) -> float:
        if tile.block_m * tile.num_stages > 500:
            return math.inf
        return abs(math.log2(tile.block_m) - 7) + abs(tile.num_stages - 3) + abs(tile.num_warps - 8)

    best, tried = search.climb(Tile(), seconds)
    assert best == Tile(128, 8, 3) and tried[best] == 0
    assert all(tried[t] == math.inf for t in tried if t.block_m * t.num_stages > 500)


def test_the_search_puts_the_table_back(monkeypatch):
    pytest.importorskip("triton")
    choice = search.Choice("sm_90", 2, "gradient")
    before, seen = choice.get(), []

    def seconds() -> float:
        seen.append(choice.get())
        if len(seen) == 2:
            raise RuntimeError("out of shared memory")
        return 1.0 / len(seen)

    text = search.search(choice, seconds, "case")
    assert choice.get() == before and len(set(seen)) == len(seen) > 2
    assert "faster: " in text and str(seen[1]) not in text.partition("faster")[2]
    assert text.endswith("\n  1 do not run, the last for RuntimeError: out of shared memory")


def test_a_launcher_that_fails_with_the_tables_entry_is_an_error():
    pytest.importorskip("triton")
    choice = search.Choice("sm_90", 2, "gradient")
    before = choice.get()

    def seconds() -> float:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        search.search(choice, seconds, "case")
    assert choice.get() == before
