"""What ZeRO-1 and ZeRO-2 do for each parameter by itself, done for all of a bucket or group at once.

A small model's step on a GPU takes as long as the host needs to launch its kernels. Of DeepSpeed's, most are copies and
additions of one parameter's gradient, and a norm of each: torch has one call for a list of tensors, with a kernel for
some hundred of them. The numbers are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero.utils import get_norm_dtype
from torch import Tensor


def launch_less(optimizer: Any) -> None:
    """Replace two methods of ZeRO-1's and ZeRO-2's optimizer; others stay as they are."""
    if isinstance(optimizer, stage_1_and_2.DeepSpeedZeroOptimizer):
        optimizer.allreduce_and_copy_with_multiple_ranks = functools.partial(_reduce, optimizer)
        optimizer.get_grad_norm_direct = functools.partial(_norm, optimizer, optimizer.get_grad_norm_direct)


def _reduce(
    optimizer: Any,
    small_bucket: Sequence[Tensor],
    communication_data_type: torch.dtype,
    log: object = None,
    divide: bool = True,
    process_group: dist.ProcessGroup | None = None,
    bucket_ranks: Sequence[int | frozenset[int]] = (),
    output_bucket: Sequence[Tensor | None] | None = None,
) -> None:
    """Add gradients up over the ranks, and keep of them what is this rank's (DeepSpeed's method of this name)."""
    group = optimizer.dp_process_group if process_group is None else process_group
    reduced = optimizer.allreduce_bucket(small_bucket, communication_data_type, divide=divide, process_group=group)
    if optimizer.overlap_comm and reduced.is_cuda:
        for tensor in (reduced, *small_bucket):
            tensor.record_stream(optimizer.reduction_stream)
    rank = dist.get_rank(group)
    own = [
        number
        for number, ranks in enumerate(bucket_ranks)
        if (rank in ranks if isinstance(ranks, frozenset) else rank == ranks)
    ]
    if not own:
        return
    parts = optimizer.unflatten(reduced, small_bucket)
    torch._foreach_copy_([small_bucket[number] for number in own], [parts[number] for number in own])
    outputs = output_bucket or [None] * len(small_bucket)
    sums = [(number, output) for number in own if (output := outputs[number]) is not None]
    if sums:
        parts = optimizer.unflatten(reduced.to(sums[0][1].dtype), small_bucket)
        torch._foreach_add_([output for _, output in sums], [parts[number] for number, _ in sums])


def _norm(
    optimizer: Any, theirs: Any, gradients: Iterable[Tensor], params: Sequence[Tensor], norm_type: float = 2
) -> Tensor:
    """Give the norm of the gradients over all ranks, those that ranks have in common counted once."""
    if norm_type != 2:
        return theirs(gradients, params, norm_type)
    of_params = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
    counted = [
        gradient.detach()
        for gradient, parameter in zip(of_params, params, strict=False)
        if is_model_parallel_parameter(parameter) or optimizer.model_parallel_rank == 0
    ]
    nothing = [torch.zeros((), device=optimizer.device)]
    norms = torch._foreach_norm(counted, dtype=get_norm_dtype()) if counted else nothing
    total = torch.stack(norms).pow(2).sum().float()
    dist.all_reduce(total, group=optimizer.dp_process_group)
    optimizer._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.SUM)
    total = total.sqrt()
    stage_1_and_2.mask_nan_or_inf_with_val_inplace(total, device=optimizer.device)
    return total
