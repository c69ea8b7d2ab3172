"""Biases of the MLM head that begin with the frequencies of tokens, in whole runs."""

import json
import math

import numpy as np
import pytest

from peer_scale.corpus.store import TokenStore
from runs import corpus, train_in_pool

FLAGS = ("--model", "bert-tiny", "--fp32", "--train-iters", 1, "--micro-batch-size", 4, "--global-batch-size", 8)
# nothing but the biases tells tokens apart
ALIKE = ("--init-method-std", 1e-9, "--hidden-dropout", 0, "--attention-dropout", 0)


def first_loss(pool, folder, text_file, *more):
    flags = [*FLAGS, *ALIKE, *corpus(text_file), "--log-dir", folder, *more]
    return pool.run(train_in_pool, list(map(str, flags)))[0][0]["mlm_loss"]


def test_unigram_output_bias(two_ranks, tmp_path, text_file):
    unigram = first_loss(two_ranks, tmp_path / "dp", text_file, "--unigram-output-bias")
    split = ("--tensor-model-parallel-size", 2, "--unigram-output-bias")
    assert first_loss(two_ranks, tmp_path / "tp", text_file, *split) == pytest.approx(unigram, rel=1e-6)
    assert first_loss(two_ranks, tmp_path / "plain", text_file) == pytest.approx(math.log(2000), rel=1e-3)

    (manifest,) = [
        path
        for path in (text_file.parent / "cache").rglob("*.json")
        if json.loads(path.read_text()).get("vocab_size") == 2000
    ]
    store = TokenStore.open([str(manifest.with_suffix(""))])
    lengths = store.document_lengths(0, store.num_documents).tolist()
    tokens = np.concatenate([store.read(document, 0, length) for document, length in enumerate(lengths)])
    frequencies = np.bincount(tokens) / len(tokens)
    entropy = -(frequencies[frequencies > 0] * np.log(frequencies[frequencies > 0])).sum()
    assert entropy < 0.9 * math.log(2000)
    assert unigram == pytest.approx(entropy, rel=0.1)
