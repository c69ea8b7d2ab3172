"""What the loss curve does not show: equal corruption on all ranks, dropout streams that are equal or not as due."""

import hashlib

import pytest
import torch
import torch.distributed as dist

from peer_scale.errors import UserError
from peer_scale.parallel.sequence import own_random_stream
from peer_scale.parallel.topology import build_topology, check_parallel_sizes
from peer_scale.settings.flags import build_parser
from peer_scale.settings.resolve import resolve
from runs import corpus, ds_config, train_in_pool

FOUR_HEADS = ("--num-attention-heads", "4", "--generator-num-attention-heads", "4")


def train_and_watch(flags: list[str]) -> tuple[list[dict], set[str], dict[str, str]]:
    """Metrics, a digest of each sample with its corrupted ids and labels, digests of the replicated weights."""
    from peer_scale.objectives import tasks
    from peer_scale.training import job

    seen: set[str] = set()
    weights: dict[str, str] = {}
    corrupt, build_engine = tasks.corrupt, job.build_engine

    def watched(batch, generated, objective):
        ids, labels = corrupt(batch, generated, objective)
        seen.update(digest(torch.cat(row)) for row in zip(batch.input_ids.float(), ids.float(), labels, strict=True))
        return ids, labels

    def kept(task, run, topology):
        engines.append(build_engine(task, run, topology))
        return engines[-1]

    engines: list = []
    tasks.corrupt, job.build_engine = watched, kept
    try:
        metrics = train_in_pool(flags)
    finally:
        tasks.corrupt, job.build_engine = corrupt, build_engine
    for name, parameter in engines[0].module.named_parameters():
        if not getattr(parameter, "tensor_model_parallel", False):
            weights[name] = digest(parameter)
    return metrics, seen, weights


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().contiguous().numpy().tobytes()).hexdigest()


def watched_run(pool, tmp_path, text_file, *flags, steps=6):
    return pool.run(
        train_and_watch,
        [
            *(*corpus(text_file), "--log-dir", str(tmp_path / "log")),
            *("--deepspeed_config", str(ds_config(tmp_path, 1)), "--train-iters", str(steps), "--fp32"),
            *("--global-batch-size", "8", "--num-workers", "0", "--warmup-epochs", "0.01", *FOUR_HEADS, *flags),
        ],
    )


def test_corrupted_ids_and_labels_are_the_same_on_every_layout(one_rank, two_ranks, four_ranks, tmp_path, text_file):
    def seen(pool, *flags):
        return [ids for _, ids, _ in watched_run(pool, tmp_path / f"{len(flags)}", text_file, *flags)]

    for folder in ("0", "2", "3"):
        (tmp_path / folder).mkdir()
    (reference,) = seen(one_rank)
    assert len(reference) == 6 * 8
    for ids in seen(two_ranks, "--tensor-model-parallel-size", "2"):
        assert ids == reference
    for ids in seen(four_ranks, "--tensor-model-parallel-size", "4", "--sequence-parallel"):
        assert ids == reference
    first, second, third, fourth = seen(four_ranks, "--tensor-model-parallel-size", "2")
    assert first == second and third == fourth and not first & third
    assert first | third == reference


@pytest.mark.parametrize("more", [pytest.param((), marks=pytest.mark.slow), ("--sequence-parallel",)])
def test_dropout_leaves_replicated_weights_equal_and_survives_recomputation(more, two_ranks, tmp_path, text_file):
    flags = ("--tensor-model-parallel-size", "2", "--hidden-dropout", "0.1", "--attention-dropout", "0.1", *more)
    (metrics, _, first), (_, _, second) = watched_run(two_ranks, tmp_path, text_file, *flags)
    assert first == second and len(first) > 20
    recomputed = watched_run(two_ranks, tmp_path, text_file, *flags, "--activation-checkpointing")[0][0]
    assert [m["loss"] for m in recomputed] == pytest.approx([m["loss"] for m in metrics], rel=1e-6)
    without = watched_run(two_ranks, tmp_path, text_file, *flags[:2], *more)[0][0]
    assert without[-1]["loss"] != pytest.approx(metrics[-1]["loss"], rel=1e-5)


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
        (
            ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--seq-length", "63"),
            "does not divide --seq-length 63",
        ),
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
