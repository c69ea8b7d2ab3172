"""From raw text to a Megatron `.bin/.idx` pair, in parallel and resumable, and from `--data-path` to an open store."""

import contextlib
import itertools
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from peer_scale.corpus.formats.base import MIN_SAMPLED_BYTES, SAMPLED_BYTES, FileSource, Source
from peer_scale.corpus.locks import locked
from peer_scale.corpus.manifest import InputSummary, PairManifest, has_manifest
from peer_scale.corpus.parts import (
    Part,
    PartInput,
    cut_into_parts,
    digest_of,
    merge_bin,
    merge_index,
    read_part,
    token_dtype,
    write_part,
)
from peer_scale.corpus.progress import PreparationBar
from peer_scale.corpus.readers import Inputs, find_inputs, iter_documents
from peer_scale.corpus.store import TokenStore, check_vocab, inspect_pair, pair_fingerprint
from peer_scale.corpus.unknown import UnknownCounts
from peer_scale.corpus.wordpiece import WordPiece, load_wordpiece, train_wordpiece
from peer_scale.corpus.worker_pool import worker_pool
from peer_scale.errors import UserError
from peer_scale.storage import remove_unfinished_writes, write_atomically

PART_BYTES = 1 << 25  # of text per part: little beside a worker's memory
_LEAST_PART_BYTES = 1 << 20  # much beside what starting a part costs
_PARTS = 256  # of a smaller input, so that all workers have work to its end
_NAMES_SHOWN = 3
_TRAINING_CHARS = 200_000_000
_PARTS_VERSION = 2  # raise it whenever the same files give other documents
_IDENTITY_THREADS = 8  # many small reads, which wait for a file server rather than a core


def preprocess(
    inputs: Sequence[str],
    tokenizer: WordPiece,
    output_prefix: str,
    *,
    text_key: str = "text",
    workers: int = 1,
    show_progress: bool = False,
    part_bytes: int = PART_BYTES,
) -> None:
    """Tokenise raw text into `<prefix>.bin`, `.idx`, `.tokenizer.json` and, last, the manifest `.json`.

    The bytes depend on inputs and tokenizer only. Called again after an interruption it goes on from the finished
    parts; where all is done it returns at once. Memory does not grow with the input.

    Args:
        inputs: as `readers.iter_documents`.
        tokenizer: the tokenizer to apply.
        output_prefix: path without ending; its folder is made if need be.
        text_key: key or column of the text.
        workers: number of processes.
        show_progress: whether to report on stderr.
        part_bytes: how much text a worker takes at a time at most, and so an interruption can lose.

    Raises:
        UserError: an input is bad, the output cannot be written, or it would overwrite files not made here.
    """
    with _as_user_errors(output_prefix):
        found = _found(inputs, show_progress)
        os.makedirs(os.path.dirname(os.path.abspath(output_prefix)), exist_ok=True)
        with locked(f"{output_prefix}.lock"):
            identities = _identities(found.sources)
            _preprocess(found, identities, tokenizer, output_prefix, text_key, workers, show_progress, part_bytes)


def train_on_inputs(
    inputs: Sequence[str], vocab_size: int, text_key: str = "text", show_progress: bool = False
) -> WordPiece:
    """Train a WordPiece on the first 200 million characters of the inputs, in a process of its own.

    Raises:
        UserError: as `readers.iter_documents` and `wordpiece.train_wordpiece`.
    """
    if show_progress:
        print(f"training a WordPiece tokenizer of {vocab_size} on {', '.join(inputs)}", file=sys.stderr, flush=True)
    # The trainer's threads would make every later fork of this process print a warning.
    with _as_user_errors(", ".join(inputs)), worker_pool(1) as pool:
        wordpiece = pool.submit(_train, tuple(inputs), vocab_size, text_key).result()
    if show_progress:
        for line in wordpiece.departures():
            print(line, file=sys.stderr, flush=True)
    return wordpiece


