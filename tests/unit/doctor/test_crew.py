"""Ranks in processes of their own: what becomes of those that hang, die and raise."""

import os
import threading
import time

import psutil
import pytest

from peer_scale.doctor.crew import Crew, Trial
from peer_scale.doctor.curves import ShortRun
from peer_scale.doctor.outcome import Failed
from peer_scale.parallel.environment import detect_environment


@pytest.fixture
def crew(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def make(timeout=240.0, ranks=2):
        return Crew(detect_environment(os.environ), tmp_path, ranks=ranks, num_gpus=0, timeout=timeout)

    return make


def ranks_of_trials() -> list[psutil.Process]:
    return [one for one in psutil.Process().children() if "peer_scale.doctor.rank" in one.cmdline()]


@pytest.mark.heavy
def test_ranks_that_hang_are_ended_and_named(crew):
    with pytest.raises(Failed, match=r"^rank 0 did not end in 0\.5 s"):
        crew(timeout=0.5).run(Trial("curve"))
    assert ranks_of_trials() == []


@pytest.mark.heavy
def test_a_rank_that_dies_is_named_and_takes_the_others_with_it(crew):
    def kill():
        while not (found := [one for one in ranks_of_trials() if one.environ().get("RANK") == "1"]):
            time.sleep(0.01)
        found[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(Failed, match=r"^rank 1 died, killed by SIGKILL"):
        crew().run(Trial("curve"))
    killer.join()
    assert ranks_of_trials() == []


@pytest.mark.slow
def test_a_rank_that_raises_is_quoted(crew):
    with pytest.raises(Failed, match=r"^rank [01]: UserError: --train-iters is x; ") as failed:
        crew().run(Trial("curve", ("--train-iters", "x")))
    (log,) = failed.value.details.values()
    assert any("Traceback" in line for line in log)


@pytest.mark.slow
def test_a_step_is_profiled(crew, tmp_path):
    run = ShortRun(tmp_path, steps=8, ranks=1)
    (found,) = crew().run(Trial("kernels", tuple(run.flags()), ranks=1, on_cpu=True))
    assert found["attention"] == "in groups of like length"
    assert found["launches"] > 100
    assert "aten::addmm" in found["microseconds"] or "aten::mm" in found["microseconds"]
