"""ZeRO's sums and norms of many gradients at once are those of one after the other, to the last bit."""

import pytest

from peer_scale.training import engine, fewer_launches
from runs import corpus, ds_config, train_in_pool, without_times


def train_one_by_one(flags):
    """Run by every rank: train with DeepSpeed's own methods."""
    ours = engine.launch_less
    engine.launch_less = lambda optimizer: None
    try:
        return train_in_pool(flags)
    finally:
        engine.launch_less = ours


@pytest.mark.parametrize(
    ("stage", "precision", "zero", "sizes"),
    [
        (2, "bf16", {"overlap_comm": True}, ()),
        pytest.param(1, "bf16", {}, ("--tensor-model-parallel-size", "2"), marks=pytest.mark.slow),
        pytest.param(2, "fp32", {"reduce_bucket_size": 50_000}, (), marks=pytest.mark.slow),
    ],
)
def test_the_numbers_are_deepspeeds(stage, precision, zero, sizes, two_ranks, tmp_path, text_file):
    config = ds_config(tmp_path, stage, zero_optimization=zero)
    flags = [*corpus(text_file), f"--{precision}", "--deepspeed_config", str(config), *sizes, "--seq-length", "32"]
    flags += ["--train-iters", "3", "--global-batch-size", "8", "--micro-batch-size", "2"]
    found = two_ranks.run(train_in_pool, [*flags, "--log-dir", str(tmp_path / "ours")])[0]
    expected = two_ranks.run(train_one_by_one, [*flags, "--log-dir", str(tmp_path / "theirs")])[0]
    for one, other in zip(without_times(found), without_times(expected), strict=True):
        assert one == other, {key: (one[key], other[key]) for key in one if one[key] != other[key]}
    assert all(line["grad_norm"] > 0 for line in found)


def test_stage_3_is_left_as_it_is():
    optimizer = type("Stage3", (), {"get_grad_norm_direct": None})()
    fewer_launches.launch_less(optimizer)
    assert not vars(optimizer)
