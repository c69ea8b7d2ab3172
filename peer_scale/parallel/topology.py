"""Where a rank stands: its place in the pipeline x data x tensor grid, the groups it talks to, its device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from peer_scale.errors import UserError

if TYPE_CHECKING:
    from peer_scale.parallel.environment import ProcessEnvironment


@dataclass(frozen=True)
class Topology:
    """The grid of ranks, named ("pp", "dp", "tp"), tensor-parallel ranks being neighbours.

    `sequence_parallel`: between tensor-parallel products, activations are split along the sequence.
    """

    mesh: DeviceMesh
    device: torch.device
    sequence_parallel: bool = False

    def size(self, dim: str) -> int:
        """Number of ranks along `dim`."""
        return self.mesh[dim].size()

    def rank(self, dim: str) -> int:
        """Coordinate of this rank along `dim`."""
        return self.mesh.get_local_rank(dim)

    def group(self, dim: str) -> dist.ProcessGroup:
        """The ranks that differ from this one only along `dim`."""
        return self.mesh.get_group(dim)

    @property
    def is_first_rank(self) -> bool:
        """True on global rank 0, the one that speaks and writes for all."""
        return dist.get_rank() == 0

    def layer_config(self) -> ModelParallelConfig:
        """What megatron-core's layers want to know; weights are made on the CPU and initialised by us."""
        return ModelParallelConfig(
            tensor_model_parallel_size=self.size("tp"),
            pipeline_model_parallel_size=1,
            use_cpu_initialization=True,
            perform_initialization=False,
            params_dtype=torch.float32,
        )


class ModelParallelUnit:
    """The `mpu` object by which DeepSpeed asks for groups (its Megatron interface)."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        for name, dim in (("model", "tp"), ("tensor_model", "tp"), ("data", "dp")):
            setattr(self, f"get_{name}_parallel_group", lambda dim=dim: topology.group(dim))
            setattr(self, f"get_{name}_parallel_rank", lambda dim=dim: topology.rank(dim))
            setattr(self, f"get_{name}_parallel_world_size", lambda dim=dim: topology.size(dim))


def check_parallel_sizes(world_size: int, tensor_parallel: int, pipeline_parallel: int) -> int:
    """Data-parallel size that remains of `world_size`; raises UserError where the sizes do not multiply out."""
    for flag, size in (("tensor", tensor_parallel), ("pipeline", pipeline_parallel)):
        if size < 1:
            raise UserError(f"--{flag}-model-parallel-size is {size}; it must be at least 1")
    if pipeline_parallel > 1:
        raise UserError(f"--pipeline-model-parallel-size {pipeline_parallel}: it is not there yet; use 1")
    if world_size % (tensor_parallel * pipeline_parallel):
        raise UserError(
            f"{world_size} ranks cannot be shared out: --tensor-model-parallel-size {tensor_parallel} x "
            f"--pipeline-model-parallel-size {pipeline_parallel} must divide their number"
        )
    return world_size // (tensor_parallel * pipeline_parallel)


def init_process_group(environment: ProcessEnvironment, timeout_minutes: float = 30.0) -> torch.device:
    """Join the job's default group (NCCL where there are GPUs, else gloo) and choose this rank's device."""
    _export(environment)
    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", environment.local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if use_cuda else "gloo",
        init_method=f"tcp://{environment.master_addr}:{environment.master_port}",
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timedelta(minutes=timeout_minutes),
    )
    return device


def _export(environment: ProcessEnvironment) -> None:
    """Tell DeepSpeed, which reads torchrun's variables whatever the launcher was."""
    values = {
        "RANK": environment.rank,
        "WORLD_SIZE": environment.world_size,
        "LOCAL_RANK": environment.local_rank,
        "LOCAL_SIZE": environment.local_world_size,
        "MASTER_ADDR": environment.master_addr,
        "MASTER_PORT": environment.master_port,
    }
    os.environ.update({name: str(value) for name, value in values.items()})


def build_topology(
    device: torch.device, *, tensor_parallel: int = 1, pipeline_parallel: int = 1, sequence_parallel: bool = False
) -> Topology:
    """Arrange all ranks of the default group; raises UserError where the sizes do not multiply out."""
    data_parallel = check_parallel_sizes(dist.get_world_size(), tensor_parallel, pipeline_parallel)
    shape = (pipeline_parallel, data_parallel, tensor_parallel)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("pp", "dp", "tp"))
    return Topology(mesh=mesh, device=device, sequence_parallel=sequence_parallel and tensor_parallel > 1)


def single_process_topology() -> Topology:
    """A grid of one rank for tools and tests; joins a group of one unless a default group is there already."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.get_world_size() == 1, "a grid of one rank in a job of several"
    return build_topology(torch.device("cpu"))
