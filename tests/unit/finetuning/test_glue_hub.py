"""GLUE's tasks as the hub has them: files of the same layout, opened by the same call."""

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from peer_scale.errors import UserError
from peer_scale.finetuning.glue_hub import load_glue

pytestmark = pytest.mark.heavy

PAIR = {"first": ["He said yes.", "A"], "second": ["He said no.", "B"]}
NO_LABELS = [-1, -1]
TASKS = {
    "mnli": (
        ("premise", "hypothesis"),
        {
            "train": [0, 2],
            "validation_matched": [1, 0],
            "validation_mismatched": [2, 1],
            "test_matched": NO_LABELS,
            "test_mismatched": NO_LABELS,
        },
    ),
    "ax": (("premise", "hypothesis"), {"test": NO_LABELS}),
    "stsb": (("sentence1", "sentence2"), {"train": [4.5, 0.0], "validation": [1.0, 5.0], "test": [-1.0, -1.0]}),
}
TEXTS = list(zip(PAIR["first"], PAIR["second"], strict=True))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    configurations = []
    for name, ((first, second), splits) in TASKS.items():
        (folder / name).mkdir()
        configurations.append(f"- config_name: {name}\n  data_files:")
        for split, labels in splits.items():
            kind = pyarrow.float32() if name == "stsb" else pyarrow.int64()
            columns = {first: PAIR["first"], second: PAIR["second"], "label": pyarrow.array(labels, kind)}
            pyarrow.parquet.write_table(pyarrow.table(columns), folder / name / f"{split}-00000-of-00001.parquet")
            configurations.append(f"  - split: {split}\n    path: {name}/{split}-*")
    (folder / "README.md").write_text("\n".join(["---", "configs:", *configurations, "---", ""]))
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_several_parts_and_the_diagnostic_set(source):
    data = load_glue("mnli", source)
    assert data.train.texts == TEXTS
    assert data.train.labels.tolist() == [0, 2]
    assert {name: part.labels.tolist() for name, part in data.dev.items()} == {
        "dev_matched": [1, 0],
        "dev_mismatched": [2, 1],
    }
    assert {name: (part.texts, part.labels) for name, part in data.test.items()} == dict.fromkeys(
        ("test_matched", "test_mismatched", "ax"), (TEXTS, None)
    )
    assert data.notes[0] == "MNLI: train has 2 examples, GLUE's has 392,702"


def test_numbers(source):
    data = load_glue("stsb", source)
    assert data.train.labels.tolist() == [4.5, 0.0]
    assert data.dev["dev"].labels.tolist() == [1.0, 5.0]
    assert data.test["test"].labels is None


def test_what_cannot_be_had_is_refused(source):
    with pytest.raises(UserError, match=r"--task rte: .* cannot be loaded from the .* --data-dir takes the folder"):
        load_glue("rte", source)
