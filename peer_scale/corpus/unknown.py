"""What of a text a vocabulary does not know, counted and told."""

from dataclasses import astuple, dataclass

from peer_scale.corpus.alphabet import BERT_WORD_CHARS

_NOTICE_ABOVE = 0.01


@dataclass(frozen=True)
class UnknownCounts:
    """What of a text became [UNK]. BERT's tokenizer makes one [UNK] of a word of which it lacks a single character.

    Attributes:
        words: number of words and signs, as the tokenizer splits the text.
        characters: number of characters, white space left out, after normalising.
        unknown_words: words that became [UNK]; so many tokens are [UNK].
        unknown_characters: characters of these words.
        long_words, long_characters: those of them that became [UNK] for their length alone.
    """

    words: int = 0
    characters: int = 0
    unknown_words: int = 0
    unknown_characters: int = 0
    long_words: int = 0
    long_characters: int = 0

    def __add__(self, other: "UnknownCounts") -> "UnknownCounts":
        return UnknownCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def describe(self, num_tokens: int) -> str:
        """Say in a line which shares of the text's tokens, words and characters are lost."""
        tokens, words, characters = self._percentages(num_tokens)
        return (
            f"[UNK] is {tokens} of the tokens; in it {words} of the words and {characters} of the characters are lost"
        )

    def notice(self, num_tokens: int, word_chars: int) -> str | None:
        """Return a line of notice where a share is above 1 %, else None.

        Args:
            num_tokens: number of tokens of the text.
            word_chars: length above which the tokenizer makes any word [UNK].
        """
        if max(self._ratios(num_tokens)) <= _NOTICE_ABOVE:
            return None
        _, words, characters = self._percentages(num_tokens)
        lost = f"{characters} of the characters and {words} of the words are lost as [UNK]"
        if 2 * self.long_characters > self.unknown_characters:
            reason = f"most of them in words of over {word_chars} characters, as scripts without spaces give them"
            remedy = "put spaces between the words"
            if word_chars <= BERT_WORD_CHARS:
                remedy += ", or leave --tokenizer out and have a vocabulary trained on this text"
            return f"{lost}, {reason}; {remedy}"
        return (
            f"{lost}, because the vocabulary lacks characters of theirs; "
            "a vocabulary trained on this text, or a larger --vocab-size, keeps more"
        )

    def _percentages(self, num_tokens: int) -> list[str]:
        return [f"{100 * ratio:.3g} %" for ratio in self._ratios(num_tokens)]

    def _ratios(self, num_tokens: int) -> list[float]:
        pairs = (
            (self.unknown_words, num_tokens),
            (self.unknown_words, self.words),
            (self.unknown_characters, self.characters),
        )
        return [part / whole if whole else 0.0 for part, whole in pairs]
