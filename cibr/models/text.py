"""Captions as token ids: open_clip's byte-pair encoding, with its 49,408 ids remapped to the few that occur."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

LETTERS = range(512)  # BPE's pieces of one byte, 256 in and 256 at the end of a word; piece 512 + k is its merge k


@cache
def pieces() -> Any:
    """open_clip's tokenizer: its merges take a tenth of a second to read, and nobody changes them."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


class Vocabulary:
    """Our ids: 0 padding, 1 start, then the BPE ids in use, last the end of text (where CLIP pools: the greatest).

    A piece that is not in use is spelled by the parts that BPE merged it from, down to letters, so that unseen words
    are neither empty nor all alike. Runs of version 0.1 have no letters, and leave such pieces out.
    """

    def __init__(self, bpe_ids: Iterable[int], context_length: int) -> None:
        self.bpe_ids = sorted(set(bpe_ids))
        self.context_length = context_length
        self._tokenizer = pieces()
        self._merges = list(self._tokenizer.bpe_ranks)
        self._own = {bpe: [own] for own, bpe in enumerate(self.bpe_ids, start=2)}
        self._spells = set(LETTERS) <= set(self.bpe_ids)

    @classmethod
    def of(cls, texts: Iterable[str], context_length: int) -> Vocabulary:
        """The vocabulary of the pieces that occur in `texts`, and of all letters."""
        encode = pieces().encode
        return cls({*LETTERS, *(piece for text in set(texts) for piece in encode(text))}, context_length)

    def __len__(self) -> int:
        return len(self.bpe_ids) + 3

    def __call__(self, texts: list[str]) -> Tensor:
        """n texts -> (n, context_length) int64, with start and end; what is too long is cut."""
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            spelled = [own for piece in self._tokenizer.encode(text) for own in self._spell(piece)]
            own = [1, *spelled[: self.context_length - 2], len(self) - 1]
            row[: len(own)] = torch.tensor(own)
        return ids

    def _spell(self, piece: int) -> list[int]:
        """Our ids of a BPE piece."""
        if piece not in self._own and self._spells:
            parts = self._merges[piece - len(LETTERS)]
            self._own[piece] = [own for part in parts for own in self._spell(self._tokenizer.encoder[part])]
        return self._own.get(piece, [])
