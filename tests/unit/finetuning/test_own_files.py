"""Own data: CSV, TSV, JSONL and task folders, and what is said of bad ones."""

import json

import pytest

from peer_scale.errors import UserError
from peer_scale.finetuning.own_files import read_files, read_task_folder, task_of_files


def read(train, columns=(), label="label", kind="classification", metric=None, dev=None, test=None):
    return read_files(task_of_files(train, columns, label, kind, metric), train, dev, test)


def write(path, text):
    path.write_bytes(text.encode())
    return path


def test_csv_has_quotes_and_tsv_has_not(tmp_path):
    rows = [('say "yes"', "b"), ("two\nlines, a comma", "a")]
    csv = write(tmp_path / "x.csv", '\ufefftext,label\r\n"say ""yes""",b\r\n"two\nlines, a comma",a\r\n')
    data = read(csv, dev=csv)
    assert data.train.texts == [(text,) for text, _ in rows]
    assert data.task.labels == ("a", "b")
    assert data.train.labels.tolist() == [1, 0]
    tsv = write(tmp_path / "x.tsv", 'text\tlabel\nsay "yes\tb\nno" \ta\n')
    assert read(tsv, dev=tsv).train.texts == [('say "yes',), ('no" ',)]


def test_jsonl_of_two_columns_says_what_is_the_text(tmp_path):
    rows = [{"review": f"text {n}", "label": n % 3 + 8} for n in range(20)]
    path = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    data = read(path)
    assert data.task.columns == ("review",)
    assert data.task.labels == ("8", "9", "10"), "in the order of the numbers"
    assert (len(data.train), len(data.dev["dev"])) == (18, 2), "a tenth is held out"
    texts = {*data.train.texts, *data.dev["dev"].texts}
    assert len(texts) == 20
    assert data.notes == (f"no dev file: 2 of the 20 examples of {path} are held out",)
    assert read(path).dev["dev"].texts == data.dev["dev"].texts


def test_pairs_and_numbers(tmp_path):
    path = write(tmp_path / "x.tsv", "text_a\ttext_b\tlabel\na\tb\t-1\nc\td\t2.5\n")
    data = read(path, kind="regression", dev=path)
    assert data.train.texts == [("a", "b"), ("c", "d")]
    assert data.train.labels.tolist() == [-1.0, 2.5]
    assert (data.task.metric, data.task.scale) == ("pearson_spearman", (-1.0, 2.5))


def test_a_test_file_may_have_no_labels(tmp_path):
    train = write(tmp_path / "x.csv", "text,label\na,1\nb,0\n")
    data = read(train, dev=train, test=write(tmp_path / "t.csv", "text\nc\n"))
    assert data.test["test"].texts == [("c",)]
    assert data.test["test"].labels is None
    assert read(train, dev=train, test=train).test["test"].labels.tolist() == [1, 0]


def test_a_task_folder(tmp_path):
    told = {"name": "own", "kind": "classification", "metric": "mcc", "columns": ["text_a", "text_b"], "label": "y"}
    (tmp_path / "task.json").write_text(json.dumps(told))
    for part in ("train", "dev", "test"):
        write(tmp_path / f"{part}.tsv", f"text_a\ttext_b\ty\n{part}\tx\tno\n{part}\ty\tyes\n")
    data = read_task_folder(tmp_path)
    assert (data.task.name, data.task.metric, data.task.labels) == ("own", "mcc", ("no", "yes"))
    assert [e.texts[0][0] for e in (data.train, data.dev["dev"], data.test["test"])] == ["train", "dev", "test"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.csv", 'text,label\na,1\n"b,0\n', "x.csv: line 3: not CSV: unexpected end of data"),
        ("x.csv", "text,label\na,1\nb,0,2\n", "x.csv: line 3: 3 columns, but the header has 2"),
        ("x.tsv", "text\tlabel\na\t1\nb\n", "x.tsv: line 3: 1 columns, but the header has 2"),
        ("x.tsv", "text\tlabel\n", "x.tsv: holds no examples"),
        ("x.tsv", "a\tb\tlabel\nx\ty\t1\n", "x.tsv: --text-columns must say which are texts; the file has a, b, label"),
        ("x.tsv", "text\tlabel\na\t1\nb\t1\n", "x.tsv: all labels are '1'; there must be two classes or more"),
        ("x.tsv", "text\tscore\na\t1\n", "x.tsv: line 2: no column 'label'; it has text, score"),
        ("x.tsv", "text\tlabel\na\t\n", "x.tsv: line 2: the label 'label' is \"\"; it must be a word or a number"),
        ("x.jsonl", '{"text": "a", "label": 1}\n{"text": \n', "x.jsonl: line 2: not JSON"),
        ("x.jsonl", '{"text": "a", "label": 1}\n[1]\n', "x.jsonl: line 2: not a JSON object"),
        ("x.jsonl", '{"text": 5, "label": 1}\n{"text": "b", "label": 2}\n', "x.jsonl: line 1: 'text' is 5; it must be"),
        ("x.jsonl", '{"text": "a"}\n', "x.jsonl: line 1: no column 'label'; it has text"),
        ("x.txt", "a", "x.txt: the file's ending must be one of .csv, .tsv, .jsonl"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, name, content, said):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{tmp_path}/{said}")


def test_other_refusals(tmp_path):
    path = write(tmp_path / "x.tsv", "text\tlabel\na\t1\nb\t0\n")
    dev = write(tmp_path / "dev.tsv", "text\tlabel\na\t1\nb\t7\n")
    for more, said in (
        ({"dev": dev}, f"{dev}: line 3: the label is '7'; the train file has 0, 1"),
        ({"metric": "pearson_spearman"}, "the metric pearson_spearman does not go with classification"),
        ({"kind": "regression", "metric": "mcc"}, "the metric mcc does not go with regression"),
        ({"dev": tmp_path / "none.tsv"}, f"{tmp_path}/none.tsv: cannot be read: No such file or directory"),
    ):
        with pytest.raises(UserError) as error:
            read(path, **more)
        assert str(error.value) == said
    words = write(tmp_path / "words.tsv", "text\tlabel\na\t1\nb\thigh\n")
    with pytest.raises(UserError, match=r"words.tsv: line 3: the label 'high' is not a number"):
        read(words, kind="regression")
    for told, said in (("[", "not a JSON object of a task"), ('{"name": "x"}', "no 'kind'")):
        (tmp_path / "task.json").write_text(told)
        with pytest.raises(UserError, match=f"task.json: {said}; it must have name, kind, metric and columns"):
            read_task_folder(tmp_path)
