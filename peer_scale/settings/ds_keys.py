"""Which keys a ds_config may have, of which kind their values are, and what is said of those that are refused.

What a ds_config asks for is done or refused. DeepSpeed's own descriptions of its blocks say which keys there are; the
tables below say which of them this trainer does otherwise, and how.
"""

import json
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

from peer_scale.configuration import Setting, shown
from peer_scale.errors import UserError
from peer_scale.settings.names import hint

AUTO = "auto"

_Dtype = Literal["fp32", "float32", "float", "bf16", "bfloat16", "fp16", "float16", "half"]
_AnyCase = BeforeValidator(lambda value: value.lower())
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
SCALARS: dict[str, Any] = {
    **dict.fromkeys(_BATCH, PositiveInt),
    "gradient_clipping": Annotated[float, Field(ge=0)],
    "communication_data_type": Annotated[Literal["fp16", "bf16", "fp32"], _AnyCase],
    "prescale_gradients": bool,
    "gradient_predivide_factor": PositiveFloat,
    "gradient_allreduce_op": str,
    "managed_gradient_accumulation": bool,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "disable_allgather": bool,
    "disable_python_gc": bool,
    "dump_state": bool,
    "steps_per_print": PositiveInt,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
}
_NULL_IS_ABSENT = (*_BATCH, "communication_data_type", "steps_per_print")
_OF_BLOCKS: dict[str, dict[str, Any]] = {
    "data_types": {
        **dict.fromkeys(("grad_accum_dtype", "param_dtype", "buffer_dtype"), _Dtype),
        "keep_in_fp32_modules": list[str],
    },
    "aio": {
        **dict.fromkeys(("block_size", "queue_depth", "intra_op_parallelism"), PositiveInt),
        **dict.fromkeys(("single_submit", "overlap_events", "use_gds"), bool),
    },
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": Annotated[float, Field(ge=0)],
        "profile_step": PositiveInt,
        "module_depth": int,
        "top_modules": PositiveInt,
        "detailed": bool,
        "output_file": str | None,
    },
    "optimizer.params": {
        "lr": PositiveFloat,
        "betas": list[float],
        "eps": PositiveFloat,
        "weight_decay": Annotated[float, Field(ge=0)],
        **dict.fromkeys(("bias_correction", "torch_adam", "adam_w_mode", "amsgrad"), bool),
    },
    "scheduler.params": {
        "warmup_min_lr": float,
        "warmup_max_lr": PositiveFloat,
        "warmup_num_steps": Annotated[int, Field(ge=0)],
        "total_num_steps": PositiveInt,
        "warmup_type": str,
    },
}
_NARROWER: dict[str, Any] = {  # than DeepSpeed's own bounds, beyond which it breaks down later
    "fp16.initial_scale_power": Annotated[int, Field(ge=0, le=127)],
    "fp16.hysteresis": PositiveInt,
    "zero_optimization.stage": int,
    "zero_optimization.allgather_bucket_size": PositiveInt,
    "zero_optimization.sub_group_size": PositiveInt,
    "zero_optimization.zero_hpz_partition_size": PositiveInt,
}


class Only(NamedTuple):
    """The one value that a key can have here, and why."""

    value: Any
    reason: str


