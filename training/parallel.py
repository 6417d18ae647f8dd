"""One process or many: what a training stage needs of torch's distributed engine.

    torchrun --nproc-per-node 8 -m training.recurrence --config FILE

Every process draws the whole batch and takes its share, so that the number of processes changes no number but by
rounding. Students are replicated (DDP): the gradient of a rollout enters a layer through keys and values that earlier
forwards left in the cache, which FSDP's module hooks never see. Frozen score models can be sharded (FSDP2).
"""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Workers:
    """The processes of this run. Alone, every method is the identity."""

    def __init__(self) -> None:
        """Joins the group that torchrun's environment names: NCCL where every process has a GPU, else Gloo."""
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        local = int(os.environ.get("LOCAL_RANK", 0))
        gpu = torch.cuda.is_available() and torch.cuda.device_count() > local
        self.device = torch.device("cuda", local) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if gpu else "gloo")

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        """This process's clips of a whole batch [B, ...]: every `world`-th. ValueError if it cannot be shared evenly."""
        if len(batch) % self.world:
            raise ValueError(f"batch is {len(batch)}; it must be a multiple of the {self.world} processes")
        return batch[self.rank :: self.world]

    def condition(self, context: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This process's part of a whole batch's context [1 or B, n, width] and mask [B, chunks, n], on its device."""
        context = context if len(context) == 1 else self.share(context)
        return context.to(self.device), None if mask is None else self.share(mask).to(self.device)

    def replicate(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over all processes after each backward."""
        if self.world == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=True, broadcast_buffers=False)

    def shard(self, model: nn.Module) -> nn.Module:
        """A frozen Wan model split over all processes, block by block."""
        if self.world > 1:
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
            register_fsdp_forward_method(model, "forward_orig")
        return model

    def mean(self, figures: dict[str, float]) -> dict[str, float]:
        """Each figure's mean over the processes that have it."""
        if self.world == 1:
            return figures
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, figures)
        names = dict.fromkeys(name for one in every for name in one)
        return {n: sum(f[n] for f in every if n in f) / sum(n in f for f in every) for n in names}

    def peak_mib(self) -> float:
        """The most memory that this process has held: the GPU's if it has one."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        status = Path("/proc/self/status")
        if status.is_file():
            # not getrusage: a child's ru_maxrss starts at what its parent had
            return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def leave(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
