"""Which checkpoints are kept, and which is the newest: those saved last, whatever their steps."""

import random
from dataclasses import replace

import pytest

from checkpoint_runs import WHOLE
from peer_scale.checkpoints.folder import CheckpointFolder, committed, newest, superfluous
from peer_scale.checkpoints.manifest import Manifest
from peer_scale.checkpoints.progress import Progress
from peer_scale.checkpoints.sections import Saving
from peer_scale.errors import DamagedError, UserError

pytestmark = pytest.mark.heavy


def save(folder, step):
    folder.begin(step)
    return folder.commit(step, Manifest(replace(WHOLE, progress=Progress(step)), {}, {}))


def steps(path):
    return [int(each.name[5:]) for each in committed(path)]


def test_the_run_that_went_back_keeps_its_own(tmp_path):
    first = CheckpointFolder(tmp_path, 3, run="a")
    for step in (2, 4, 6):
        save(first, step)
    two = next(each for each in committed(tmp_path) if each.name.endswith("2"))
    saving = newest(two)[1].sections.saving
    assert saving == Saving("a", 1)
    second = CheckpointFolder(tmp_path, 3, run="a", resumed=saving)
    save(second, 3)
    assert steps(tmp_path) == [2, 3, 6], "4, which was left, gives way first"
    assert newest(tmp_path)[1].sections.saving == Saving("a", 4, after=1)
    assert (tmp_path / "latest").read_text() == "step_00000003" == newest(tmp_path)[0].name
    save(second, 5)
    assert steps(tmp_path) == [2, 3, 5]
    save(second, 6)
    assert steps(tmp_path) == [3, 5, 6]
    assert newest(tmp_path)[1].sections.saving == Saving("a", 6, after=5)


def test_a_step_that_is_saved_again_takes_the_place_of_the_one_that_was_left(tmp_path):
    first = CheckpointFolder(tmp_path, 2, run="a")
    save(first, 1)
    saving = newest(tmp_path)[1].sections.saving
    save(first, 2)
    (put_away,) = save(CheckpointFolder(tmp_path, 2, run="a", resumed=saving), 2)
    assert put_away.name == ".removing_step_00000002"
    assert newest(tmp_path)[1].sections.saving == Saving("a", 3, after=1)
    assert steps(tmp_path) == [1, 2]


def test_those_of_versions_that_did_not_number_them_are_older(tmp_path):
    old = CheckpointFolder(tmp_path, 9)
    for step in (10, 20, 30):
        save(old, step)
    assert newest(tmp_path)[1].sections.saving is None
    assert newest(tmp_path)[0].name == "step_00000030"
    save(CheckpointFolder(tmp_path, 2, run="a"), 15)
    assert steps(tmp_path) == [15, 30]
    assert newest(tmp_path)[0].name == "step_00000015"


def test_a_manifest_that_cannot_be_read_is_named_rather_than_passed_over(tmp_path):
    folder = CheckpointFolder(tmp_path, 3, run="a")
    save(folder, 1)
    save(folder, 2)
    (tmp_path / "step_00000001/peer_scale.json").write_text("{")
    with pytest.raises(UserError, match=r"step_00000001/peer_scale.json: not a checkpoint's manifest"):
        newest(tmp_path)


def kept_by_hand(history, keep_last, keep_every):
    """What must be kept of (step, number, after) in the order of saving, each number once; the slow way."""
    there = {}
    for position, (step, number, _) in enumerate(history):
        there[step] = number
        goes_on = {n for n in there.values() if n in current_at(history[: position + 1])}
        left = [n for n in sorted(there.values(), reverse=True) if n not in goes_on]
        order = sorted(goes_on, reverse=True) + left
        keep = set(order[:keep_last])
        if keep_every:
            keep |= {n for s, n in there.items() if n in goes_on and s % keep_every == 0}
        there = {s: n for s, n in there.items() if n in keep}
    return there


def current_at(history):
    after = {number: before for _, number, before in history}
    found, number = set(), history[-1][1]
    while number is not None:
        found.add(number)
        number = after[number]
    return found


@pytest.mark.parametrize("seed", range(6))
def test_going_back_and_forth_at_random(seed, tmp_path):
    rng = random.Random(seed)
    keep_last, keep_every = rng.randint(1, 3), rng.choice((None, 3))
    folder, history, step = CheckpointFolder(tmp_path, keep_last, keep_every, run="a"), [], 0
    last = None
    for number in range(1, 26):
        if history and rng.random() < 0.3:
            path = rng.choice(committed(tmp_path))
            saving = newest(path)[1].sections.saving
            step, last = int(path.name[5:]), saving.number
            folder = CheckpointFolder(tmp_path, keep_last, keep_every, run="a", resumed=saving)
        step += rng.randint(1, 3)
        save(folder, step)
        history.append((step, number, last))
        last = number
        expected = kept_by_hand(history, keep_last, keep_every)
        found = {int(each.name[5:]): newest(each)[1].sections.saving.number for each in committed(tmp_path)}
        assert found == expected
        assert newest(tmp_path)[1].sections.saving.number == number


def test_what_was_saved_last_is_never_superfluous(tmp_path):
    savings = {tmp_path / "step_00000009": Saving("a", 1), tmp_path / "step_00000001": Saving("a", 2, after=None)}
    assert superfluous(savings, 1, None) == [tmp_path / "step_00000009"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    save(CheckpointFolder(tmp_path, 2), 1)
    for name in ("latest.123.tmp", ".writing_step_00000002/x", ".removing_step_00000003/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    CheckpointFolder(tmp_path, 2).remove_unfinished()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_one_that_is_damaged_under_way_does_not_keep_the_next_from_being_saved(tmp_path):
    first = CheckpointFolder(tmp_path, 2, run="a")
    for step in (1, 2):
        save(first, step)
    resumed = newest(tmp_path)[1].sections.saving
    manifest = tmp_path / "step_00000001/peer_scale.json"
    manifest.write_text(manifest.read_text().replace('"step": 1', '"step": 7'))
    with pytest.raises(DamagedError, match="its content has another digest"):
        newest(tmp_path)
    second = CheckpointFolder(tmp_path, 2, run="a", resumed=resumed)
    for step in (3, 4, 5):
        save(second, step)
    assert steps(tmp_path) == [1, 4, 5], "for the next start to put aside"
