"""Keep the libraries' own chatter off a user's terminal; call before they are imported."""

import logging
import os
import warnings

_NOISY_MODULES = r"(torch|deepspeed|megatron|transformers|datasets|apex|multiprocessing)\b"
_NOISY_LOGGERS = (
    "DeepSpeed",
    "DeepSpeedAccelerator",
    "torch.distributed",
    "torch.utils.cpp_extension",
    "transformers",
    "megatron.core",
    "datasets",
)


def silence_libraries() -> None:
    """Let only errors through from the libraries' loggers, and none of their warnings."""
    warnings.filterwarnings("ignore", module=_NOISY_MODULES)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in _NOISY_LOGGERS:
        # a filter stays in force when the library sets its logger's level on import
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)
