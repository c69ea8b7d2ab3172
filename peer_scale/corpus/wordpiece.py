"""WordPiece tokenizers as BERT and ELECTRA use them: opened, trained, saved, applied to raw text.

The `tokenizers` library makes the pipeline and trains it. Files are opened here, because the libraries' own ways of
opening them would change the ids, and so the digests, of tokenizers in use:

- `transformers.AutoTokenizer` opens no single file, and no vocab.txt without a tokenizer_config.json that names a
  class. For the class BertTokenizer it makes the pipeline of a tokenizer.json anew, so that another normaliser or
  another `max_input_chars_per_word` is lost. Each worker process would also import it: 1.8 s, where this module takes
  0.2 s.
- `tokenizers.models.WordPiece.read_file` strips white space from the end of each line of a vocab.txt, so that tokens
  such as U+3000 are lost.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, normalizers, processors
from tokenizers.implementations import BertWordPieceTokenizer

from peer_scale.configuration import shown
from peer_scale.corpus import tokenizer_folder
from peer_scale.corpus.alphabet import (
    BERT_WORD_CHARS,
    LONG_WORD_CHARS,
    choose_alphabet,
    count_characters,
    has_long_words,
    long_word_lengths,
    loses_letters,
)
from peer_scale.corpus.unknown import UnknownCounts
from peer_scale.errors import UserError
from peer_scale.storage import write_atomically

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL_TOKENS = (PAD, UNK, CLS, SEP, MASK)
MIN_VOCAB_SIZE = 64
_PREFIX = "##"
_MOST_IDS = 1 << 20
_HUB_ID = re.compile(r"^\w[\w.-]*(?:/[\w.-]+)?$")


@dataclass(frozen=True)
class WordPiece:
    """A WordPiece tokenizer with the special tokens of BERT.

    Attributes:
        backend: the tokenizer itself; text never encodes to [CLS], [SEP], [PAD] or [MASK], even where it spells them.
        vocab_size: 1 + the largest id.
        cls_id, sep_id, pad_id, mask_id: ids of the special tokens.
        digest: sha256 of what decides the ids, the same whatever kind of file the tokenizer came from.
        notices: lines on what a user would not expect of the file that it came from.
    """

    backend: Tokenizer
    vocab_size: int
    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    digest: str
    notices: tuple[str, ...] = ()

    @cached_property
    def starts_word(self) -> np.ndarray:
        """Bool array [vocab_size]: False for the pieces ("##...") that continue a word."""
        starts = np.ones(self.vocab_size, dtype=bool)
        prefix = self.backend.model.continuing_subword_prefix
        starts[[id_ for token, id_ in self.backend.get_vocab().items() if token.startswith(prefix)]] = False
        return starts

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return each text's ids, without special tokens and untruncated."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_and_count(self, texts: list[str]) -> tuple[list[np.ndarray], UnknownCounts]:
        """Return each text's ids as `encode` does, as int64 arrays, and what of the texts became [UNK]."""
        rows = self.encode(texts)
        bounds = np.cumsum([0, *map(len, rows)])
        ids = np.fromiter(itertools.chain.from_iterable(rows), np.int64, count=int(bounds[-1]))
        encoded = [ids[first:last] for first, last in itertools.pairwise(bounds.tolist())]
        # Offsets would say it too, but the library takes a third longer where it notes them.
        unknown_id = self.backend.token_to_id(self.backend.model.unk_token)
        unknown = np.flatnonzero(ids == unknown_id)
        lost, long_words = 0, list[int]()
        for number in np.unique(np.searchsorted(bounds, unknown, side="right") - 1).tolist():
            lost += max(0, self._num_characters(texts[number]) - int(self._piece_lengths[encoded[number]].sum()))
            long_words += long_word_lengths(texts[number], self.word_chars, self.backend)
        return encoded, UnknownCounts(
            words=int(np.count_nonzero(self.starts_word[ids])),
            characters=int(self._piece_lengths[ids].sum()) + lost,
            unknown_words=len(unknown),
            unknown_characters=lost,
            long_words=len(long_words),
            long_characters=sum(long_words),
        )

    @cached_property
    def _piece_lengths(self) -> np.ndarray:
        """Int64 array [vocab_size]: number of each piece's characters that are not white space; 0 for [UNK]."""
        model, lengths = self.backend.model, np.zeros(self.vocab_size, dtype=np.int64)
        for token, id_ in self.backend.get_vocab().items():
            if token != model.unk_token:
                lengths[id_] = len("".join(token.removeprefix(model.continuing_subword_prefix).split()))
        return lengths

    def _num_characters(self, text: str) -> int:
        """Return how many characters, white space left out, the normaliser leaves of a text."""
        if isinstance(self.backend.normalizer, normalizers.BertNormalizer):
            return len(text.translate(self._normalized))
        return len("".join((self.backend.normalizer.normalize_str(text) if self.backend.normalizer else text).split()))

    @cached_property
    def _normalized(self) -> "_NormalizedCharacters":
        return _NormalizedCharacters(self.backend.normalizer)

    @property
    def word_chars(self) -> int:
        """Length of the longest word that does not become [UNK] for its length alone."""
        return self.backend.model.max_input_chars_per_word

    def departures(self) -> list[str]:
        """Say in a line each where a trained tokenizer differs from BERT's lower-casing one, as its text asked."""
        lines = []
        if self.backend.normalizer.strip_accents is False:
            lines.append("accents are not stripped, because this would take letters from the text")
        if self.word_chars > BERT_WORD_CHARS:
            lines.append(
                f"words of up to {self.word_chars} characters are kept (BERT: {BERT_WORD_CHARS}), because the text has "
                "long stretches without spaces"
            )
        return lines

    def to_json(self) -> str:
        """Return the content of a `tokenizer.json`."""
        return self.backend.to_str(pretty=True)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `transformers.AutoTokenizer` opens: tokenizer.json, vocab.txt and the two config files.

        Raises:
            UserError: the folder cannot be written.
        """
        by_id = sorted(self.backend.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
        names = dict(tokenizer_folder.SPECIAL_NAMES)
        contents = {
            "tokenizer.json": self.to_json(),
            "tokenizer_config.json": json.dumps(_transformers_config(self.backend) | names, indent=2) + "\n",
            "special_tokens_map.json": json.dumps(names, indent=2) + "\n",
        }
        if all(id_ == line for line, (_, id_) in enumerate(by_id)):  # a vocab.txt's ids are its line numbers
            contents["vocab.txt"] = "".join(token + "\n" for token, _ in by_id)
        try:
            os.makedirs(folder, exist_ok=True)
            for name, content in contents.items():
                write_atomically(Path(folder, name), content.encode())
        except OSError as error:
            raise UserError(f"{folder}: the tokenizer cannot be written there ({error.strerror})") from error

    def __reduce__(self) -> tuple[Callable[[str], "WordPiece"], tuple[str]]:
        # The backend's own pickle forgets encode_special_tokens.
        return _unpickled, (self.backend.to_str(),)


class _NormalizedCharacters(dict[int, str]):
    """A table for `str.translate`: what BERT's normaliser, which takes each character alone, leaves of it."""

    def __init__(self, normalizer: normalizers.Normalizer) -> None:
        super().__init__()
        self._normalizer = normalizer

    def __missing__(self, code: int) -> str:
        self[code] = "".join(self._normalizer.normalize_str(chr(code)).split())
        return self[code]