_IN_FP32 = "master weights and Adam's means are kept in fp32"
_TORCH_ADAM = "the optimizer is torch's AdamW, on the host too"
_OWN_CHECKPOINTS = "checkpoints are those of --save, which any layout loads"
_ONLY: dict[str, Only] = {
    "optimizer.params.adam_w_mode": Only(True, "the optimizer is AdamW, whose weight decay is decoupled"),
    "optimizer.params.amsgrad": Only(False, "the optimizer is AdamW without it"),
    "scheduler.params.warmup_type": Only("linear", "the learning rate rises linearly"),
    "scheduler.params.warmup_min_lr": Only(0, "the warm-up starts there"),
    "gradient_allreduce_op": Only("mean", "the loss is that of the whole global batch"),
    "managed_gradient_accumulation": Only(True, "gradient_accumulation_steps says how many there are"),
    "zero_force_ds_cpu_optimizer": Only(False, _TORCH_ADAM),
    "disable_allgather": Only(False, "DeepSpeed itself does nothing with it"),
    "flops_profiler.enabled": Only(False, "metrics.jsonl has train_flops, tflops_per_device and mfu (--log-dir)"),
    "comms_logger.enabled": Only(False, "peer-scale plan says what a step sends"),
    "fp16.auto_cast": Only(False, "inputs are token ids"),
    "fp16.fp16_master_weights_and_grads": Only(False, _IN_FP32),
    "bf16.bf16_master_weights_and_grads": Only(False, _IN_FP32),
    "bf16.bf16_optimizer_states": Only(False, _IN_FP32),
    "zero_optimization.compute_grad_norm": Only(True, "every step's norm is reported"),
    "zero_optimization.elastic_checkpoint": Only(False, _OWN_CHECKPOINTS),
    "zero_optimization.load_from_fp32_weights": Only(True, _OWN_CHECKPOINTS),
    "zero_optimization.pipeline_loading_checkpoint": Only(False, _OWN_CHECKPOINTS),
    "zero_optimization.legacy_stage1": Only(False, "DeepSpeed has no other stage 1 any more"),
    "zero_optimization.save_muon_momentum_buffer_in_memory": Only(False, _TORCH_ADAM),
    "zero_optimization.offload_optimizer.ratio": Only(1, _TORCH_ADAM),
    "zero_optimization.offload_optimizer.super_offload": Only(False, _TORCH_ADAM),
}
_ELSEWHERE: dict[str, str] = {
    "activation_checkpointing": "--activation-checkpointing does it",
    "autotuning": "peer-scale plan --search finds the layout",
    "checkpoint": "--save, --save-interval, --keep-last and --async-save say how checkpoints are written",
    "compile": "--compile is the way to have the layers compiled",
    "data_efficiency": "--data-path and --seq-length say what is read",
    "dataloader_drop_last": "every batch is full",
    "datastates": "--async-save writes checkpoints in the background",
    "expert_parallel": "the models have no experts",
    "hybrid_engine": "nothing is generated while training",
    "log_level": "--verbose lets DeepSpeed's messages through",
    "pipeline": "--pipeline-model-parallel-size says the number of stages",
    "seq_parallel_communication_data_type": "--sequence-parallel splits sequences",
    "sequence_parallel_size": "--sequence-parallel splits sequences",
    "tensor_parallel": "--tensor-model-parallel-size says it",
    "timers": "metrics.jsonl has each step's time (--log-dir)",
    "torch_autocast": "--bf16 or --fp16 chooses the number format",
    "use_data_before_expert_parallelism": "the models have no experts",
    "vocabulary_size": "--tokenizer or --vocab-size says it",
    "weight_quantization": "weights are not quantised while training",
    "optimizer.legacy_fusion": _TORCH_ADAM,
    "optimizer.params.max_grad_norm": "gradient_clipping does it",
    "zero_optimization.zenflow": _TORCH_ADAM,
}
_TYPES = {"optimizer": ("Adam", "AdamW"), "scheduler": ("WarmupDecayLR",)}


def checked_ds_config(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Give the config under DeepSpeed's present names, without what asks for nothing.

    Raises:
        UserError: that begins with `path`, for a key that is not known, a value that cannot be right, and what this
            trainer does otherwise.
    """
    config = dict(config)
    if "bfloat16" in config:  # as DeepSpeed reads it
        if "bf16" in config:
            raise UserError(f"{path}: bfloat16 and bf16 are one block: leave one of them out")
        config["bf16"] = config.pop("bfloat16")
    models = _deepspeed_models()
    blocks = {name: fields for name, fields in _OF_BLOCKS.items() if "." not in name}
    known = [*SCALARS, "optimizer", "scheduler", *models, *blocks]
    checked: dict[str, Any] = {}
    for key, value in config.items():
        if _is_elsewhere(str(key), value, path):
            continue
        _require_known(key, known, path, "", _removed_keys()[0])
        if key in models:
            checked[key] = _checked_model(_object(value, key, path), models[key], path, key)
        elif key in blocks:
            checked[key] = _checked_fields(_object(value, key, path), blocks[key], path, key)
        elif key in _TYPES:
            checked[key] = _checked_with_params(_object(value, key, path), path, key)
        elif value is not None or key not in _NULL_IS_ABSENT:
            checked[key] = _checked(value, SCALARS[key], path, key)
    _check_stage(checked, path)
    return checked


def _check_stage(config: Mapping[str, Any], path: str) -> None:
    stage = _object(config.get("zero_optimization", {}), "zero_optimization", path).get("stage", 0)
    if isinstance(stage, bool | str) or stage not in (1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {shown(stage)}; it must be 1, 2 or 3")


def _deepspeed_models() -> dict[str, Any]:
    """Give DeepSpeed's own descriptions of its blocks: which keys there are, of which type."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    monitors = {name: field.annotation for name, field in DeepSpeedMonitorConfig.model_fields.items()}
    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "comms_logger": CommsLoggerConfig,
        **monitors,
    }


