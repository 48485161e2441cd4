"""The step of a large batch in the memory of a part of it, exactly (GradCache, 2101.06983).

    1. features of every part, without a graph
    2. the loss of all of them, and its gradient with respect to the features
    3. every part again, with the same random numbers, from its features' gradient backward

Adding up the gradients of the parts' own losses is another thing: there, a row's negatives are those of its part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from cibr_kernels.distributed.once import broadcast_buffers_again, unsynchronised
from cibr_kernels.losses.parts import Encoded, Parts

DEVIATION = 0.02  # of features that were encoded twice, relative: above what kernels in another order of sums do
_OTHERS = (
    "part {} was encoded to other tensors the second time ({}), so the gradients in .grad are not those of the loss: "
    "parts must be the same both times, random numbers torch's own, and 0-d tensors the same for all parts"
)


def accumulate(
    encode: Callable[[Any], Tensor | Sequence[Tensor] | Mapping[str, Tensor]],
    parts: Any,
    loss: Callable[..., Tensor],
    *,
    rows: int | None = None,
    model: nn.Module | Iterable[nn.Module] = (),
    check: bool = True,
) -> Tensor:
    """Leaves in `.grad` what `loss(*encode(batch)).backward()` would of the whole batch; returns the loss, detached.

    Args:
        encode: a part of the batch -> a tensor, or several in a sequence or by name.  Those of one and more dimensions
            have a row for each sample and are concatenated over parts; 0-d ones, a temperature say, are the same for
            all parts.  Integers, group ids say, have no gradient.
        parts: of the batch, in order, of any sizes: an iterable that can be gone through twice (a list, a DataLoader,
            shuffled or not), or a function without arguments that returns one.  One part is in memory at a time.
        loss: called once with the tensors of the whole batch (by name where they have names) -> 0-d.  Its own
            parameters, critics say, get their gradients too; its random numbers follow those of the encoding.
        rows: where given, `parts` is the batch, a tensor or a dictionary, tuple or list of tensors, and is cut into
            parts of so many rows, the last one with what is left.
        model: the module or modules that `encode` calls.  Their buffers are put back before the second encoding, so
            that running statistics count each row once.  Those in DistributedDataParallel or fully_shard (FSDP2) send
            their gradients once, with the last part; others of FSDP2 send those of every part.
        check: that the second encoding gives what the first gave.  On a GPU that waits for the device once, at the end.

    Encode and loss run under the caller's autocast, every backward outside of it.  A list of one part is encoded once,
    with its graph.  The memory is that of one part and all features; batch norm sees a part at a time.

    Raises:
        TypeError: parts that can be gone through once only, or are a tensor or dictionary without `rows`; no tensors
            where there should be some.
        ValueError: no parts, parts that are others the second time, a scale of shape (1,) beside several rows, a loss
            that is not 0-d.
    Source: Gao et al. 2021 (2101.06983), section 3.2.
    """
    source = Parts.of(parts, rows)
    only = source.only()
    if only is not None:
        return _in_one_graph(loss, Encoded.of(encode(only[0])))
    modules = _all_modules(model)
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers(recurse=False)]
    outputs: list[Encoded] = []
    with ExitStack() as quiet:
        quiet.enter_context(unsynchronised(modules))
        with torch.no_grad():
            source.first(lambda part: outputs.append(Encoded.of(encode(part)).kept()))
        torch.clear_autocast_cache()  # of weights in half precision, which were made without a graph
        whole = Encoded.concatenated(outputs)
        value, gradients = _at_features(loss, whole)
        shared = [g if g.ndim else g / len(outputs) for g in gradients]  # a share of a 0-d tensor's to every part
        pieces = whole.split(shared, outputs)
        seen = whole.split(whole.tensors, outputs)
        names = whole.names
        outputs.clear()
        for buffer, before in buffers:
            buffer.copy_(before)
        broadcast_buffers_again(modules)
        deviations: list[Tensor] = []

        def again(k: int, part: Any) -> None:
            if k + 1 == len(pieces):
                quiet.close()  # the last one sends
            encoded = Encoded.of(encode(part))
            encoded.like(names, seen[k])
            if any(len(t) != len(b) for t, b in zip(encoded.tensors, seen[k], strict=True) if t.ndim):
                raise ValueError(_OTHERS.format(k, "other numbers of rows"))
            if check:
                deviations.append(_deviation(encoded.tensors, seen[k]))
            _backward(encoded.tensors, pieces[k])

        source.second(again)
    _refuse_other_features(deviations)
    return value


def _all_modules(model: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    """All modules inside, each once."""
    given = [model] if isinstance(model, nn.Module) else list(model)
    for module in given:
        if not isinstance(module, nn.Module):
            raise TypeError(f"model must be a module or several, got {type(module).__name__}")
    return list(dict.fromkeys(inner for module in given for inner in module.modules()))


def _in_one_graph(loss: Callable[..., Tensor], encoded: Encoded) -> Tensor:
    """The loss of a batch in one part, whose backward goes on into what made the tensors.

    As with several parts, what the loss does not depend on has a gradient of 0: DDP waits for one of each parameter.
    """
    value = _value(loss, encoded, encoded.tensors)
    wanted = [t for t in encoded.tensors if t.requires_grad]
    if value.requires_grad or wanted:
        unused = _unreached(value, wanted)
        zeros = [t.new_zeros(()).expand_as(t) for t in unused]
        with _no_autocast([value]):
            torch.autograd.backward([value, *unused], [None, *zeros])
    return value.detach()


def _unreached(value: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that no way from `value` down its graph comes to; a way ends at the first of them."""
    edges = {_edge(t): t for t in tensors}
    reached: set[tuple[Node, int]] = set()
    seen: set[Node] = set()
    todo = [_edge(value)] if value.requires_grad else []
    while todo:
        node, output = todo.pop()
        if (node, output) in edges:
            reached.add((node, output))
        elif node not in seen:
            seen.add(node)
            todo += [(below, index) for below, index in node.next_functions if below is not None]
    return [t for edge, t in edges.items() if edge not in reached]


