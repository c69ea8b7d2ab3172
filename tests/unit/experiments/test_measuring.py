"""The calls of fine-tuning that a model is measured by, and the arm that has no model."""

import json
from pathlib import Path

import pytest

from peer_scale.experiments.measures import measurements
from peer_scale.experiments.measuring import batches, flags, measuring_command
from peer_scale.experiments.plan import RunName, make_plan
from peer_scale.experiments.processes import Programs
from peer_scale.experiments.reading import read_experiment
from peer_scale.experiments.run import Conductor

TASKS = """
name: x
arms: [{name: tfidf, kind: tfidf}]
tasks: [{name: one, path: %s}, {name: two, path: %s}, {name: other, path: %s, options: {epochs: 9}}]
probe: {options: {layers: all}}
finetune: {sizes: [40, all], options: {recipe: electra, lr: [1.0e-3, 1.0e-4], best_epoch: true, seeds: [1, 2]}}
"""


def read(tmp_path, *tasks):
    path = tmp_path / "x.yaml"
    path.write_text(TASKS % tasks)
    return read_experiment(path), path


def write_task(folder: Path, kind="classification", columns=("text",)):
    """Say of 60 numbers whether they are even: by a word for that, and one for the number."""
    folder.mkdir()
    metric = "accuracy" if kind == "classification" else "pearson_spearman"
    told = {"name": folder.name, "kind": kind, "metric": metric, "columns": list(columns), "label": "label"}
    (folder / "task.json").write_text(json.dumps(told))
    for split in ("train", "dev", "test"):
        lines = ["\t".join([*columns, "label"])]
        for number in range(60):
            word = ("even", "odd")[number % 2]
            texts = [f"word{number % 7} is {word}"] if len(columns) == 1 else [f"word{number % 7}", word]
            lines.append("\t".join([*texts, word if kind == "classification" else str(number % 2)]))
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_tasks_with_the_same_options_share_a_process(tmp_path):
    config, _ = read(tmp_path, "a", "b", "c")
    found = batches(measurements(config))
    assert {name: [each.task.name for each in batch] for name, batch in found.items()} == {
        "probe": ["one", "two", "other"],
        "finetune-40": ["one", "two"],
        "finetune-40-2": ["other"],
        "finetune-all": ["one", "two"],
        "finetune-all-2": ["other"],
    }


def test_options_become_flags_that_fine_tuning_takes(tmp_path):
    from peer_scale.commands.finetune import build_parser
    from peer_scale.configuration import values
    from peer_scale.finetuning.config import FinetuneConfig
    from peer_scale.settings.flags import given

    config, _ = read(tmp_path, "a", "b", "c")
    batch = batches(measurements(config))["finetune-40"]
    words = measuring_command(Path("model"), batch, Path("out"))
    told = values(given(build_parser().parse_args(words[words.index("finetune") + 1 :]), FinetuneConfig))
    asked = FinetuneConfig(**told)
    assert (asked.model, asked.tasks, asked.output_dir) == ("model", ("a", "b"), Path("out"))
    assert asked.max_train_examples == 40
    assert (asked.recipe, asked.lrs, asked.seeds, asked.best_epoch) == ("electra", (1e-3, 1e-4), (1, 2), True)
    assert not asked.save_model


def test_options_become_flags_that_a_probe_takes(tmp_path):
    from peer_scale.experiments.probing import build_parser

    config, _ = read(tmp_path, "a", "b", "c")
    words = measuring_command(Path("model"), batches(measurements(config))["probe"], Path("out"))
    args = build_parser().parse_args(words[3:])
    assert (args.model, args.task, args.layers, args.max_train_examples) == ("model", ["a", "b", "c"], "all", None)


def test_flags():
    words = flags({"a_b": 1, "c": [1, 2.5], "d": True, "e_f": False})
    assert words == ["--a-b", "1", "--c", "1", "2.5", "--d", "--no-e-f"]


@pytest.mark.heavy
def test_tfidf_is_scored_on_the_same_examples_and_its_result_is_written(tmp_path):
    one = write_task(tmp_path / "one")
    two = write_task(tmp_path / "two", columns=("text_a", "text_b"))
    other = write_task(tmp_path / "other", kind="regression")
    config, path = read(tmp_path, one, two, other)
    conductor = Conductor(make_plan(config, path, None), tmp_path, Programs(one_thread=True), say=lambda line: None)
    assert conductor.run_all(conductor.plan.runs, jobs=1) == {}
    result = json.loads((tmp_path / "results" / "tfidf-s1.json").read_text())
    # a word tells the class: found whatever the size and the number of texts; numbers in between cost correlation
    of_classes = {name: score for name, score in result["scores"].items() if name.endswith(("one", "two"))}
    assert of_classes == dict.fromkeys(of_classes, 1.0)
    assert all(0.9 < score <= 1 for score in result["scores"].values())
    assert (len(of_classes), len(result["scores"])) == (3 * 2, 3 * 4)
    entry = result["details"]["measures"]["finetune-40/one"]
    assert (entry["train_size"], entry["n"], entry["scored_on"]) == (40, 2, "test")
    assert entry["metric"] == "accuracy"
    assert conductor.is_done(RunName("tfidf", 1))
    assert json.loads((tmp_path / "experiment.json").read_text())["missing"] == []
