"""What DeepSpeed refuses when an engine starts, found before anything else has started."""

import os
from importlib.util import find_spec
from typing import Any

from pydantic import ValidationError

from peer_scale.configuration import shown
from peer_scale.errors import UserError

_MONITOR_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
_DTYPES = {"fp32": ("fp32", "float32", "float"), "bf16": ("bf16", "bfloat16"), "fp16": ("fp16", "float16", "half")}
_ZERO_PLUS_PLUS = (
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "zero_hpz_partition_size",
)


def check_start(resolved: dict[str, Any], precision: str) -> None:
    """Raise UserError, which names the key, for what DeepSpeed would refuse or pass over on this machine."""
    parsed = _parsed(resolved)
    _check_reduction(parsed)
    _check_offload(parsed.zero_config)
    _check_zero_plus_plus(parsed.zero_config)
    asked = resolved.get("data_types", {}).get("param_dtype")
    if asked is not None and asked not in _DTYPES[precision]:
        raise UserError(f"the ds_config's data_types.param_dtype is {asked}, but training is in {precision}")
    for block, package in _MONITOR_PACKAGES.items():
        if resolved.get(block, {}).get("enabled") and find_spec(package) is None:
            raise UserError(f"the ds_config's {block}.enabled needs the package {package}: pip install {package}")


def _parsed(resolved: dict[str, Any]) -> Any:
    """Let DeepSpeed read its part; UserError in its words where it refuses."""
    from deepspeed.runtime.config import DeepSpeedConfig

    # the number of ranks is not known to DeepSpeed yet
    config = {key: value for key, value in resolved.items() if key != "train_batch_size"}
    try:
        return DeepSpeedConfig(config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([_block_of(error.title), *map(str, first["loc"])])
        raise UserError(f"the ds_config's {key} is {shown(first['input'])}: {first['msg']}") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"DeepSpeed refuses the ds_config: {reason}") from None


def _block_of(model: str) -> str:
    names = {"DeepSpeedZeroConfig": "zero_optimization", "DeepSpeedFP16Config": "fp16", "DeepSpeedBF16Config": "bf16"}
    return names.get(model, model)


def _check_reduction(parsed: Any) -> None:
    zero = parsed.zero_config
    if parsed.prescale_gradients and parsed.gradient_predivide_factor != 1:
        raise UserError(
            "the ds_config's gradient_predivide_factor has no effect with prescale_gradients: give one of them"
        )
    if zero.stage == 3 and parsed.gradient_predivide_factor != 1:
        key = "the ds_config's gradient_predivide_factor"
        raise UserError(f"{key} must be 1 under ZeRO-3: DeepSpeed leaves the gradients divided by it")
    if zero.stage == 1 or not zero.reduce_scatter:
        return
    for key, is_given in (
        ("prescale_gradients", parsed.prescale_gradients),
        ("gradient_predivide_factor", parsed.gradient_predivide_factor != 1),
    ):
        if is_given:
            raise UserError(
                f"the ds_config's {key} needs zero_optimization.reduce_scatter false under ZeRO-{int(zero.stage)}"
            )


def _check_offload(zero: Any) -> None:
    for block in ("offload_optimizer", "offload_param"):
        offload = getattr(zero, block)
        if offload is None or offload.device == "none":
            continue
        key = f"the ds_config's zero_optimization.{block}"
        if block == "offload_param" and zero.stage != 3:
            raise UserError(f"{key} needs zero_optimization.stage 3, not {int(zero.stage)}")
        if offload.device == "nvme":
            _check_nvme(key, offload, int(zero.stage))


def _check_nvme(key: str, offload: Any, stage: int) -> None:
    if stage != 3:
        raise UserError(f"{key}.device nvme needs zero_optimization.stage 3, not {stage}")
    if offload.nvme_path is None:
        raise UserError(f"{key}.device nvme needs {key.rsplit('.', maxsplit=1)[1]}.nvme_path")
    if not _has_libaio():
        raise UserError(f"{key}.device nvme needs libaio and its headers: install them, or use cpu")


def _has_libaio() -> bool:
    """Ask DeepSpeed, which links a small program; what the linker has to say is kept off stderr."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        return bool(AsyncIOBuilder().is_compatible(verbose=False))
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_zero_plus_plus(zero: Any) -> None:
    from deepspeed.accelerator import get_accelerator

    for key in _ZERO_PLUS_PLUS:
        value = getattr(zero, key)
        if value == (1 if key == "zero_hpz_partition_size" else False):
            continue
        if zero.stage != 3:
            raise UserError(
                f"the ds_config's zero_optimization.{key} needs zero_optimization.stage 3, not {zero.stage}"
            )
        if get_accelerator().device_name() == "cpu":
            raise UserError(
                f"the ds_config's zero_optimization.{key} needs GPUs: DeepSpeed has no such kernels for CPUs"
            )
