"""A NaN at step 13 of 20: stop, skip and rollback each do what they say, under every layout."""

import copy
import json
import math
import re

import pytest
import torch

from peer_scale.checkpoints.folder import committed, newest
from peer_scale.errors import StoppedEarly, TrainingError
from runs import corpus, ds_config, read_metrics, train_in_fp16, train_in_pool, without_times

BAD = 13


def flags_for(folder, text_file, name, *more, stage=2, **blocks):
    flags = [
        *(*corpus(text_file), "--deepspeed_config", ds_config(folder, stage, **blocks), "--model", "bert-tiny"),
        *("--num-layers", 2, "--train-iters", 20, "--seq-length", 32, "--global-batch-size", 4),
        *("--micro-batch-size", 2, "--hidden-dropout", 0.1, "--log-dir", folder / name),
        *("--save", folder / name / "save", "--save-interval", 5, *more),
        *(() if "--bf16" in more or "--fp16" in more else ("--fp32",)),
    ]
    return list(map(str, flags))


def train_with_nan(flags, steps, rank, where="gradient", stays=False, stop_at=None):
    """Run by a rank: train with a NaN in a gradient or a hidden state of one rank.

    Gives the metrics, or the line that ends the run, and for each step whether it left weights and optimizer alone.
    """
    from peer_scale.training.trainer import Callback

    class Planted(Callback):
        def __init__(self):
            self.handle, self.before, self.unchanged = None, None, {}

        def on_step_begin(self, trainer, step):
            self.before = state_of(trainer.engine)
            if step in steps and torch.distributed.get_rank() == rank and self.handle is None:
                self.handle = plant(trainer.engine.module)

        def on_step_end(self, trainer, record):
            trainer.wants_stop |= record.step == stop_at
            after = state_of(trainer.engine)
            self.unchanged[record.step] = all(map(torch.equal, self.before, after))
            if self.handle is not None and not stays:
                self.handle.remove()
                self.handle = None

    def plant(module):
        if where == "gradient":
            # of which tensor-parallel ranks have a part each; of what they have in common the first one counts
            matrix = next(p for p in module.parameters() if len(getattr(p, "ds_shape", p.shape)) == 2)
            return matrix.register_hook(lambda gradient: gradient * math.nan)
        layer = [part for part in module.modules() if type(part).__name__ == "TransformerLayer"][-1]
        return layer.register_forward_hook(lambda _, __, output: output * math.nan)

    planted = Planted()
    try:
        told = (train_in_fp16 if "zero2_fp16" in flags else train_in_pool)(flags, [planted])
    except (StoppedEarly, TrainingError) as error:
        told = str(error)
    return told, dict(planted.unchanged)


def state_of(engine):
    """Weights, moments and the count of updates that this rank holds, copied."""
    states = engine.optimizer.optimizer.state
    kept = [parameter for group in engine.optimizer.optimizer.param_groups for parameter in group["params"]]
    found = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    return [t.detach().clone() for t in (*found, *kept, *(v for p in kept for v in states[p].values()))]


def dropped(log_dir):
    return [json.loads(line) for line in (log_dir / "metrics.dropped.jsonl").read_text().splitlines()]


