"""A disk that is full for some time: saves are tried again, and training goes on without those that fail."""

import contextlib
import threading

import pytest

from peer_scale.checkpoints.folder import committed
from peer_scale.errors import StoppedEarly, TrainingError
from runs import corpus, ds_config, read_metrics, train_in_pool


def flags_for(folder, disk, text_file, *more):
    flags = [
        *(*corpus(text_file), "--deepspeed_config", ds_config(folder), "--model", "bert-tiny", "--num-layers", 1),
        *("--train-iters", 8, "--seq-length", 32, "--global-batch-size", 4, "--micro-batch-size", 2),
        *("--log-dir", disk / "log", "--save", disk / "save", "--save-interval", 2, "--keep-last", 2, *more),
    ]
    return list(map(str, flags))


def fill(ballast):
    """Take all of the disk's room."""
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def train_on_a_full_disk(flags, ballast, full, free=None, after=0.0):
    """Run by a rank: train; no room from the step `full` on, up to `after` seconds after `free` has begun.

    Gives the metrics, or how and why the run has ended.
    """
    from torch.distributed import get_rank

    from peer_scale.training.trainer import Callback

    class Filling(Callback):
        def on_step_begin(self, trainer, step):
            if get_rank() == 0 and step == full:
                fill(ballast)
            if get_rank() == 0 and step == free:
                threading.Timer(after, ballast.unlink).start()

    try:
        return train_in_pool(flags, [Filling()])
    except (StoppedEarly, TrainingError) as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize(
    ("ranks", "saves"),
    [
        (1, "--async-save"),
        pytest.param(2, "--async-save", marks=pytest.mark.slow),
        pytest.param(2, "--no-async-save", marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_without_what_could_not_be_saved(ranks, saves, rank_pools, mount_disk, tmp_path, text_file):
    disk = mount_disk("40m")
    more = ("--max-failed-saves", 9, "--save-retry-seconds", 0, "--keep-last", 9, saves)
    flags = flags_for(tmp_path, disk, text_file, *more)
    metrics = rank_pools.of(ranks).run(train_on_a_full_disk, flags, disk / "ballast", full=3, free=7)[0]
    assert [line["step"] for line in metrics] == list(range(1, 9))
    kept = [path.name for path in committed(disk / "save")]
    if saves == "--no-async-save":
        assert kept == ["step_00000002", "step_00000008"]
    # in the background, step 2 may be written too late, and step 6 be tried when there is room again
    assert "step_00000004" not in kept and kept[-1] == "step_00000008"
    assert not list((disk / "save").glob(".*step_*"))


@pytest.mark.slow
@pytest.mark.parametrize("saves", ["--async-save", "--no-async-save"])
def test_a_save_is_tried_again(saves, one_rank, mount_disk, tmp_path, text_file):
    disk = mount_disk("40m")
    more = ("--max-failed-saves", 1, "--save-retry-seconds", 1, "--micro-batch-size", 4, saves)
    flags = flags_for(tmp_path, disk, text_file, *more)
    metrics = one_rank.run(train_on_a_full_disk, flags, disk / "ballast", full=4, free=4, after=0.7)[0]
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert [path.name for path in committed(disk / "save")] == ["step_00000006", "step_00000008"]


def test_too_many_failed_saves_end_the_run(one_rank, mount_disk, tmp_path, text_file):
    disk = mount_disk("40m")
    more = ("--max-failed-saves", 2, "--save-retry-seconds", 0, "--micro-batch-size", 4, "--no-async-save")
    flags = flags_for(tmp_path, disk, text_file, *more)
    how, why = one_rank.run(train_on_a_full_disk, flags, disk / "ballast", full=1)[0]
    assert how == "TrainingError", "there is nothing to go on from"
    assert why.startswith("2 saves in a row have failed; ") and "No space left on device; 3 tries" in why
    assert len(read_metrics(disk / "log")) < 8
    (disk / "ballast").unlink()
    assert one_rank.run(train_on_a_full_disk, [*flags, "--set-aside"], disk / "ballast", full=3)[0][0] == "StoppedEarly"
    assert [path.name for path in committed(disk / "save")] == ["step_00000002"]
    (disk / "ballast").unlink()
    metrics = one_rank.run(train_on_a_full_disk, flags, disk / "ballast", full=9)[0]
    assert [line["step"] for line in metrics] == list(range(1, 9))
