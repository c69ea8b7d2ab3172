"""Small runs whose checkpoints tests look at."""

from pathlib import Path

from runs import corpus, ds_config

TIMES = ("step_time_s", "data_wait_s", "tokens_per_second", "tflops_per_device", "mfu")


def flags_for(folder: Path, text_file: Path, name: str, *more: object, stage: int = 2, steps: int = 4) -> list[str]:
    flags = [
        *(*corpus(text_file), "--deepspeed_config", ds_config(folder, stage)),
        *("--model", "bert-tiny", "--num-layers", 1, "--train-iters", steps, "--global-batch-size", 4),
        *("--micro-batch-size", 2, "--num-workers", 0, "--log-dir", folder / name, *more),
    ]
    return list(map(str, flags))


def without_times(metrics: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics]
