"""DistributedDataParallel and FSDP2 that add gradients up without sending them, until the last backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel


@contextlib.contextmanager
def unsynchronised(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Backwards inside send nothing; the first one after it sends what has been added up.  modules: all, flat."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
            elif hasattr(module, "set_requires_gradient_sync"):  # FSDPModule
                _set_last(module, False)
                stack.callback(_set_last, module, True)
        yield


def _set_last(module: nn.Module, last: bool) -> None:
    """Of a module that `fully_shard` was called on: whether its next backward is the one that reduces gradients."""
    module.set_requires_gradient_sync(last, recurse=False)  # type: ignore[operator]
    module.set_is_last_backward(last)  # type: ignore[operator]


def broadcast_buffers_again(modules: Sequence[nn.Module]) -> None:
    """The next forward of DistributedDataParallel sends the first rank's buffers, as that of a new step does."""
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            module.require_forward_param_sync = True
