"""What a text asks of a vocabulary that is trained on it: its characters and its longest words.

All of it is counted on characters, so that a sample of 200 million takes seconds.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from tokenizers import Tokenizer, normalizers, pre_tokenizers

COVERAGE = 0.9999  # of a text's characters; the others become [UNK], each with the whole of its word
BERT_WORD_CHARS = 100  # a longer word becomes [UNK]: the limit of BERT, and of transformers where it reads a vocab.txt
LONG_WORD_CHARS = 500  # the limit where the text needs one; the time that a word takes grows with its length's square
_BERT_ALPHABET = 1000  # characters that BERT's own recipe keeps
_LETTERS_LOST_ABOVE = 0.001  # share of a text's characters
_LONG_WORDS_ABOVE = 0.01
# Marks that are no script's own: combining diacritics and variation selectors.
_DIACRITICS = ((0x0300, 0x036F), (0x1AB0, 0x1AFF), (0x1DC0, 0x1DFF), (0x20D0, 0x20FF), (0xFE00, 0xFE2F))
# What may be inside a word, found faster than by the pre-tokenizer: no white space, no ASCII punctuation.
_NO_WORD = r"\s!-/:-@\[-`{-~\u3000-\u303f"
_IDEOGRAPHS = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"


@dataclass(frozen=True)
class Alphabet:
    """The single characters of a vocabulary.

    Attributes:
        chars: the characters that training begins with, sorted.
        continuing: those of them that also stand inside a word.
        others: the remaining ones that the vocabulary takes in while it has room, most frequent first, each with
            whether it also stands inside a word.
    """

    chars: tuple[str, ...]
    continuing: tuple[str, ...]
    others: tuple[tuple[str, bool], ...]


def count_characters(texts: Iterable[str]) -> Counter[str]:
    """Count the characters of the texts as they stand there, white space included."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    return counts


def loses_letters(counts: Counter[str]) -> bool:
    """Say whether stripping accents takes letters away: vowels of Thai and Hindi, the voicing of kana, a Cyrillic й."""
    lost = sum(count for char, count in counts.items() if _is_lost_letter(char))
    return lost > _LETTERS_LOST_ABOVE * counts.total()


def has_long_words(texts: Iterable[str], num_chars: int, backend: Tokenizer) -> bool:
    """Say whether words over BERT's limit, as scripts without spaces give them, hold a good share of the characters.

    Args:
        texts: the texts.
        num_chars: how many characters they have.
        backend: a tokenizer whose normaliser and pre-tokenizer are BERT's.
    """
    lost = sum(sum(long_word_lengths(text, BERT_WORD_CHARS, backend)) for text in texts)
    return lost > _LONG_WORDS_ABOVE * num_chars


def long_word_lengths(text: str, limit: int, backend: Tokenizer) -> list[int]:
    """Return the lengths of a text's words that have more than `limit` characters once they are normalised.

    Args:
        text: the text.
        limit: the longest word that is not meant.
        backend: the tokenizer; where it is not of BERT's kind, none are found.
    """
    normalizer, splitter = backend.normalizer, backend.pre_tokenizer
    if not isinstance(normalizer, normalizers.BertNormalizer):
        return []
    if not isinstance(splitter, pre_tokenizers.BertPreTokenizer):
        return []
    lengths = []
    # Normalising makes up to three characters of one: it takes the syllables of Hangul apart.
    for found in _long_runs(limit // 3 + 1, normalizer.handle_chinese_chars).findall(text):
        words = splitter.pre_tokenize_str(normalizer.normalize_str(found))
        lengths += [len(word) for word, _ in words if len(word) > limit]
    return lengths


@cache
def _long_runs(length: int, between_ideographs: bool) -> re.Pattern[str]:
    char = f"[^{_NO_WORD}{_IDEOGRAPHS if between_ideographs else ''}]"
    return re.compile(f"(?<!{char}){char}{{{length},}}")


def choose_alphabet(counts: Counter[str], normalizer: normalizers.Normalizer, vocab_size: int) -> Alphabet:
    """Choose the characters of a vocabulary.

    Where the thousand of BERT's recipe (and no more than a quarter of the vocabulary) cover the text, it is those.
    Else it is as many as cover it, in up to half of the vocabulary, and what room training leaves goes to the others.

    Args:
        counts: the text's characters.
        normalizer: of the tokenizer; it works character by character, but for the order of marks.
        vocab_size: number of ids, special tokens included.
    """
    normalized: Counter[str] = Counter()
    for char, count in counts.items():
        for part in normalizer.normalize_str(char):
            if not part.isspace():
                normalized[part] += count
    by_count = sorted(normalized, key=lambda char: (-normalized[char], char))
    needed = COVERAGE * normalized.total()
    floor = min(_BERT_ALPHABET, vocab_size // 4)
    covered = sum(normalized[char] for char in by_count[:floor])
    if covered >= needed:
        chars = sorted(by_count[:floor])
        return Alphabet(tuple(chars), tuple(char for char in chars if _joins(char)), ())
    joins = {char: _joins(char, normalizer) for char in by_count}
    covered, slots, size = 0, 0, 0
    for char in by_count:
        slots += 1 + joins[char]
        if slots > vocab_size // 2 or covered >= needed:
            break
        covered += normalized[char]
        size += 1
    chars = sorted(by_count[:size])
    others = tuple((char, joins[char]) for char in by_count[size:])
    return Alphabet(tuple(chars), tuple(char for char in chars if joins[char]), others)


def _joins(char: str, normalizer: normalizers.Normalizer | None = None) -> bool:
    """Say whether a character can stand inside a word: no punctuation and, by the normaliser, no ideograph."""
    text = f"a{char}a"
    if normalizer is not None:
        text = normalizer.normalize_str(text)
    return len(pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)) == 1


def _is_lost_letter(char: str) -> bool:
    decomposed = unicodedata.normalize("NFD", char)
    base, rest = decomposed[0], decomposed[1:]
    if unicodedata.category(base) == "Mn":
        return not any(first <= ord(base) <= last for first, last in _DIACRITICS)
    if not base.isalpha() or not any(unicodedata.category(mark) == "Mn" for mark in rest):
        return False
    return not unicodedata.name(base, "").startswith(("LATIN ", "GREEK "))