LAYOUTS = {
    "two ranks": (2, 1, ()),
    "one rank": (1, 0, ()),
    "two stages": (2, 1, ("--pipeline-model-parallel-size", 2)),
    "tensor parallel": (2, 1, ("--tensor-model-parallel-size", 2)),
    "ZeRO-3, bf16": (2, 1, ("--bf16",)),
    "ZeRO-2, optimizer on the host": (2, 1, ("--bf16",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stop_skip_and_rollback(layout, rank_pools, tmp_path, text_file):
    ranks, bad_rank, more = LAYOUTS[layout]
    stage = int(layout.partition("ZeRO-")[2][:1] or 2)
    blocks = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}} if "host" in layout else {}
    pool = rank_pools.of(ranks)

    def train(action, *others, where="gradient", **planted):
        flags = flags_for(
            tmp_path, text_file, action, "--on-nan", action, *more, *others, stage=stage, **copy.deepcopy(blocks)
        )
        told = pool.run(train_with_nan, flags, [BAD], bad_rank, where, **planted)
        assert all(one == told[0][0] for one, _ in told)
        return told[0][0], [unchanged for _, unchanged in told]

    message, _ = train("stop", where="hidden", stays=True)
    assert message == f"step {BAD}: mlm_loss is nan; a lower --lr may help"
    stopped = read_metrics(tmp_path / "stop")
    assert [line["step"] for line in stopped] == list(range(1, BAD))
    assert [path.name for path in committed(tmp_path / "stop/save")] == ["step_00000005", "step_00000010"]
    described = json.loads((tmp_path / f"stop/bad_steps/step_{BAD}.json").read_text())
    assert described["samples"] == list(range(4 * (BAD - 1), 4 * BAD))
    assert described["mlm_loss"] == "nan" and described["action"] == "stop"
    culprit = next(one for one in described["first_not_finite"] if one["rank"] == bad_rank)
    assert re.search(r"\.layers\.\d$", culprit["module"]) and culprit["forward"] == 1

    skipped, unchanged = train("skip")
    assert without_times(skipped[: BAD - 1]) == without_times(stopped), "two runs are the same until then"
    assert [line["step"] for line in skipped] == list(range(1, 21))
    assert [line["skipped_steps"] for line in skipped] == [0] * (BAD - 1) + [1] * (21 - BAD)
    assert skipped[BAD - 1]["grad_norm"] is None
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] for line in skipped[BAD:])
    for one in unchanged:
        assert [step for step, is_same in one.items() if is_same] == [BAD]

    rolled, unchanged = train("rollback")
    assert without_times(rolled) == without_times(skipped)
    first = dropped(tmp_path / "rollback")
    assert [line["step"] for line in first] == [11, 12]
    assert without_times(first) == without_times(rolled[10:12]), "bit for bit"
    saved = [newest(tmp_path / name / "save/step_00000020")[1] for name in ("skip", "rollback")]
    assert saved[0].files == saved[1].files
    assert saved[0].sections.optimizer.skipped_steps == 1 and saved[0].sections.optimizer.updates == 19


@pytest.mark.slow
def test_fp16_that_only_overflows_ends_by_a_line_also_at_the_least_scale(one_rank, tmp_path, text_file):
    flags = flags_for(tmp_path, text_file, "fp16", "--fp16", "--num-layers", 1, "--micro-batch-size", 4)
    flags[flags.index("--deepspeed_config") + 1] = "zero2_fp16"  # 2^16, after a second overflow halved 16 times
    flags += ["--max-skipped-steps", "19"]
    told, _ = one_rank.run(train_with_nan, flags, range(1, 21), 0)[0]
    assert told == "step 19: fp16 gradients overflowed 19 steps in a row (loss scale 1); use bf16, or a lower --lr"
    metrics = read_metrics(tmp_path / "fp16")
    assert [line["skipped_steps"] for line in metrics] == list(range(1, 19))


def test_two_bad_steps_and_a_restart(one_rank, tmp_path, text_file):
    """Bad at 3 (before any checkpoint), 7 and 8 (one is gone back for, one skipped): as if skipped, stopped or not."""

    def train(name, *more, **planted):
        common = ("--num-layers", 1, "--train-iters", 10, "--micro-batch-size", 4, "--no-adam-bias-correction")
        flags = flags_for(tmp_path, text_file, name, *common, "--num-workers", 0, *more)
        return one_rank.run(train_with_nan, flags, [3, 7, 8], 0, **planted)[0][0]

    skipped = without_times(train("skip", "--on-nan", "skip"))
    assert [line["skipped_steps"] for line in skipped] == [0, 0, 1, 1, 1, 1, 2, 3, 3, 3]
    assert without_times(train("rollback", "--on-nan", "rollback")) == skipped
    again = [line["step"] for line in dropped(tmp_path / "rollback")]
    assert again == [1, 2, 6], "from the start, and from step 5; nothing was to be done again for step 8"
    assert "stopped after step 8" in train("resumed", "--on-nan", "skip", stop_at=7)
    assert without_times(train("resumed", "--on-nan", "skip")) == skipped
