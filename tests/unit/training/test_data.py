"""A run's text in its two parts, and what the start-up summary says of them."""

from dataclasses import replace

import numpy as np
import pytest

from peer_scale.corpus.store import TokenStore
from peer_scale.corpus.wordpiece import train_wordpiece
from peer_scale.errors import UserError
from peer_scale.parallel.cpu_binding import CpuShare
from peer_scale.parallel.topology import single_process_topology
from peer_scale.settings.run import OutputConfig
from peer_scale.training.data import choose_num_workers, cut_into_samples
from peer_scale.training.summary import startup_summary
from small_runs import GLOBAL_BATCH, small_run
from token_files import write_pair


@pytest.fixture(scope="module")
def vocabulary():
    return train_wordpiece(["the quick brown fox jumps over the lazy dog " * 20, "pack my box"], 200)


@pytest.fixture
def corpus(tmp_path, vocabulary):
    """Cut documents of given lengths into the samples of a run."""

    def corpus(run, lengths, rule="tokens"):
        ids = np.random.default_rng(0).integers(5, 60, sum(lengths))
        prefix = write_pair(tmp_path / "own", np.split(ids, np.cumsum(lengths)[:-1]), np.uint16)
        return cut_into_samples(run, TokenStore.open([prefix]), vocabulary, rule)

    return corpus


def lines_of(run, corpus):
    summary = startup_summary(run, single_process_topology(), corpus, 1_000_000, None)
    return dict(line.split("  ", 1) for line in summary.splitlines())


def test_the_summary_has_both_shares(corpus):
    run = small_run(output=OutputConfig(eval_interval=5, eval_iters=4), seq_length=32)
    found = {name: text.strip() for name, text in lines_of(run, corpus(run, [2900, 7000, 100])).items()}
    assert found["data"].startswith("3 documents, 10,000 tokens")
    samples = -(-2900 // 29) + -(-7000 // 29)
    assert found["trained on"] == f"99.00% of the tokens (9,900), of 2 document(s), {samples} samples per epoch"
    assert found["held out"] == (
        f"1.00% of the tokens (100), of 1 document(s), 4 samples; a validation takes {4 * GLOBAL_BATCH}"
    )


def test_the_summary_says_what_is_not_validated(corpus):
    run = small_run()
    found = lines_of(run, corpus(run, [10_000]))["held out"]
    assert (
        found.strip() == "1.00% of the tokens (100), of 1 document(s), 4 samples; not looked at without --eval-interval"
    )
    without = replace(run, data=replace(run.data, validation_fraction=0.0))
    split = corpus(without, [10_000])
    assert split.validation is None
    assert lines_of(without, split)["held out"].strip() == "nothing, so there is no validation"


def test_by_documents_numbers_are_what_they_were(corpus):
    split = corpus(small_run(), [10, 9000], rule="documents")
    assert [samples.windows.num_tokens for samples in (split.training, split.validation)] == [10, 9000]
    by_tokens = corpus(small_run(), [10, 9000])
    assert [samples.windows.num_tokens for samples in (by_tokens.training, by_tokens.validation)] == [8920, 90]


def test_batches_are_prepared_by_as_many_processes_as_the_rank_has_cores_for():
    run = small_run()
    assert choose_num_workers(run, None) == 1
    shares = [CpuShare(tuple(range(cores)), cores, is_near=True) for cores in (1, 2, 7, 8, 14, 16, 72)]
    assert [choose_num_workers(run, share) for share in shares] == [1, 1, 1, 2, 3, 4, 4]
    given = replace(run, data=replace(run.data, num_workers=0))
    assert [choose_num_workers(given, share) for share in (None, *shares)] == [0] * 8


def test_the_summary_says_which_cpus_are_a_gpus(corpus):
    run, share = small_run(), CpuShare((0, 1, 2, 3), 2, is_near=True)
    split, topology = corpus(run, [10_000]), single_process_topology()
    summary = startup_summary(run, topology, split, 1_000_000, None, cpus=share, num_workers=2)
    lines = [" ".join(line.split()) for line in summary.splitlines()]
    assert "CPUs 0-3, near the GPU; 2 cores of its own; 2 processes prepare batches" in lines
    assert "CPUs" not in startup_summary(run, topology, split, 1_000_000, None)


def test_a_part_without_text_is_said(corpus):
    line = "documents 9 to 9 of the data (counted from 0), which --validation-fraction 0.01 sets apart, hold no text"
    with pytest.raises(UserError) as error:
        corpus(small_run(), [50] * 9 + [0], rule="documents")
    assert str(error.value) == line
    assert corpus(small_run(), [50] * 9 + [0]).validation.windows.num_tokens == 4  # round(4.5)
