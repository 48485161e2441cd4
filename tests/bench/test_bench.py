"""The benchmark measures what it says: its arithmetic, its memory, its agreement check and its command line."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cibr_kernels as ck
from bench import cases as all_cases
from bench import cli, devices, floor, measure, optional_peers, peers, processes, report
from bench.cases import CASES, Case, Passes, Target
from bench.experiments import curve
from bench.guards import ratios
from bench.measure import Row
from cibr_kernels.dispatch import backends

ROOT = Path(__file__).resolve().parents[2]

MIB = 2**20
KINDS = {(c.op, c.dtype, c.backward, c.tier, c.activation): c for c in CASES if not c.group}.values()
SLOW = ("compiled", "max-autotune", "cut-cross-entropy", "keops")


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_every_implementation_computes_the_same(case):
    tiny = replace(case.shrunk(48), width=32, baselines=tuple(b for b in case.baselines if b not in SLOW))
    answers, rates, unit = measure.time_child(tiny, tiny.implementations, budget=0.01)
    for name in tiny.implementations:
        assert len(answers[name]["seconds"]) >= 1 and min(answers[name]["seconds"]) > 0
        assert measure.agrees(tiny, Row(name, **{k: v for k, v in answers[name].items() if k != "seconds"})), answers
    for name in tiny.baselines:
        compared = peers.IMPLEMENTATIONS[case.op, name].same
        assert (answers[name].get("grad_diff") is not None) == (tiny.backward and compared)
    assert len(rates) == (len(answers["fused"]["seconds"]) if unit else 0)
    kinds = (3 if tiny.backward else 1) if tiny.op in floor.DOT_FAMILY else 2
    assert all(len(best) == kinds and min(best) > 0 for best in rates)
    expected = {"cibr_loss": "3 matmuls", "critic_moments": "issue"}.get(tiny.op, "vendor GEMM, ")
    assert unit.startswith(expected) or (tiny.op == "cibr_loss" and not unit)  # machine code that cannot be read


def test_cases_are_named_once_and_all_their_implementations_exist():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    for case in [*CASES, *all_cases.GPU_CASES]:
        for implementation in case.implementations:
            entry = peers.IMPLEMENTATIONS[case.op, implementation]
            made_of_matmuls = case.op in ("clip_loss", "siglip_loss")
            assert entry.peak_bytes(case) > 0 and (entry.passes(case) is not None) == made_of_matmuls
        assert case.target is None or case.target.baseline in case.baselines


def test_the_targets_of_the_project_are_in_the_table():
    targets = {case.name: case.target for case in CASES if case.target}
    clip = Target("open_clip", 2.0, 1 / 10)
    assert targets == {
        "clip_loss-train-8192-float32": clip,
        "clip_loss-train-8192-bfloat16": clip,
        "critic_moments-train-2048-float32": Target("eager", 60.0, 1 / 100),
    }


def test_a_wrong_gradient_is_called_wrong():
    case = Case("clip_loss", 64, 32)
    assert measure.agrees(case, Row("peer", loss_diff=1e-7, grad_diff=1e-6))
    assert not measure.agrees(case, Row("peer", loss_diff=1e-7, grad_diff=0.1))
    assert not measure.agrees(case, Row("peer", loss_diff=float("nan"), grad_diff=1e-6))
    x, zero = torch.randn(8, 4), torch.zeros(1)
    difference = measure.difference((x.sum(), (x, x, zero)), x.sum(), (x, 1.5 * x, zero + 1e-9))
    assert difference["loss_diff"] == 0 and difference["grad_diff"] == pytest.approx(0.5)


def test_floor_is_passes_times_the_flops_over_their_rates():
    flops = 2 * 8192**2 * 512
    train, forward = Passes(2, 2), Passes(1, 0)
    seconds = floor.floor_seconds(train, 8192, 8192, 512, (200e9, 160e9, 100e9))
    assert seconds == pytest.approx(flops * (2 / 200e9 + 1 / 160e9 + 1 / 100e9))
    assert floor.floor_seconds(forward, 8192, 8192, 512, (200e9,)) == pytest.approx(flops / 200e9)
    case = Case("clip_loss", 64, 512)
    result = measure.Result(case, [Row("fused", [1.0], passes=train)], (4e6, 2e6, 1e6), "vendor GEMM")
    measure.add_floor(result)
    flops = 2 * 64**2 * 512
    assert result.rows[0].floor_percent == pytest.approx(100 * flops * (2 / 4e6 + 1 / 2e6 + 1 / 1e6))
    assert f"{100 * flops * 4 / 4e6:.0f} %" in result.floor_note  # all at the rate of X Y^T
    assert "X Y^T 0, G Y 0, G^T X 0 GF/s" in report.table(result)


def test_the_vendor_is_timed_on_the_products_of_a_panel(monkeypatch):
    monkeypatch.setattr(floor, "panel", lambda case: (32, 16, 48))
    for backward, products in ((True, 3), (False, 1)):
        unit = floor.vendor(Case("clip_loss", 64, 16, backward=backward))
        assert [one.work for one in unit.products] == [2 * 32 * 16 * 48] * products and len(unit.rates()) == products
    assert floor.vendor(Case("clip_loss", 64, 16, "bfloat16")).what in ("vendor GEMM, bfloat16", "vendor GEMM, float32")
    monkeypatch.undo()
    assert floor.panel(Case("clip_loss", 16384, 512)) == (2048, 512, 8192)


def test_passes_follow_the_stash_budget(monkeypatch):
    monkeypatch.setattr(peers.ck, "native_available", lambda: True)
    passes = peers.IMPLEMENTATIONS["clip_loss", "fused"].passes
    fits, too_large = int((peers.ck.stash_budget() / 4) ** 0.5), int((peers.ck.stash_budget() / 4) ** 0.5) + 1
    assert passes(Case("clip_loss", fits, 512)) == (1, 2) and passes(Case("clip_loss", too_large, 512)) == (2, 2)
    assert passes(Case("clip_loss", too_large, 512, "bfloat16")) == (1, 2)
    assert passes(Case("clip_loss", fits, 512, backward=False)) == (1, 0)


def _peak_of_96_mib() -> int:
    devices.map_large_allocations()

    def work() -> torch.Tensor:
        torch.ones(48 * MIB // 4)  # freed at once: it must not be added to what follows
        kept = torch.ones(64 * MIB // 4)
        torch.ones(32 * MIB // 4)
        return kept

    return devices.peak_extra_bytes(work)


def test_memory_of_a_known_allocation():
    assert 95 * MIB < processes.call(_peak_of_96_mib) < 104 * MIB


@pytest.mark.parametrize(("dtype", "packed"), [("float32", 8192), ("bfloat16", 4096)])
def test_a_step_without_the_stash_takes_memory_for_rows_alone(dtype, packed):
    """In place of two matrices of 8192 x 8192: gradients, float32 sums of dy, rows of y, and a panel of weights."""
    if not ck.native_available():
        pytest.skip("the compiled kernels are not built")
    n, d = 8192, 256
    case = Case("clip_loss", n, d, dtype, tier="panel")
    bf16_products = backends.compiled().isa() in ("avx512bf16", "amx")  # y as it is, packed whole; elsewhere upcast
    rows = 2 * n * peers.itemsize(case) + 4 * n + 4 * packed  # of d numbers
    panel, others = 4 * 384 * (4096 + 3 * d), 3 * MIB + torch.get_num_threads() * MIB // 4
    assert processes.call(measure.memory_child, case, "fused") < rows * d + panel + others
    forward = processes.call(measure.memory_child, replace(case, backward=False), "fused")
    whole = 4 * n * d if dtype == "float32" else 2 * n * d if bf16_products else 0
    assert forward < whole + others


def _fail(message: str) -> None:
    raise ValueError(message)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_child_that_raises_or_dies_is_reported():
    with pytest.raises(processes.Failed, match="ValueError: out of luck"):
        processes.call(_fail, "out of luck")
    with pytest.raises(processes.Failed, match="-9"):
        processes.call(_die)


def test_a_child_is_stopped_at_its_deadline():
    with pytest.raises(processes.Failed, match="out of time"):
        processes.call(time.sleep, 60, deadline=time.monotonic() + 0.5)


def test_what_does_not_fit_is_reported_and_not_run(monkeypatch):
    case = Case("critic_moments", 128, 32, baselines=("eager",), target=Target("eager", 60.0, 1 / 100))
    needed = peers.IMPLEMENTATIONS["critic_moments", "eager"].peak_bytes(case)
    unlimited = peers.Implementation(peers.fused, lambda c: None, lambda c: 1.0)
    monkeypatch.setitem(peers.IMPLEMENTATIONS, ("critic_moments", "fused"), unlimited)
    monkeypatch.setattr(devices, "available_bytes", lambda: int(needed))
    result = measure.measure(case, budget=0.0)
    fused, eager = result.rows
    assert len(fused.seconds) == 1 and fused.extra_bytes is not None
    assert eager.seconds == [] and f"needs about {peers.gigabytes(needed)}" in eager.note
    assert report.targets(result) == ["  target against eager: not measured"]


def test_marks_of_a_target():
    case = Case("clip_loss", 8192, 512, baselines=("open_clip",), target=Target("open_clip", 2.0, 1 / 10))
    rows = [Row("fused", [1.0, 2.0, 3.0], 10), Row("open_clip", [3.8], 1000)]
    (line,) = report.targets(measure.Result(case, rows, (1e11,)))
    assert "FAIL 1.90x" in line and "PASS 1/100.0" in line


def test_sizes_are_printed_in_their_unit():
    assert [peers.gigabytes(x) for x in (0, 512, 12.9e9, 3.3e16)] == ["0", "512 B", "12.9 GB", "3.3e+04 TB"]


def test_command_line_writes_json_and_a_picture(tmp_path, monkeypatch, capsys):
    cases = [Case("clip_loss", 96, 32, baselines=("eager", "one-logits"), quick=True), Case("clip_loss", 64, 32)]
    monkeypatch.setattr(all_cases, "CASES", cases)
    arguments = ["--quick", "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cli, "QUICK_SECONDS", 500)  # a loaded machine is no reason to fail
    monkeypatch.setattr(cli, "QUICK_STOP", 500)
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "vendor GEMM" in out and "cpu:" in out
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert [r["name"] for r in written["results"]] == ["clip_loss-train-96-float32-d32"]
    rows = {row["implementation"]: row for row in written["results"][0]["rows"]}
    assert set(rows) == {"fused", "eager", "one-logits"} and all(r["seconds"] for r in rows.values())
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial*"))


def test_no_case_starts_after_the_deadline(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(all_cases, "CASES", [Case("clip_loss", 64, 32, quick=True)])
    monkeypatch.setattr(cli, "QUICK_SECONDS", -1)
    assert cli.main(["--quick", "--json", str(tmp_path / "b.json")]) == 0
    assert "left out for time: clip_loss-train-64-float32-d32" in capsys.readouterr().out


@pytest.mark.parametrize("start", [["bench/"], ["-m", "bench"]], ids=" ".join)
def test_an_unknown_name_lists_the_known_ones(start):
    """At once: torch is not imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *start, "clip_los5"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "argparse" in done.stderr and "torch" not in done.stderr
    assert "clip_los5" in done.stderr and "clip_loss-train-8192-float32" in done.stderr and "toy" in done.stderr


