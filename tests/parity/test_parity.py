"""Parity is proof: every layout gives the loss curve of one process with the same seed.

A new layout or feature adds its rows here. Rows of DEFAULT are in every run of the tests, so a new one there has to be
worth its seconds (docs/testing.md); the others run with `-m slow`.
"""

from pathlib import Path
from typing import NamedTuple

import pytest

from corpus_files import write_uneven_text
from layouts import OFFLOAD, Layout, parse
from runs import corpus, ds_config, without_times
from watched import Watched, train_watched

STEPS, MIDDLE = 20, 10
# A layout rounds otherwise, which moves the ends of the tokens' shares of a distribution by 1e-8 or so: a number that
# falls that near picks another token, about once in 50,000 draws, and the curves part. A reference has no such draw.
MARGIN = 4e-8

DEFAULT = """
peer dp1 zero2 mb4
peer dp2 zero1 mb4
peer dp2 zero2 tok48
teams dp2 zero3 mb2
peer dp2 zero2 mb4 offload recompute
bert dp2 tp2 zero2 mb4
peer pp2 zero1 mb8
peer pp2 zero2 tok64
peer pp2 zero2 mb2 offload
peer pp4 zero3 mb2
teams tp2 pp2 sp zero1 mb4
peer modern pp2 zero1 mb4
"""

SLOW = """
peer modern dp2 zero2 mb2
peer modern dp2 zero3 mb2 offload recompute
peer modern tp2 sp zero3 mb4
peer modern pp2 zero3 mb4
peer modern tp2 pp2 sp zero1 mb4
peer t5bias dp2 zero1 mb4
peer t5bias dp2 zero3 mb2 recompute
peer t5bias tp2 sp zero3 mb4
peer t5bias pp2 zero3 mb2
peer t5bias tp2 pp2 sp zero3 mb4
teams modern tp2 pp2 sp zero1 mb4
teams modern pp2 zero3 mb2
electra modern tp2 sp zero2 mb4
bert modern tp2 pp2 sp zero2 mb4
peer dp2 zero2 mb2
peer dp2 zero1 tok48
peer dp2 zero3 tok48
bert dp2 zero2 tok48 offload
teams dp2 zero3 tok32 offload
teams tp2 sp zero2 tok64
peer pp2 zero1 tok48
bert pp4 zero2 tok64
peer pp2 zero2 tok64 offload
peer tp2 pp2 sp zero2 tok64

peer pp2 zero2 mb4
bert dp2 pp2 zero2 mb1
peer dp2 zero3 mb4
bert dp2 zero3 mb4
electra dp2 zero2 mb2
peer dp1 zero3 mb2
peer dp2 zero3 mb1
teams dp2 zero1 mb4
peer dp2 zero3 mb4 offload recompute
teams dp2 zero3 mb4 offload recompute

peer tp2 zero1 mb4
peer tp2 sp zero3 mb4
peer tp4 sp zero2 mb4
peer dp2 tp2 sp zero3 mb4
electra tp2 sp zero2 mb4
peer tp2 sp zero2 mb4
bert tp2 sp zero3 mb4
peer tp4 zero3 mb4
peer dp2 tp2 zero1 mb4
teams tp2 sp zero3 mb4
teams tp4 sp zero3 mb4
teams dp2 tp2 sp zero2 mb4

peer tp2 pp2 sp zero2 mb2
peer pp2 zero2 mb1
electra pp2 zero3 mb2
bert pp2 zero2 mb2
teams pp2 zero1 mb2
teams pp2 zero2 mb4
teams pp2 zero1 mb8
peer pp4 zero2 mb8
teams pp4 zero1 mb4
teams pp4 zero2 mb2
teams pp4 zero3 mb1
peer dp2 pp2 zero3 mb2
electra dp2 pp2 zero1 mb2
bert tp2 pp2 sp zero1 mb4
electra tp2 pp2 sp zero3 mb4
peer tp2 pp2 sp zero3 mb2
teams tp2 pp2 sp zero2 mb2
peer dp2 tp2 pp2 sp zero2 mb2
teams dp2 tp2 pp2 sp zero3 mb2

peer pp2 zero1 mb2 offload
peer pp2 zero3 mb2 offload
peer dp2 pp2 zero3 mb2 offload
teams pp2 zero2 mb2 offload
"""

SLOW += """
peer dp2 zero2 tok48 compiled
peer modern tp2 sp zero1 mb4 compiled recompute
"""

# any number of micro-batches of one sequence: 1, P-1, P and 4P of them for P stages (ELECTRA's works are PEER's); not
# 16 of TEAMS, which draws five times as often: none of twenty seeds keeps all draws of such a run clear of the margin
SLOW += "".join(
    f"{model} pp{stages} zero{1 + count % 3} mb1 batch{count}\n"
    for model in ("peer", "bert", "teams")
    for stages in (2, 4)
    for count in sorted({1, stages - 1, stages, 4 * stages})
    if (model, count) != ("teams", 16)
)


# from the middle of the reference run on; the first is that run's own layout
RESUMED = """
teams dp1 zero1 mb8
teams pp2 zero3 mb4
"""
SLOW_RESUMED = """
peer modern tp2 sp zero1 mb4
peer t5bias tp2 pp2 sp zero3 mb4
teams dp2 zero2 mb2
teams tp2 zero1 mb4
teams tp2 pp2 sp zero3 mb2
"""


