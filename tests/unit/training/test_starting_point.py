"""Where a run begins and into which folders it writes: nothing that a run has saved is lost or taken for another's."""

import json
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from checkpoint_runs import SHAPE, WHOLE
from peer_scale.checkpoints.folder import CheckpointFolder, committed
from peer_scale.checkpoints.manifest import FileEntry, Manifest, Piece, TensorEntry
from peer_scale.checkpoints.parameters import shardings
from peer_scale.checkpoints.progress import Progress
from peer_scale.errors import UserError
from peer_scale.models.config import ModelConfig
from peer_scale.parallel.topology import single_process_topology
from peer_scale.settings.run import OutputConfig
from peer_scale.training.callbacks.reporting import MetricsFile
from peer_scale.training.run_folders import RunFolders
from peer_scale.training.starting_point import find_start

pytestmark = pytest.mark.heavy

MODEL = ModelConfig(SHAPE, SHAPE, num_shared_layers=1, vocab_size=30, embedding_size=8, max_position_embeddings=16)
RUN = replace(WHOLE, model=MODEL, reshaped=None)
OTHER = replace(RUN, data=replace(RUN.data, seed=5))
IMPORTED = replace(RUN, progress=Progress(), data=None, layout=None, training=None, imported={"ranker": "x/y"})
NUMBERS = "numbers"  # a file that is never read
RANKS = single_process_topology().tensor_parallel


def manifest_of(sections):
    found = shardings(sections.model, sections.objective, RANKS)
    tensors = {
        name: TensorEntry(s.shape, s.dim, s.count, s.padding, (Piece(NUMBERS, 0, 0, s.stored(0)),))
        for name, s in found.items()
    }
    return Manifest(sections, tensors, {NUMBERS: FileEntry(0, "")})


def begin(folder, step):
    (folder.begin(step) / NUMBERS).touch()


@dataclass
class Done:
    """What became of a run: how it began, what it said, which metrics and checkpoints it wrote, by their marks."""

    run: str
    first_step: int
    said: list[str]


def run(output: OutputConfig, own=RUN, steps=0, save_every=1, mark="", killed=False, environ=()) -> Done:
    """Do what a training job does with its folders, without the training; a killed one does not save its last step."""
    said: list[str] = []
    folders = RunFolders(output)
    folders.claim()
    try:
        start = find_start(output, own, RANKS, folders, said.append, dict(environ))
        kept = None
        if output.log_dir is not None:
            folders.prepare_logs(start.run, start.step, own, "run.yaml's text", said.append)
            metrics = MetricsFile(output.log_dir / "metrics.jsonl", start.step)
        if output.save is not None:
            kept = CheckpointFolder(
                output.save, output.keep_last, output.keep_every, run=start.run, resumed=start.saving_in(output.save)
            )
            kept.remove_unfinished()
        for step in range(start.step + 1, start.step + steps + 1):
            if output.log_dir is not None:
                metrics.on_metrics({"step": step, "mark": mark})
            is_last = step == start.step + steps and not killed
            if kept is not None and (step % save_every == 0 or is_last):
                begin(kept, step)
                for outdated in kept.commit(step, manifest_of(replace(own, progress=Progress(step)))):
                    outdated.rename(outdated.with_name("gone"))
                    shutil.rmtree(outdated.with_name("gone"))
        return Done(start.run, start.step, said)
    finally:
        folders.release()


def steps_in(path):
    return [int(each.name[5:]) for each in committed(path)]


def metrics_in(path, name="metrics.jsonl"):
    file = path / name
    return [(m["step"], m["mark"]) for m in map(json.loads, file.read_text().splitlines())] if file.exists() else []


def test_the_same_command_goes_on_by_itself(tmp_path):
    output = OutputConfig(save=tmp_path / "save", log_dir=tmp_path / "log")
    first = run(output, steps=5)
    again = run(output, steps=2)
    assert (again.first_step, again.run) == (5, first.run)
    assert again.said == [f"resuming from {tmp_path}/save/step_00000005 after step 5"]
    assert [step for step, _ in metrics_in(tmp_path / "log")] == list(range(1, 8))
    assert not (tmp_path / "log/metrics.dropped.jsonl").exists()


def test_a_run_of_an_earlier_version_goes_on_and_says_how_it_holds_text_out(tmp_path):
    output = OutputConfig(save=tmp_path / "save", log_dir=tmp_path / "log")
    earlier = replace(RUN, data=replace(RUN.data, split="documents"))
    first = run(output, earlier, steps=3)
    again = run(output, steps=1)
    assert (again.first_step, again.run) == (3, first.run)
    assert again.said[1:] == ["text is held out by documents, not by tokens, as by the version that began this run"]


