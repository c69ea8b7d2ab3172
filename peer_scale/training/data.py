"""A run's text as samples: opened, checked against the tokenizer, split into training and validation."""

import os
from dataclasses import dataclass

from peer_scale.corpus.prepare import open_corpus
from peer_scale.corpus.store import TokenStore, check_vocab
from peer_scale.corpus.wordpiece import WordPiece
from peer_scale.samples.examples import NUM_SPECIAL_TOKENS, ExampleBuilder
from peer_scale.samples.loader import ExampleDataset
from peer_scale.samples.windows import Windows, split_documents
from peer_scale.settings.run import RunConfig

_VALIDATION_STREAM = 2**32  # added to the seed, which lies below


@dataclass(frozen=True)
class Corpus:
    """The text of a run, cut into samples."""

    store: TokenStore
    tokenizer: WordPiece
    training: ExampleDataset
    validation: ExampleDataset | None


def open_data(run: RunConfig, *, show_progress: bool) -> Corpus:
    """Tokenise the run's text where that has not been done, and open it; UserError for what cannot be used."""
    store, tokenizer = open_corpus(
        run.data.data_path,
        run.data.tokenizer,
        vocab_size=run.model.vocab_size,
        text_key=run.data.text_key,
        cache_dir=run.data.cache_dir,
        workers=len(os.sched_getaffinity(0)),
        show_progress=show_progress,
    )
    check_vocab(store, tokenizer)
    held_out = split_documents(store.num_documents, run.data.validation_fraction)
    training = _samples(run, store, tokenizer, first=0, last=held_out, seed=run.seed)
    if held_out == store.num_documents:
        return Corpus(store, tokenizer, training, None)
    seed = run.seed + _VALIDATION_STREAM
    validation = _samples(run, store, tokenizer, first=held_out, last=store.num_documents, seed=seed)
    return Corpus(store, tokenizer, training, validation)


def _samples(
    run: RunConfig, store: TokenStore, tokenizer: WordPiece, *, first: int, last: int, seed: int
) -> ExampleDataset:
    seq_length = run.training.seq_length
    windows = Windows(store, width=seq_length - NUM_SPECIAL_TOKENS, first=first, last=last)
    return ExampleDataset(windows, _builder(run, tokenizer, seed))


def _builder(run: RunConfig, tokenizer: WordPiece, seed: int) -> ExampleBuilder:
    return ExampleBuilder(tokenizer, run.masking, run.training.seq_length, seed, run.objective.num_extra_uniforms)