def bytes_per_part(sources: Sequence[Source], part_bytes: int) -> int:
    """Return how much text each part gets, at most `part_bytes`: less of a small input, so that no worker is idle.

    It does not depend on the number of workers, so that a run with another number goes on from the finished parts.
    """
    total = _total_bytes(sources)
    return part_bytes if total is None else min(part_bytes, max(_LEAST_PART_BYTES, total // _PARTS))


def open_corpus(
    data_path: Sequence[str],
    tokenizer: str | None,
    *,
    vocab_size: int,
    text_key: str,
    cache_dir: Path,
    workers: int,
    show_progress: bool = False,
) -> tuple[TokenStore, WordPiece]:
    """Open `.bin/.idx` pairs as they are, or raw text after tokenising it once into the cache.

    Args:
        data_path: prefixes of pairs (`.bin` or `.idx` may be appended), or raw text as `readers.iter_documents`.
        tokenizer: path or id as `wordpiece.load_wordpiece`; by default a pair's own, or one trained on the raw text.
        vocab_size: size of the vocabulary where one is trained.
        text_key: key or column of the text.
        cache_dir: where tokenised raw text is kept; several processes may use it at once.
        workers: number of processes that tokenise.
        show_progress: whether to report on stderr.

    Raises:
        UserError: data or tokenizer are missing, bad, or do not fit together; the cache cannot be written.
    """
    prefixes = [prefix for prefix in map(_as_prefix, data_path) if prefix is not None]
    if not prefixes:
        wordpiece = load_wordpiece(tokenizer) if tokenizer else None
        prefix = _cached(data_path, wordpiece, vocab_size, text_key, cache_dir, workers, show_progress)
        return _open_pairs([prefix], wordpiece)
    if len(prefixes) < len(data_path):
        raise UserError(f"{', '.join(data_path)}: either prefixes of .bin/.idx pairs or raw text, not both")
    once: dict[str, str] = {}
    for prefix in prefixes:
        once.setdefault(os.path.realpath(prefix), prefix)
    if show_progress and len(once) < len(prefixes):
        again = len(prefixes) - len(once)
        print(f"notice: {again} of --data-path name a .bin/.idx pair again, which is read once", file=sys.stderr)
    return _open_pairs(list(once.values()), load_wordpiece(tokenizer) if tokenizer else None)


def _open_pairs(prefixes: Sequence[str], wordpiece: WordPiece | None) -> tuple[TokenStore, WordPiece]:
    store = TokenStore.open(prefixes)
    if wordpiece is None:
        path = f"{prefixes[0]}.tokenizer.json"
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file; name the tokenizer that made {prefixes[0]}.bin by --tokenizer")
        wordpiece = load_wordpiece(path)
    for prefix in prefixes:
        manifest = PairManifest.read(prefix)
        if manifest is not None and manifest.tokenizer_digest != wordpiece.digest:
            raise UserError(
                f"{prefix}.bin: made with another tokenizer than the one given; it is {prefix}.tokenizer.json"
            )
    check_vocab(store, wordpiece)
    return store, wordpiece


def _as_prefix(path: str) -> str | None:
    base, ending = os.path.splitext(path)
    if ending in (".bin", ".idx"):
        return base
    present = sum(os.path.exists(path + ending) for ending in (".bin", ".idx"))
    return path if present == 2 or (present == 1 and not os.path.exists(path)) else None


def _cached(
    data_path: Sequence[str],
    wordpiece: WordPiece | None,
    vocab_size: int,
    text_key: str,
    cache_dir: Path,
    workers: int,
    show_progress: bool,
) -> str:
    """Return the prefix of the pair in the cache, which is made where it is not there yet."""
    with _as_user_errors(str(cache_dir)):
        found = _found(data_path, show_progress)
        identities = _identities(found.sources)
        made_with = wordpiece.digest if wordpiece else f"trained {vocab_size}"
        folder = Path(cache_dir, digest_of(text_key, *itertools.chain(*identities), made_with)[:32])
        prefix = str(folder / "corpus")
        if _is_finished(prefix, None):
            return prefix  # without the lock, so that a complete cache may be read-only
        folder.mkdir(parents=True, exist_ok=True)
        with locked(f"{prefix}.lock"):
            if wordpiece is None:
                wordpiece = _trained_once(data_path, vocab_size, text_key, f"{prefix}.tokenizer.json", show_progress)
            _preprocess(found, identities, wordpiece, prefix, text_key, workers, show_progress, PART_BYTES)
    return prefix


def _trained_once(inputs: Sequence[str], vocab_size: int, text_key: str, path: str, show_progress: bool) -> WordPiece:
    if os.path.exists(path):
        return load_wordpiece(path)
    wordpiece = train_on_inputs(inputs, vocab_size, text_key, show_progress)
    write_atomically(Path(path), wordpiece.to_json().encode())
    return wordpiece


def _train(inputs: tuple[str, ...], vocab_size: int, text_key: str) -> WordPiece:
    documents, size = [], 0
    for document in iter_documents(inputs, text_key):
        documents.append(document[: _TRAINING_CHARS - size])
        size += len(documents[-1])
        if size >= _TRAINING_CHARS:
            break
    return train_wordpiece(documents, vocab_size)


def _found(paths: Sequence[str], show_notice: bool) -> Inputs:
    found = find_inputs(paths)
    if show_notice and found.notice:
        print(found.notice, file=sys.stderr, flush=True)
    return found


def _preprocess(
    inputs: Inputs,
    identities: Sequence[Sequence[str]],
    tokenizer: WordPiece,
    prefix: str,
    text_key: str,
    workers: int,
    show_progress: bool,
    part_bytes: int,
) -> None:
    sources = inputs.sources
    key = digest_of(text_key, *itertools.chain(*identities), tokenizer.digest, str(_PARTS_VERSION), str(part_bytes))
    if _is_finished(prefix, key):
        return
    _refuse_to_overwrite(prefix, sources)
    cut_bytes = bytes_per_part(sources, part_bytes)
    folder, parts_name = Path(f"{prefix}.parts"), digest_of(key, str(cut_bytes))[:32]
    if folder.is_dir():
        for other in folder.iterdir():
            if other.name != parts_name:
                shutil.rmtree(other)
    parts_folder = folder / parts_name
    parts_folder.mkdir(parents=True, exist_ok=True)
    for stale in parts_folder.glob("*.tmp"):  # of workers that were killed
        stale.unlink()
    with PreparationBar(show_progress, _total_bytes(sources)) as progress:
        part_inputs = cut_into_parts(sources, text_key, cut_bytes)
        parts = _write_parts(part_inputs, tokenizer, str(parts_folder), text_key, workers, progress)
    if not any(part.num_documents for part in parts):
        raise UserError(f"{', '.join(path for path, _ in inputs.by_path)}: no document in it")
    for source, before, after in zip(sources, identities, _identities(sources), strict=True):
        if before != after:
            raise UserError(f"{source.name}: changed while it was read; start again when nothing writes to it any more")
    _merge(parts, inputs, tokenizer, prefix, key)
    shutil.rmtree(folder)


def _total_bytes(sources: Sequence[Source]) -> int | None:
    """Add up the files' sizes; None where a source is not a file."""
    files = _files(sources)
    return sum(file.num_bytes for file in files) if len(files) == len(sources) else None


def _files(sources: Sequence[Source]) -> list[FileSource]:
    return [source for source in sources if isinstance(source, FileSource)]


def _write_parts(
    part_inputs: Iterator[PartInput],
    tokenizer: WordPiece,
    folder: str,
    text_key: str,
    workers: int,
    progress: PreparationBar,
) -> list[Part]:
    """Write the parts of all inputs that do not lie there finished; return all of them in order."""
    dtype = token_dtype(tokenizer.vocab_size)
    parts: dict[int, Part] = {}
    pending: dict[Future[Part], tuple[int, PartInput]] = {}

    def collect() -> None:
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            number, part_input = pending[future]
            parts[number] = future.result()
            del pending[future]
            progress.add(parts[number].num_documents, part_input.num_bytes)

    try:
        with worker_pool(workers) as pool:
            for number, part_input in enumerate(part_inputs):
                path = os.path.join(folder, part_input.name)
                finished = read_part(path, dtype)
                if finished:
                    parts[number] = finished
                    progress.add(finished.num_documents, part_input.num_bytes)
                    continue
                pending[pool.submit(write_part, part_input, path, tokenizer, text_key)] = (number, part_input)
                if len(pending) >= 2 * workers:
                    collect()
            while pending:
                collect()
    except BrokenProcessPool as error:
        raise UserError(_killed_while_reading(part for _, part in pending.values())) from error
    return [parts[number] for number in sorted(parts)]


def _killed_while_reading(part_inputs: Iterable[PartInput]) -> str:
    names = sorted({file_slice.source.name for part_input in part_inputs for file_slice in part_input.slices})
    shown = ", ".join(names[:_NAMES_SHOWN]) + (f" or {len(names) - _NAMES_SHOWN} more" * (len(names) > _NAMES_SHOWN))
    return (
        f"{shown or 'the data set'}: a worker process was killed while it read this (out of memory? use fewer workers)"
    )


def _merge(parts: Sequence[Part], inputs: Inputs, tokenizer: WordPiece, prefix: str, key: str) -> None:
    # What lies there goes first: at no time may old and new files pass for a pair.
    for ending in ("json", "idx", "bin"):
        Path(f"{prefix}.{ending}").unlink(missing_ok=True)
    remove_unfinished_writes(*(f"{prefix}.{ending}" for ending in ("json", "idx", "bin", "tokenizer.json")))
    dtype = token_dtype(tokenizer.vocab_size)
    data = merge_bin(parts, f"{prefix}.bin", dtype)
    index = merge_index(parts, f"{prefix}.idx", dtype)
    write_atomically(Path(f"{prefix}.tokenizer.json"), tokenizer.to_json().encode())
    manifest = PairManifest(
        key=key,
        tokenizer_digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        num_documents=sum(part.num_documents for part in parts),
        num_tokens=sum(part.num_tokens for part in parts),
        bin_bytes=data.num_bytes,
        bin_sha256=data.sha256,
        idx_bytes=index.num_bytes,
        idx_sha256=index.sha256,
        fingerprint=pair_fingerprint(prefix),
        inputs=tuple(_summary(path, _files(sources)) for path, sources in inputs.by_path),
        unknown=sum((part.unknown for part in parts), UnknownCounts()),
    )
    manifest.write(prefix)


def _summary(name: str, files: Sequence[FileSource]) -> InputSummary:
    return InputSummary(name, len(files), sum(file.num_bytes for file in files))


def _is_finished(prefix: str, key: str | None) -> bool:
    """Say whether a whole and undamaged pair lies there and, where a key is given, was made from what it stands for."""
    try:
        manifest = PairManifest.read(prefix)
        if manifest is None or key not in (None, manifest.key):
            return False
        inspect_pair(prefix)
    except UserError:
        return False
    return os.path.exists(f"{prefix}.tokenizer.json")


def _refuse_to_overwrite(prefix: str, sources: Sequence[Source]) -> None:
    outputs = [f"{prefix}.{ending}" for ending in ("json", "bin", "idx", "tokenizer.json")]
    read = {os.path.realpath(file.name) for file in _files(sources)}
    for output in outputs:
        if os.path.realpath(output) in read:
            raise UserError(f"{output}: is an input and would be overwritten; choose another output prefix")
    # Parts are the mark of an interrupted run of our own.
    if not has_manifest(prefix) and not os.path.isdir(f"{prefix}.parts"):
        for output in outputs[:3]:
            if os.path.exists(output):
                raise UserError(f"{output}: exists and was not made here; delete it or choose another output prefix")


def _identities(sources: Sequence[Source]) -> list[list[str]]:
    """Return the identity of each source; for a large corpus, each file may be read in its share of places."""
    sampled_bytes = SAMPLED_BYTES
    if sum(file.num_bytes for file in _files(sources)) > SAMPLED_BYTES:
        sampled_bytes = max(MIN_SAMPLED_BYTES, SAMPLED_BYTES // len(sources))
    with ThreadPoolExecutor(_IDENTITY_THREADS) as pool:
        return list(pool.map(lambda source: source.identity(sampled_bytes), sources))


@contextlib.contextmanager
def _as_user_errors(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or name}: {error.strerror or error}") from error
    except BrokenProcessPool as error:
        raise UserError(f"{name}: a worker process was killed (out of memory?); use fewer workers") from error