def test_what_another_run_saved_is_refused_naming_both_or_set_aside_whole(tmp_path):
    output = OutputConfig(save=tmp_path, log_dir=tmp_path)
    first = run(output, steps=3, mark="a")
    with pytest.raises(UserError) as refused:
        run(output, OTHER)
    assert str(refused.value) == (
        f"--save {tmp_path}: holds step 3 of peer-tiny {first.run}, saved by another run: data.seed 1234 there, 5 here"
        "; give another folder, or --set-aside to move what is there into a folder beside it"
    )
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    second = run(replace(output, set_aside=True), OTHER, steps=1, mark="b")
    assert second.said == [
        f"--save {tmp_path}: step 3 of peer-tiny {first.run} is now in {tmp_path}/earlier_1",
        f"--log-dir {tmp_path}: the logs of peer-tiny {first.run} are now in {tmp_path}/earlier_2",
    ]
    moved = {path.relative_to(tmp_path / f"earlier_{n}") for n in (1, 2) for path in tmp_path.glob(f"earlier_{n}/**/*")}
    assert moved - {Path(".")} == before
    assert steps_in(tmp_path / "earlier_1") == [1, 2, 3] and steps_in(tmp_path) == [1]
    assert metrics_in(tmp_path) == [(1, "b")]
    # started again, the same command goes on: its own work is not another run's
    assert run(replace(output, set_aside=True), OTHER, steps=1).first_step == 1


def test_going_back_to_an_own_checkpoint_keeps_what_is_saved_from_then_on(tmp_path):
    save, log = tmp_path / "save", tmp_path / "log"
    output = OutputConfig(save=save, log_dir=log, keep_last=3)
    first = run(output, steps=6, save_every=2, mark="a")
    assert steps_in(save) == [2, 4, 6]
    back = run(replace(output, load=save / "step_00000002"), steps=1, mark="b")
    assert back.first_step == 2 and back.run == first.run
    gives_way = "which gives way to what is saved from now on"
    assert back.said[0] == f"going back to step 2 from step 6 of peer-tiny {first.run}, {gives_way}"
    assert metrics_in(log) == [(1, "a"), (2, "a"), (3, "b")]
    assert metrics_in(log, "metrics.dropped.jsonl") == [(step, "a") for step in range(3, 7)]
    assert run(output, steps=1, mark="c").first_step == 3, "not 6, which was left"


def test_a_restarted_job_does_not_go_back_again(tmp_path):
    output = OutputConfig(save=tmp_path, load=tmp_path / "step_00000002", keep_last=9)
    run(replace(output, load=None), steps=3)
    assert run(output, steps=2).first_step == 2
    restarted = run(output, steps=1, environ={"SLURM_RESTART_COUNT": "1"})
    assert restarted.first_step == 4
    assert restarted.said[0] == f"--load {tmp_path}/step_00000002: not gone back to again, since the job was restarted"
    assert run(output, steps=1, environ={"SLURM_RESTART_COUNT": "0"}).first_step == 2


def test_beginning_with_weights_goes_on_at_the_runs_own_checkpoints(tmp_path):
    start = CheckpointFolder(tmp_path / "import", keep_last=1)
    begin(start, 0)
    start.commit(0, manifest_of(IMPORTED))
    for flag in ("init_from", "load"):
        output = OutputConfig(save=tmp_path / flag, **{flag: tmp_path / "import"})
        first = run(output, steps=2)
        again = run(output, steps=1)
        assert (first.first_step, again.first_step, again.run) == (0, 2, first.run)
    assert again.said[0] == f"--load {tmp_path}/import: not read, since --save {tmp_path}/load holds " + (
        f"step 2 of peer-tiny {first.run} of this run"
    )
    from_run = OutputConfig(save=tmp_path / "new", init_from=tmp_path / "load")
    other = run(from_run, OTHER, steps=1)
    assert other.first_step == 0 and other.run != first.run
    assert other.said == [f"starting from the weights of {tmp_path}/load/step_00000003"]
    bigger = replace(OTHER, model=replace(MODEL, embedding_size=16))
    with pytest.raises(UserError, match=r"--init-from .*: weights of another model: model.embedding_size 8 there, 16"):
        run(replace(from_run, save=None), bigger)


def test_what_is_not_there_is_an_error_and_what_is_empty_starts_fresh(tmp_path):
    with pytest.raises(
        UserError, match=f"--load {tmp_path}/gone: no such folder; give a --save folder or a step in it"
    ):
        run(OutputConfig(load=tmp_path / "gone"))
    with pytest.raises(UserError, match=f"--load {tmp_path}/save/step_00000009: no such folder"):
        run(OutputConfig(save=tmp_path / "save", load=tmp_path / "save/step_00000009"))
    with pytest.raises(UserError, match=f"--init-from {tmp_path}: no committed checkpoint there"):
        run(OutputConfig(init_from=tmp_path))
    assert run(OutputConfig(load=tmp_path)).said == [
        f"--load {tmp_path}: no committed checkpoint there; starting fresh"
    ]


