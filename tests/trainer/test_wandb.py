"""`--wandb`: what Weights & Biases is told, by a module that stands for it and keeps the calls."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from runs import config, log_of

from cibr.errors import UsageError
from cibr.train import train


class Service(ModuleType):
    """`wandb`, of which a run uses init, log and finish."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **about: Any) -> Service:
        self.begun.append(about)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        assert self.finished < len(self.begun)
        self.logged.append((step, numbers))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    stand_in = Service()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def test_the_log_of_a_run_and_of_its_resumption_in_one_history(tmp_path: Path, service: Service) -> None:
    more = {"wandb": "a project", "log_every": 2, "eval_every": 3, "val_data": "synthetic:20"}
    for steps in (3, 6):
        train(config(tmp_path / "run", steps=steps, **more), resume=True)
    first, second = service.begun
    assert first["project"] == "a project" and first["name"] == "run" and first["dir"] == str(tmp_path / "run")
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert first["config"]["steps"] == 3 and first["config"]["data"] == "synthetic:200"
    assert service.finished == 2
    assert [step for step, _ in service.logged] == [1, 2, 3, 3, 4, 6, 6]
    entries = [numbers for _, numbers in service.logged if "eval/loss" not in numbers]
    for numbers, entry in zip(entries, log_of(tmp_path / "run"), strict=True):
        assert numbers["loss"] == entry["loss"] and numbers["share_of_time/towers"] == entry["share_of_time"]["towers"]
    assert {"eval/loss", "eval/retrieval/val/text_to_image@1"} <= service.logged[-1][1].keys()

    train(config(tmp_path / "else" / "run", steps=1, wandb="a project"))
    assert service.begun[-1]["id"] != first["id"]  # another run of that name is another history


def test_it_is_told_of_a_run_that_fails(tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("cibr.train.take_step", fail)
    with pytest.raises(KeyError, match="a bug"):
        train(config(tmp_path / "run", wandb="a project"))
    assert service.finished == len(service.begun) == 1


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cibr.train.find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(UsageError, match="pip install wandb"):
        train(config(tmp_path / "run", wandb="a project"))
    assert not (tmp_path / "run").exists()
