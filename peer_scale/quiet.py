"""Keep the libraries' own chatter off a user's terminal; call before they are imported."""

import logging
import os
import threading
import warnings
from typing import Any

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
    threading.excepthook = _told_once(threading.excepthook)


def _told_once(report: Any) -> Any:
    """Leave out TensorBoard's writing thread: it hands what ends it to the caller, who tells it in one line."""

    def told(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            report(failure)

    return told
