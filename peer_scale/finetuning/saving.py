"""A fine-tuned model as a folder that plain transformers opens."""

from __future__ import annotations

import copy
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from peer_scale.finetuning.head import LinearHead, write_into_transformers_head
from peer_scale.finetuning.tasks import Task
from peer_scale.storage import fsync_folder, write_atomically


def save_model(model: Any, tokenizer: Any, card: str, folder: Path) -> None:
    """Write the model with its tokenizer and README.md in place of what `folder` holds."""
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        aside.mkdir(parents=True)
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        write_atomically(aside / "README.md", card.encode())
        fsync_folder(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.replace(folder)
        fsync_folder(folder.absolute().parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@torch.no_grad()
def for_transformers(model: Any, task: Task, label_range: tuple[float, float] | None) -> Any:
    """Give the model in a class of transformers', with outputs as the task has its labels.

    Args:
        model: as it was trained, maybe with ELECTRA's head.
        task: what it was trained for.
        label_range: what 0 and 1 stand for where numbers were brought there for training.
    """
    plain: Any = AutoModelForSequenceClassification.from_config(copy.deepcopy(model.config))
    weights = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
    if isinstance(model.classifier, LinearHead):
        plain.load_state_dict(
            {name: tensor for name, tensor in weights.items() if not name.startswith("classifier.")}, strict=False
        )
        linear = LinearHead(model.config.hidden_size, task.num_outputs, 0.0)
        linear.out_proj.weight.copy_(weights["classifier.out_proj.weight"])
        linear.out_proj.bias.copy_(weights["classifier.out_proj.bias"])
        write_into_transformers_head(linear, plain.classifier)
    else:
        plain.load_state_dict(weights)
    if label_range is not None:
        low, high = label_range
        last = _last_layer(plain, task.num_outputs)
        last.weight.mul_(high - low)
        last.bias.mul_(high - low).add_(low)
    return plain.eval()


def _last_layer(model: nn.Module, num_outputs: int) -> nn.Linear:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert layers[-1].out_features == num_outputs
    return layers[-1]
