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
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, processors
from tokenizers.implementations import BertWordPieceTokenizer

from peer_scale.errors import UserError
from peer_scale.storage import write_atomically

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL_TOKENS = (PAD, UNK, CLS, SEP, MASK)
MIN_VOCAB_SIZE = 64
_PREFIX = "##"
_MAX_ALPHABET = 1000  # BERT's: a character beyond the most frequent ones becomes [UNK]
_HUB_ID = re.compile(r"^\w[\w.-]*(?:/[\w.-]+)?$")


@dataclass(frozen=True)
class WordPiece:
    """A WordPiece tokenizer with the special tokens of BERT.

    Attributes:
        backend: the tokenizer itself; text never encodes to [CLS], [SEP], [PAD] or [MASK], even where it spells them.
        vocab_size: 1 + the largest id.
        cls_id, sep_id, pad_id, mask_id: ids of the special tokens.
        digest: sha256 of what decides the ids, the same whatever kind of file the tokenizer came from.
    """

    backend: Tokenizer
    vocab_size: int
    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    digest: str

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

    def to_json(self) -> str:
        """Return the content of a `tokenizer.json`."""
        return self.backend.to_str(pretty=True)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `transformers.AutoTokenizer` opens: tokenizer.json, vocab.txt and the two config files.

        Raises:
            UserError: the folder cannot be written.
        """
        by_id = sorted(self.backend.get_vocab().items(), key=lambda item: item[1])
        names = {"unk_token": UNK, "sep_token": SEP, "pad_token": PAD, "cls_token": CLS, "mask_token": MASK}
        contents = {
            "tokenizer.json": self.to_json(),
            "tokenizer_config.json": json.dumps(_transformers_class(self.backend) | names, indent=2) + "\n",
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
        return wordpiece_from_json, (self.backend.to_str(),)


def wordpiece_from_json(content: str, name: str = "tokenizer.json") -> WordPiece:
    """Make a WordPiece from the content of a tokenizer.json.

    Raises:
        UserError: it is not a WordPiece tokenizer or lacks a special token; `name` says where it came from.
    """
    try:
        backend = Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{name}: not a tokenizer.json ({error})") from error
    return _wordpiece(backend, name)


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
    backend = BertWordPieceTokenizer()
    alphabet = _alphabet(texts, backend.normalizer, min(_MAX_ALPHABET, vocab_size // 4))
    if not alphabet:
        raise UserError("no text to train a tokenizer on")
    # Left alone, the trainer numbers the "##x" of single characters in the order of a randomly seeded hash map, and
    # breaks ties between merges by these numbers. Naming them all beforehand makes it deterministic.
    continuing = [_PREFIX + char for char in alphabet if not _stands_alone(char)]
    backend.train_from_iterator(
        iter(texts),
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *continuing],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
        wordpieces_prefix=_PREFIX,
    )
    # Made anew, because the trainer's tokenizer takes the "##x" for special tokens.
    return _wordpiece(_bert_tokenizer(backend.get_vocab(), {}), "the trained tokenizer")


def _alphabet(texts: Iterable[str], normalizer: Any, size: int) -> list[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    letters = [(-count, char) for char, count in counts.items() if not char.isspace()]
    return sorted(char for _, char in sorted(letters)[:size])


def _stands_alone(char: str) -> bool:
    """Say whether BERT's pre-tokenizer makes a word of this character alone (ASCII symbols and punctuation)."""
    return (char.isascii() and not char.isalnum()) or unicodedata.category(char).startswith("P")


def _bert_tokenizer(vocab: dict[str, int], config: dict[str, Any]) -> Tokenizer:
    """Make BERT's tokenizer of a vocabulary that has the special tokens.

    Args:
        vocab: id by token.
        config: the content of a tokenizer_config.json.
    """
    backend = BertWordPieceTokenizer(
        vocab,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
        wordpieces_prefix=_PREFIX,
    )
    return Tokenizer.from_str(backend.to_str())


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
    for file in ("tokenizer.json", "vocab.txt"):
        path = os.path.join(folder, file)
        if os.path.exists(path):
            return _load_file(path)
    raise UserError(f"{name}: holds neither tokenizer.json nor vocab.txt")


def _load_file(path: str) -> WordPiece:
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the tokenizer cannot be read ({error})") from error
    if path.endswith(".json"):
        return wordpiece_from_json(content, path)
    vocab = {line.rstrip("\r"): id_ for id_, line in enumerate(content.removesuffix("\n").split("\n"))}
    for token in SPECIAL_TOKENS:
        if token not in vocab:
            raise UserError(
                f"{path}: the vocabulary lacks {token}; a BERT or ELECTRA vocab.txt has it, one token per line"
            )
    return _wordpiece(_bert_tokenizer(vocab, _config_beside(path)), path)


def _config_beside(vocab_path: str) -> dict[str, Any]:
    path = os.path.join(os.path.dirname(vocab_path), "tokenizer_config.json")
    if not os.path.exists(path):
        return {}
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def _download(name: str) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["tokenizer.json", "vocab.txt", "tokenizer_config.json"])
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name}: neither an existing tokenizer file nor one that can be downloaded ({reason})"
        ) from error


def _transformers_class(backend: Tokenizer) -> dict[str, Any]:
    """Choose the class by which transformers gives the same ids; BertTokenizer makes its normaliser from these keys."""
    content = json.loads(backend.to_str())
    normalizer, pre_tokenizer = content["normalizer"] or {}, content["pre_tokenizer"] or {}
    if (normalizer.get("type"), pre_tokenizer.get("type")) != ("BertNormalizer", "BertPreTokenizer"):
        return {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": normalizer["lowercase"],
        "strip_accents": normalizer["strip_accents"],
        "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
    }
