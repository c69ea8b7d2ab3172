"""The Slurm jobs that an experiment becomes."""

import shlex
import sys
from pathlib import Path

import pytest

from peer_scale.errors import UserError
from peer_scale.experiments.plan import make_plan
from peer_scale.experiments.processes import Programs
from peer_scale.experiments.reading import read_experiment
from peer_scale.experiments.results import RunResult, write_result
from peer_scale.experiments.run import Conductor
from peer_scale.experiments.slurm import TEMPLATE, SlurmOptions, submit
from peer_scale.settings.flags import build_parser
from peer_scale.settings.resolve import resolve

EXPERIMENT = """
name: x
seeds: [1, 2]
arms: [{name: bert, model: bert-tiny, steps: 30}, {name: tfidf, kind: tfidf}]
tasks: [cola]
finetune: {}
"""


@pytest.fixture
def conductor(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(EXPERIMENT)
    plan = make_plan(read_experiment(path), path, None)
    return Conductor(plan, tmp_path / "out", Programs(one_thread=False))


def jobs_of(conductor, tmp_path, **changes):
    """The commands of a dry run, cut into words."""
    lines = []
    options = {"pretraining": ["-N", "2"], "measuring": ["--gpus", "1"], "template": TEMPLATE, "dry_run": True}
    submit(conductor, conductor.plan.runs, SlurmOptions(tmp_path / "x.yaml", **(options | changes)), lines.append)
    return [shlex.split(line) for line in lines]


def test_a_run_is_a_job_that_trains_and_one_behind_it_that_measures(conductor, tmp_path):
    training, measuring, of_tfidf, _, _ = jobs_of(conductor, tmp_path)
    assert training[:3] == ["sbatch", "--parsable", "--job-name=x-bert-s1"]
    assert training[4:7] == ["-N", "2", str(TEMPLATE)]
    args = build_parser().parse_args(training[7:])
    run = resolve(args, 1)
    assert (run.name, run.seed, run.training.train_iters) == ("bert-tiny", 1, 30)
    assert args.save == tmp_path / "out" / "runs" / "bert-s1" / "checkpoints"
    assert "--dependency=afterok:JOB" in measuring
    assert measuring[measuring.index("--gpus") + 1] == "1"
    wrapped = shlex.split(measuring[-1].removeprefix("--wrap="))
    assert wrapped[0] == f"PYTHONPATH={TEMPLATE.parents[1]}" or wrapped[0].startswith(
        f"PYTHONPATH={TEMPLATE.parents[1]}:"
    )
    assert wrapped[1:6] == ["exec", sys.executable, "-m", "peer_scale.cli", "experiment"]
    assert wrapped[-2:] == ["--only", "bert-s1"]
    assert not [word for word in of_tfidf if word.startswith("--dependency")]


def test_what_is_finished_is_not_submitted(conductor, tmp_path):
    arm = conductor.plan.arms["bert"]
    scores = {"finetune-all/cola": 0.5}
    write_result(tmp_path / "out", RunResult("x", "bert", 1, arm.fingerprint, steps=30, scores=scores))
    names = [words[2] for words in jobs_of(conductor, tmp_path)]
    assert names == ["--job-name=x-tfidf-s1", "--job-name=x-bert-s2", "--job-name=x-bert-s2"]


def test_without_the_script_of_jobs_one_line_says_so(conductor, tmp_path):
    with pytest.raises(UserError, match=r"--slurm-script nowhere: no such file; give slurm/base\.sh"):
        jobs_of(conductor, tmp_path, template=Path("nowhere"))
