"""All that is asked of megatron-core's layers: the parallel linears and embedding, their configuration, their marks.

Only this module knows which versions of megatron-core differ, and how; the models take their layers from here.
"""

import torch
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn

from peer_scale.parallel.tensor_parallel import TensorParallel

__all__ = ["ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding", "layer_config", "mark_sharded"]


def layer_config(tensor_parallel: TensorParallel) -> ModelParallelConfig:
    """Return what megatron-core's layers want to know; weights are made on the CPU and initialised by us."""
    return ModelParallelConfig(
        tensor_model_parallel_size=tensor_parallel.size,
        pipeline_model_parallel_size=1,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.float32,
    )


def mark_sharded(parameter: nn.Parameter, dim: int) -> None:
    """Note on `parameter` that the tensor-parallel ranks hold one part of it each, in order, along `dim`.

    These are the attributes by which Megatron and DeepSpeed know such parameters. megatron-core's own function for them
    is not used: the linears of its newer versions have set the attributes already, and the function refuses to again.
    """
    attributes = {"tensor_model_parallel": True, "partition_dim": dim, "partition_stride": 1}
    for name, value in attributes.items():
        setattr(parameter, name, value)
