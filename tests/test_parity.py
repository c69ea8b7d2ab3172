"""Parity is proof: every layout gives the loss curve of one process with the same seed."""

import pytest

from runs import corpus, ds_config, train_in_pool

STEPS = 20


def curve(pool, tmp_path, text_file, *, stage=2, flags=(), blocks=None):
    name = f"{pool.world_size}-{stage}-{'-'.join(flags)}".replace("/", "_")[:80]
    log_dir = tmp_path / name
    metrics = pool.run(
        train_in_pool,
        [
            *(*corpus(text_file), "--log-dir", str(log_dir)),
            *("--deepspeed_config", str(ds_config(tmp_path, stage, **(blocks or {})))),
            *("--train-iters", str(STEPS), "--global-batch-size", "8", "--fp32"),
            *("--hidden-dropout", "0", "--attention-dropout", "0", "--warmup-epochs", "0.05"),
            *flags,
        ],
    )[0]
    assert len(metrics) == STEPS
    return [(m["loss"], m["grad_norm"], m.get("rank_label_fractions")) for m in metrics]


@pytest.fixture(scope="module")
def references(one_rank, tmp_path_factory, text_file):
    curves = {}

    def reference(model, *more):
        key = (model, *more)
        if key not in curves:
            folder = tmp_path_factory.mktemp(model)
            flags = ("--model", model, "--micro-batch-size", "8", *more)
            curves[key] = curve(one_rank, folder, text_file, stage=1, flags=flags)
        return curves[key]

    return reference


def assert_same(found, reference):
    for step, ((loss, norm, labels), (expected_loss, expected_norm, expected_labels)) in enumerate(
        zip(found, reference, strict=True), start=1
    ):
        assert loss == pytest.approx(expected_loss, rel=1e-5), f"step {step}"
        assert norm == pytest.approx(expected_norm, rel=1e-4), f"step {step}"
        assert labels == expected_labels, f"step {step}"


def slow(*rows):
    """Rows that only `pytest -m slow` runs: the grid is wider than ten minutes."""
    return [pytest.param(*row, marks=pytest.mark.slow) for row in rows]


ROWS = [  # ranks, ZeRO stage, micro-batch, model
    (1, 2, "4", "peer-tiny"),
    (2, 1, "4", "peer-tiny"),
    (2, 2, "2", "peer-tiny"),
    (2, 3, "4", "peer-tiny"),
    (2, 3, "4", "bert-tiny"),
    *slow(
        (2, 2, "2", "electra-tiny"),
        (1, 3, "2", "peer-tiny"),
        (1, 1, "4", "peer-tiny"),
        (1, 2, "8", "peer-tiny"),
        (1, 3, "8", "peer-tiny"),
        (2, 2, "4", "peer-tiny"),
        (2, 1, "2", "peer-tiny"),
        (2, 3, "1", "peer-tiny"),
        (2, 3, "4", "electra-tiny"),
        (2, 2, "2", "bert-tiny"),
    ),
]


@pytest.fixture
def pool_of(request):
    """The pool of so many ranks, started when a test first asks for it."""
    names = {1: "one_rank", 2: "two_ranks", 4: "four_ranks", 8: "eight_ranks"}
    return lambda ranks: request.getfixturevalue(names[ranks])


@pytest.mark.parametrize(("ranks", "stage", "micro_batch", "model"), ROWS)
def test_layouts_agree(ranks, stage, micro_batch, model, references, pool_of, tmp_path, text_file):
    pool = pool_of(ranks)
    flags = ("--model", model, "--micro-batch-size", micro_batch)
    assert_same(curve(pool, tmp_path, text_file, stage=stage, flags=flags), references(model))


TENSOR_PARALLEL_ROWS = [  # ranks, tensor-parallel size, ZeRO stage, sequence parallelism, model
    (2, 2, 3, True, "peer-tiny"),
    (4, 2, 2, False, "bert-tiny"),
    *slow(
        (2, 2, 1, False, "peer-tiny"),
        (4, 4, 2, True, "peer-tiny"),
        (4, 2, 3, True, "peer-tiny"),
        (2, 2, 2, True, "electra-tiny"),
        (2, 2, 1, True, "peer-tiny"),
        (2, 2, 2, False, "electra-tiny"),
        (2, 2, 2, True, "peer-tiny"),
        (2, 2, 3, True, "bert-tiny"),
        (2, 2, 3, False, "peer-tiny"),
        (4, 4, 1, True, "peer-tiny"),
        (4, 4, 2, False, "peer-tiny"),
        (4, 4, 3, False, "peer-tiny"),
        (4, 4, 3, True, "electra-tiny"),
        (4, 2, 1, False, "peer-tiny"),
        (4, 2, 2, True, "electra-tiny"),
    ),
]
FOUR_HEADS = ("--num-attention-heads", "4", "--generator-num-attention-heads", "4")


