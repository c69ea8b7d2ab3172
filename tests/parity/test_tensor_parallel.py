"""What the loss curve does not show: dropout streams of tensor-parallel ranks that are equal, or not, as due."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from layouts import parse
from peer_scale.errors import UserError
from peer_scale.parallel.sequence import own_random_stream
from peer_scale.parallel.topology import build_topology, check_parallel_sizes
from peer_scale.settings.flags import build_parser
from peer_scale.settings.resolve import resolve
from runs import corpus, ds_config
from watched import train_watched


def watched_run(pools, tmp_path, text_file, layout, *flags):
    return pools.of(layout.ranks).run(
        train_watched,
        [
            *(*corpus(text_file), "--log-dir", str(tmp_path / "log"), "--seq-length", "32"),
            *("--deepspeed_config", str(ds_config(tmp_path, layout.zero)), "--train-iters", "6", "--fp32"),
            *(*layout.flags, *flags),
        ],
    )


@pytest.mark.parametrize(
    "row",
    [
        "teams tp2 sp zero1 mb8",
        *(
            pytest.param(f"{row} zero1 mb8", marks=pytest.mark.slow)
            for row in ("teams tp2", "peer tp2", "peer tp2 sp", "peer modern tp2 sp")
        ),
    ],
)
def test_dropout_leaves_replicated_weights_equal_and_survives_recomputation(row, rank_pools, tmp_path, text_file):
    layout, dropout = parse(row), ("--hidden-dropout", "0.1", "--attention-dropout", "0.1")
    first, second = watched_run(rank_pools, tmp_path, text_file, layout, *dropout)
    assert first.replicated == second.replicated and len(first.replicated) > 15
    again = replace(layout, recompute=True)
    recomputed = watched_run(rank_pools, tmp_path, text_file, again, *dropout)[0]
    assert losses(recomputed) == pytest.approx(losses(first), rel=1e-6)
    (tmp_path / "without").mkdir()
    without = watched_run(rank_pools, tmp_path / "without", text_file, layout)[0]
    assert losses(without)[-1] != pytest.approx(losses(first)[-1], rel=1e-5)


def losses(run):
    return [line["loss"] for line in run.metrics]


def draw_numbers() -> tuple[list[float], list[float], list[float]]:
    topology = build_topology(torch.device("cpu"), tensor_parallel=dist.get_world_size())
    torch.manual_seed(5)
    before = torch.rand(3).tolist()
    with own_random_stream(topology.tensor_parallel):
        inside = torch.rand(3).tolist()
    return before, inside, torch.rand(3).tolist()


def test_random_streams(two_ranks):
    (before, inside, after), (other_before, other_inside, other_after) = two_ranks.run(draw_numbers)
    assert (before, after) == (other_before, other_after)
    assert inside != other_inside
    assert not {*before, *inside} & {*after}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tensor-model-parallel-size", "4"), "does not divide the generator's num_attention_heads 2"),
        (("--tensor-model-parallel-size", "4", "--model", "electra-tiny"), "generator's num_attention_heads 1"),
        (("--sequence-parallel",), "needs --tensor-model-parallel-size of 2 or more"),
    ],
)
def test_sizes_that_do_not_divide(flags, message):
    with pytest.raises(UserError, match=message):
        resolve(build_parser().parse_args(flags), world_size=4)


def test_ranks_that_cannot_be_shared_out():
    assert check_parallel_sizes(8, 2, 1) == 4
    with pytest.raises(UserError, match="6 ranks cannot be shared out"):
        check_parallel_sizes(6, 4, 1)
    with pytest.raises(UserError, match="must be at least 1"):
        check_parallel_sizes(2, 0, 1)
