"""Vocabularies trained on scripts of many characters, without spaces or with marks; transformers is the oracle."""

import random
from collections import Counter
from dataclasses import dataclass

import pytest
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import AutoTokenizer

from peer_scale.corpus.wordpiece import load_wordpiece, train_wordpiece

_HIRAGANA = [chr(code) for code in range(0x3041, 0x3095)]
_THAI = [*map(chr, range(0x0E01, 0x0E2F)), *"ะาเแโใไ"]
_THAI_MARKS = list("\u0e31\u0e34\u0e35\u0e36\u0e37\u0e38\u0e39\u0e48\u0e49")
_KHMER = [chr(code) for code in range(0x1780, 0x17B3)]
_KHMER_MARKS = list("\u17b6\u17b7\u17b8\u17bb\u17c1\u17d2")
_LAO = list("ກຂຄງຈສຊຍດຕຖທນບປຜຝພຟມຢຣລວຫອຮະາເແໂໃໄ")
_LAO_MARKS = list("\u0eb1\u0eb4\u0eb5\u0ec8\u0ec9")


def zipf_documents(chars: list[str], between: str = "", length: int = 100, seed: int = 0) -> list[str]:
    """Return 500 documents in which the character of rank r stands in proportion to 1 / (r + 5)."""
    rng = random.Random(seed)
    weights = [1 / (rank + 5) for rank in range(len(chars))]
    return [between.join(rng.choices(chars, weights, k=length)) for _ in range(500)]


def unspaced_documents(letters: list[str], marks: list[str], words_per_sentence: int = 60) -> list[str]:
    """Return 30 documents of sentences without spaces, of words of two or three syllables."""
    rng = random.Random(1)
    words = [
        "".join(rng.choice(letters) + rng.choice([*marks, "", ""]) for _ in range(rng.randint(2, 3)))
        for _ in range(300)
    ]
    return [" ".join("".join(rng.choices(words, k=words_per_sentence)) for _ in range(5)) for _ in range(30)]


def ideographs(number: int) -> list[str]:
    return random.Random(2).sample([chr(code) for code in range(0x4E00, 0x9FA6)], number)


def emoji() -> list[str]:
    return [chr(code) for code in [*range(0x1F300, 0x1F6D0), *range(0x1F900, 0x1FA00), *range(0x1FA70, 0x1FAF0)]]


def mixed() -> list[str]:
    english = [
        "the",
        "model",
        "reads",
        "a",
        "text",
        "of",
        "many",
        "words",
        "and",
        "learns",
        "which",
        "of",
        "them",
        "it",
        "is",
        "made",
        "of",
    ]
    rng = random.Random(3)
    chinese = zipf_documents(ideographs(3000), length=40)
    return [" ".join([*rng.choices(english, k=20), text]) for text in chinese]


@dataclass(frozen=True)
class Case:
    documents: list[str]
    vocab_size: int
    before: float  # share of [UNK] in a vocabulary of the thousand most frequent characters
    after: float  # at most


CASES = {
    "Chinese": Case(zipf_documents(ideographs(4000)), 8000, 0.198, 0.0005),
    "Chinese in a small vocabulary": Case(zipf_documents(ideographs(4000)), 4000, 0.198, 0.0005),
    "mixed with English": Case(mixed(), 6000, 0.097, 0.0005),
    "emoji": Case(zipf_documents(emoji(), between=" "), 4000, 0.048, 0.0005),
    "Thai": Case(unspaced_documents(_THAI, _THAI_MARKS), 2000, 1, 0),
    "Japanese kana": Case(unspaced_documents(_HIRAGANA, []), 2000, 1, 0),
    # Also without spaces, or with over a thousand signs.
    "Khmer": Case(unspaced_documents(_KHMER, _KHMER_MARKS), 2000, 1, 0),
    "Lao": Case(unspaced_documents(_LAO, _LAO_MARKS), 2000, 1, 0),
    "Yi": Case(zipf_documents([chr(code) for code in range(0xA000, 0xA48D)], between=" "), 6000, 0.0225, 0.0005),
    "ideographs of the second plane": Case(
        zipf_documents([chr(code) for code in range(0x20000, 0x20800)]), 4000, 0.110, 0.0005
    ),
    "DNA": Case(unspaced_documents(list("acgt"), [], 100), 500, 1, 0),
}