@pytest.mark.parametrize(("ranks", "tensor_parallel", "stage", "sequence_parallel", "model"), TENSOR_PARALLEL_ROWS)
def test_tensor_parallel_layouts_agree(
    ranks, tensor_parallel, stage, sequence_parallel, model, references, pool_of, tmp_path, text_file
):
    flags = ["--model", model, "--tensor-model-parallel-size", str(tensor_parallel), "--micro-batch-size", "4"]
    flags += FOUR_HEADS
    if sequence_parallel:
        flags.append("--sequence-parallel")
    found = curve(pool_of(ranks), tmp_path, text_file, stage=stage, flags=tuple(flags))
    assert_same(found, references(model, *FOUR_HEADS))


PIPELINE_ROWS = [  # ranks, stages, tensor-parallel size, ZeRO stage, micro-batch, model
    (2, 2, 1, 1, "8", "peer-tiny"),  # one micro-batch
    (2, 2, 1, 2, "4", "peer-tiny"),
    (4, 4, 1, 3, "2", "peer-tiny"),
    (4, 2, 1, 2, "1", "bert-tiny"),
    (4, 2, 2, 2, "2", "peer-tiny"),
    *slow(
        (2, 2, 1, 3, "1", "electra-tiny"),
        *((2, 2, 1, stage, "1", "peer-tiny") for stage in (1, 2, 3)),
        *((2, 2, 1, stage, "2", "electra-tiny") for stage in (1, 2, 3)),
        *((2, 2, 1, stage, "2", "bert-tiny") for stage in (1, 2, 3)),
        (4, 4, 1, 1, "2", "peer-tiny"),
        (4, 4, 1, 2, "8", "peer-tiny"),
        (4, 4, 1, 3, "2", "electra-tiny"),
        (4, 4, 1, 2, "1", "bert-tiny"),
        (4, 2, 1, 3, "2", "peer-tiny"),
        (4, 2, 1, 1, "2", "electra-tiny"),
        (4, 2, 1, 2, "2", "peer-tiny"),
        (4, 2, 2, 1, "4", "bert-tiny"),
        (4, 2, 2, 3, "4", "electra-tiny"),
        (4, 2, 2, 3, "2", "peer-tiny"),
        *((8, 2, 2, stage, "2", "peer-tiny") for stage in (1, 2, 3)),
    ),
]


@pytest.mark.parametrize(("ranks", "stages", "tensor_parallel", "stage", "micro_batch", "model"), PIPELINE_ROWS)
def test_pipeline_layouts_agree(
    ranks, stages, tensor_parallel, stage, micro_batch, model, references, pool_of, tmp_path, text_file
):
    flags = ["--model", model, "--micro-batch-size", micro_batch, "--pipeline-model-parallel-size", str(stages)]
    if tensor_parallel > 1:
        flags += ["--tensor-model-parallel-size", str(tensor_parallel), "--sequence-parallel"]
    flags += FOUR_HEADS
    found = curve(pool_of(ranks), tmp_path, text_file, stage=stage, flags=tuple(flags))
    assert_same(found, references(model, *FOUR_HEADS))


COUNTS = [  # stages, micro-batches of one sample: 1, P-1, P and 4P
    (stages, count) for stages in (2, 4) for count in sorted({1, stages - 1, stages, 4 * stages})
]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["peer-tiny", "electra-tiny", "bert-tiny"])
@pytest.mark.parametrize(("stages", "count"), COUNTS)
def test_any_number_of_micro_batches_agrees(stages, count, model, references, pool_of, tmp_path, text_file):
    batch = (*FOUR_HEADS, "--global-batch-size", str(count))
    flags = ("--model", model, "--pipeline-model-parallel-size", str(stages), "--micro-batch-size", "1", *batch)
    found = curve(pool_of(stages), tmp_path, text_file, stage=1 + count % 3, flags=flags)
    assert_same(found, references(model, *batch, "--micro-batch-size", str(count)))


@pytest.mark.parametrize(
    ("ranks", "stage", "model"),
    [
        (2, 2, "peer-tiny"),
        *slow(
            (2, 1, "peer-tiny"), (2, 3, "peer-tiny"), (4, 2, "electra-tiny"), (4, 3, "peer-tiny"), (4, 3, "bert-tiny")
        ),
    ],
)
def test_stages_with_the_optimizer_on_the_host_agree(ranks, stage, model, references, pool_of, tmp_path, text_file):
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    flags = ("--model", model, "--pipeline-model-parallel-size", "2", "--micro-batch-size", "2", *FOUR_HEADS)
    found = curve(pool_of(ranks), tmp_path, text_file, stage=stage, flags=flags, blocks=offload)
    assert_same(found, references(model, *FOUR_HEADS))


def test_the_curve_goes_down(references):
    first, last = references("peer-tiny")[0][0], references("peer-tiny")[-1][0]
    assert last < 0.9 * first


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_activation_checkpointing_and_offload_change_nothing(stage, references, two_ranks, tmp_path, text_file):
    flags = ("--micro-batch-size", "4", "--activation-checkpointing")
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    found = curve(two_ranks, tmp_path, text_file, stage=stage, flags=flags, blocks=offload)
    assert_same(found, references("peer-tiny"))


def test_the_curve_depends_on_the_seed(references, one_rank, tmp_path, text_file):
    flags = ("--micro-batch-size", "8", "--seed", "7")
    other = curve(one_rank, tmp_path, text_file, stage=1, flags=flags)
    assert other[0][0] != pytest.approx(references("peer-tiny")[0][0], rel=1e-5)