def _removed_keys() -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Give what DeepSpeed says of keys that it no longer has: at the top, and in zero_optimization."""
    from deepspeed.runtime import config

    names = ("_REMOVED_TOP_LEVEL_CONFIG_KEYS", "_REMOVED_ZERO_CONFIG_KEYS")
    top, zero = (getattr(config, name, {}) for name in names)
    return top, zero


def _object(value: Any, where: str, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {where} must be a JSON object, not {shown(value)}")
    return value


def _is_elsewhere(where: str, value: Any, path: str) -> bool:
    """Say whether a key is one that this trainer has no use for and that asks for nothing; refuse it if it does."""
    if where not in _ELSEWHERE:
        return False
    if value == {} or (isinstance(value, dict) and value.get("enabled") is False):
        return True
    raise UserError(f"{path}: {where} has no effect here: {_ELSEWHERE[where]}; leave it out")


def _require_known(key: Any, known: Iterable[str], path: str, where: str, removed: Mapping[str, str]) -> None:
    names = list(known)
    full = f"{where}.{key}" if where else str(key)
    if key in removed:
        raise UserError(
            f"{path}: {full} is not in this version of DeepSpeed: {removed[key].split('. ')[0].rstrip('.')}"
        )
    if key not in names:
        raise UserError(f"{path}: unknown key {full}{hint(key, names)}")


def _checked_with_params(block: dict[str, Any], path: str, where: str) -> dict[str, Any]:
    """Check the block of the optimizer or of the scheduler."""
    checked = {}
    for key, value in block.items():
        if _is_elsewhere(f"{where}.{key}", value, path):
            continue
        _require_known(key, ("type", "params"), path, where, {})
        checked[key] = value
    kinds = {kind.lower() if where == "optimizer" else kind: kind for kind in _TYPES[where]}
    kind = checked.get("type", _TYPES[where][0])
    named = kind.lower() if isinstance(kind, str) and where == "optimizer" else kind
    if not isinstance(kind, str) or named not in kinds:
        raise UserError(f"{path}: {where}.type is {shown(kind)}; it must be {' or '.join(_TYPES[where])}")
    name = f"{where}.params"
    if "params" in checked:
        params = _checked_fields(_object(checked["params"], name, path), _OF_BLOCKS[name], path, name)
        betas = params.get("betas", AUTO)
        if betas != AUTO and len(betas) != 2:
            raise UserError(f"{path}: optimizer.params.betas is {shown(betas)}; it must be a list of two numbers")
        checked["params"] = params
    return checked


def _checked_fields(block: dict[str, Any], fields: Mapping[str, Any], path: str, where: str) -> dict[str, Any]:
    """Check a block by the types of its keys."""
    checked = {}
    for key, value in block.items():
        full = f"{where}.{key}"
        if not _is_elsewhere(full, value, path):
            _require_known(key, fields, path, where, {})
            checked[key] = _checked(value, fields[key], path, full)
    return checked


def _checked_model(block: dict[str, Any], model: Any, path: str, where: str) -> dict[str, Any]:
    """Check a block by DeepSpeed's description of it; keys come out under the names that DeepSpeed documents."""
    fields = {name: field for key, field in model.model_fields.items() for name in (key, field.alias) if name}
    removed = _removed_keys()[1] if where == "zero_optimization" else {}
    checked: dict[str, Any] = {}
    for key, value in block.items():
        _require_known(key, fields, path, where, removed)
        field, name = fields[key], fields[key].alias or key
        full = f"{where}.{name}"
        if name in checked:
            raise UserError(f"{path}: {full} stands twice, under two names")
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("deprecated"):
            raise UserError(f"{path}: {where}.{key} is an old name: give {where}.{extra['new_param']} instead")
        inner = next((one for one in _types(field.annotation) if hasattr(one, "model_fields")), None)
        is_null = value is None and type(None) in _types(field.annotation)  # as if it were not there
        if is_null or _is_elsewhere(full, value, path):
            continue
        if inner is None:
            described = (field.annotation, *field.metadata)
            annotation = Annotated[described] if field.metadata else field.annotation  # type: ignore[valid-type]
            checked[name] = _checked(value, _NARROWER.get(full, annotation), path, full)
        else:
            checked[name] = _checked_model(_object(value, full, path), inner, path, full)
    return checked


def _types(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) or (annotation,)


def _checked(value: Any, annotation: Any, path: str, where: str) -> Any:
    """Give a value as it stands, if it is of its kind and within its bounds."""
    if isinstance(value, str) and value == AUTO:
        return value
    source = f"{path}: {where}"
    setting = Setting.of(annotation)
    setting.checked(value, source, typed=True)
    if isinstance(value, float) and setting.schema.get("type") == "integer":
        value = int(value)  # 5e8
    only = _ONLY.get(where)
    if only is not None and value != only.value:
        allowed = json.dumps(only.value).strip('"')
        raise UserError(f"{source} is {shown(value)}; it must be {allowed}: {only.reason}")
    return value
