"""What results of ranks mean. The ranks here give prepared results: what real ones give needs other devices."""

from pathlib import Path

import pytest

from peer_scale.doctor.curves import ShortRun
from peer_scale.doctor.examination import Examination

GOOD = [{"loss": 4.0, "mlm_loss": 2.0, "grad_norm": 1.0}, {"loss": 3.0, "mlm_loss": 1.0, "grad_norm": 1.0}]
PARTED = [GOOD[0], {**GOOD[1], "loss": 3.1}]


class PreparedRanks:
    """Answers trials by a function of theirs, and remembers them."""

    is_first = True
    place = (0, 0, 2)

    def __init__(self, answer, *, ranks=2, gpus=0):
        self._answer = answer
        self.num_ranks = self.ranks_per_node = ranks
        self.num_gpus = gpus
        self.trials = []

    def run(self, trial):
        self.trials.append(trial)
        return [self._answer(trial)] * (trial.ranks or self.num_ranks)

    def exchange(self, value):
        return [value]


@pytest.fixture
def examine(tmp_path):
    def run(group, answer, **options):
        crew = PreparedRanks(answer, **options)
        told = []
        examination = Examination(
            crew,
            ShortRun(tmp_path, steps=2, ranks=crew.num_ranks),
            environ={},
            host="here",
            local_rank=0,
            folder=Path("."),
            shared_memory=Path("/dev/shm"),
            bench=tmp_path / "bench.py",
            tell=told.append,
        )
        outcomes = examination.run([group])
        assert told == outcomes or group == "curves"
        return {one.name: one for one in outcomes}, crew

    return run


def seed(trial):
    return trial.flags[trial.flags.index("--seed") + 1]


def test_layouts_that_agree_pass(examine):
    found, crew = examine("curves", lambda trial: GOOD)
    assert found.pop("one GPU").state == "not tried"
    assert [one.state for one in found.values()] == ["passed"] * 7
    assert [(trial.ranks, trial.on_cpu) for trial in crew.trials] == [(1, True), *[(None, False)] * 6]
    assert found["TP 2"].line == "2 steps, losses within 0.0e+00 of one process; on CPUs, gloo"


def test_a_layout_that_parts_under_one_seed_only_was_unlucky(examine):
    found, _ = examine("curves", lambda trial: PARTED if trial.ranks is None and seed(trial) == "1" else GOOD)
    assert {one.state for name, one in found.items() if name != "one GPU"} == {"passed"}


def test_a_layout_that_parts_under_both_seeds_fails(examine):
    def answer(trial):
        is_pipeline = trial.flags[trial.flags.index("--pipeline-model-parallel-size") + 1 :][:1] == ("2",)
        return PARTED if is_pipeline else GOOD

    found, _ = examine("curves", answer)
    assert [name for name, one in found.items() if one.state == "failed"] == ["PP 2"]
    assert found["PP 2"].line.startswith("step 2: loss is 3.1 instead of 3 ")
    assert found["PP 2"].details["found"] == PARTED


def test_without_a_reference_nothing_is_compared(examine):
    found, _ = examine("curves", lambda trial: [GOOD[0], {**GOOD[1], "mlm_loss": 2.5}])
    states = [one.state for one in found.values()]
    assert states == ["failed", *["not tried"] * 7]


def test_each_check_of_gpus_is_named_where_there_is_none(examine):
    found, crew = examine("gpu", None)
    assert {(one.state, one.line) for one in found.values()} == {("not tried", "no GPU")}
    assert len(found) == 5
    assert crew.trials == []


def on_gpus(attention="torch's flash attention, variable length", flash=("flash_fwd",), places=(), overlap=GOOD):
    def answer(trial):
        if trial.kind == "kernels":
            return {"attention": attention, "flash": list(flash), "launches": 1234, "microseconds": {}}
        if trial.kind == "synchronizations":
            return list(places)
        return overlap if any("overlap_comm_True" in flag for flag in trial.flags) else GOOD

    return answer


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("attention's kernels", {"flash": ()}, "none of which is flash attention"),
        ("nothing waits for the device", {"places": ["trainer.py:109"]}, "1 places of steps 5 to 7 wait"),
        (
            "ZeRO-2 overlap on = off",
            {"overlap": [GOOD[0], {**GOOD[1], "grad_norm": 1.0001}]},
            "step 2: grad_norm is 1.0001 instead of 1",
        ),
    ],
)
def test_what_is_wrong_on_gpus_fails(name, options, said, examine):
    found, _ = examine("gpu", on_gpus(**options), gpus=2)
    assert found[name].state == "failed"
    assert said in found[name].line
    states = {other: one.state for other, one in found.items() if other != name}
    assert states.pop("speed against others") == "not tried"
    assert set(states.values()) == {"passed"}


def test_the_benchmark_is_run_where_it_is(examine, tmp_path):
    write_and_end = "import json, sys; json.dump([{'row': 'head', 'ratio': 2.5}], open(sys.argv[2], 'w'))"
    (tmp_path / "bench.py").write_text(write_and_end)
    found, _ = examine("gpu", on_gpus(), gpus=2)
    assert found["speed against others"].line == "peer's time over ours: head 2.50"
    assert found["speed against others"].details == {"rows": [{"row": "head", "ratio": 2.5}]}
    (tmp_path / "bench.py").write_text("import sys; sys.exit('error: out of memory')")
    found, _ = examine("gpu", on_gpus(), gpus=2)
    assert found["speed against others"].state == "failed"
    assert "exit code 1 and said: error: out of memory" in found["speed against others"].line


def test_one_gpu_leaves_out_what_needs_two(examine):
    found, _ = examine("curves", lambda trial: GOOD, ranks=1, gpus=1)
    assert found.pop("one GPU").line == "2 steps, losses within 0.0e+00 of one process on the CPU"
    assert {one.line for name, one in found.items() if "one process" not in name} == {"one rank (one GPU)"}


def test_a_gpu_that_parts_from_the_cpu_is_told_apart_from_layouts(examine):
    found, _ = examine("curves", lambda trial: PARTED if trial.ranks == 1 and not trial.on_cpu else GOOD, gpus=2)
    assert [name for name, one in found.items() if one.state == "failed"] == ["one GPU"]
    assert found["DP 2, ZeRO-2"].line.endswith("on GPUs, NCCL")
