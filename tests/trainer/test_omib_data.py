"""CREMA-D and MOSI in miniature, in the layouts that they are distributed in."""

from __future__ import annotations

import pickle
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cibr.errors import UsageError
from cibr.omib import cremad, mosi, train
from cibr.omib.options import OmibOptions

TINY = {
    "warm_up_steps": 2,
    "steps": 4,
    "eval_every": 2,
    "hidden": 8,
    "latent": 4,
    "tokens": 2,
    "batch_size": 4,
    "beta": 0.01,
    "out": "unused",
}


def write_wav(path: Path, seconds: float, pitch: float) -> None:
    times = np.arange(int(16_000 * seconds)) / 16_000
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((12_000 * np.sin(2 * np.pi * pitch * times)).astype("<i2").tobytes())


@pytest.fixture
def crema(tmp_path: Path) -> Path:
    """Ten actors, every emotion."""
    (tmp_path / "AudioWAV").mkdir()
    for actor in range(1001, 1011):
        for k, emotion in enumerate(cremad.EMOTIONS):
            name = f"{actor}_DFA_{emotion}_XX"
            write_wav(tmp_path / "AudioWAV" / f"{name}.wav", 0.1, 200 + 300 * k)
            frames = tmp_path / "Image-01-FPS" / name
            frames.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 30), (40 * k, actor % 100, 100 * i)).save(frames / f"{i:05d}.jpg")
    return tmp_path


def test_cremad_by_actor(crema):
    data = cremad.read(str(crema), anomaly=False)
    assert data.widths == [2 * cremad.BANDS, cremad.SIDE**2] and data.classes == 6
    assert [len(split) for split in (data.train, data.val, data.test)] == [42, 6, 12]  # 7, 1 and 2 actors
    assert data.train.target[:6].tolist() == [5, 4, 3, 1, 0, 2]  # in the order of names: ANG DIS FEA HAP NEU SAD
    loudest = data.train.views[0][:, : cremad.BANDS].argmax(1)
    pitch = 200 + 300 * data.train.target
    assert ((loudest + 0.5) * 8000 / cremad.BANDS - pitch).abs().max() < 250  # a band is 125 Hz wide
    assert not data.notes


def test_cremad_by_its_lists_and_with_a_broken_clip(crema):
    names = sorted(path.stem for path in (crema / "AudioWAV").glob("*.wav"))
    (crema / "train.csv").write_text("".join(f"{name},{name[9:12]}\n" for name in names[:40]))
    (crema / "test.csv").write_text("".join(f"{name},{name[9:12]}\n" for name in [*names[40:], "9999_DFA_ANG_XX"]))
    (crema / "AudioWAV" / f"{names[1]}.wav").write_bytes(b"")
    write_wav(crema / "AudioWAV" / f"{names[2]}.wav", 0.001, 100)
    for frame in (crema / "Image-01-FPS" / names[3]).iterdir():
        frame.unlink()
    data = cremad.read(str(crema), anomaly=True)
    assert [len(split) for split in (data.train, data.val, data.test)] == [33, 4, 20]
    assert sorted(data.notes) == [
        "1 clips skipped: EOFError",
        "1 clips skipped: a clip without frames",
        "1 clips skipped: a wav of almost no sound",
    ]
    assert data.test.target.tolist() == [int(name[9:12] != "NEU") for name in names[40:]]


@pytest.mark.parametrize("task", ["class", "anomaly"])
def test_a_run_on_cremad(crema, task):
    run = train.start(OmibOptions(data=f"cremad:{crema}", task=task, **TINY))
    train.advance(run)
    assert train.result(run)["last"]["accuracy" if task == "class" else "auc"] >= 0


def test_cremad_without_frames_says_how_to_make_them(crema, tmp_path):
    (crema / "Image-01-FPS").rename(crema / "faces")
    with pytest.raises(UsageError, match="ffmpeg -i VideoFlash"):
        cremad.read(str(crema), anomaly=False)
    with pytest.raises(UsageError, match="git-lfs"):
        cremad.read(str(tmp_path / "AudioWAV"), anomaly=False)


def features(n: int, seed: int) -> dict[str, object]:
    """n rows as MMSA's pickle has them: padded sequences, texts beside them."""
    rng = np.random.default_rng(seed)
    part = {
        name: rng.normal(size=(n, 6, width)).astype(np.float32)
        for name, width in (("text", 12), ("audio", 5), ("vision", 20))
    }
    for values in part.values():
        values[:, 4:] = 0
    return {
        **part,
        "regression_labels": part["text"][:, 0, 0].copy(),
        "id": [f"v{i}" for i in range(n)],
        "raw_text": np.array(["a text"] * n),
        "annotations": ["Neutral"] * n,
    }


def write_mosi(path: Path, **changes) -> Path:
    parts = {name: {**features(n, n), **changes} for name, n in (("train", 30), ("valid", 10), ("test", 12))}
    with path.open("wb") as file:
        pickle.dump(parts, file)
    return path


def test_mosi_means_leave_padding_out(tmp_path):
    (tmp_path / "Processed").mkdir()
    path = write_mosi(tmp_path / "Processed" / "unaligned_50.pkl")
    data = mosi.read(str(tmp_path))
    assert data.widths == [12, 5, 20] and len(data.test) == 12
    expected = features(30, 30)["text"][:, :4].mean(1)
    np.testing.assert_allclose(data.train.views[0].numpy(), expected, rtol=1e-5)
    with path.open("rb") as file:
        assert mosi.load(file)["train"]["id"][0] == "v0"


def test_a_run_on_mosi_with_three_views(tmp_path):
    sound = features(30, 30)["audio"]
    sound[0, 0, 0] = -np.inf
    part = {**features(30, 30), "audio": sound}
    path = tmp_path / "mosi.pkl"
    with path.open("wb") as file:
        pickle.dump(dict.fromkeys(("train", "valid", "test"), part), file)
    run = train.start(OmibOptions(data=f"mosi:{path}", task="value", **TINY))
    train.advance(run)
    assert len(run.model.encoders) == 3
    assert {"r2", "mae", "acc2", "f1"} <= set(train.result(run)["last"])


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


def test_pickles_that_are_not_mosi(tmp_path, capsys):
    bad = tmp_path / "bad.pkl"
    bad.write_bytes(pickle.dumps({"train": Code()}))
    with pytest.raises(UsageError, match=r"builtins\.print"):
        mosi.read(str(bad))
    assert not capsys.readouterr().out
    bad.write_bytes(b"no pickle")
    with pytest.raises(UsageError, match="is not MOSI"):
        mosi.read(str(bad))
    with pytest.raises(UsageError, match="regression_labels"):
        mosi.read(str(write_cut(tmp_path / "cut.pkl")))
    with pytest.raises(UsageError, match=r"text is \(30, 6\), not"):
        mosi.read(str(write_mosi(tmp_path / "flat.pkl", text=np.zeros((30, 6)))))


def write_cut(path: Path) -> Path:
    path.write_bytes(pickle.dumps({name: {"text": np.zeros((2, 2, 2))} for name in ("train", "valid", "test")}))
    return path
