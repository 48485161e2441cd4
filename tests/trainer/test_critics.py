"""Critics and encoders in turns: n critic steps on batches of their own, then one of the encoders."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import config, log_of, require_same_state, state, tiny_clip

from cibr.errors import UsageError
from cibr.models import Output
from cibr.run.ranks import Ranks
from cibr.session import prepare, resolve
from cibr.step import take_step
from cibr.train import train

pytestmark = pytest.mark.filterwarnings("ignore:the estimate")
TURNS: dict[str, Any] = {
    "objective": "cibr",
    "critic_hidden": 8,
    "lam": 0.7,
    "lam_warmup_steps": 0,
    "lam_ramp_steps": 0,
    "update": "alternating",
    "lr_warmup_steps": 0,
    "schedule": "constant",
}


@pytest.mark.parametrize(("objective", "n_critic"), [("cibr", 1), ("cibr", 3), ("ceb", 2)])
def test_a_step_is_the_two_players_by_hand(tmp_path: Path, objective: str, n_critic: int) -> None:
    """Two optimisers and two graphs; `eps` keeps Adam from making steps of rounding."""
    options = {**TURNS, "objective": objective, "n_critic": n_critic, "weight_decay": 0.0, "eps": 1e-3}
    session = prepare(resolve(config(tmp_path / "run", **options)), None, Ranks())
    players, batches = session.players, list(itertools.islice(session.batches.start(0), n_critic))
    model, ours = copy.deepcopy((players.model, players.stages[0].objective))
    critics = torch.optim.AdamW(ours.parameters(), 2e-3, eps=1e-3, weight_decay=0)
    encoders = torch.optim.AdamW(model.parameters(), 1e-3, eps=1e-3, weight_decay=0)
    for turn, batch in enumerate(batches):
        output = model(batch)
        statistics = copy.deepcopy(dict(ours.named_buffers()))
        players.seed(0, 0, 0, turn + 1)
        detached = {name: t.detach() for name, t in output.tensors().items()}
        ours(Output.of(detached), batch)["loss"].backward()
        critics.step()
        critics.zero_grad()
        ours.load_state_dict(statistics, strict=False)
    players.seed(0)
    ours(output, batches[-1])["loss"].backward()
    encoders.step()

    assert take_step(players, players.stages[0], batches, 0).finite
    for found, expected in ((players.model, model), (players.stages[0].objective, ours)):
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], value, msg=lambda m, n=name: f"{n}: {m}")
    assert all(p.requires_grad for p in players.critics.parameters())


def test_parts_and_turns(tmp_path: Path) -> None:
    """In parts as in the whole, and resumed bit for bit; critics have moved three times as often."""
    common = {**TURNS, "model": tiny_clip(tmp_path), "n_critic": 3, "batch_size": 15, "eps": 1e-3, "gradient_cap": 0.5}
    train(config(tmp_path / "whole", **common, steps=4))
    for steps in (2, 4):
        train(config(tmp_path / "parts", **common, accumulate=4, steps=steps), resume=True)
    train(config(tmp_path / "unbroken", **common, accumulate=4, steps=4))
    require_same_state(tmp_path / "parts", tmp_path / "unbroken")
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    moves = {name: int(value) for name, value in whole.items() if name.endswith(":step")}
    assert set(moves.values()) == {4, 12}
    assert all((count == 12) == ("objective." in name) for name, count in moves.items())
    assert whole["objective.step"] == 4


def test_stages_without_critics_read_the_same_batches(tmp_path: Path) -> None:
    stages = ('{"steps": 2, "objective": "clip"}', "9:")
    for steps in (1, 2, 3, 4):
        train(config(tmp_path / "run", **{**TURNS, "n_critic": 2}, stages=stages, steps=steps), resume=True)
    train(config(tmp_path / "whole", **{**TURNS, "n_critic": 2}, stages=stages, steps=4))
    require_same_state(tmp_path / "run", tmp_path / "whole")
    norms = [entry["critic_gradient_norm"] for entry in log_of(tmp_path / "whole")]
    assert norms[0] == 0 < norms[-1]


def test_what_has_no_turns(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--objective clip has no critics to move"):
        train(config(tmp_path / "run", update="alternating"))
    with pytest.raises(UsageError, match="--n-critic needs --update alternating"):
        config(tmp_path / "run", objective="cibr", n_critic=2)
