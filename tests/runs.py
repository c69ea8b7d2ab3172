"""Training runs for tests: in the rank pool, or as a user starts them."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch.distributed as dist

from rank_pool import free_port

if TYPE_CHECKING:
    from peer_scale.training.trainer import Callback

PROJECT = Path(__file__).resolve().parent.parent
TIMES = (
    *("step_time_s", "data_wait_s", "tokens_per_second", "tflops_per_device", "mfu"),
    *("slowest_rank", "busy_time_s", "rank_data_wait_s", "peak_memory_bytes"),
)
SMALL = (
    *("--model", "peer-tiny", "--vocab-size", "2000", "--seq-length", "64", "--log-interval", "1000000"),
    "--no-report",
)


def corpus(text_file: Path) -> tuple[str, ...]:
    """Flags of the text, and of one cache for all tests: it is tokenised once for each vocabulary."""
    return ("--data-path", str(text_file), "--cache-dir", str(text_file.parent / "cache"))


def ds_config(folder: Path, zero_stage: int = 2, **blocks: object) -> Path:
    path = folder / f"zero{zero_stage}-{abs(hash(repr(blocks)))}.json"
    zero = {"stage": zero_stage}
    if zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # tiny parameters are partitioned too
    zero |= blocks.pop("zero_optimization", {})
    path.write_text(json.dumps({"zero_optimization": zero, **blocks}))
    return path


def train_in_pool(flags: list[str], watching: Sequence["Callback"] = ()) -> list[dict]:
    """Run by every rank of a pool: what `pretrain.py` does after it has joined its group; gives the metrics."""
    import torch

    from peer_scale.parallel.coordination import RankCoordinator
    from peer_scale.settings.flags import build_parser
    from peer_scale.settings.resolve import resolve
    from peer_scale.training.job import arrange_ranks, train

    _number_modules_afresh()
    args = build_parser().parse_args([*SMALL, "--num-workers", "0", *flags])
    run = resolve(args, dist.get_world_size())
    train(run, arrange_ranks(run, torch.device("cpu")), RankCoordinator(), watching)
    dist.barrier()  # the first rank may still be writing its last line
    return read_metrics(args.log_dir)


def train_to_refusal(flags: list[str]) -> str | None:
    """As `train_in_pool`, for a run that is refused: gives the line."""
    from peer_scale.errors import UserError

    try:
        train_in_pool(flags)
    except UserError as error:
        return str(error)
    return None


def _number_modules_afresh() -> None:
    """ZeRO-3 compares module numbers between ranks; stages of earlier runs in this process had different modules."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    register = DeepSpeedZeRoOffload._register_deepspeed_module
    (count,) = getattr(register, "__wrapped__", register).__defaults__
    count[0] = 0
    Init.param_id = 0


def train_in_fp16(flags: list[str], watching: Sequence["Callback"] = ()) -> list[dict] | str:
    """As `train_in_pool`, or why training failed. DeepSpeed refuses fp16 on a CPU: the refusal is lifted here alone."""
    from deepspeed.accelerator import get_accelerator

    from peer_scale.errors import TrainingError

    accelerator = get_accelerator()
    refusal = accelerator.is_fp16_supported
    accelerator.is_fp16_supported = lambda: True
    try:
        return train_in_pool(flags, watching)
    except TrainingError as error:
        return str(error)
    finally:
        accelerator.is_fp16_supported = refusal


def read_metrics(log_dir: Path | str) -> list[dict]:
    return [json.loads(line) for line in (Path(log_dir) / "metrics.jsonl").read_text().splitlines()]


def without_times(metrics: list[dict]) -> list[dict]:
    """What two runs that do the same have in common, bit for bit."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics]


def pretrain(*flags: object, launcher: tuple[str, ...] = (), timeout: float = 240, **environ: str):
    """Train a small model as a user does; gives the finished process with its output as text."""
    return run_trainer(*SMALL, *flags, launcher=launcher, timeout=timeout, **environ)


def run_trainer(*flags: object, launcher: tuple[str, ...] = (), timeout: float = 240, **environ: str):
    """Start the trainer with these flags alone; gives the finished process with its output as text.

    One that takes too long fails with the stacks of all its processes in what it has said.
    """
    command = [sys.executable, *launcher, str(PROJECT / "peer_scale/pretrain.py"), *map(str, flags)]
    mark = secrets.token_hex(8)
    environment = outside_of_ranks() | environ | {"PEER_TEST_RUN": mark}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=PROJECT
    )
    try:
        said = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        own = [
            each
            for each in psutil.process_iter(["environ"])
            if (each.info["environ"] or {}).get("PEER_TEST_RUN") == mark
        ]
        left = [f"{each.pid} (of {each.ppid()}, {each.status()}): {' '.join(each.cmdline())[:200]}" for each in own]
        for number in (signal.SIGUSR2, signal.SIGKILL):  # the first has ranks and their data workers show their stacks
            for each in own:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if number == signal.SIGKILL or "torch.distributed.run" not in each.cmdline():
                        each.send_signal(number)
            time.sleep(2)
        raise AssertionError("\n".join(["it does not end:", *left, *process.communicate()])) from None
    return subprocess.CompletedProcess(command, process.returncode, *said)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait for something that a trainer does; fail with what it has said where it ends or takes too long."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read() if process.stderr else process.args
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.02)


def outside_of_ranks() -> dict[str, str]:
    """The environment without what says that this process is a rank: a test may have made it one."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in names}


def torchrun(ranks: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port()))
