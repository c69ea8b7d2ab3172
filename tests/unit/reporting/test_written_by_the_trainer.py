"""The page that a run leaves behind, and what becomes of a run whose page cannot be written."""

import pytest

from peer_scale.training.callbacks.page import write_page
from report_pages import Parsed, check_figures, log_folder, records
from runs import corpus, train_in_pool

FEW = ("--micro-batch-size", "2", "--global-batch-size", "2", "--seq-length", "16")


def test_a_run_writes_its_page(one_rank, tmp_path, text_file):
    flags = [*corpus(text_file), *FEW, "--train-iters", "3", "--log-dir", str(tmp_path / "log")]
    one_rank.run(train_in_pool, [*flags, "--report"])
    page = Parsed((tmp_path / "log/report.html").read_text(encoding="utf-8"))
    check_figures(page)
    titles = {figure["title"] for figure in page.data["figures"]}
    assert {"Loss", "MLM loss", "TQR loss", "Label shares of the selected positions"} <= titles
    assert "peer-tiny reached loss" in "".join(page.text)
    assert page.curve("Loss", "only")[0].tolist() == [1, 2, 3]


def test_what_goes_wrong_is_one_line(tmp_path, capsys):
    folder = log_folder(tmp_path / "log", records(range(1, 4)))
    (folder / "report.html").mkdir()
    assert write_page(folder) is None
    captured = capsys.readouterr()
    assert captured.err.startswith(f"warning: {folder / 'report.html'}: the page could not be written (")
    assert captured.err.count("\n") == 1 and not captured.out
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "report.html", "run.yaml"]
    assert write_page(tmp_path / "gone") is None
    assert "gone" in capsys.readouterr().err


@pytest.mark.slow
def test_ten_thousand_steps_take_two_seconds(tmp_path):
    import time

    folder = log_folder(tmp_path / "log", records(range(1, 10_001)))
    write_page(folder)  # with the imports
    begin = time.process_time()
    assert write_page(folder) == folder / "report.html"
    assert time.process_time() - begin < 2
