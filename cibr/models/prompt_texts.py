"""Class names as token ids with places for learned vectors.

    end      [SOS] v_1 ... v_M rest name . [EOS]
    middle   [SOS] v_1 ... v_M/2 name v_M/2+1 ... v_M rest . [EOS]
    front    [SOS] name v_1 ... v_M rest . [EOS]

The place of v_k has the id -k, k from 1; `rest` is what follows the first M tokens of an initial phrase.  As CoOp does
(KaiyangZhou/CoOp), "X ... X name." is one text for the tokenizer, and its first M tokens become places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cibr.errors import UsageError


class PromptTexts:
    """Prompts of `places` vectors around a name; of a phrase the first `places` tokens are vectors, all by default."""

    def __init__(self, tokenizer: Any, *, phrase: str, places: int | None, position: str = "end") -> None:
        """`tokenizer` is open_clip's SimpleTokenizer.  Raises UsageError for a phrase of fewer tokens than places."""
        self._tokenizer, self._position = tokenizer, position
        self.phrase = phrase.strip() or " ".join("X" * (places or 0))
        ids = tokenizer.encode(self.phrase)
        self.places = len(ids) if places is None else places
        self.length: int = tokenizer.context_length
        if not 1 <= self.places <= len(ids):
            raise UsageError(
                f"the phrase {self.phrase!r} has {len(ids)} tokens, so it cannot begin with {self.places} vectors"
            )
        self.initial = torch.tensor(ids[: self.places])  # (M,) int64: the tokens that the vectors stand for
        self._rest = ids[self.places :]
        self._context = len(ids)

    def __call__(self, names: Sequence[str], *, cut: bool = False, specific: bool = False) -> Tensor:
        """n names -> (n, length) int64 with negative ids for places; underscores are spaces.

        `specific`: name c has the places c M + 1 ... c M + M of its own.  `cut`: a name too long loses its end, as
        captions do in CLIP.  Raises UsageError for a name too long otherwise.
        """
        tokens = torch.zeros(len(names), self.length, dtype=torch.int64)
        for c, name in enumerate(names):
            first = c * self.places if specific else 0
            ids = self._prompt(name.replace("_", " "), first, cut)
            tokens[c, : len(ids)] = torch.tensor(ids)
        return tokens

    def _prompt(self, name: str, first: int, cut: bool) -> list[int]:
        encode, start, end = self._tokenizer.encode, self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        tail = encode(f"{self.phrase} {name}.")[self._context :]
        width = len(encode(name))
        spoken, stop = tail[:width], tail[width:]
        context = [*range(-1 - first, -1 - first - self.places, -1), *self._rest]
        more = 2 + len(context) + len(spoken) + len(stop) - self.length
        if more > 0:
            if not cut or more > len(spoken):
                raise UsageError(
                    f"the prompt of {name[:80]!r} has {self.length + more} tokens, {len(context)} of them context, and "
                    f"the model takes {self.length}: use a shorter context or name"
                )
            spoken = spoken[: len(spoken) - more]
        half = {"end": len(context), "middle": len(context) // 2, "front": 0}[self._position]
        return [start, *context[:half], *spoken, *context[half:], *stop, end]
