"""What a step's time is made of: bytes, launches and seconds written out by hand, and the table of them."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from peer_scale.commands import plan as plan_command
from peer_scale.errors import UserError
from peer_scale.flops import actual_train_flops
from peer_scale.models.config import EncoderShape
from peer_scale.pipeline.search import choose_placement
from peer_scale.planning.element_wise import layer_moved
from peer_scale.planning.estimate import make_plan
from peer_scale.planning.gpus import GPUS
from peer_scale.planning.layout import GIB, Cluster, ParallelLayout, Workload
from peer_scale.planning.report import Row, roofline
from peer_scale.planning.roofline import LAUNCHES, attention_seconds, forward_and_backward, product_seconds
from peer_scale.planning.stage_works import stage_part
from peer_scale.settings.presets import find_preset

# round numbers: 100 TFLOP/s, of which large products get half and attention a quarter; 1 TB/s of memory
ROUND = Cluster(
    1, 8, 80 * GIB, 100e12, 300e9, 40e9, efficiency=0.5, attention=0.25, memory_bandwidth=1e12, launch=1e-6, latency=0.0
)
MACHINES = ["--nodes", "1", "--gpus-per-node", "8"]


def workload(name, **changes):
    preset = find_preset(name)
    sizes = (preset.training.seq_length, preset.training.global_batch_size, 1e9)
    return replace(Workload(preset.model, preset.objective, preset.masking, *sizes), **changes)


def part_of(work, name, stage=0, stages=1):
    return stage_part(choose_placement(work.graph, stages, size=work.full), stage, work.graph.work(name))


def test_a_product_and_attention_by_hand():
    # 2 * 1000 * 300 * 200 FLOPs at 50 TFLOP/s, and 2 bytes of each of 300,000 + 60,000 + 200,000 numbers at 1 TB/s
    assert product_seconds(ROUND, 1000, 300, 200, 2) == pytest.approx(2.4e-6 + 1.12e-6)
    # half of the quarter at 180 tokens
    assert attention_seconds(ROUND, 1e9, 180) == pytest.approx(1e9 / 12.5e12)
    # FlashAttention-2's figures for 512 and 16,384 tokens, forward and backward
    for name, peak, measured in (
        ("A100", 312e12, {512: 132e12, 16384: 176e12}),
        ("H100", 989e12, {512: 215e12, 16384: 296e12}),
    ):
        cluster = replace(ROUND, peak_flops=peak, attention=GPUS[name].attention)
        for length, rate in measured.items():
            assert 1 / attention_seconds(cluster, 1.0, length) == pytest.approx(rate, rel=0.03)


def test_numbers_that_a_layer_moves_by_hand():
    shape = EncoderShape(num_layers=1, hidden_size=10, ffn_hidden_size=40, num_attention_heads=2)
    model = find_preset("peer-base").model
    # QKV and its bias 3 + 3, the context copied 1 + 1, twice the norm 2 + 2 (of 10 each); GELU 1 + 1 of 40
    forward = 10 * (6 + 2 + 2 * 4) + 40 * 2
    # of QKV: gradients put together 3 + 3, the bias's sum 3; context 1 + 1; twice the norm 2 + 2 and a sum of two
    # gradients 2 + 1; GELU 2 + 1
    backward = 10 * (6 + 3 + 2 + 2 * (4 + 3)) + 40 * 3
    assert layer_moved(model, shape, ParallelLayout(1)) == (forward, backward)
    # tensor-parallel ranks divide what lies between split matrices, and the norms too where tokens are divided
    assert layer_moved(model, shape, ParallelLayout(1, 2)).forward == 10 * (8 / 2 + 8) + 40 * 2 / 2
    assert layer_moved(model, shape, ParallelLayout(1, 2, sequence_parallel=True)).forward == forward / 2
    # pre-norm, rotary, gated, without biases or dropout: context 1 + 1; turning; twice a sum 2 + 1 and a norm 1 + 1
    plain = replace(
        model,
        position_embedding="rotary",
        activation="geglu",
        norm_position="pre",
        norm="rms_norm",
        linear_bias=False,
        hidden_dropout=0.0,
    )
    # halves of queries and keys (1 number each of 10): four products to fp32, two sums in it, two copies back
    turning = 4 * 3 + 2 * 6 + 2 * 3
    assert layer_moved(plain, shape, ParallelLayout(1)).forward == 10 * (2 + turning + 2 * 5) + 40 * 5


def test_a_layer_is_its_matrices_its_attention_and_what_it_moves():
    work = workload("bert-base")
    layout = ParallelLayout(1, micro_batch_size=4)
    tokens, hidden = 4 * 512, 768
    forward, backward = forward_and_backward(part_of(work, "generator"), work, ROUND, layout)
    matrices = 12 * 2 * tokens * (3 + 1 + 4 + 4) * hidden**2 / 50e12
    operands = 12 * 2 * (tokens * (4 + 2 + 5 + 5) * hidden + 12 * hidden**2) / 1e12
    assert forward.products == pytest.approx(matrices + operands)
    assert backward.products == pytest.approx(2 * (matrices + operands))
    attention = 12 * 4 * 4 * 512**2 * hidden / (25e12 * 512 / 692)
    assert (forward.attention, backward.attention) == pytest.approx((attention, 2.5 * attention))
    # three tables of embeddings: rows 3 * 2, sums 2 * 3, the norm 2 and dropout 2; then the layers, H = F / 4
    moved = 12 * (16 + 2 * 4) + 16
    assert forward.element_wise == pytest.approx(2 * tokens * hidden * moved / 1e12)
    counts = LAUNCHES[False]
    assert forward.host == pytest.approx(1e-6 * (12 * counts.layer_forward + counts.work_forward))
    assert backward.host == pytest.approx(1e-6 * (12 * counts.layer_backward + counts.work_backward))
    assert forward.starved == max(0.0, forward.host - forward.kernels)
    again, _ = forward_and_backward(part_of(work, "generator"), work, ROUND, replace(layout, micro_batch_size=8))
    assert again.attention == pytest.approx(2 * forward.attention)


def test_the_head_reads_and_writes_its_logits():
    work = workload("bert-base")
    forward, backward = forward_and_backward(
        part_of(work, "mlm_head"), work, ROUND, ParallelLayout(1, micro_batch_size=4)
    )
    positions, hidden, words = 4 * 77, 768, 30522
    products = 2 * positions * hidden * (hidden + words) / 50e12
    moved = 2 * positions * (2 * words + 6 * hidden) / 1e12
    assert (forward.products, forward.element_wise) == pytest.approx((products, moved))
    # the logits are made once more: nobody kept them
    assert (backward.products, backward.element_wise) == pytest.approx((3 * products, 3 * moved))


def test_compiled_layers_start_fewer_kernels():
    eager_work, compiled_work = (workload("peer-small", compiled=compiled) for compiled in (False, True))
    layout = ParallelLayout(8, micro_batch_size=1)
    plans = [make_plan(work, ROUND, layout) for work in (eager_work, compiled_work)]
    assert plans[1].host_time < plans[0].host_time
    # generator 6 layers, ranker 12, and the head: 64 micro-batches, one update
    for plan, compiled in zip(plans, (False, True), strict=True):
        counts = LAUNCHES[compiled]
        layers = 18 * (counts.layer_forward + counts.layer_backward)
        started = 64 * (layers + 3 * (counts.work_forward + counts.work_backward)) + counts.step
        assert plan.host_time == pytest.approx(started * 1e-6)
    with pytest.raises(UserError, match="--compile does not go with ZeRO-3"):
        make_plan(compiled_work, ROUND, replace(layout, zero_stage=3))


@pytest.mark.parametrize(
    "layout", [ParallelLayout(8, micro_batch_size=4), ParallelLayout(2, 2, 2, 1, 4, True)], ids=str
)
def test_the_parts_are_the_step(layout):
    work = workload("peer-base")
    plan = make_plan(work, ROUND, layout)
    assert sum(plan.parts.values()) == pytest.approx(plan.step_time, rel=1e-6)
    flops = actual_train_flops(work.model, work.objective, work.size, samples=work.global_batch_size)
    assert plan.mfu == pytest.approx(flops / (plan.step_time * 8 * 100e12))
    assert plan.bound == max(plan.parts, key=plan.parts.get)
    slow = make_plan(work, replace(ROUND, launch=1e-3), layout)
    assert slow.bound == "host calls" and slow.step_time > plan.step_time
    assert make_plan(work, replace(ROUND, intra_bandwidth=1e9), layout).bound == "messages"


@pytest.mark.parametrize(
    "better",
    [
        {"peak_flops": 200e12},
        {"memory_bandwidth": 2e12},
        {"intra_bandwidth": 600e9},
        {"efficiency": 0.9},
        {"attention": 0.5},
        {"launch": 0.5e-6},
        {"overlap": 1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_better_machines_are_never_slower(better):
    layouts = (
        ParallelLayout(8, micro_batch_size=1),
        ParallelLayout(2, 2, 2, 1, 4),
        ParallelLayout(4, 2, 1, 3, 8, True),
    )
    for name, layout in itertools.product(("peer-small", "teams-small"), layouts):
        work = workload(name)
        faster, usual = (make_plan(work, cluster, layout) for cluster in (replace(ROUND, **better), ROUND))
        assert faster.step_time <= usual.step_time * (1 + 1e-12), "but for rounding"


def test_rings_between_nodes_use_the_links_of_all_their_ranks():
    cluster = replace(ROUND, nodes=8)
    assert cluster.bandwidth(8, 1) == 300e9, "within the node"
    assert cluster.bandwidth(64, 1) == 300e9, "eight links of 40 GB/s are more than NVLink"
    assert cluster.bandwidth(32, 2) == 160e9, "four ranks on each node"
    assert cluster.bandwidth(8, 8) == 40e9, "one rank on each node"
    assert cluster.bandwidth(2, 32) == 40e9, "neighbouring stages"


def test_the_table_says_what_the_plan_says():
    plan = make_plan(workload("peer-small"), ROUND, ParallelLayout(8, micro_batch_size=16))
    head, rule, line = roofline([Row("peer-small", "A100", 8, plan)]).splitlines()
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    assert columns == [
        *("model", "GPU", "GPUs", "layout", "m", "products", "attention", "element-wise", "messages", "idle"),
        *("ms/step", "host calls", "bound by", "MFU"),
    ]
    cells = dict(zip(columns, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
    assert rule.count("---") == len(columns)
    assert cells["model"] == "peer-small" and cells["GPU"] == "A100" and cells["GPUs"] == "8" and cells["m"] == "4"
    parts = [float(cells[name]) for name in columns[5:10]]
    assert sum(parts) == pytest.approx(float(cells["ms/step"]), abs=0.3)
    assert np.allclose(parts, [1e3 * seconds for seconds in plan.parts.values()], atol=0.051)
    assert cells["bound by"] == plan.bound and cells["MFU"] == f"{plan.mfu:.1%}"


def test_the_command_prints_the_table(capsys):
    assert plan_command.main(["--roofline", "--model", "peer-tiny", "--gpu", "H100", "--global-batch-size", "64"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| peer-tiny | H100 |")]
    assert [row.split("|")[3].strip() for row in rows] == ["1", "8", "64"]
    assert "assumed: 64 GPUs of 989 TFLOP/s" in out and "2,848 GB/s of memory" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--roofline", "--nodes", "2"], "--nodes has no effect with --roofline"),
        (["--roofline", "--micro-batch-tokens", "999"], "--micro-batch-tokens has no effect with --roofline"),
        (["--model", "peer-base", "--nodes", "2"], "required: --gpus-per-node"),
        (["--model", "peer-base", *MACHINES, "--gpu", "T4"], "give --peak-tflops, --memory, --memory-bandwidth"),
        (["--model", "peer-base", *MACHINES, "--micro-batch-tokens", "511"], "less than one sequence may have"),
        (
            ["--model", "peer-base", *MACHINES, "--micro-batch-tokens", "999", "--micro-batch-size", "4"],
            "give one of them",
        ),
        (["--model", "peer-base", *MACHINES, "--micro-batch-tokens", "999", "--global-batch-size", "9"], "no multiple"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags, said, capsys):
    assert plan_command.main(flags) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and said in captured.err


def test_blocks_of_the_model_are_flags(capsys):
    flags = ["--model", "bert-base", *MACHINES, "--micro-batch-size", "8", "--json"]
    outputs = []
    for more in ([], ["--activation", "geglu", "--num-layers", "6"], ["--attention-window", "64"]):
        assert plan_command.main([*flags, *more]) == 0
        outputs.append(capsys.readouterr().out)
    assert len(set(outputs)) == 3
    assert '"own_layers": {"generator": [0, 1, 2, 3, 4, 5]}' in outputs[1]
