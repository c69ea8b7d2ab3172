"""Adam with decoupled weight decay, and its hyper-parameters as pure functions of the step."""

from typing import Any

import torch
from torch import nn

from peer_scale.models.config import decays
from peer_scale.settings.run import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over two groups: matrices and tables decay, biases, LayerNorms and thresholds do not."""
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": config.weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        groups[0 if decays(name, parameter.ndim) else 1]["params"].append(parameter)
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Of optimizer step `step` (from 1): linear up to `lr` at the end of the warm-up, then linear down to 0."""
    if step <= config.lr_warmup_iters:
        return config.lr * step / config.lr_warmup_iters
    remaining = max(config.train_iters - step + 1, 0)
    return config.lr * remaining / (config.train_iters - max(config.lr_warmup_iters, 1) + 1)


def set_hyperparameters(optimizer: Any, config: TrainingConfig, step: int, num_updates: int) -> float:
    """Set the groups' hyper-parameters for `step`; gives the learning rate.

    `num_updates` counts the updates including this one (steps that fp16 skipped are none). Without bias correction the
    update lr * m / (sqrt(v) + eps) is got from an Adam that does correct, by scaling lr and eps; the decay,
    lr * weight_decay, stays what it was.
    """
    rate = learning_rate(config, step)
    scale, spread = 1.0, 1.0
    if not config.adam_bias_correction:
        spread = (1 - config.adam_beta2**num_updates) ** 0.5
        scale = (1 - config.adam_beta1**num_updates) / spread
    for group, decay in zip(optimizer.param_groups, (config.weight_decay, 0.0), strict=True):
        group.update(lr=rate * scale, eps=config.adam_eps / spread, weight_decay=decay / scale)
    return rate
