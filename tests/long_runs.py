"""Runs of many steps: the smallest model with a generator and a ranker, a few milliseconds per step."""

from pathlib import Path

from runs import SMALL, corpus, ds_config

_SIZES = ("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads")
_NETWORK = [
    word
    for prefix in ("", "generator-")
    for name, n in zip(_SIZES, (1, 16, 32, 2), strict=True)
    for word in (f"--{prefix}{name}", str(n))
]


def flags_of_long_run(folder: Path, text_file: Path, steps: int, *more: object) -> list[str]:
    """Give all flags of a run of the smallest model, which writes into `log` and `save` in `folder`."""
    flags = [
        *(*SMALL, *corpus(text_file), "--deepspeed_config", ds_config(folder, 2), "--model", "peer-tiny", *_NETWORK),
        *("--seq-length", 32, "--global-batch-size", 4, "--micro-batch-size", 2, "--num-threads", 1),
        *("--train-iters", steps, "--log-dir", folder / "log", "--save", folder / "save", *more),
    ]
    return list(map(str, flags))
