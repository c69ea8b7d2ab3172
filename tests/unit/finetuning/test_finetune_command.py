"""The command as users call it: own data and a checkpoint of ours, going on, predictions, several ranks."""

import errno
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import pipeline

from checkpoint_runs import WHOLE, write_random
from peer_scale.commands.finetune import main
from peer_scale.errors import UserError
from peer_scale.finetuning.config import FinetuneConfig
from peer_scale.finetuning.deepspeed_settings import deepspeed_settings
from peer_scale.finetuning.disk_errors import naming_the_file
from peer_scale.finetuning.predictions import write_predictions
from peer_scale.finetuning.probe import probe
from peer_scale.finetuning.recipes import recipe_for
from peer_scale.finetuning.results import Results, Run, TaskResult
from peer_scale.finetuning.run import finetune
from peer_scale.finetuning.tasks import GLUE
from peer_scale.models.config import EncoderShape, ModelConfig
from runs import PROJECT
from tiny_encoders import sentences, write_encoder, write_task

pytestmark = pytest.mark.heavy

SHAPE = EncoderShape(num_layers=2, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2)
QUICK = ("--epochs", "2", "--batch-size", "16", "--lr", "0.003")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, wordpiece):
    model = ModelConfig(SHAPE, SHAPE, num_shared_layers=1, vocab_size=wordpiece.vocab_size, max_position_embeddings=32)
    folder = tmp_path_factory.mktemp("save")
    write_random(folder, model, WHOLE.objective, "ranker", wordpiece)
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory, checkpoint):
    """What one command makes of a JSONL of two columns and a checkpoint."""
    folder = tmp_path_factory.mktemp("own")
    rows = [json.dumps({"review": text, "label": label}) for text, label in sentences(60, 0)]
    (folder / "reviews.jsonl").write_text("\n".join(rows) + "\n")
    flags = ["--model", checkpoint, "--train-file", folder / "reviews.jsonl", "--output-dir", folder / "out"]
    flags = [*map(str, flags), "--seeds", "1", "2", *QUICK]
    assert main(flags) == 0
    return folder / "out", flags


def test_a_model_that_a_pipeline_opens(done):
    folder, _ = done
    classify = pipeline("text-classification", str(folder / "reviews" / "model"))
    answers = classify(["the film is good", "the film is bad"])
    assert {answer["label"] for answer in answers} <= {"good", "bad"}
    card = (folder / "reviews" / "model" / "README.md").read_text()
    assert "| 1 | 0.003 |" in card
    assert "| 2 | 0.003 |" in card
    assert "accuracy of 2 runs" in card


def test_the_results_are_written(done):
    folder, _ = done
    told = json.loads((folder / "results.json").read_text())
    task = told["tasks"]["reviews"]
    assert (told["recipe"], task["metric"], task["train_size"], task["n"]) == ("paper", "accuracy", 54, 2)
    scores = [run["dev"] for run in task["runs"]]
    assert (task["mean"], task["median"], task["max"]) == (np.mean(scores), np.median(scores), max(scores))
    assert task["std"] == pytest.approx(np.std(scores, ddof=1))
    assert (task["scored_on"], told["average"], task["higher_is_better"]) == ("dev", task["mean"], True)
    assert {"seed", "lr", "best_epoch", "dev", "test", "dev_metrics", "test_metrics", "failed", "wall_s"} <= {
        *task["runs"][0]
    }


def test_runs_that_are_done_are_kept_and_others_come_out_the_same(done, capfd):
    folder, flags = done
    before = json.loads((folder / "results.json").read_text())
    (folder / "reviews" / "runs" / "seed2-lr0.003.json").unlink()
    assert main(flags) == 0
    lines = capfd.readouterr().out.splitlines()
    assert ["(kept from before)" in line for line in lines if line.startswith("reviews  seed")] == [True, False]
    after = json.loads((folder / "results.json").read_text())
    for one, other in zip(before["tasks"]["reviews"]["runs"], after["tasks"]["reviews"]["runs"], strict=True):
        assert {**one, "wall_s": 0} == {**other, "wall_s": 0}


