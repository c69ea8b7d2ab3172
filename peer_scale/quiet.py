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
HIDDEN = "peer_scale.hidden"
"""The logger that gets the warnings which are not shown, for a rank's log file."""


def silence_libraries() -> None:
    """Let only errors through from the libraries' loggers, and none of their warnings."""
    warnings.filterwarnings("ignore", module=_NOISY_MODULES)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in _NOISY_LOGGERS:
        # a filter stays in force when the library sets its logger's level on import
        logging.getLogger(name).addFilter(_is_error_or_hidden)
    hidden = logging.getLogger(HIDDEN)
    hidden.propagate = False
    hidden.addHandler(logging.NullHandler())
    threading.excepthook = _told_once(threading.excepthook)


def _is_error_or_hidden(record: logging.LogRecord) -> bool:
    if record.levelno >= logging.ERROR:
        return True
    if record.levelno >= logging.WARNING:
        logging.getLogger(HIDDEN).handle(record)
    return False


def _told_once(report: Any) -> Any:
    """Leave out TensorBoard's writing thread: it hands what ends it to the caller, who tells it in one line."""

    def told(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            report(failure)

    return told
