"""Losses over the rows of many ranks, on torch.distributed: rows local, columns global, every gradient exact.

    loss = ck.clip_loss(image_features, text_features, scale, process_group=dist.group.WORLD)

**The convention.** The collectives differentiate the *sum* of all ranks' losses, and every loss is scaled so that its
*mean* over ranks is the single-process loss of the whole batch.  So after DDP or FSDP, which average, each gradient is
the single-process one; where gradients are summed over ranks instead, divide them by the world size; and the gradient
that reaches a rank's own features is world-size times that of the whole batch's loss.  Shards may be uneven.

    shards.py       how many rows each rank has, agreed in one small header before any work
    collectives.py  gather, exchange and merge with their gradients; traffic, which counts them
    lse.py          dot_lse over ranks: one tower is gathered, the columns' log-sum-exps are exchanged
    ring.py         the same in O(local rows) memory: shards travel, the next one while this one is multiplied
    softplus.py     dot_softplus over ranks, by both strategies
    once.py         several backwards of DDP and FSDP2 that send their gradients once

Only collectives that NCCL has are used, on the features' device, without a host synchronisation (the header: see
`set_header_check`).  torch.compile runs them eagerly, in a graph break; with fullgraph=True it refuses.
"""

from cibr_kernels.distributed.collectives import Traffic, traffic
from cibr_kernels.distributed.merge import gather_rows
from cibr_kernels.distributed.shards import Shards, header_check, set_header_check

__all__ = ["Shards", "Traffic", "gather_rows", "header_check", "set_header_check", "traffic"]
