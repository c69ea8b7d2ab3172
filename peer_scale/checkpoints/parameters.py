"""The parameters that an objective's model has: their names, their shapes and how ranks share them."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from peer_scale.checkpoints.manifest import VOCABULARY_PARAMETERS, Sharding
from peer_scale.models.config import ModelConfig
from peer_scale.models.networks import PretrainingModel
from peer_scale.objectives.objective import Objective
from peer_scale.objectives.task import build_model
from peer_scale.parallel.tensor_parallel import TensorParallel


def sharding_of(name: str, parameter: nn.Parameter, tensor_parallel: int, vocab_size: int) -> Sharding:
    """Say how tensor-parallel ranks share the parameter, of which `parameter` is one rank's part."""
    shape = list(getattr(parameter, "ds_shape", parameter.shape))
    dim = getattr(parameter, "partition_dim", -1)
    if dim < 0 or not getattr(parameter, "tensor_model_parallel", False):
        return Sharding(tuple(shape))
    shape[dim] *= tensor_parallel
    padding = shape[0] - vocab_size if name in VOCABULARY_PARAMETERS else 0
    shape[0] -= padding
    return Sharding(tuple(shape), dim, tensor_parallel, padding)


def shardings(config: ModelConfig, objective: Objective, tensor_parallel: TensorParallel) -> dict[str, Sharding]:
    """Say how tensor-parallel ranks share each parameter of the whole model, in the model's order."""
    model = model_without_weights(config, objective, tensor_parallel)
    size = tensor_parallel.size
    return {name: sharding_of(name, p, size, config.vocab_size) for name, p in model.named_parameters()}


def model_without_weights(
    config: ModelConfig, objective: Objective, tensor_parallel: TensorParallel
) -> PretrainingModel:
    """Build our own model in evaluation mode, its parameters on the meta device, its buffers as they are."""
    handle = register_module_parameter_registration_hook(_on_meta_device)  # type: ignore[arg-type]
    try:
        return build_model(config, objective, tensor_parallel).eval()
    finally:
        handle.remove()


def _on_meta_device(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None:
        return None
    moved = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
    vars(moved).update(vars(parameter))
    return moved
