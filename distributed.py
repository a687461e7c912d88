"""What train.py needs of many processes; without them, each function is what it is for one."""
import time

import torch
import torch.distributed as dist

from checkpoint import digest


def reduce(tensor, op=dist.ReduceOp.SUM):
    """All ranks' sum (or max) of a tensor; the tensor itself where there is one process."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def gather(tensor):
    """(n, ...) of every rank -> (ranks n, ...), in rank order."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def assert_ranks_agree(parameters, what):
    """RuntimeError, on every rank, where weights are not bitwise the same on all of them."""
    content = b"".join(p.detach().float().cpu().numpy().tobytes() for p in parameters)
    mine = torch.tensor([int(digest(content)[:15], 16)], device=parameters[0].device)
    if dist.is_initialized():
        all_ranks = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(all_ranks, mine)
        odd = [i for i, x in enumerate(all_ranks) if x != all_ranks[0]]
        if odd:
            raise RuntimeError(f"{what}: weights of rank {', '.join(map(str, odd))} differ from rank 0's")


def absent(wait=3):
    """After a collective failed: the ranks that do not come here in `wait` seconds, as they ended or hang.
    Known under torchrun, whose store outlives them."""
    store, ranks = dist.distributed_c10d._get_default_store(), range(dist.get_world_size())
    store.set(f"came/{dist.get_rank()}", "")
    time.sleep(wait)
    return [str(rank) for rank in ranks if not store.check([f"came/{rank}"])]
