"""docs/adding_an_objective.md, done as it stands there, on a copy of the package."""

import os
import re
import shutil
from pathlib import Path

import pytest

from forked_ranks import ForkedRanks
from runs import PROJECT, corpus, ds_config, read_metrics

PAGE = (PROJECT / "docs/adding_an_objective.md").read_text(encoding="utf-8")
SIZES = ("--vocab-size", "1000", "--seq-length", "32", "--global-batch-size", "4", "--micro-batch-size", "2")
STEPS = ("--train-iters", "6", "--lr-warmup-iters", "2", "--num-workers", "0", "--hidden-dropout", "0")


def block(language: str, number: int = 0) -> str:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)[number]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the project with the page's file and the page's lines in the registry."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("peer_scale", "tools", "ds_configs"):
        shutil.copytree(PROJECT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "peer_scale/objectives/smoothed_rtd.py").write_text(block("python"))
    registry = copy / "peer_scale/objectives/registry.py"
    text = registry.read_text()
    anchor = "from peer_scale.objectives.teams import Teams\n"
    assert anchor in text
    text = text.replace(anchor, block("diff", 0).removeprefix("+") + anchor)
    removed, added = (line[1:] for line in block("diff", 1).splitlines())
    assert removed in text
    registry.write_text(text.replace(removed, added))
    (copy / "smoothed.yaml").write_text(block("yaml"))
    return copy


def run(checkout: Path, folder: Path, ranks: int, script: str, *flags: object) -> str:
    """Run a script of the copy; gives what the first rank has said."""
    processes = ForkedRanks(flags, ranks, folder, checkout=checkout, script=script)
    assert processes.end() == [0] * ranks, processes.said
    return processes.said[0]


def test_the_page_trains_plans_and_goes_on(checkout, tmp_path, text_file):
    """One process, two stages that save, and the planner know the objective without a change of their own."""
    shared = ("--model", "electra-tiny", "--config", "smoothed.yaml", *SIZES, *STEPS, *corpus(text_file))
    shared += ("--attention-dropout", "0", "--deepspeed_config", ds_config(tmp_path, 1))
    out = run(checkout, tmp_path, 1, "peer_scale/pretrain.py", *shared, "--log-dir", tmp_path / "one")
    assert "labels smoothed by 0.05" in out
    assert "detection" in out
    stages = ("--pipeline-model-parallel-size", 2, "--save", tmp_path / "saved", "--log-dir", tmp_path / "two")
    run(checkout, tmp_path, 2, "peer_scale/pretrain.py", *shared, *stages)
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert len(one) == len(two) == 6
    for left, right in zip(one, two, strict=True):
        assert left["detection_loss"] == pytest.approx(right["detection_loss"], rel=1e-5)
        assert left["loss"] == pytest.approx(left["mlm_loss"] + 50 * left["detection_loss"], rel=1e-9)
        assert {"rtd_auc", "replaced_fraction", "mlm_accuracy"} <= left.keys()
    assert len(os.listdir(tmp_path / "saved")) == 2, "a checkpoint and `latest`"
    (latest,) = (tmp_path / "saved").glob("step_*")
    assert '"kind": "smoothed_rtd", "smoothing": 0.05' in (latest / "peer_scale.json").read_text()
    layout = ("--nodes", 1, "--gpus-per-node", 2, "--pipeline-model-parallel-size", 2)
    sizes = ("--model", "electra-tiny", "--config", "smoothed.yaml")
    planned = run(checkout, tmp_path, 1, "tools/plan.py", *sizes, *layout)
    assert "tokens/s" in planned
