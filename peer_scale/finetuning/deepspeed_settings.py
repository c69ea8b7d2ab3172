"""What DeepSpeed is told: of the user's configuration the sharding; everything else is the recipe's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peer_scale.errors import UserError
from peer_scale.settings.ds_config import read_ds_config

_AUTO = "auto"


def deepspeed_settings(name: str) -> dict[str, Any]:
    """Give the Trainer's DeepSpeed configuration with the ZeRO settings of a file or of one in the package.

    Raises:
        UserError: it cannot be read, or asks for ZeRO-3, under which no rank has the whole weights to keep.
    """
    zero = dict(read_ds_config(Path(name)).get("zero_optimization", {}))
    if zero.get("stage", 0) > 2:
        raise UserError(f"--deepspeed_config {name}: ZeRO stage {zero['stage']}; fine-tuning has stages 0, 1 and 2")
    zero = {key: value for key, value in zero.items() if value != _AUTO}
    return {
        "train_batch_size": _AUTO,
        "train_micro_batch_size_per_gpu": _AUTO,
        "gradient_accumulation_steps": _AUTO,
        "gradient_clipping": _AUTO,
        "bf16": {"enabled": _AUTO},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
