"""When two curves are one, and that the layouts that are tried are what their names say."""

import math

import pytest

from peer_scale.doctor.curves import Layout, ShortRun, compare, layouts
from peer_scale.doctor.outcome import Failed
from peer_scale.settings.flags import build_parser
from peer_scale.settings.resolve import resolve


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    def make(ranks):
        return ShortRun(tmp_path_factory.mktemp("doctor"), steps=20, ranks=ranks)

    return make


def steps(*losses, norm=1.0):
    return [{"loss": loss, "mlm_loss": loss / 2, "grad_norm": norm} for loss in losses]


def test_curves_that_differ_in_rounding_are_one():
    assert compare(steps(2.0, 1.00005), steps(2.0, 1.0)) == "2 steps, losses within 5.0e-05"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (steps(2.0, 1.0002), "step 2: loss is 1.0002 instead of 1 (off by 2.0e-04, allowed 1e-04)"),
        (steps(2.0, math.nan), "step 2: loss is nan"),
        (steps(2.0, 1.0, norm=1.002), "step 1: grad_norm is 1.002 instead of 1"),
        (steps(2.0), "1 steps instead of 2"),
    ],
)
def test_curves_that_part_name_the_first_step(found, said):
    with pytest.raises(Failed) as failed:
        compare(found, steps(2.0, 1.0))
    assert str(failed.value).startswith(said)


def test_norms_may_be_asked_to_agree_more_closely():
    compare(steps(1.0, norm=1.0001), steps(1.0))
    with pytest.raises(Failed, match="grad_norm"):
        compare(steps(1.0, norm=1.0001), steps(1.0), norm_tolerance=1e-5)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_layouts_are_what_their_names_say(ranks, short_run):
    run = short_run(ranks)
    reference = resolve(build_parser().parse_args(run.flags()), 1)
    seen = set()
    for layout in layouts(ranks):
        assert layout.suits(ranks)
        asked = resolve(build_parser().parse_args(run.flags(layout)), ranks)
        name = layout.name
        assert asked.tensor_parallel == (2 if "TP 2" in name else 1)
        assert asked.pipeline_parallel == (2 if "PP 2" in name else 1)
        assert asked.sequence_parallel == ("SP" in name)
        for stage in (1, 2, 3):
            assert f"ZeRO-{stage}" not in name or asked.zero_stage == stage
        # what decides on the curve is the same
        assert asked.training.global_batch_size == reference.training.global_batch_size
        assert (asked.seed, asked.model, asked.objective) == (reference.seed, reference.model, reference.objective)
        assert asked.training.precision == "fp32"
        assert asked.model.hidden_dropout == asked.model.attention_dropout == 0
        seen |= {part for part in ("TP", "PP", "SP", "ZeRO-1", "ZeRO-2", "ZeRO-3") if part in name}
    assert len(seen) == 6


def test_several_micro_batches_are_tried(short_run):
    run = short_run(2)
    for layout in layouts(2):
        assert resolve(build_parser().parse_args(run.flags(layout)), 2).num_micro_batches >= 2


def test_overlap_is_asked_for_by_the_ds_config(short_run):
    run = short_run(2)
    for overlap in (True, False):
        flags = run.flags(Layout("DP 2"), overlap_comm=overlap, reduce_bucket_size=100_000)
        asked = resolve(build_parser().parse_args(flags), 2)
        assert asked.deepspeed["zero_optimization"]["reduce_bucket_size"] == 100_000
        assert asked.deepspeed["zero_optimization"]["overlap_comm"] is overlap


def test_an_odd_number_of_ranks_leaves_layouts_out():
    assert [layout.name for layout in layouts(3) if not layout.suits(3)] == ["TP 2", "TP 2 with SP", "PP 2"]
