"""Many strings as one block of bytes: millions of captions cost their letters, and a fork does not copy them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np


class Strings:
    """A sequence of strings kept as UTF-8 in one array, and where each begins; other bytes of file names stay."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [string.encode(errors="surrogateescape") for string in strings]
        self.bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self.starts = np.cumsum([0, *map(len, encoded)], dtype=np.int64)  # (n + 1,)

    @classmethod
    def of_arrays(cls, data: np.ndarray, starts: np.ndarray) -> Strings:
        """The strings whose `bytes` and `starts` these are. Raises ValueError for arrays that are none's."""
        if not (len(starts) and starts[0] == 0 and starts[-1] == len(data) and (np.diff(starts) >= 0).all()):
            raise ValueError("the starts do not divide the bytes into strings")
        strings = cls.__new__(cls)
        strings.bytes, strings.starts = data, starts
        return strings

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"string {index} of {len(self)}")
        return self.bytes[self.starts[index] : self.starts[index + 1]].tobytes().decode(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


class Texts:
    """The captions of every row of a data set, one or several each."""

    def __init__(self, rows: Iterable[tuple[str, ...]]) -> None:
        rows = list(rows)
        self.strings = Strings(text for row in rows for text in row)
        self.starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)  # (n + 1,): the first caption of each row

    @classmethod
    def of_strings(cls, strings: Strings, starts: np.ndarray) -> Texts:
        """Row i has the strings from starts[i] to starts[i + 1]."""
        texts = cls.__new__(cls)
        texts.strings, texts.starts = strings, starts
        return texts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> tuple[str, ...]:
        return tuple(self.strings[k] for k in range(self.starts[row], self.starts[row + 1]))
