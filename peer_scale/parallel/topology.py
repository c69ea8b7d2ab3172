"""Where a rank stands: its place in the pipeline x data x tensor grid, the groups it talks to, its device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from peer_scale.errors import UserError
from peer_scale.parallel.devices import take_device
from peer_scale.parallel.environment import ANY_PORT, ProcessEnvironment
from peer_scale.parallel.meeting import open_store
from peer_scale.parallel.tensor_parallel import TensorParallel

Dimension: TypeAlias = Literal["pp", "dp", "tp", "model"]
"""Of the grid of ranks: pipeline, data and tensor parallel; "model" is all of one replica, stages x tensor-parallel."""

_DIMENSIONS: tuple[Dimension, ...] = ("pp", "dp", "tp")


@dataclass(frozen=True)
class Topology:
    """The grid of ranks, named ("pp", "dp", "tp"), tensor-parallel ranks being neighbours.

    `sequence_parallel`: between tensor-parallel products, activations are split along the sequence.
    """

    mesh: DeviceMesh
    model_mesh: DeviceMesh
    device: torch.device
    sequence_parallel: bool = False

    def size(self, dim: Dimension) -> int:
        """Give the number of ranks along `dim`."""
        # not of a slice of the mesh, which takes 50 microseconds to make: this is asked for each message of a pipeline
        return self.size("pp") * self.size("tp") if dim == "model" else self.mesh.size(_DIMENSIONS.index(dim))

    def rank(self, dim: Literal["pp", "dp", "tp"]) -> int:
        """Give the coordinate of this rank along `dim`."""
        return self.mesh.get_local_rank(dim)

    def group(self, dim: Dimension) -> dist.ProcessGroup:
        """Give the ranks that differ from this one only along `dim`."""
        return self.model_mesh.get_group() if dim == "model" else self.mesh.get_group(dim)

    @property
    def tensor_parallel(self) -> TensorParallel:
        """The ranks that share each layer, as models want to know them."""
        return TensorParallel(self.size("tp"), self.rank("tp"), self.group("tp"), self.sequence_parallel, self.device)

    @property
    def is_first_rank(self) -> bool:
        """True on global rank 0, the one that speaks and writes for all."""
        return dist.get_rank() == 0


class ModelParallelUnit:
    """The `mpu` object by which DeepSpeed asks for groups (its Megatron interface).

    The model-parallel group shares gradient norms and overflows: it spans stages and tensor-parallel ranks.
    By the rank in it DeepSpeed asks who counts the parameters that tensor-parallel ranks have in common: in each
    stage that is the first of them, so it is the tensor-parallel rank.
    """

    def __init__(self, topology: Topology) -> None:
        dims: dict[str, Dimension] = {"model": "model", "tensor_model": "tp", "data": "dp"}
        for name, dim in dims.items():
            rank_dim = "tp" if dim == "model" else dim
            setattr(self, f"get_{name}_parallel_group", lambda dim=dim: topology.group(dim))
            setattr(self, f"get_{name}_parallel_rank", lambda dim=rank_dim: topology.rank(dim))
            setattr(self, f"get_{name}_parallel_world_size", lambda dim=dim: topology.size(dim))


def check_parallel_sizes(world_size: int, tensor_parallel: int, pipeline_parallel: int) -> int:
    """Data-parallel size that remains of `world_size`; raises UserError where the sizes do not multiply out."""
    for flag, size in (("tensor", tensor_parallel), ("pipeline", pipeline_parallel)):
        if size < 1:
            raise UserError(f"--{flag}-model-parallel-size is {size}; it must be at least 1")
    if world_size % (tensor_parallel * pipeline_parallel):
        raise UserError(
            f"{world_size} ranks cannot be shared out: --tensor-model-parallel-size {tensor_parallel} x "
            f"--pipeline-model-parallel-size {pipeline_parallel} must divide their number"
        )
    return world_size // (tensor_parallel * pipeline_parallel)


def init_process_group(environment: ProcessEnvironment, timeout_minutes: float = 30.0) -> torch.device:
    """Join the job's default group (NCCL where there are GPUs, else gloo) and choose this rank's device.

    Raises:
        UserError: on all ranks alike: a rank has no GPU of its own while others have.
        FoundAlone: the ranks' meeting point has no address here, or is taken.
    """
    timeout = timedelta(minutes=timeout_minutes)
    store = open_store(environment, timeout)
    store.set_timeout(timeout)
    device = take_device(environment, store if environment.world_size > 1 else None)
    _export(environment, device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timeout,
    )
    return device


def _export(environment: ProcessEnvironment, device: torch.device) -> None:
    """Tell DeepSpeed, which reads torchrun's variables whatever the launcher was, and takes LOCAL_RANK for the GPU."""
    local_rank = environment.local_rank if device.index is None else device.index
    values = {
        "RANK": environment.rank,
        "WORLD_SIZE": environment.world_size,
        "LOCAL_RANK": local_rank,
        "LOCAL_SIZE": environment.local_world_size,
        "MASTER_ADDR": environment.master_addr,
    }
    if environment.master_port != ANY_PORT:
        values["MASTER_PORT"] = environment.master_port
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # which DeepSpeed compares
        values["OMPI_COMM_WORLD_LOCAL_RANK"] = local_rank
    os.environ.update({name: str(value) for name, value in values.items()})


def build_topology(
    device: torch.device, *, tensor_parallel: int = 1, pipeline_parallel: int = 1, sequence_parallel: bool = False
) -> Topology:
    """Arrange all ranks of the default group; raises UserError where the sizes do not multiply out."""
    data_parallel = check_parallel_sizes(dist.get_world_size(), tensor_parallel, pipeline_parallel)
    shape = (pipeline_parallel, data_parallel, tensor_parallel)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=_DIMENSIONS)
    model_mesh = mesh["tp"] if pipeline_parallel == 1 else mesh["pp", "tp"]._flatten("model")
    return Topology(
        mesh=mesh,
        model_mesh=model_mesh,
        device=device,
        sequence_parallel=sequence_parallel and tensor_parallel > 1,
    )


def single_process_topology() -> Topology:
    """Give a grid of one rank for tools and tests; joins a group of one unless a default group is there already."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.get_world_size() == 1, "a grid of one rank in a job of several"
    return build_topology(torch.device("cpu"))
