"""What watches a run: here on the CPU, where nothing waits for a device."""

import os
import warnings
from types import SimpleNamespace

import pytest

from peer_scale.doctor.bandwidth import measure_links
from peer_scale.doctor.trials import Curve, Synchronizations


def steps(watching, wait=None):
    """Go through twelve steps, of which some may wait for a device in the way that torch tells of."""
    for step in range(1, 13):
        if wait is not None and step in wait:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        watching.on_step_end(None, SimpleNamespace(step=step))


def test_the_mode_is_on_from_step_5_to_step_10():
    modes = []
    steps(Synchronizations(modes.append))
    assert modes == ["warn", "error", "default"]


@pytest.mark.parametrize(("wait", "count"), [({5}, 1), ({7}, 1), ({6, 7}, 1)])
def test_places_that_wait_are_listed(wait, count):
    modes: list[str] = []
    watching = Synchronizations(modes.append)
    steps(watching, wait)
    assert len(watching.places) == count
    assert all(place.startswith("test_trials.py:") for place in watching.places)
    assert modes == ["warn", "default", "default"]


def test_torchs_word_on_the_mode_itself_is_no_place():
    def set_mode(mode):
        if mode == "warn":
            warnings.warn(
                "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing "
                "operations",
                stacklevel=1,
            )

    watching = Synchronizations(set_mode)
    steps(watching)
    assert watching.places == set()


def test_what_waits_before_is_nobodys_business():
    watching = Synchronizations(lambda mode: None)
    with pytest.warns(UserWarning, match="synchronizing"):
        steps(watching, {3})
    assert watching.places == set()


def test_a_curve_has_losses_and_norms():
    watching = Curve()
    watching.on_metrics({"step": 1, "loss": 3.0, "x_loss": 1.0, "loss_scale": 1.0, "grad_norm": 2.0})
    assert watching.steps == [{"loss": 3.0, "x_loss": 1.0, "grad_norm": 2.0}]


def links_of_ranks(ranks_per_node):
    import torch

    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node)
    try:
        return measure_links(torch.device("cpu"), sizes=(1024, 65536))
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]


@pytest.mark.parametrize(("ranks_per_node", "link"), [(2, "node"), (1, "network")])
def test_messages_are_timed(ranks_per_node, link, two_ranks):
    first, other = two_ranks.run(links_of_ranks, ranks_per_node)
    assert first == other  # the slowest rank counts, on all
    measures = first["measures"]
    assert [(one["link"], one["message"], one["size"]) for one in measures] == [
        (link, message, size) for size in (1024, 65536) for message in ("all-reduce", "pair")
    ]
    for one in measures:
        assert one["ranks"] == 2
        # of two ranks each sends the tensor once, either way
        assert one["bandwidth"] == pytest.approx(one["size"] / one["seconds"])
    figures = {"node": "intra_bandwidth", "network": "inter_bandwidth"}
    assert first[figures.pop(link)] == max(one["bandwidth"] for one in measures if one["message"] == "all-reduce")
    assert first[next(iter(figures.values()))] is None
    assert first["latency"] == min(one["seconds"] for one in measures if one["message"] == "pair")