def test_logs_of_another_run_are_refused_and_those_of_one_that_never_saved_are_set_aside(tmp_path):
    output = OutputConfig(log_dir=tmp_path)
    first = run(output, steps=3, mark="a")
    with pytest.raises(UserError) as refused:
        run(output, OTHER)
    assert str(refused.value).startswith(
        f"--log-dir {tmp_path}: holds the metrics of another run (peer-tiny {first.run}: data.seed 1234 there, 5 here)"
    )
    assert metrics_in(tmp_path) == [(1, "a"), (2, "a"), (3, "a")]
    again = run(output, steps=1, mark="b")
    assert again.said == [f"--log-dir {tmp_path}: the logs of peer-tiny {first.run} are now in {tmp_path}/earlier_1"]
    assert metrics_in(tmp_path) == [(1, "b")] and len(metrics_in(tmp_path / "earlier_1")) == 3
    (tmp_path / "run.json").unlink()  # as an earlier version left it
    with pytest.raises(UserError, match=r"holds the metrics of another run \(a run\); give another folder"):
        run(output)


def test_a_name_that_somebody_wrote_into_latest_is_not_passed_over_in_silence(tmp_path):
    run(OutputConfig(save=tmp_path), steps=2)
    (tmp_path / "latest").write_text("step_00000001\n")
    said = run(OutputConfig(save=tmp_path)).said
    assert said[0] == (
        f"{tmp_path}/latest names step_00000001, but step_00000002 was saved after it; "
        f"--load {tmp_path}/step_00000001 goes back to it"
    )


def test_what_changed_since_is_told(tmp_path):
    run(OutputConfig(save=tmp_path), steps=1)
    said = run(OutputConfig(save=tmp_path), replace(RUN, training={**RUN.training, "lr": 0.5})).said
    assert said == [f"resuming from {tmp_path}/step_00000001 after step 1; changed: lr 0.001 -> 0.5"]


@pytest.mark.parametrize("seed", range(4))
def test_fifty_runs_that_stop_go_back_change_folders_and_start_again(seed, tmp_path):
    """Against a small model: per folder, whose it is, what was saved last and all lines of metrics ever written."""
    rng = random.Random(seed)
    owner: dict[Path, int] = {}
    newest: dict[Path, int] = {}
    lines: set[tuple[int, str]] = set()
    for number in range(50):
        save, log = tmp_path / f"save_{rng.randrange(3)}", tmp_path / f"log_{rng.randrange(2)}"
        which = rng.randrange(2)
        output = OutputConfig(save=save, log_dir=log, keep_last=rng.randint(1, 3), set_aside=rng.random() < 0.3)
        load = rng.choice((None, None, save, "step"))
        if load == "step" and save in owner:
            load = rng.choice(committed(save))
        output = replace(output, load=None if load == "step" or (load and not save.exists()) else load)
        steps, killed = rng.randint(1, 5), rng.random() < 0.4
        before = set(steps_in(save)) if save.exists() else set()
        try:
            done = run(output, (RUN, OTHER)[which], steps, 2, f"{number}", killed)
        except UserError as error:
            assert not output.set_aside or (output.load and output.load.parent == save)
            assert owner.get(save) == 1 - which or "--log-dir" in str(error), error
            assert not save.exists() or set(steps_in(save)) == before
            continue
        finally:
            found = {line for path in tmp_path.rglob("metrics*.jsonl") for line in metrics_in(path.parent, path.name)}
            assert lines <= found, "a line of metrics is lost"
        lines |= {(step, f"{number}") for step in range(done.first_step + 1, done.first_step + steps + 1)}
        is_own = owner.get(save) == which
        asked = int(output.load.name[5:]) if output.load not in (None, save) else None
        assert done.first_step == ((asked or newest.get(save, 0)) if is_own else 0)
        saved = [s for s in range(done.first_step + 1, done.first_step + steps + 1) if s % 2 == 0]
        if not killed:
            saved.append(done.first_step + steps)
        if saved:
            owner[save], newest[save] = which, saved[-1]
            assert saved[-1] in steps_in(save), "what was saved last is missing"
            assert (save / "latest").read_text() == f"step_{saved[-1]:08d}"
            assert len(steps_in(save)) <= output.keep_last
        elif not is_own and save in owner:  # set aside, and nothing saved since
            assert steps_in(save) == []
            del owner[save], newest[save]
        ours = [step for step, _ in metrics_in(log)]
        assert ours == sorted(set(ours)) and ours[-1] == done.first_step + steps, "a repeated step"
