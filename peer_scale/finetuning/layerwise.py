"""Learning rates that fall from the head down to the embeddings.

ELECTRA's code gives embeddings (and their projection) the rate lr d^(n+2), layer i of n, counted from 0, lr d^(n+1-i)
and the head lr: between the head and the top layer one power is left out, a left-over of the pooler that BERT has
("official"). "fixed" closes that gap: all exponents but the head's are one less.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from peer_scale.finetuning.recipes import Recipe

_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")
_TOP_NORM = "final_norm."
_POOLER = "pooler."


def exponent(name: str, *, prefix: str, num_layers: int, is_fixed: bool) -> int:
    """Give the power of the decay that a parameter's rate has.

    `name` is the parameter's, `prefix` what the encoder is called in the model, without a dot.
    """
    if not is_of_encoder(name, prefix):
        return 0
    inner = name.removeprefix(f"{prefix}.")
    layer = _LAYER.search(inner)
    if layer:
        depth = int(layer[1])
    elif inner.startswith(_TOP_NORM):
        depth = num_layers - 1
    else:
        depth = -1
    return num_layers + (0 if is_fixed else 1) - depth


def is_of_encoder(name: str, prefix: str) -> bool:
    """Whether a parameter belongs to the pre-trained encoder; a pooler is part of the head."""
    return name.startswith(f"{prefix}.") and not name.startswith(f"{prefix}.{_POOLER}")


def parameter_groups(model: nn.Module, recipe: Recipe, lr: float, decayed: set[str]) -> list[dict]:
    """Group the parameters for an optimizer by rate, and by whether their name is in `decayed`: of weight decay."""
    taken: Any = model
    prefix, num_layers = str(taken.base_model_prefix), int(taken.config.num_hidden_layers)
    groups: dict[tuple[float, bool], list] = {}
    for name, parameter in model.named_parameters():
        power = 0
        if recipe.layerwise != "none":
            is_fixed = recipe.layerwise == "fixed"
            power = exponent(name, prefix=prefix, num_layers=num_layers, is_fixed=is_fixed)
        rate = lr * recipe.layerwise_decay**power
        groups.setdefault((rate, name in decayed), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": recipe.weight_decay if is_decayed else 0.0}
        for (rate, is_decayed), parameters in groups.items()
    ]
