"""What metrics are called on the page, in which order they stand, and how their numbers are written."""

from __future__ import annotations

import html
import math

_ACRONYMS = {"mlm", "rtd", "mws", "tqr", "auc", "mfu", "lr"}
_NAMES = {
    "loss": "Loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "step_time_s": "Seconds per step",
    "data_wait_s": "Seconds per step, waiting for data",
    "tokens_per_second": "Tokens per second",
    "tokens_per_second_per_device": "Tokens per second and device",
    "tflops_per_device": "TFLOP/s per device",
    "mfu": "Model FLOPs utilisation",
    "slowest_rank": "Rank that is busy the longest",
    "busy_time_s": "Seconds per step in which a rank waits for no other",
    "rank_data_wait_s": "Seconds per step, each rank's wait for data",
    "peak_memory_bytes": "Peak memory, bytes",
    "reserved_memory_bytes": "Memory taken of the GPU, bytes",
    "fill": "Tokens over padded positions",
    "varying_share": "Varying share of the generator's states",
    "rank_label_fractions": "Label shares of the selected positions",
    "level_accuracy": "Accuracy per level",
}
_COUNTS = ("step", "samples", "tokens", "train_flops", "time_s", "skipped_steps")
_OF_SPEED = (
    *("tokens_per_second_per_device", "tokens_per_second", "mfu", "tflops_per_device", "step_time_s"),
    *("data_wait_s", "fill", "slowest_rank"),
)
_OF_OPTIMIZER = ("lr", "grad_norm", "loss_scale")
_SPEED_ENDINGS = ("_bytes", "_gib", "_per_second", "_s")
_FIRST = ("loss", "_loss", "mlm_accuracy", "rtd_auc", "_auc", "_accuracy")

GROUPS = {
    "scores": "Scores",
    "differences": "Differences between arms",
    "cost": "Scores against cost",
    "learning": "What is learned",
    "labels": "Labels of the ranking",
    "optimizer": "Optimizer",
    "speed": "Speed and memory",
}


def is_count(name: str) -> bool:
    """Say whether a metric only counts, and is what others are drawn over."""
    return name in _COUNTS


def title(name: str) -> str:
    """Give a metric's name in words."""
    if name in _NAMES:
        return _NAMES[name]
    if name.startswith("validation_"):
        return f"{title(name.removeprefix('validation_'))}, held out"
    words = [word.upper() if word in _ACRONYMS else word for word in name.split("_")]
    text = " ".join(words)
    return text[:1].upper() + text[1:]


def group(name: str) -> str:
    """Give the part of the page that a metric belongs to, a key of GROUPS."""
    if name in _OF_OPTIMIZER:
        return "optimizer"
    return "speed" if name in _OF_SPEED or name.endswith(_SPEED_ENDINGS) else "learning"


def order(name: str) -> tuple[int, int]:
    """Give what metrics of one group are sorted by; equal ones stay as they are."""
    for known in (_OF_OPTIMIZER, _OF_SPEED):
        if name in known:
            return 0, known.index(name)
    for place, pattern in enumerate(_FIRST):
        if name == pattern or (pattern.startswith("_") and name.endswith(pattern)):
            return 0, place
    return 1, 0


def plain(text: str) -> str:
    """Escape the little HTML that plotly reads in labels."""
    return html.escape(text, quote=False)


def base(name: str) -> str:
    """Give the metric that a validation has measured, or the metric itself."""
    return name.removeprefix("validation_")


def is_loss(name: str) -> bool:
    """Say whether a metric is a loss, which is better where it is lower."""
    return base(name) == "loss" or name.endswith("_loss")


def in_text(name: str) -> str:
    """Give a metric's name as it stands within a sentence."""
    text = title(base(name))
    first = text.split()[0]
    text = text if first.isupper() else text[:1].lower() + text[1:]
    return f"held-out {text}" if name != base(name) else text


def number(value: float | None, digits: int = 4) -> str:
    """Write a number with so many significant digits: with thousands' commas, or a power of ten where it is long."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1e7 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def spread(value: float, deviation: float | None, digits: int = 4) -> str:
    """Write a mean with its deviation in the same decimals."""
    if deviation is None or not math.isfinite(deviation):
        return number(value, digits)
    if not 1e-3 <= abs(value) < 1e7:
        return f"{number(value, digits)} ± {number(deviation, 2)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f} ± {deviation:,.{decimals}f}"


def scaled(value: float) -> str:
    """Write a count in thousands, millions and so on: 1.23 M."""
    for limit, unit in ((1e15, ""), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= limit:
            return f"{value:.3g}" if not unit else f"{value / (1e3 if limit == 1e4 else limit):.3g}{unit}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def span(seconds: float) -> str:
    """Write a time as a person would say it."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = seconds / 60
    if minutes < 60:
        return f"{int(minutes)} min {int(seconds) % 60} s"
    hours = minutes / 60
    if hours < 48:
        return f"{int(hours)} h {int(minutes) % 60} min"
    return f"{hours / 24:.1f} days"