def wordpiece_from_json(content: str, name: str = "tokenizer.json") -> WordPiece:
    """Make a WordPiece from the content of a tokenizer.json.

    Raises:
        UserError: it is not a WordPiece tokenizer or lacks a special token; `name` says where it came from.
    """
    ids = _ids(content)
    greatest = max(ids.values(), default=0)
    if greatest >= _MOST_IDS:  # the library would make room for all up to it
        raise UserError(f"{name}: has the id {greatest}; ids must be below {_MOST_IDS}")
    if len(set(ids.values())) < len(ids):  # the library would forget one of them
        first, second = _with_one_id(ids)
        raise UserError(f"{name}: {shown(first)} and {shown(second)} have the same id {ids[first]}")
    try:
        backend = Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{name}: not a tokenizer.json ({error})") from error
    return _wordpiece(backend, name)


def _ids(content: str) -> dict[str, int]:
    """Find the id of each token in a tokenizer.json; nothing where the file is not one."""
    try:
        parsed = json.loads(content)
        vocab, added = parsed["model"]["vocab"], parsed["added_tokens"]
        ids = {**(vocab if isinstance(vocab, dict) else {}), **{token["content"]: token["id"] for token in added}}
        return {token: index for token, index in ids.items() if isinstance(index, int)}
    except (ValueError, RecursionError, KeyError, TypeError):
        return {}


