"""A module's process group, which copies share and files name."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup


class OnGroup(nn.Module):
    """A module with `process_group`, settable: the ranks whose rows make one batch, or None.

    deepcopy shares the group.  Pickling (torch.save of the module) keeps its name and ranks; a process without such a
    group raises ValueError where the loaded module needs it, until `process_group` is set.
    """

    def __init__(self, process_group: ProcessGroup | None) -> None:
        super().__init__()
        self._ranks = _Ranks(process_group)

    @property
    def process_group(self) -> ProcessGroup | None:
        """Raises ValueError in a copy from a file whose group this process does not have."""
        return self._ranks.group(type(self).__name__)

    @process_group.setter
    def process_group(self, process_group: ProcessGroup | None) -> None:
        self._ranks = _Ranks(process_group)


class _Ranks:
    """A group, or the name and ranks of one that was pickled."""

    def __init__(self, group: ProcessGroup | None, name: str = "", ranks: tuple[int, ...] = ()) -> None:
        self.known, self.name, self.ranks = group, name, ranks

    def group(self, owner: str) -> ProcessGroup | None:
        if self.known is None and self.name:
            self.known = _found(self.name, self.ranks)
            if self.known is None:
                raise ValueError(
                    f"{owner} was saved with the process group {self.name!r} of ranks {list(self.ranks)}, which is not "
                    "here: initialise torch.distributed alike, or set its process_group (None for one process)"
                )
        return self.known

    def __deepcopy__(self, memo: dict[int, Any]) -> _Ranks:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.known is None:
            return _Ranks, (None, self.name, self.ranks)
        return _Ranks, (None, self.known.group_name, tuple(dist.get_process_group_ranks(self.known)))


def _found(name: str, ranks: tuple[int, ...]) -> ProcessGroup | None:
    if not dist.is_initialized():
        return None
    try:
        group: ProcessGroup = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except (LookupError, RuntimeError, ValueError):
        return None
    return group if tuple(dist.get_process_group_ranks(group)) == ranks else None
