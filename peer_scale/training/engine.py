"""The one place that builds a DeepSpeed engine and knows what of DeepSpeed has to be worked around."""

from typing import Any, SupportsFloat

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from peer_scale.errors import UserError
from peer_scale.models.layers import TransformerLayer
from peer_scale.objectives.engine import Engine
from peer_scale.objectives.task import PretrainingTask
from peer_scale.parallel.topology import ModelParallelUnit, Topology
from peer_scale.settings.ds_config import with_bucket_sizes
from peer_scale.settings.run import RunConfig
from peer_scale.training.compilation import compile_task
from peer_scale.training.fewer_launches import launch_less
from peer_scale.training.late_numbers import LateNumbers
from peer_scale.training.optimizer import build_optimizer
from peer_scale.training.unread_norms import leave_norms_unread

MONITOR_BLOCKS = ("tensorboard", "wandb", "csv_monitor", "comet")


def build_engine(task: PretrainingTask, run: RunConfig, topology: Topology) -> Engine:
    """Wrap `task` under the run's ZeRO stage and precision.

    The runners say which backward call is a step's last: pipeline stages have more of them than micro-batches, and with
    a budget of tokens steps differ in their number, so that the ds_config's gradient_accumulation_steps count nothing.
    What `check_start` did not foresee and DeepSpeed refuses raises UserError in its words.
    """
    leave_out_shared_memory_op()
    if run.training.activation_checkpointing:
        apply_activation_checkpointing(task, check_fn=lambda module: isinstance(module, TransformerLayer))
    sized = with_bucket_sizes(
        run.deepspeed,
        num_parameters=sum(parameter.numel() for parameter in task.parameters()),
        data_parallel=topology.size("dp"),
        on_gpu=topology.device.type == "cuda",
    )
    config = _without_waits({key: value for key, value in sized.items() if key not in MONITOR_BLOCKS})
    if run.training.compile:
        compile_task(task)
    task.to(topology.device)
    optimizer = build_optimizer(task, run.training)
    try:
        engine, *_ = deepspeed.initialize(
            model=task, optimizer=optimizer, config=config, mpu=ModelParallelUnit(topology), dist_init_required=False
        )
    except (AssertionError, ImportError, NotImplementedError, ValueError) as error:  # how it refuses a ds_config
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"DeepSpeed refuses the ds_config: {reason}") from error
    if run.training.precision == "fp16":
        # at the least scale DeepSpeed would end the run by a bare Exception, whatever --max-skipped-steps allows
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    else:
        leave_norms_unread(engine.optimizer)
    launch_less(engine.optimizer)
    return engine


def check_precision(precision: str) -> None:
    """Raise UserError where this device lacks the number format."""
    accelerator = get_accelerator()
    supported = {"fp32": True, "bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    if not supported[precision]:
        raise UserError(
            f"{precision} is not supported by DeepSpeed on this device ({accelerator.device_name()}): use bf16 or fp32"
        )


def loss_scale(engine: Engine) -> float:
    """Current fp16 loss scale, 1 in other precisions."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0


def gradient_norm(engine: Engine) -> SupportsFloat | None:
    """Give the norm of the last step's gradients before clipping, not yet read; infinity where it is not finite.

    None before the first step.
    """
    norm = engine.get_global_grad_norm()
    if not isinstance(norm, Tensor):
        return norm
    return LateNumbers(torch.where(norm < 0, torch.inf, norm))  # -1 is DeepSpeed's word for it


def _without_waits(config: dict[str, Any]) -> dict[str, Any]:
    """Switch off what has the host wait for the device in each step and is of no use here.

    DeepSpeed's clock waits twice for each micro-batch. Its search for overflows in bf16, which a ds_config may still
    ask for, is what our own check of a step's norm does, one step late.
    """
    bf16 = {"check_grad_overflow": False, **config.get("bf16", {})}
    return {**config, "bf16": bf16, "timers": {"throughput": {"enabled": False}}}


def leave_out_shared_memory_op() -> None:
    """Spare the user the wait for a CPU kernel that DeepSpeed would compile and only its inference all-reduce calls."""
    compatible = getattr(deepspeed.ops, "__compatible_ops__", {})
    compatible["deepspeed_shm_comm"] = False
