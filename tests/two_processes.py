"""What each of two processes does in `test_every_recipe.test_two_processes`; apart so that it starts quickly."""
import os

import torch
import torch.distributed as dist
from columns_for_tests import columns_for, objective_for, outcome, take

from data_tools import Batch
from prefopt import recipes

SHARES = ((3, 99), (99, 0))                                   # groups of the first and of the second process


def share(columns: dict, rank: int, sizes: tuple[int, int]) -> torch.Tensor:
    """The rows of this process: the first groups for rank 0, the rest for rank 1."""
    index = Batch(columns).index
    start, stop = (0, sizes[0]) if rank == 0 else (sizes[0], sizes[0] + sizes[1])
    return ((index >= start) & (index < stop)).nonzero().squeeze(1)


def work(rank: int, folder: str) -> None:
    """Gradients of every recipe from this process's share alone, summed over both, written by rank 0."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name in recipes.__all__:
        for i, sizes in enumerate(SHARES):
            columns = columns_for(name)
            rows = share(columns, rank, sizes)
            width = None if len(rows) else Batch(columns).width
            value, gradients = outcome(objective_for(name), take(columns, rows), width=width)
            whole = {"value": value}
            for key, g in gradients.items():
                whole[key] = g if key[0].isdigit() else torch.zeros_like(columns[key]).index_put((rows,), g)
            for g in whole.values():
                dist.all_reduce(g)
            found[name, i] = whole
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()
