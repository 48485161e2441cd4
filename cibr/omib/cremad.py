"""CREMA-D: sound and face of actors who speak with one of six emotions, as features that a small network takes.

    DIR/AudioWAV/1001_DFA_ANG_XX.wav                 as published; the third part of a name is the emotion
    DIR/Image-01-FPS/1001_DFA_ANG_XX/*.jpg           frames of VideoFlash/*.flv, as OGM-GE makes them
    DIR/train.csv, DIR/test.csv                      lines of NAME,EMOTION, if there; otherwise split by actor

Sound is the mean and the deviation over time of a log spectrogram in BANDS bands; a face is its mean frame, grey,
SIDE x SIDE.  That is enough to run OMIB on the set and not what the paper's ResNets saw.
"""

from __future__ import annotations

import csv
import wave
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cibr.errors import UsageError
from cibr.omib.data import Data, Split

EMOTIONS = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")
NORMAL = "NEU"  # of one-class tasks
BANDS, SIDE, WINDOW = 64, 32, 512
VALIDATION = 10  # every tenth clip or actor of training


def read(place: str, *, anomaly: bool) -> Data:
    """The set in a folder.  Raises UsageError where the layout is not there; clips that cannot be read are skipped."""
    root = Path(place)
    sounds = root / "AudioWAV"
    if not sounds.is_dir():
        raise UsageError(
            f"there is no folder {sounds}: CREMA-D's repository has it, by git-lfs (CheyneyComputerScience)"
        )
    frames = frames_of(root)
    groups, skipped = split(root, sorted(path.stem for path in sounds.glob("*.wav"))), Counter[str]()
    parts = []
    for names in groups:
        rows = []
        for name in names:
            try:
                face = mean_frame(frames / name)
                rows.append((sound(sounds / f"{name}.wav"), face, label(name, anomaly)))
            except (ValueError, OSError, EOFError, wave.Error) as error:
                skipped[str(error) or type(error).__name__] += 1
        if not rows:
            why = f": {skipped.most_common(1)[0][0]}" if skipped else ""
            raise UsageError(f"no clip of one of the splits in {root} can be read{why}")
        targets = torch.tensor([target for _, _, target in rows])
        parts.append(Split((torch.stack([s for s, _, _ in rows]), torch.stack([f for _, f, _ in rows])), targets))
    notes = tuple(f"{count} clips skipped: {why}" for why, count in skipped.most_common(3))
    return Data(parts[0], parts[1], parts[2], classes=len(EMOTIONS), notes=notes)


def frames_of(root: Path) -> Path:
    """The folder of folders of frames, at the smallest rate there is."""
    found = sorted(root.glob("Image-*-FPS"))
    if not found:
        raise UsageError(
            f"there is no folder {root / 'Image-01-FPS'}: make frames of VideoFlash, a folder a clip, with "
            "ffmpeg -i VideoFlash/NAME.flv -r 1 Image-01-FPS/NAME/%05d.jpg"
        )
    return found[0]


def split(root: Path, names: Sequence[str]) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    """Names of clips to train on, to validate on, to test on."""
    known = [root / "train.csv", root / "test.csv"]
    if all(path.is_file() for path in known):
        listed = []
        for path in known:
            with path.open(newline="") as file:
                listed.append([row[0] for row in csv.reader(file) if row and row[0] in set(names)])
        train, test = listed
        return [n for i, n in enumerate(train) if i % VALIDATION], train[::VALIDATION], test
    actors = sorted({name.partition("_")[0] for name in names})
    held = set(actors[-max(1, len(actors) // 5) :])
    val = set([actor for actor in actors if actor not in held][::VALIDATION])

    def of(chosen: set[str]) -> list[str]:
        return [name for name in names if name.partition("_")[0] in chosen]

    return of(set(actors) - held - val), of(val), of(held)


def label(name: str, anomaly: bool) -> int:
    emotion = (name.split("_") + [""] * 3)[2]
    if emotion not in EMOTIONS:
        raise ValueError(f"a clip's name without an emotion, such as {name}")
    return int(emotion != NORMAL) if anomaly else EMOTIONS.index(emotion)


def sound(path: Path) -> Tensor:
    """16-bit wav -> (2 BANDS,): mean and standard deviation over time of the log power in bands."""
    with wave.open(str(path)) as file:
        if file.getsampwidth() != 2:
            raise ValueError("a wav that is not of 16 bits")
        channels, data = file.getnchannels(), file.readframes(file.getnframes())
    samples = (
        torch.from_numpy(np.frombuffer(data, dtype="<i2").astype(np.float32) / 2**15).reshape(-1, channels).mean(1)
    )
    if len(samples) < 2 * WINDOW:
        raise ValueError("a wav of almost no sound")
    spectrum = torch.stft(samples, WINDOW, window=torch.hann_window(WINDOW), return_complex=True).abs().square()
    bands = F.adaptive_avg_pool1d(spectrum.T[None], BANDS)[0].clamp(min=1e-8).log()  # (times, BANDS)
    return torch.cat([bands.mean(0), bands.std(0)])


def mean_frame(folder: Path) -> Tensor:
    """A folder of images -> (SIDE^2,) in [0, 1]."""
    from PIL import Image

    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise ValueError("a clip without frames")
    grey = [np.asarray(Image.open(path).convert("L").resize((SIDE, SIDE)), dtype=np.float32) / 255 for path in paths]
    return torch.from_numpy(np.mean(grey, axis=0).ravel())
