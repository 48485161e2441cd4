"""Captions as token ids: open_clip's byte-pair encoding, with its 49,408 ids remapped to the few that occur."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Vocabulary:
    """Our ids: 0 padding, 1 start, 2 unknown, then the BPE ids in use, last the end of text (where CLIP pools).

    Without `unknown`, as runs of version 0.1 were made, pieces that did not occur in training are left out.
    """

    def __init__(self, bpe_ids: Iterable[int], context_length: int, *, unknown: bool = True) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.bpe_ids = sorted(set(bpe_ids))
        self.context_length, self.unknown = context_length, unknown
        self._tokenizer = SimpleTokenizer()
        self._own = {bpe: own for own, bpe in enumerate(self.bpe_ids, start=3 if unknown else 2)}

    @classmethod
    def of(cls, texts: Iterable[str], context_length: int) -> Vocabulary:
        """The vocabulary of the pieces that occur in `texts`."""
        pieces = cls((), context_length)._tokenizer
        return cls({piece for text in set(texts) for piece in pieces.encode(text)}, context_length)

    def __len__(self) -> int:
        return len(self.bpe_ids) + (4 if self.unknown else 3)

    def __call__(self, texts: list[str]) -> Tensor:
        """n texts -> (n, context_length) int64, with start and end; what is too long is cut."""
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            own = [1, *self._encode(text)[: self.context_length - 2], len(self) - 1]
            row[: len(own)] = torch.tensor(own)
        return ids

    def _encode(self, text: str) -> list[int]:
        pieces = self._tokenizer.encode(text)
        if self.unknown:
            return [self._own.get(piece, 2) for piece in pieces]
        return [self._own[piece] for piece in pieces if piece in self._own]
