"""GLUE's tasks from small files in GLUE's own layout."""

import numpy as np
import pytest

from glue_files import FILES, MNLI_HEAD, STSB_HEAD, mnli
from peer_scale.errors import UserError
from peer_scale.finetuning.glue_files import read_glue
from peer_scale.finetuning.tasks import GLUE

# texts and labels of train and of the dev parts
EXPECTED = {
    "cola": [
        ([('The "sailors rode the breeze.',), ("They drank the pub.\u2028",)], [1, 0]),
        ([("Bill sang.",)], [1]),
    ],
    "sst2": [([("it 's \" charming ",)], [1]), ([("no ",)], [0])],
    "mrpc": [([('He "said so .', "So he said .")], [1]), ([("A", "B")], [0])],
    "stsb": [([("A plane.", "An air plane.")], [4.5]), ([("A.", "B.")], [0.0])],
    "qqp": [([('How "so?', "Why?"), ("Who?", "Whom?")], [1, 0]), ([("A?", "B?")], [0])],
    "mnli": [([('He said "yes 0.', "He said no.")], [label]) for label in (1, 0, 2)],
    "qnli": [([("When?", 'In "2004.')], [1]), ([("A?", "B.")], [0])],
    "rte": [([("No weapons.", "Weapons.")], [1]), ([("A.", "B.")], [0])],
}


@pytest.fixture
def root(tmp_path):
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode())
    return tmp_path


@pytest.mark.parametrize("name", GLUE)
def test_each_task_is_read(root, name):
    data = read_glue(root, name)
    found = [(examples.texts, examples.labels.tolist()) for examples in (data.train, *data.dev.values())]
    assert found == EXPECTED[name]
    assert data.train.labels.dtype == (np.float32 if name == "stsb" else np.int64)
    assert list(data.test) == list(GLUE[name].server_files)
    assert all(len(examples) >= 1 and examples.labels is None for examples in data.test.values())


def test_what_is_not_as_in_glue_is_told(root):
    first, *others = read_glue(root, "qqp").notes
    assert first == f"{root}/QQP/train.tsv: 2 lines with too few columns were passed over, the first is 3"
    assert others == ["QQP: train has 2 examples, GLUE's has 363,846", "QQP: dev has 1 examples, GLUE's has 40,430"]


@pytest.mark.parametrize(
    ("name", "file", "content", "said"),
    [
        (
            "cola",
            "CoLA/train.tsv",
            b"gj04\t1\t\tA.\ngj04\t2\t*\tB.\n",
            "line 2: the label is '2'; it must be one of 0, 1",
        ),
        ("cola", "CoLA/dev.tsv", b"gj04\t1\t\tA.\ngj04\t1\n", "line 2: 2 columns, but 'label' is number 4"),
        (
            "sst2",
            "SST-2/train.tsv",
            b"text\tlabel\nA\t1\n",
            "line 1: the header has no column 'sentence'; it has text, ",
        ),
        ("sst2", "SST-2/dev.tsv", b"sentence\tlabel\n\xff\t1\n", "line 2: not UTF-8"),
        ("sst2", "SST-2/dev.tsv", b"", "empty; GLUE's file begins with a header"),
        ("sst2", "SST-2/dev.tsv", b"sentence\tlabel\n", "holds no examples"),
        (
            "stsb",
            "STS-B/dev.tsv",
            (STSB_HEAD + "\tscore\n" + "x\t" * 9 + "nan\n").encode(),
            "line 2: the label 'nan' is not a ",
        ),
        (
            "mnli",
            "MNLI/dev_matched.tsv",
            f"{MNLI_HEAD}\tgold_label\n{mnli(0, '-')}\n".encode(),
            "line 2: the label is '-'",
        ),
        ("rte", "RTE/train.tsv", b"index\tsentence1\tsentence2\tlabel\n0\tA\tentailment\n", "line 2: 3 columns, but "),
        ("qqp", "QQP/test.tsv", b"id\tquestion1\tquestion2\n0\tA\n", "line 2: 2 columns, but "),
    ],
)
def test_bad_files_are_named_with_the_line(root, name, file, content, said):
    (root / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_glue(root, name)
    assert str(error.value).startswith(f"{root / file}: {said}")


def test_missing_files_are_named(root):
    (root / "RTE/dev.tsv").unlink()
    with pytest.raises(UserError, match=r"RTE/dev.tsv: cannot be read: No such file"):
        read_glue(root, "rte")
    with pytest.raises(UserError, match=r"--data-dir .*RTE: has no folder RTE with GLUE's train.tsv"):
        read_glue(root / "RTE", "rte")
    (root / "CoLA/test.tsv").unlink()
    assert read_glue(root, "cola").test == {}