def _with_one_id(ids: Mapping[str, int]) -> tuple[str, str]:
    seen: dict[int, str] = {}
    for token, index in ids.items():
        if index in seen:
            return seen[index], token
        seen[index] = token
    raise AssertionError("each id has one token")


@lru_cache(maxsize=1)
def _unpickled(content: str) -> WordPiece:
    """Make a WordPiece once in a process that is handed the same one with each piece of work: it takes 65 ms."""
    return wordpiece_from_json(content)


def load_wordpiece(path: str) -> WordPiece:
    """Open a WordPiece tokenizer.

    Args:
        path: a folder with a tokenizer.json or vocab.txt, one of these files, or a Hugging Face id. A vocab.txt is
            lower-cased unless the tokenizer_config.json beside it says otherwise.

    Raises:
        UserError: it is missing, not a WordPiece, or lacks one of the special tokens.
    """
    if os.path.isdir(path):
        return _load_folder(path, path)
    if os.path.exists(path):
        return _load_file(path)
    if not _HUB_ID.match(path) or path.endswith((".json", ".txt")):
        raise UserError(f"{path}: no such tokenizer file or folder")
    return _load_folder(_download(path), path)


def train_wordpiece(documents: Iterable[str], vocab_size: int) -> WordPiece:
    """Train a lower-casing WordPiece; the same documents give the same vocabulary.

    Args:
        documents: texts; they are gone through twice, so an iterator is held in memory.
        vocab_size: number of ids, the special tokens 0..4 included; a small corpus may give fewer.

    Raises:
        UserError: there is no text, or `vocab_size` is too small for any.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"a vocabulary of {vocab_size} is too small to train: at least {MIN_VOCAB_SIZE}")
    texts = documents if isinstance(documents, Sequence) else list(documents)
    counts = count_characters(texts)
    strip_accents = False if loses_letters(counts) else None
    backend = BertWordPieceTokenizer(strip_accents=strip_accents)
    alphabet = choose_alphabet(counts, backend.normalizer, vocab_size)
    if not alphabet.chars:
        raise UserError("no text to train a tokenizer on")
    long_words = has_long_words(texts, counts.total(), Tokenizer.from_str(backend.to_str()))
    # Left alone, the trainer numbers the "##x" of single characters in the order of a randomly seeded hash map, and
    # breaks ties between merges by these numbers. Naming them all beforehand makes it deterministic.
    continuing = [_PREFIX + char for char in alphabet.continuing]
    backend.train_from_iterator(
        iter(texts),
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *continuing],
        initial_alphabet=list(alphabet.chars),
        limit_alphabet=len(alphabet.chars),
        show_progress=False,
        wordpieces_prefix=_PREFIX,
    )
    vocab = backend.get_vocab()
    for char, joins in alphabet.others:
        forms = [char, _PREFIX + char] if joins else [char]
        if len(vocab) + len(forms) <= vocab_size:
            vocab |= {form: len(vocab) + number for number, form in enumerate(forms)}
    # Made anew, because the trainer's tokenizer takes the "##x" for special tokens.
    word_chars = LONG_WORD_CHARS if long_words else BERT_WORD_CHARS
    return _wordpiece(_bert_tokenizer(vocab, {"strip_accents": strip_accents}, word_chars), "the trained tokenizer")


def _bert_tokenizer(vocab: dict[str, int], config: Mapping[str, Any], word_chars: int = BERT_WORD_CHARS) -> Tokenizer:
    """Make BERT's tokenizer of a vocabulary that has the special tokens.

    Args:
        vocab: id by token.
        config: the content of a tokenizer_config.json.
        word_chars: length of the longest word that does not become [UNK].
    """
    backend = BertWordPieceTokenizer(
        vocab,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
        wordpieces_prefix=_PREFIX,
    )
    content = json.loads(backend.to_str())
    content["model"]["max_input_chars_per_word"] = word_chars
    return Tokenizer.from_str(json.dumps(content))


def _wordpiece(backend: Tokenizer, name: str) -> WordPiece:
    if not isinstance(backend.model, models.WordPiece):
        raise UserError(f"{name}: a {type(backend.model).__name__} tokenizer, but a WordPiece one is needed")
    vocab = backend.get_vocab()
    for token in SPECIAL_TOKENS:
        if token not in vocab:
            raise UserError(f"{name}: the vocabulary lacks {token}; a BERT or ELECTRA tokenizer has it")
    # Files in circulation truncate at 128 tokens and pad; both would change the corpus.
    backend.no_truncation()
    backend.no_padding()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    backend.encode_special_tokens = True
    backend.post_processor = processors.TemplateProcessing(
        single=f"{CLS}:0 $A:0 {SEP}:0",
        pair=f"{CLS}:0 $A:0 {SEP}:0 $B:1 {SEP}:1",
        special_tokens=[(CLS, vocab[CLS]), (SEP, vocab[SEP])],
    )
    return WordPiece(
        backend=backend,
        vocab_size=max(vocab.values()) + 1,
        cls_id=vocab[CLS],
        sep_id=vocab[SEP],
        pad_id=vocab[PAD],
        mask_id=vocab[MASK],
        digest=_digest(backend),
    )


def _digest(backend: Tokenizer) -> str:
    content = json.loads(backend.to_str())
    content["model"]["vocab"] = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
    deciding = {key: content[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _load_folder(folder: str, name: str) -> WordPiece:
    path = os.path.join(folder, "tokenizer.json")
    if os.path.exists(path):
        wordpiece = _load_file(path)
        tokenizer_folder.check_agreement(wordpiece.backend, tokenizer_folder.read_settings(folder), folder)
        return wordpiece
    path = os.path.join(folder, "vocab.txt")
    if os.path.exists(path):
        return _load_file(path)
    raise UserError(f"{name}: holds neither tokenizer.json nor vocab.txt")


def _load_file(path: str) -> WordPiece:
    content = tokenizer_folder.read_text(path)
    if path.endswith(".json"):
        wordpiece = wordpiece_from_json(content, path)
        return replace(wordpiece, notices=tokenizer_folder.split_special_notice(path, wordpiece.backend))
    vocab = {line.rstrip("\r"): id_ for id_, line in enumerate(content.removesuffix("\n").split("\n"))}
    for token in SPECIAL_TOKENS:
        if token not in vocab:
            raise UserError(
                f"{path}: the vocabulary lacks {token}; a BERT or ELECTRA vocab.txt has it, one token per line"
            )
    folder = os.path.dirname(path)
    settings = tokenizer_folder.read_settings(folder)
    tokenizer_folder.check_case(path, vocab, settings)
    backend = _bert_tokenizer(vocab, settings.flags)
    notices = tokenizer_folder.unreached_notice(path, backend)
    tokenizer_folder.add_tokens(backend, settings, folder)
    return replace(_wordpiece(backend, path), notices=notices)


def _download(name: str) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["tokenizer.json", "vocab.txt", *tokenizer_folder.FILES])
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name}: neither an existing tokenizer file nor one that can be downloaded ({reason})"
        ) from error


def _transformers_config(backend: Tokenizer) -> dict[str, Any]:
    """Choose the class by which transformers gives the same ids, and the keys of which it makes its tokenizer."""
    content = json.loads(backend.to_str())
    tokens = content["added_tokens"]
    own = {}
    if any(token["content"] not in SPECIAL_TOKENS for token in tokens):
        own["added_tokens_decoder"] = {str(token.pop("id")): token for token in tokens}
    normalizer = content["normalizer"] or {}
    config = {
        "do_lower_case": normalizer.get("lowercase"),
        "strip_accents": normalizer.get("strip_accents"),
        "tokenize_chinese_chars": normalizer.get("handle_chinese_chars"),
    }
    if normalizer.get("type") == "BertNormalizer":
        made = json.loads(_bert_tokenizer(content["model"]["vocab"], config).to_str())
        if all(made[part] == content[part] for part in ("normalizer", "pre_tokenizer", "model")):
            return {"tokenizer_class": "BertTokenizer", **config, **own}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **own}