def test_runs_of_other_settings_are_not_mixed(done, capfd):
    _, flags = done
    assert main([*flags, "--dropout", "0.2"]) == 2
    error = capfd.readouterr().err
    assert "the runs of reviews there were made with dropout 0.1, now it is 0.2; give another folder" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--task", "cola"), "--model is missing (see --help)"),
        (("--model", "m", "--output-dir", "o"), "give either --task or --train-file"),
        (("--model", "m", "--output-dir", "o", "--task", "cola", "--metric", "f1"), "--dev-file, --test-file, "),
        (("--model", "m", "--output-dir", "o", "--task", "cola", "--lr", "1", "1"), "lrs is [1.0, 1.0]; it must be"),
        (("--model", "m", "--output-dir", "o", "--task", "cola", "--recipe", "best"), "--recipe is best; it must be"),
        (("--model", "{here}", "--output-dir", "{here}/o", "--task", "cola"), "--model {here}: neither a folder with"),
        (("--model", "{model}", "--output-dir", "{here}/o", "--task", "cola", "--data-dir", "{here}"), "--data-dir "),
        (("--model", "{model}", "--output-dir", "{here}/o", "--task", "none"), "--task none: neither a folder with "),
        (("--model", "m", "--output-dir", "{here}/o", "--task", "cola", "--deepspeed_config", "zero2"), "--deeps"),
    ],
)  # fmt: skip
def test_what_is_refused_in_one_line(flags, said, capfd, tmp_path, checkpoint, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # another test may have set them
        monkeypatch.delenv(name, raising=False)
    places = {"here": tmp_path, "model": checkpoint}
    assert main([flag.format(**places) for flag in flags]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: {said.format(**places)}")
    assert error.count("\n") == 1


def test_a_file_that_cannot_be_written_is_named(done, capfd, tmp_path):
    settings = tmp_path / "reviews" / "settings.json"
    settings.mkdir(parents=True)
    assert main([*done[1], "--output-dir", str(tmp_path)]) == 2
    assert capfd.readouterr().err == f"error: {settings}: Is a directory\n"


def test_full_disks_and_other_files_are_told_apart(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")  # of a write, which knows no name
    with pytest.raises(UserError, match=r"^x/model: No space left on device$"), naming_the_file(Path("x/model")):
        raise full
    with pytest.raises(OSError, match="No space left"), naming_the_file():
        raise full
    with pytest.raises(UserError, match=r"none: No such file or directory$"), naming_the_file(Path("x/model")):
        (tmp_path / "none").read_bytes()
    with pytest.raises(UserError, match=r"^x/model: .*No such file"), naming_the_file(Path("x/model")):
        save_file({"a": torch.zeros(1)}, tmp_path / "no" / "model.safetensors")


def test_several_tasks_subsets_and_random_weights(tmp_path):
    model = write_encoder(tmp_path / "model", "bert")
    tasks = [str(write_task(tmp_path / name, name=name)) for name in ("one", "two")]
    config = FinetuneConfig(
        model=str(model),
        output_dir=tmp_path / "out",
        tasks=tuple(tasks),
        recipe="electra",
        layerwise="none",
        seeds=(1,),
        lrs=(1e-6, 1e-2),
        epochs=8,
        batch_size=16,
        dropout=0.0,
        attention_dropout=0.0,
        max_train_examples=48,
        best_epoch=True,
        random_init=True,
        group_by_length=True,
    )
    results = finetune(config)
    assert list(results.tasks) == ["one", "two"]
    assert results.tasks["one"].train_size == 48
    assert results.tasks["one"].scored_on == "test"
    assert results.tasks["one"].lr == 1e-2, "the rate with the better mean on dev counts"
    assert len(results.tasks["one"].runs) == 2
    lines = (tmp_path / "out/one/predictions/test.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == list(map(str, range(32)))
    gold = [line.split("\t")[1] for line in (tmp_path / "one/test.tsv").read_text().splitlines()[1:]]
    right = np.mean([line.split("\t")[1] == label for line, label in zip(lines[1:], gold, strict=True)])
    assert right == max(results.tasks["one"].counted, key=lambda run: run.dev).test, (
        "of the best run, at its best epoch"
    )


@pytest.mark.parametrize("layers", ["last", "all"])
def test_a_probe_reads_what_stands_in_the_states(tmp_path, layers):
    sizes = {"hidden_size": 64, "embedding_size": 64, "num_hidden_layers": 1, "initializer_range": 0.02}
    model = write_encoder(tmp_path / "model", **sizes)
    task = write_task(tmp_path / "task", train=200, dev=60, test=60)
    found = probe(str(model), str(task), layers=layers)
    assert found > 0.75, "the words stand in the embeddings, which the first layer hands on"
    assert found == probe(str(model), str(task), layers=layers)
    assert probe(str(model), str(task), layers=layers, max_train_examples=8) < found
    assert 0 < probe(str(model), str(task), layers=layers, random_init=True, seed=3) <= 1


def run_of(seed, lr, dev, failed=False, test=None):
    return Run(seed, lr, 1, dev, test, {}, None, failed, 1.0, (0.5,))


def test_failed_runs_are_counted_and_never_dropped():
    runs = (run_of(1, 1e-4, 0.8), run_of(2, 1e-4, 0.5, failed=True), run_of(1, 5e-5, 0.6), run_of(2, 5e-5, 0.6))
    told = Results("m", "paper", {"t": TaskResult("t", "accuracy", 10, runs)}).to_json()["tasks"]["t"]
    assert (told["lr"], told["n"], told["failed"]) == (1e-4, 2, 1)
    assert (told["mean"], told["median"], told["max"]) == (0.65, 0.65, 0.8)
    assert len(told["runs"]) == 4


def test_flags_win_over_the_recipe():
    config = FinetuneConfig(model="m", output_dir="o", tasks=("cola",), epochs=7, layerwise="fixed", clip_grad=2.0)
    recipe = recipe_for("paper", hidden_size=256, task="cola", train_size=8551)
    assert config.applied_to(recipe) == replace(recipe, epochs=7, layerwise="fixed", clip_grad=2.0)


def test_predictions_are_in_the_servers_format(tmp_path):
    ids = np.eye(3, dtype=np.float32)
    write_predictions(tmp_path, GLUE["mnli"].task, {"test_matched": ids, "ax": ids[:1]}, None)
    assert (tmp_path / "MNLI-m.tsv").read_text() == "index\tprediction\n0\tentailment\n1\tneutral\n2\tcontradiction\n"
    assert (tmp_path / "AX.tsv").read_text() == "index\tprediction\n0\tentailment\n"
    write_predictions(tmp_path, GLUE["qnli"].task, {"test": ids[:2, :2]}, None)
    assert (tmp_path / "QNLI.tsv").read_text() == "index\tprediction\n0\tentailment\n1\tnot_entailment\n"
    write_predictions(tmp_path, GLUE["cola"].task, {"test": ids[:2, :2]}, None)
    assert (tmp_path / "CoLA.tsv").read_text() == "index\tprediction\n0\t0\n1\t1\n"
    outputs = np.array([[0.5], [1.3], [-0.2]], np.float32)
    write_predictions(tmp_path, GLUE["stsb"].task, {"test": outputs}, (0.0, 5.0))
    assert (tmp_path / "STS-B.tsv").read_text() == "index\tprediction\n0\t2.500\n1\t5.000\n2\t0.000\n"


def test_deepspeed_is_told_the_sharding_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero2").mkdir()  # a run's output, maybe
    own = {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}, "optimizer": {"type": "Adam"}}
    (tmp_path / "own.json").write_text(json.dumps(own))
    assert deepspeed_settings("zero2")["zero_optimization"]["stage"] == 2
    told = deepspeed_settings("own.json")
    assert told["zero_optimization"] == {"stage": 1}
    assert "optimizer" not in told
    with pytest.raises(UserError, match="zero3: ZeRO stage 3; fine-tuning has stages 0, 1 and 2"):
        deepspeed_settings("zero3")


SEVERAL_COMMANDS = """
import runpy, shlex, sys
for line in sys.argv[1:]:
    sys.argv = ["peer_scale.finetune", *shlex.split(line)]
    try:
        runpy.run_module("peer_scale.finetune", run_name="__main__")
    except SystemExit as done:
        assert done.code == 0
"""


@pytest.mark.slow
def test_two_ranks_do_what_one_does(tmp_path):
    model, task = write_encoder(tmp_path / "model"), write_task(tmp_path / "task")
    common = ["--model", model, "--task", task, "--seeds", "1", *QUICK, "--dropout", "0", "--attention-dropout", "0"]

    def flags(name, *more):
        return list(map(str, [*common, *more, "--output-dir", tmp_path / name]))

    zero2 = ("--deepspeed_config", "zero2")
    for name, more in (("one", ()), ("one-electra", ("--recipe", "electra"))):
        assert main(flags(name, *more)) == 0
    launched = {"two": (), "two-zero2": zero2, "two-electra-zero2": ("--recipe", "electra", *zero2)}
    # one start for all, since to import everything takes longer than to train
    (tmp_path / "all.py").write_text(SEVERAL_COMMANDS)
    extensions = tmp_path / "extensions"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "all.py"),
            *(shlex.join(flags(name, *more)) for name, more in launched.items()),
        ],
        env=os.environ | {"PYTHONPATH": str(PROJECT), "TORCH_EXTENSIONS_DIR": str(extensions)},
        capture_output=True, text=True, check=False, timeout=240, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("praise  seed 1") == 3, "one rank speaks"
    assert not extensions.exists(), "nothing was compiled"

    def run_of_results(name):
        return json.loads((tmp_path / name / "results.json").read_text())["tasks"]["praise"]["runs"][0]

    for name, other in (("two", "one"), ("two-zero2", "one"), ("two-electra-zero2", "one-electra")):
        found, wanted = run_of_results(name), run_of_results(other)
        np.testing.assert_allclose(found["train_losses"], wanted["train_losses"], rtol=1e-4)
        for scores in ("dev_metrics", "test_metrics", "best_epoch"):
            assert found[scores] == wanted[scores]