def _edge(t: Tensor) -> tuple[Node, int]:
    """Where a gradient of t goes: a leaf's into an AccumulateGrad."""
    edge = get_gradient_edge(t)
    return edge.node, edge.output_nr


def _value(loss: Callable[..., Tensor], encoded: Encoded, tensors: Sequence[Tensor]) -> Tensor:
    """The loss of `tensors`, by the names of `encoded`."""
    value = loss(*tensors) if encoded.names is None else loss(**dict(zip(encoded.names, tensors, strict=True)))
    if not isinstance(value, Tensor) or value.ndim:
        raise ValueError(f"loss must return a 0-d tensor, got {_shape(value)}")
    return value


def _at_features(loss: Callable[..., Tensor], encoded: Encoded) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients with respect to the tensors; a stride-0 zero where it does not depend on one."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t.detach() for t in encoded.tensors]
    value = _value(loss, encoded, leaves)
    with _no_autocast([value]):
        value.backward()
    return value.detach(), [t.new_zeros(()).expand_as(t) if t.grad is None else t.grad for t in leaves]


def _shape(value: Any) -> str:
    return f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _backward(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    needed = [(t, g) for t, g in zip(tensors, gradients, strict=True) if t.requires_grad]
    if needed:
        with _no_autocast(tensors):
            torch.autograd.backward([t for t, _ in needed], [g for _, g in needed])


def _no_autocast(tensors: Sequence[Tensor]) -> ExitStack:
    """A backward's products have the types of the forward's, whatever the region it is called in."""
    stack = ExitStack()
    for device in {t.device.type for t in tensors}:
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack


@torch.no_grad()
def _deviation(tensors: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """(): the largest relative difference |a - b| / |b| among the tensors, in the Euclidean norm."""
    found = []
    for a, b in zip(tensors, before, strict=True):
        a, b = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (a, b))
        difference = torch.linalg.vector_norm(a - b)
        found.append(torch.where(difference == 0, difference, difference / torch.linalg.vector_norm(b)).float())
    return torch.stack(found).max()


def _refuse_other_features(deviations: list[Tensor]) -> None:
    for k, found in enumerate(torch.stack(deviations).tolist() if deviations else []):
        if found > DEVIATION:  # NaN is not
            raise ValueError(_OTHERS.format(k, f"relative difference {found:.2g}; check=False leaves this test out"))
