"""Captions as token ids: open_clip's byte-pair encoding, with its 49,408 ids remapped to the few that occur."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from cibr.data import Concept


class Vocabulary:
    """Our ids: 0 padding, 1 start, then the BPE ids in use, last the end of text (where CLIP pools: the greatest)."""

    def __init__(self, bpe_ids: Iterable[int], context_length: int) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.bpe_ids = sorted(set(bpe_ids))
        self.context_length = context_length
        self._tokenizer = SimpleTokenizer()
        self._own = {bpe: own for own, bpe in enumerate(self.bpe_ids, start=2)}

    @classmethod
    def of(cls, texts: Iterable[str], context_length: int) -> Vocabulary:
        """The vocabulary of the pieces that occur in `texts`."""
        pieces = cls((), context_length)._tokenizer
        return cls((piece for text in texts for piece in pieces.encode(text)), context_length)

    def __len__(self) -> int:
        return len(self.bpe_ids) + 3

    def encode(self, text: str) -> list[int]:
        """The text's pieces as our ids, without start and end; pieces unknown here are left out."""
        return [self._own[piece] for piece in self._tokenizer.encode(text) if piece in self._own]

    def pad(self, pieces: Sequence[Sequence[int]]) -> torch.Tensor:
        """(n, context_length) int64 from n lists of ids, with start and end; what is too long is cut."""
        ids = torch.zeros(len(pieces), self.context_length, dtype=torch.int64)
        for row, own in zip(ids, pieces, strict=True):
            own = [1, *own[: self.context_length - 2], len(self) - 1]
            row[: len(own)] = torch.tensor(own)
        return ids


class Captions:
    """A concept's captions: its label alone to evaluate; to train, the label, the label with keywords, or keywords."""

    def __init__(self, concepts: Sequence[Concept], vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._label = [vocabulary.encode(concept.label) for concept in concepts]
        self._keywords = [[vocabulary.encode(word) for word in concept.keywords] for concept in concepts]

    def labels(self, concepts: Iterable[int]) -> torch.Tensor:
        """(n, context_length) int64: the labels."""
        return self.vocabulary.pad([self._label[c] for c in concepts])

    def draw(self, concepts: Iterable[int], rng: np.random.Generator) -> torch.Tensor:
        """(n, context_length) int64: one caption of each concept at random."""
        captions = []
        for c in concepts:
            words = [self._keywords[c][k] for k in rng.permutation(len(self._keywords[c]))[: rng.integers(1, 4)]]
            kind = rng.random()
            parts = [self._label[c]] if kind < 0.5 or not words else [self._label[c], *words] if kind < 0.8 else words
            captions.append([piece for part in parts for piece in part])
        return self.vocabulary.pad(captions)