def rows(text, *marks):
    return [pytest.param(parse(row), id=row.replace(" ", "-"), marks=marks) for row in text.splitlines() if row]


class Reference(NamedTuple):
    """The run of one rank that layouts must equal."""

    seed: int
    metrics: list[dict]
    drawn: set[str]
    checkpoints: Path


@pytest.fixture(scope="session")
def uneven_file(tmp_path_factory, text_file):
    """Documents of very unequal lengths: shares of a step that were not made equal would differ by half."""
    path = tmp_path_factory.mktemp("uneven") / "documents.txt"
    write_uneven_text(path, text_file.read_text())
    return path


def train(pools, folder, uneven_file, layout, *flags, steps=STEPS, **options) -> list[Watched]:
    """What each rank has seen of a run under a layout."""
    config = ds_config(folder, layout.zero, **(dict(OFFLOAD) if layout.offload else {}))
    arguments = [
        *(*corpus(uneven_file), "--seq-length", "32", "--log-dir", folder / "log", "--deepspeed_config", config),
        *("--train-iters", steps, "--fp32", "--hidden-dropout", "0", "--attention-dropout", "0"),
        *(*layout.flags, *flags),
    ]
    return pools.of(layout.ranks).run(train_watched, list(map(str, arguments)), **options)


@pytest.fixture(scope="module")
def references(rank_pools, tmp_path_factory, uneven_file):
    """Runs of one rank, each made when a layout first asks for its own."""
    found: dict[Layout, Reference] = {}

    def make(layout, seed):
        folder = tmp_path_factory.mktemp(f"{layout.model}-{seed}")
        flags = ("--seed", seed, "--save", folder / "save", "--save-interval", MIDDLE)
        (run,) = train(rank_pools, folder, uneven_file, layout, *flags, measure_margin=True)
        return run, Reference(seed, run.metrics, run.drawn, folder / "save")

    def reference(layout):
        alone = layout.reference
        for seed in () if alone in found else range(1, 21):
            run, made = make(alone, seed)
            if run.margin > MARGIN:
                found[alone] = made
                break
        return found[alone]

    return reference


def assert_same(found, expected):
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, other in zip(found, expected, strict=True):
        step = f"step {other['step']}"
        losses = {name: value for name, value in other.items() if name == "loss" or name.endswith("_loss")}
        assert {name: line[name] for name in losses} == pytest.approx(losses, rel=1e-5), step
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), step
        assert line.get("rank_label_fractions") == other.get("rank_label_fractions"), step


def assert_drawn_alike(ranks, layout, expected):
    """Ranks of one tensor-parallel group draw the same, those of different groups for different samples."""
    heads, others = ranks[: layout.dp * layout.tp], ranks[layout.dp * layout.tp :]
    groups = [heads[first : first + layout.tp] for first in range(0, len(heads), layout.tp)]
    assert all(rank.drawn == group[0].drawn for group in groups for rank in group)
    assert not any(rank.drawn for rank in others)
    assert sum(len(group[0].drawn) for group in groups) == len(expected)
    assert set().union(*(group[0].drawn for group in groups)) == expected


@pytest.mark.parametrize("layout", rows(DEFAULT) + rows(SLOW, pytest.mark.slow))
def test_layouts_agree(layout, references, rank_pools, tmp_path, uneven_file):
    reference = references(layout)
    assert len(reference.metrics) == STEPS
    assert len(reference.drawn) == (0 if layout.model == "bert" else STEPS * layout.batch)
    ranks = train(rank_pools, tmp_path, uneven_file, layout, "--seed", reference.seed)
    assert_same(ranks[0].metrics, reference.metrics)
    assert_drawn_alike(ranks, layout, reference.drawn)


@pytest.mark.parametrize("layout", rows(RESUMED) + rows(SLOW_RESUMED, pytest.mark.slow))
def test_a_resumed_run_goes_on_as_the_one_that_was_not_stopped(layout, references, rank_pools, tmp_path, uneven_file):
    reference = references(layout)
    expected = reference.metrics[MIDDLE:]
    flags = ("--seed", reference.seed, "--load", reference.checkpoints / f"step_{MIDDLE:08d}")
    found = train(rank_pools, tmp_path, uneven_file, layout, *flags)[0].metrics
    assert_same(found, expected)
    if layout == layout.reference:
        assert without_times(found) == without_times(expected)


@pytest.mark.parametrize(("model", "share"), [("peer", 0.9), ("bert", 0.95), ("teams", 0.9)])
def test_the_curve_goes_down(model, share, references):
    metrics = references(Layout(model)).metrics
    assert metrics[-1]["loss"] < share * metrics[0]["loss"]


def test_the_curve_depends_on_the_seed(references, rank_pools, tmp_path, uneven_file):
    reference = references(Layout("peer"))
    (other,) = train(rank_pools, tmp_path, uneven_file, Layout("peer").reference, "--seed", reference.seed + 1, steps=1)
    assert other.metrics[0]["loss"] != pytest.approx(reference.metrics[0]["loss"], rel=1e-5)
