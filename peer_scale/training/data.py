"""A run's text as samples: opened, checked against the tokenizer, split into training and validation."""

import os
from dataclasses import dataclass

from peer_scale.corpus.prepare import open_corpus
from peer_scale.corpus.store import TokenStore
from peer_scale.corpus.wordpiece import WordPiece
from peer_scale.errors import UserError
from peer_scale.flops import square_cost_ratio
from peer_scale.parallel.cpu_binding import CpuShare
from peer_scale.parallel.topology import Topology
from peer_scale.samples.examples import NUM_SPECIAL_TOKENS, ExampleBuilder
from peer_scale.samples.loader import ExampleDataset
from peer_scale.samples.shares import BatchPlan
from peer_scale.samples.split import Part, SplitRule, split_text
from peer_scale.samples.windows import Windows
from peer_scale.settings.run import RunConfig

_CORES_PER_WORKER = 4
_MOST_WORKERS = 4
_VALIDATION_STREAM = 2**32  # added to the seed, which lies below


@dataclass(frozen=True)
class Corpus:
    """The text of a run, cut into samples."""

    store: TokenStore
    tokenizer: WordPiece
    training: ExampleDataset
    validation: ExampleDataset | None


def open_text(run: RunConfig, *, show_progress: bool) -> tuple[TokenStore, WordPiece]:
    """Tokenise the run's text where that has not been done, and open it; UserError for what cannot be used."""
    return open_corpus(
        run.data.data_path,
        run.data.tokenizer,
        vocab_size=run.model.vocab_size,
        text_key=run.data.text_key,
        cache_dir=run.data.cache_dir,
        workers=len(os.sched_getaffinity(0)),
        show_progress=show_progress,
    )


def cut_into_samples(run: RunConfig, store: TokenStore, tokenizer: WordPiece, rule: SplitRule) -> Corpus:
    """Split the text by a rule, and cut both parts into samples; UserError where a part would hold no text."""
    trained, held_out = split_text(store, run.data.validation_fraction, rule)
    training = _samples(run, store, tokenizer, trained, seed=run.seed)
    if held_out is None:
        return Corpus(store, tokenizer, training, None)
    validation = _samples(run, store, tokenizer, held_out, seed=run.seed + _VALIDATION_STREAM)
    return Corpus(store, tokenizer, training, validation)


def plan_batches(run: RunConfig, topology: Topology) -> BatchPlan:
    """Say how the samples of each step are shared out, and which of them are this rank's."""
    training = run.training
    budget = training.micro_batch_tokens
    return BatchPlan(
        training.global_batch_size,
        micro_batch=training.micro_batch_size if budget is None else None,
        token_budget=budget,
        square_ratio=square_cost_ratio(run.model, run.objective, run.sample_size),
        data_parallel_rank=topology.rank("dp"),
        data_parallel_size=topology.size("dp"),
    )


def choose_num_workers(run: RunConfig, cpus: CpuShare | None) -> int:
    """Give the processes that prepare this rank's batches.

    One makes some 6,000 samples of 128 tokens per second, of which a CPU trains on a few hundred at most; a GPU may ask
    for all that several make.

    Args:
        run: whose settings come first.
        cpus: the rank's share; None where it trains on them.
    """
    if run.data.num_workers is not None:
        return run.data.num_workers
    return 1 if cpus is None else min(max(cpus.num_cores // _CORES_PER_WORKER, 1), _MOST_WORKERS)


def _samples(run: RunConfig, store: TokenStore, tokenizer: WordPiece, part: Part, *, seed: int) -> ExampleDataset:
    seq_length = run.training.seq_length
    windows = Windows(store, part, width=seq_length - NUM_SPECIAL_TOKENS)
    if not len(windows):
        raise UserError(
            f"documents {part.first} to {part.last - 1} of the data (counted from 0), which "
            f"--validation-fraction {run.data.validation_fraction:g} sets apart, hold no text"
        )
    builder = ExampleBuilder(tokenizer, run.masking, seq_length, seed, run.objective.num_extra_uniforms)
    return ExampleDataset(windows, builder)
