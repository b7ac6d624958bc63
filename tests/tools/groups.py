"""Several processes of one group, for tests of what they do together."""

import multiprocessing
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def start(size, work, *arguments, join=True):
    """Processes of a group, forked from one that has imported all of this already."""
    multiprocessing.set_forkserver_preload([work.__module__])
    return mp.start_processes(work, (size, *arguments), size, join, start_method="forkserver")


def enter(rank, size, store):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), size), rank=rank, world_size=size)
