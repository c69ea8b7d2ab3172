"""Initial weights that depend on the seed and a parameter's name alone, not on how the model is split."""

import torch
import torch.distributed as dist
from torch import nn

from peer_scale.parallel.megatron import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from peer_scale.parallel.tensor_parallel import TensorParallel
from peer_scale.seeds import stream_seed

_DENSE = (nn.Linear, nn.Embedding, ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)


@torch.no_grad()
def initialize_weights(
    model: nn.Module,
    *,
    seed: int,
    std: float,
    vocab_size: int,
    tensor_parallel: TensorParallel,
    residual_scale: float = 1.0,
    by_width: bool = False,
) -> None:
    """Draw matrices and tables from a truncated normal (two standard deviations); biases are 0, norms as they come.

    A split parameter is drawn whole and then sliced; rows that only pad the vocabulary are zero.

    Args:
        model: what to change.
        seed: of all draws, with the parameter's name.
        std: standard deviation, before what follows.
        vocab_size: rows of the word table that are drawn.
        tensor_parallel: which slice is this rank's.
        residual_scale: factor for the matrices at the end of a layer's blocks, whose outputs the layers add up.
        by_width: matrices, but not tables, have the standard deviation 1 / sqrt(inputs) instead of `std`.
    """
    for module_name, module in model.named_modules():
        if not isinstance(module, _DENSE):
            continue
        weight = module.weight
        shape = list(weight.shape)
        split_dim = getattr(weight, "partition_dim", -1)
        if split_dim >= 0:
            shape[split_dim] *= tensor_parallel.size
        logical = [vocab_size, shape[1]] if isinstance(module, VocabParallelEmbedding) else shape
        generator = torch.Generator().manual_seed(stream_seed(seed, "init", module_name))
        whole = torch.zeros(shape)
        drawn = whole[: logical[0]]
        is_table = isinstance(module, (nn.Embedding, VocabParallelEmbedding))
        scale = shape[-1] ** -0.5 if by_width and not is_table else std
        if isinstance(module, RowParallelLinear):
            scale *= residual_scale
        nn.init.trunc_normal_(drawn, std=scale, a=-2 * scale, b=2 * scale, generator=generator)
        weight.copy_(whole.chunk(tensor_parallel.size, split_dim)[tensor_parallel.rank] if split_dim >= 0 else whole)
        bias = getattr(module, "bias", None)
        if isinstance(bias, torch.Tensor):
            nn.init.zeros_(bias)


def count_parameters(model: nn.Module, tensor_parallel: TensorParallel, stages: dist.ProcessGroup) -> int:
    """Count the parameters of all pipeline stages' models, split or not; rows that pad the vocabulary count."""
    sizes = ((p.numel(), getattr(p, "tensor_model_parallel", False)) for p in model.parameters())
    own = sum(size * (tensor_parallel.size if is_split else 1) for size, is_split in sizes)
    total = torch.tensor(own, device=tensor_parallel.device)
    dist.all_reduce(total, group=stages)
    return int(total)