def unknown_share(ids: list[list[int]], unknown_id: int) -> float:
    counts = Counter(id_ for row in ids for id_ in row)
    return counts[unknown_id] / counts.total()


def bert_recipe(case: Case) -> BertWordPieceTokenizer:
    """Train as the tokenizers library does by default: a thousand characters, words of up to a hundred."""
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator(iter(case.documents), case.vocab_size, limit_alphabet=1000, show_progress=False)
    return tokenizer


@pytest.mark.parametrize("name", CASES)
def test_unknown_tokens_become_few_and_ids_are_those_of_transformers(tmp_path, name):
    case = CASES[name]
    recipe = bert_recipe(case)
    before = [encoding.ids for encoding in recipe.encode_batch(case.documents, add_special_tokens=False)]
    assert unknown_share(before, recipe.token_to_id("[UNK]")) == pytest.approx(case.before, abs=0.005)
    wordpiece = train_wordpiece(case.documents, case.vocab_size)
    assert wordpiece.vocab_size <= case.vocab_size
    wordpiece.save(tmp_path)
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    after = oracle(case.documents, add_special_tokens=False).input_ids
    assert unknown_share(after, oracle.unk_token_id) <= case.after
    ids, counts = wordpiece.encode_and_count(case.documents)
    assert [row.tolist() for row in ids] == after
    assert counts.characters == sum(not char.isspace() for text in case.documents for char in text)
    assert counts.unknown_words == sum(row.count(oracle.unk_token_id) for row in after)
    assert load_wordpiece(str(tmp_path)).digest == wordpiece.digest


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("ความรู้ที่ดี กับ ผู้คน", True),
        ("हिन्दी में लिखा हुआ", True),
        ("がぎぐげご ばびぶべぼ", True),
        ("мой край и твой чай", True),
        ("שלום עולם", False),
        ("naïve café ἀθῆναι über", False),
        ("plain words", False),
        ("한국어 문장", False),  # syllables come apart into letters, of which none is lost
    ],
)
def test_accents_stay_where_stripping_them_takes_letters(tmp_path, text, kept):
    documents = [text] * 20
    wordpiece = train_wordpiece(documents, 400)
    assert (wordpiece.backend.normalizer.strip_accents is False) == kept
    wordpiece.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(documents, add_special_tokens=False).input_ids == wordpiece.encode(
        documents
    )
    decoded = wordpiece.backend.decode(wordpiece.encode([text])[0]).replace(" ", "")
    assert (decoded == text.replace(" ", "")) == (kept or text.isascii() or text.startswith("ש"))


def test_a_text_of_few_characters_gives_the_vocabulary_of_earlier_versions():
    rng = random.Random(5)
    words = ["".join(rng.choices("abcdefgh中文é,.", k=rng.randint(1, 6))) for _ in range(400)]
    documents = [" ".join(rng.choices(words, k=50)) for _ in range(50)]
    assert train_wordpiece(documents, 300).digest == DIGEST
    assert train_wordpiece(documents, 300).departures() == []


DIGEST = "474b0bea9a068d036c9c9f098d46c862637cfd87016a5f9d776dd9f805ec0f4c"  # of version 0.1.0


def test_what_room_is_left_goes_to_the_rarest_characters():
    documents = [*zipf_documents(ideographs(900), length=20), "".join(chr(0x9000 + number) for number in range(200))]
    distinct = len(set("".join(documents)))
    wordpiece = train_wordpiece(documents, distinct + 5)
    assert wordpiece.vocab_size == distinct + 5
    assert unknown_share(wordpiece.encode(documents), 1) == 0


def test_words_beyond_the_raised_limit_are_counted_as_too_long(tmp_path):
    sentence = unspaced_documents(_THAI, _THAI_MARKS)[0].split()[0]
    short, long = sentence[:450], (sentence * 10)[:501]
    wordpiece = train_wordpiece([short] * 50, 500)
    assert wordpiece.word_chars == 500
    _, counts = wordpiece.encode_and_count([f"{short} {long} \u4e00"])
    assert (counts.unknown_words, counts.unknown_characters) == (2, 502)
    assert (counts.long_words, counts.long_characters) == (1, 501)
    assert wordpiece.departures() == [
        "accents are not stripped, because this would take letters from the text",
        "words of up to 500 characters are kept (BERT: 100), because the text has long stretches without spaces",
    ]