def test_an_instruction_set_is_forced_and_baselines_are_left_out():
    """In a process of its own: it is chosen where the kernels are loaded."""
    if not ck.native_available():
        pytest.skip("the compiled kernels are not built")
    start = "from bench import cli, processes; processes.PRELOAD.remove('open_clip.loss'); raise SystemExit(cli.main())"
    command = [sys.executable, "-c", start, "clip_loss-train-64-", "--fused", "--isa", "generic"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and ", generic in use" in done.stdout and "DEFAULT, mkl" in done.stdout
    assert "fused" in done.stdout and "open_clip" not in done.stdout


def test_an_instruction_set_that_is_none_is_refused(capsys, monkeypatch):
    if not ck.native_available():
        pytest.skip("the compiled kernels are not built")
    monkeypatch.setenv("CIBR_KERNELS_ISA", "generic")  # which main sets: put back after the test
    with pytest.raises(SystemExit) as stop:
        cli.main(["clip_loss-train-64-", "--isa", "avx3"])
    assert stop.value.code == 2 and "--isa must be one of generic" in capsys.readouterr().err


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        report.require_matplotlib()


def test_what_a_name_chooses():
    def names(*asked: str, **options: bool) -> list[str]:
        return [case.name for case in all_cases.chosen(CASES, asked, **options)]

    plain = names()
    assert "clip_loss-train-4096-float32" in plain and "clip_loss-train-4096-float32-stash" not in plain
    assert names(everything=True) == [case.name for case in CASES] and len(CASES) > len(plain)
    assert names("clip_loss-train-4096-float32") == ["clip_loss-train-4096-float32"]
    assert names("clip_loss-train-32768-float32-d256") == [
        "clip_loss-train-32768-float32-d256-stash",
        "clip_loss-train-32768-float32-d256-panel",
    ]
    assert set(names("clip_loss")) == {name for name in plain if name.startswith("clip_loss")}
    assert "clip_loss-train-1024-float32-stash" in names("clip_loss-train-1024", everything=True)
    assert all(case.quick for case in all_cases.chosen(CASES, [], quick=True))
    brief = all_cases.chosen(CASES, [], brief=True)
    assert {case.op for case in brief} == {*all_cases.WIDTHS} - {"log_mean_exp"} and not any(c.extra for c in brief)
    assert {c.target for c in brief if c.target} == {c.target for c in CASES if c.target}


def test_sizes_widths_and_tiers_of_the_extra_cases():
    extra = {case.name for case in CASES}
    for dtype in ("float32", "bfloat16"):
        for width in ("-d256", "", "-d768", "-d1024"):
            assert {
                f"clip_loss-train-{n}-{dtype}{width}-{tier}" for n in (1024, 32768) for tier in all_cases.TIERS
            } <= extra
            assert {f"siglip_loss-train-32768-{dtype}{width}", f"clip_loss-forward-65536-{dtype}{width}"} <= extra
    assert "clip_loss-forward-131072-float32" in extra


def test_a_tier_is_forced():
    if not ck.native_available():
        pytest.skip("the compiled kernels are not built")
    passes = peers.IMPLEMENTATIONS["clip_loss", "fused"].passes
    for tier, expected in (("stash", (1, 2)), ("panel", (2, 2))):
        case = Case("clip_loss", 64, 32, tier=tier)
        assert passes(replace(case, n=65536)) == expected
        before = ck.stash_budget()
        with peers.budget_of(case):
            assert ck.stash_budget() == all_cases.TIERS[tier]
        assert ck.stash_budget() == before


@pytest.mark.parametrize(
    "module, build",
    [
        ("cut_cross_entropy", optional_peers.cut_cross_entropy),
        ("pykeops.torch", optional_peers.keops),
    ],
)
def test_a_peer_that_is_missing_says_what_to_install(module, build, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"is not installed .*pip install '\.\[peers\]'"):
        build(Case("clip_loss", 64, 32))


def test_rows_say_what_their_logits_are_rounded_to():
    bf16 = Case("clip_loss", 64, 32, "bfloat16")
    said = {
        name: peers.IMPLEMENTATIONS["clip_loss", name].numerics(bf16) for name in ("fused", "open_clip", "compiled")
    }
    assert said == {"fused": "f32, f32", "open_clip": "bf16, bf16", "compiled": "bf16, f32"}
    assert peers.IMPLEMENTATIONS["clip_loss", "open_clip"].numerics(replace(bf16, dtype="float32")) == "f32, f32"


def test_the_curve_measures_a_point_and_finds_a_cliff():
    point = curve.point_child(Case("clip_loss", 96, curve.WIDTH, backward=False), budget=0.0)
    assert point.n == 96 and point.seconds > 0 and point.floor_percent > 0 and point.runs == 1
    assert "clip_loss" not in curve.line(replace(point, n=131072)) and "68.7 GB" in curve.line(replace(point, n=131072))
    steady = [replace(point, n=n, seconds=point.seconds * (n / 96) ** 2) for n in (96, 192, 384)]
    assert curve.cliffs(steady) == []
    (found,) = curve.cliffs([*steady, replace(point, n=768, seconds=2 * point.seconds * (768 / 96) ** 2)])
    assert "N = 768 float32" in found


def test_ratios_are_tried_again_and_then_fail():
    results = iter([1.1, 1.2, 1.6])
    assert ratios.attempts(1.0, lambda: next(results), needed=1.5) == [1.0, 1.1, 1.2, 1.6]
    assert ratios.attempts(1.5, lambda: 1 / 0, needed=1.5) == [1.5]
    assert len(ratios.attempts(1.0, lambda: 1.0, needed=1.5)) == ratios.ATTEMPTS
    assert [case.name for case in ratios.cases()] and set(ratios.NAMES) == {case.name for case in ratios.cases()}


def test_a_ratio_is_held_to_this_processor_or_loosely_to_another(monkeypatch):
    monkeypatch.setattr(ratios.machine, "processor", lambda: "ours")
    monkeypatch.setattr(ratios, "instruction_set", lambda: "avx512")
    here, there = {"avx512, ours": {"a": 2.0}}, {"avx512, theirs": {"a": 3.0, "b": 4.0}, "avx2, ours": {"c": 5.0}}
    assert ratios.least(here | there, "a") == 2.0 * ratios.MARGIN
    assert ratios.least(here | there, "b") == 4.0 * ratios.OTHER_PROCESSOR
    assert ratios.least(here | there, "c") is None


def test_a_race_takes_turns_and_names_the_strongest():
    race = ratios.Race(Case("clip_loss", 48, 32, baselines=("open_clip", "one-logits")))
    race.rounds = 2
    assert race.attempt() > 0 and race.strongest() in ("open_clip", "one-logits")
    assert [len(times) for times in race.seconds.values()] == [2, 2, 2]
