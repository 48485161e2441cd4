"""What `accumulate` goes through twice: parts of a batch, one in memory at a time, and what they are encoded to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

State = tuple[Tensor, list[Tensor]]
_END = object()


@dataclass
class Parts:
    """Parts that are gone through twice, loading and encoding with the same random numbers."""

    make: Callable[[], Iterable[Any]]
    count: int | None  # None: not known before
    began: State | None = None
    states: list[tuple[State, State]] = field(default_factory=list)  # of each part, before it is loaded and encoded

    @staticmethod
    def of(parts: Any, rows: int | None) -> Parts:
        """Raises TypeError or ValueError in words."""
        if rows is not None:
            cut = _cut(parts, rows)
            return Parts(lambda: cut, len(cut))
        if isinstance(parts, (Tensor, Mapping)):
            raise TypeError(f"parts is one {type(parts).__name__}: give rows=, how many of its rows make a part")
        if isinstance(parts, Iterator):
            raise TypeError(
                f"parts is a {type(parts).__name__}, which can be gone through once, and every part is encoded twice: "
                "give a list, or a function without arguments that returns a new iterator"
            )
        if not isinstance(parts, Iterable):
            if not callable(parts):
                raise TypeError(f"parts must be an iterable or a function that returns one, got {type(parts).__name__}")
            return Parts(parts, None)
        try:
            count = len(parts)  # type: ignore[arg-type]
        except TypeError:  # of what has none, and of DataLoaders of streams
            count = None
        if count == 0:
            raise ValueError("parts is empty")
        return Parts(lambda: parts, count)

    def only(self) -> tuple[Any] | None:
        """The one part that there is, if that is known before."""
        return (next(iter(self.make())),) if self.count == 1 else None

    def first(self, visit: Callable[[Any], None]) -> None:
        """Calls visit(part) for every part, and lets go of it before the next one is loaded."""
        self.began = _random_state()
        source = self._source()
        while True:
            loading = _random_state()
            part = next(source, _END)
            if part is _END:
                break
            self.states.append((loading, _random_state()))
            visit(part)
            del part
        if not self.states:
            raise ValueError("parts is empty")

    def second(self, visit: Callable[[int, Any], None]) -> None:
        """Calls visit(k, part) as `first` did; then the random numbers go on as before this."""
        after = _random_state()
        assert self.began is not None
        _set_random_state(self.began)
        source = self._source()
        try:
            for k, (loading, encoding) in enumerate(self.states):
                _set_random_state(loading)
                part = next(source, _END)
                if part is _END:
                    raise ValueError(f"parts were {len(self.states)} the first time and {k} the second")
                _set_random_state(encoding)
                visit(k, part)
                del part
        finally:
            _set_random_state(after)

    def _source(self) -> Iterator[Any]:
        made = self.make()
        if not isinstance(made, Iterable):
            raise TypeError(f"parts returned {type(made).__name__}, which cannot be gone through")
        return iter(made)


@dataclass(frozen=True)
class Encoded:
    """The tensors of a part or of the batch."""

    tensors: list[Tensor]
    names: tuple[str, ...] | None  # None: they have none

    @staticmethod
    def of(found: Any) -> Encoded:
        """What `encode` returned.  Raises TypeError or ValueError in words."""
        names = None
        if isinstance(found, Tensor):
            found = (found,)
        elif isinstance(found, Mapping):
            names, found = tuple(found), tuple(found.values())
        elif not isinstance(found, Sequence) or isinstance(found, str):
            raise TypeError(f"encode must return tensors, got {type(found).__name__}")
        for k, t in enumerate(found):
            if not isinstance(t, Tensor):
                raise TypeError(f"encode must return tensors, got {names[k] if names else k}: {type(t).__name__}")
        rows = [len(t) for t in found if t.ndim]
        if not rows:
            raise ValueError("encode returned no tensor with rows")
        if 1 in rows and max(rows) > 1:
            raise ValueError(
                f"encode returned tensors of {rows} rows: a scale for all rows must be 0-d, as s.squeeze()"
            )
        return Encoded(list(found), names)

    def kept(self) -> Encoded:
        """Copies: a pooled feature may be a view that keeps all tokens, and CUDA graphs write over their results."""
        return Encoded([t.clone() for t in self.tensors], self.names)

    @staticmethod
    def concatenated(several: Sequence[Encoded]) -> Encoded:
        first = several[0]
        for other in several[1:]:
            other.like(first.names, first.tensors)
        columns = zip(*(encoded.tensors for encoded in several), strict=True)
        return Encoded([torch.cat(ts) if ts[0].ndim else ts[0] for ts in columns], first.names)

    def split(self, values: Sequence[Any], several: Sequence[Encoded]) -> list[list[Any]]:
        """values like the tensors of the batch -> those of each part; a 0-d one is the same in all."""
        columns = [
            v.split([len(part.tensors[j]) for part in several]) if t.ndim else [v] * len(several)
            for j, (t, v) in enumerate(zip(self.tensors, values, strict=True))
        ]
        return [list(part) for part in zip(*columns, strict=True)]

    def like(self, names: tuple[str, ...] | None, tensors: Sequence[Tensor]) -> None:
        """Raises ValueError where the tensors are others than those of the first part."""
        ours, theirs = ([tuple(t.shape[1:]) for t in ts] for ts in (self.tensors, tensors))
        if self.names != names or ours != theirs:
            raise ValueError(f"encode returned {_said(names, theirs)} for a part, then {_said(self.names, ours)}")


def _said(names: tuple[str, ...] | None, shapes: list[tuple[int, ...]]) -> str:
    return f"{len(shapes)} tensors" + (f" {', '.join(names)}" if names else "") + f" with rows of shapes {shapes}"


def _cut(batch: Any, rows: int) -> list[Any]:
    """A tensor, or a mapping, tuple or list of such, in parts of so many rows; what is no tensor is in every part."""
    if rows < 1:
        raise ValueError(f"rows must be positive, got {rows}")
    lengths = {len(t) for t in _leaves(batch)}
    if not lengths:
        raise TypeError(f"parts must be a tensor, or a dictionary, tuple or list of them, got {type(batch).__name__}")
    if len(lengths) > 1:
        raise ValueError(f"the tensors of parts have different numbers of rows: {sorted(lengths)}")
    (total,) = lengths
    if not total:
        raise ValueError("parts is empty")
    return [_sliced(batch, slice(k, k + rows)) for k in range(0, total, rows)]


def _leaves(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _leaves(value)


def _sliced(batch: Any, part: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[part] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {name: _sliced(value, part) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        made = [_sliced(value, part) for value in batch]
        return type(batch)(*made) if hasattr(batch, "_fields") else type(batch)(made)  # a named tuple takes each alone
    return batch


def _random_state() -> State:
    """Of the CPU and of all CUDA devices, where they are in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_state(state: State) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
