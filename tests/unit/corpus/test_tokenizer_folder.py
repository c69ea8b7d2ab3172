"""What lies beside a vocab.txt: transformers' own ids on the same folder, or one line that names what is not read."""

import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertTokenizerFast

from peer_scale.commands import data
from peer_scale.corpus.wordpiece import SPECIAL_TOKENS, load_wordpiece
from peer_scale.errors import UserError

LOWER = [*SPECIAL_TOKENS, *"abcdefghijklmnopqrstuvwxyz.,[]<>", "the", "chef", "ate", "meal", "covid", "19", "naive"]
VOCAB = [
    *LOWER,
    *(f"##{char}" for char in "abcdefghijklmnopqrstuvwxyzé19"),
    "naïve",
    "cafe",
    "café",
    "中",
    "文",
    "##文",
]
CASED = [*VOCAB, *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "The", "Chef"]
TEXTS = [
    "The chef ate the meal. <ent>chef</ent> [E1] ate [E2]  COVID-19, covid-19; the<ent> <Ent> end",
    "Naïve café 中文chef, NEW_TOKEN new_token\u00a0x [E1][E1]the [MASKED] of unusedness the_end",
    "",
]


def write_folder(folder: Path, vocab: list[str] = VOCAB, *, mark: str = "", **files: object) -> str:
    """Write a folder of a vocab.txt and of JSON files named by their names without ending."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_bytes((mark + "".join(f"{token}\n" for token in vocab)).encode())
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return str(folder)


BERT = {"tokenizer_class": "BertTokenizer"}
DECODER = {str(id_): {"content": token, "special": True} for id_, token in enumerate(SPECIAL_TOKENS)}
SIZE = len(VOCAB)
HONOURED = {
    "nothing": {},
    "cased": {"tokenizer_config": {"do_lower_case": False}},
    "accents kept": {"tokenizer_config": {"strip_accents": False}},
    "accents stripped from cased text": {"tokenizer_config": {"do_lower_case": False, "strip_accents": True}},
    "accents as the case says": {"tokenizer_config": {"do_lower_case": False, "strip_accents": None}},
    "ideographs in words": {"tokenizer_config": {"tokenize_chinese_chars": False}},
    "the old name of the class": {"tokenizer_config": {"tokenizer_class": "BertTokenizerFast"}},
    "Electra's class": {"tokenizer_config": {"tokenizer_class": "ElectraTokenizer", "do_basic_tokenize": True}},
    "the class in the model's config": {"config": {"model_type": "electra", "tokenizer_class": "ElectraTokenizer"}},
    "BERT's own splitter by name": {"tokenizer_config": {"word_tokenizer_type": "basic", "never_split": None}},
    "added tokens": {"added_tokens": {"<ent>": SIZE, "</ent>": SIZE + 1, "new_token": SIZE + 2, "COVID-19": SIZE + 3}},
    "an added token of the vocabulary": {"added_tokens": {"chef": VOCAB.index("chef")}},
    "added tokens of cased text": {
        "added_tokens": {"<Ent>": SIZE, "NEW_TOKEN": SIZE + 1},
        "tokenizer_config": {"do_lower_case": False},
    },
    "special tokens in a list": {"special_tokens_map": {"additional_special_tokens": ["[E1]", "[E2]"]}},
    "special tokens with flags": {
        "special_tokens_map": {
            "extra_special_tokens": [{"content": "[E1]", "lstrip": True, "rstrip": True, "normalized": False}],
            "mask_token": {"content": "[MASK]", "lstrip": True},
        }
    },
    "special tokens that are added": {
        "added_tokens": {"[E2]": SIZE, "[E1]": SIZE + 1},
        "special_tokens_map": {"additional_special_tokens": ["[E1]", "[E2]"], "unk_token": "[UNK]"},
    },
    "special tokens in the config": {"tokenizer_config": {"additional_special_tokens": ["[E2]", "[E1]"]}},
    "special tokens under their new name": {"tokenizer_config": {"extra_special_tokens": ["[E1]"]}},
    "names of tokens": {"tokenizer_config": {"bos_token": "[CLS]", "eos_token": "[E1]", "entity_token": "<ent>"}},
    "a table of added tokens": {
        "tokenizer_config": {
            "added_tokens_decoder": {
                **DECODER,
                str(SIZE): {"content": "COVID-19", "normalized": True, "special": False, "single_word": False},
                str(SIZE + 1): {"content": "<ent>", "normalized": False, "rstrip": True},
                str(SIZE + 2): {"content": "[E1]", "special": True},
                str(SIZE + 3): {"content": "unused", "single_word": True},
            }
        },
        "added_tokens": {"the_end": SIZE},  # older than the table, and not read beside it
    },
}


@pytest.mark.parametrize("name", HONOURED)
def test_what_is_honoured_gives_the_ids_of_transformers(tmp_path, name):
    files = HONOURED[name]
    wordpiece = load_wordpiece(write_folder(tmp_path / "given", **files))
    if "config" in files or "tokenizer_class" in files.get("tokenizer_config", {}):
        oracle = AutoTokenizer.from_pretrained(tmp_path / "given")
    else:  # AutoTokenizer opens no folder without a class
        oracle = BertTokenizerFast.from_pretrained(tmp_path / "given")
    expected = oracle(TEXTS, add_special_tokens=False).input_ids
    assert wordpiece.encode(TEXTS) == expected
    assert wordpiece.vocab_size == len(oracle)
    assert load_wordpiece(str(tmp_path / "given" / "vocab.txt")).digest == wordpiece.digest
    wordpiece.save(tmp_path / "saved")
    for left_out in ("nothing", "tokenizer.json"):
        (tmp_path / "saved" / left_out).unlink(missing_ok=True)
        assert load_wordpiece(str(tmp_path / "saved")).digest == wordpiece.digest
        assert AutoTokenizer.from_pretrained(tmp_path / "saved")(TEXTS, add_special_tokens=False).input_ids == expected


CONFIG, MAP, ADDED, MODEL = "tokenizer_config", "special_tokens_map", "added_tokens", "config"
NOT_BERT = "is not one of BERT's (BertTokenizer, ElectraTokenizer, ConvBertTokenizer, DistilBertTokenizer ...)"
REFUSED = [
    (CONFIG, {"word_tokenizer_type": "mecab"}, 'word_tokenizer_type "mecab", but only "basic" is read'),
    (
        CONFIG,
        {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"},
        f'tokenizer_class "BertJapaneseTokenizer" {NOT_BERT}',
    ),
    (CONFIG, {"tokenizer_class": "ThaiTokenizer"}, f'tokenizer_class "ThaiTokenizer" {NOT_BERT}'),
    (CONFIG, {"tokenizer_class": 5}, f"tokenizer_class 5 {NOT_BERT}"),
    (MODEL, {"tokenizer_class": "BertJapaneseTokenizer"}, f'tokenizer_class "BertJapaneseTokenizer" {NOT_BERT}'),
    (MODEL, {"model_type": "roformer"}, 'model_type "roformer" splits words otherwise than BERT'),
    (
        CONFIG,
        {"subword_tokenizer_type": "character"},
        'subword_tokenizer_type "character", but only "wordpiece" is read',
    ),
    (CONFIG, {"do_basic_tokenize": False}, "do_basic_tokenize false, but only true is read"),
    (CONFIG, {"do_word_tokenize": False}, "do_word_tokenize false, but only true is read"),
    (CONFIG, {"never_split": ["chef"]}, 'never_split ["chef"] is not read; added_tokens.json keeps tokens whole'),
    (
        CONFIG,
        {"auto_map": {"AutoTokenizer": ["own.Own", None]}},
        'auto_map {"AutoTokenizer": ["own.Own", null]}: a tokenizer that is code of its own is not run',
    ),
    (CONFIG, {"do_lower_case": "false"}, 'do_lower_case "false", but only true or false is read'),
    (CONFIG, {"do_lower_case": 0}, "do_lower_case 0, but only true or false is read"),
    (CONFIG, {"do_lower_case": None}, "do_lower_case null, but only true or false is read"),
    (CONFIG, {"strip_accents": "no"}, 'strip_accents "no", but only true or false or null is read'),
    (CONFIG, {"tokenize_chinese_chars": 1}, "tokenize_chinese_chars 1, but only true or false is read"),
    (CONFIG, [], "not a JSON object"),
    (CONFIG, "{", "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
    (CONFIG, {"unk_token": "<unk>"}, 'unk_token "<unk>", but only [UNK] is read'),
    (MAP, {"mask_token": {"content": "<mask>"}}, 'mask_token {"content": "<mask>"}, but only [MASK] is read'),
    (MAP, {"cls_token": 5}, "cls_token 5 is not a token"),
    (CONFIG, {"additional_special_tokens": "[E1]"}, 'additional_special_tokens "[E1]" is not a list of tokens'),
    (CONFIG, {"added_tokens_decoder": []}, "added_tokens_decoder [] is not an object"),
    (CONFIG, {"added_tokens_decoder": {"5": "x"}}, 'added_tokens_decoder "x" is not an object'),
    (
        CONFIG,
        {"added_tokens_decoder": {"x": {"content": "y"}}},
        'the id of {"content": "y"} is "x", but must be a whole number',
    ),
    (
        CONFIG,
        {"added_tokens_decoder": {"9": {"content": "y", "lstrip": "no"}}},
        'added_tokens_decoder: lstrip "no", but only true or false is read',
    ),
    (ADDED, {"<ent>": "5"}, 'the id of "<ent>" is "5", but must be a whole number'),
    (ADDED, ["<ent>"], "not a JSON object"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_what_is_not_honoured_is_refused_by_name(tmp_path, name, content, message):
    folder = write_folder(tmp_path, **{name: content})
    with pytest.raises(UserError) as caught:
        load_wordpiece(folder)
    assert str(caught.value) == f"{folder}/{name}.json: {message}"


@pytest.mark.parametrize("number", [SIZE + 1, 7])
def test_an_added_token_with_another_id_than_transformers_gives_it_is_refused(tmp_path, number):
    folder = write_folder(tmp_path, added_tokens={"<ent>": number})
    with pytest.raises(UserError) as caught:
        load_wordpiece(folder)
    assert str(caught.value) == (
        f'{folder}: the added token "<ent>" has the id {number} in the files beside the vocabulary, but gets {SIZE}, '
        "as in transformers"
    )
    assert BertTokenizerFast.from_pretrained(folder).convert_tokens_to_ids("<ent>") == SIZE


def test_a_cased_vocabulary_needs_its_flag(tmp_path, capfd):
    folder = write_folder(tmp_path / "cased", CASED)
    (tmp_path / "a.txt").write_text("The chef")
    arguments = ["--input", str(tmp_path / "a.txt"), "--tokenizer", folder, "--output-prefix", str(tmp_path / "out")]
    assert data.main(arguments) == 2
    assert capfd.readouterr().err == (
        f"error: {folder}/vocab.txt: 27% of its tokens have capitals, which lower-cased text never reaches; say "
        '{"do_lower_case": false} (or true) in a tokenizer_config.json beside it\n'
    )
    for lower in (False, True):
        wordpiece = load_wordpiece(write_folder(tmp_path / "cased", CASED, tokenizer_config={"do_lower_case": lower}))
        oracle = BertTokenizerFast.from_pretrained(folder)
        assert wordpiece.encode(TEXTS) == oracle(TEXTS, add_special_tokens=False).input_ids
        assert bool(wordpiece.notices) == lower
    assert wordpiece.notices[0].startswith(f"{folder}/vocab.txt: 30% of its tokens are never used, because capitals")


def test_tokens_that_stripping_never_leaves_are_told(tmp_path):
    # A Korean vocabulary of whole syllables, which lower-casing takes apart.
    folder = write_folder(tmp_path, [*LOWER, *map(chr, range(0xAC00, 0xAC40))])
    (notice,) = load_wordpiece(folder).notices
    assert notice.startswith(f"{folder}/vocab.txt: 62% of its tokens are never used, because capitals or accents are")
    (tmp_path / "tokenizer_config.json").write_text('{"strip_accents": false}')
    assert load_wordpiece(folder).notices == ()


@pytest.mark.parametrize("ending", ["vocab.txt", "tokenizer_config.json", "added_tokens.json", "tokenizer.json"])
def test_a_byte_order_mark_does_no_harm(tmp_path, ending):
    folder = write_folder(tmp_path, tokenizer_config={"strip_accents": False}, added_tokens={"<ent>": SIZE})
    plain = load_wordpiece(folder)
    if ending == "tokenizer.json":
        (tmp_path / ending).write_text(plain.to_json())
    (tmp_path / ending).write_bytes(b"\xef\xbb\xbf" + (tmp_path / ending).read_bytes())
    assert load_wordpiece(folder).digest == plain.digest
    assert load_wordpiece(folder).encode(TEXTS) == plain.encode(TEXTS)
    assert plain.pad_id == 0


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [("do_lower_case", False, "false"), ("strip_accents", False, "false"), ("tokenize_chinese_chars", False, "false")],
)
def test_a_tokenizer_json_that_its_config_contradicts_is_refused(tmp_path, key, value, shown):
    load_wordpiece(write_folder(tmp_path / "given")).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    actual = json.dumps(config[key])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError) as caught:
        load_wordpiece(str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}/tokenizer_config.json: {key} {shown}, but {actual} in the tokenizer.json beside it; make them "
        "equal, or name the tokenizer.json itself"
    )
    ids = load_wordpiece(str(tmp_path / "tokenizer.json")).encode(TEXTS)
    assert ids != AutoTokenizer.from_pretrained(tmp_path)(TEXTS, add_special_tokens=False).input_ids


def test_special_tokens_of_a_tokenizer_json_are_split_and_told(tmp_path):
    content = json.loads(load_wordpiece(write_folder(tmp_path)).to_json())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] += [{"id": SIZE, "content": "[E1]", "special": True, **flags}]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    wordpiece = load_wordpiece(str(path))
    assert SIZE not in wordpiece.encode(["[E1] ate"])[0]
    assert wordpiece.notices == (
        f"{path}: a text that spells [E1] is split as other text is, because they are special; with "
        '"special": false in added_tokens they are kept whole',
    )
    content["added_tokens"][-1]["special"] = False
    path.write_text(json.dumps(content))
    wordpiece = load_wordpiece(str(path))
    assert (wordpiece.encode(["[E1] ate"])[0][0], wordpiece.notices) == (SIZE, ())


def test_an_added_token_that_the_tokenizer_json_lacks_is_refused(tmp_path):
    load_wordpiece(write_folder(tmp_path / "given")).save(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<ent>": 200}')
    with pytest.raises(UserError) as caught:
        load_wordpiece(str(tmp_path))
    assert str(caught.value) == f'{tmp_path}: the tokenizer.json lacks the token "<ent>" of the files beside it'


@pytest.mark.parametrize("limit", [20, 300])
def test_a_tokenizer_json_of_another_word_length_is_saved_as_it_is(tmp_path, limit):
    content = json.loads(load_wordpiece(write_folder(tmp_path / "given")).to_json())
    content["model"]["max_input_chars_per_word"] = limit
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    wordpiece = load_wordpiece(str(tmp_path / "tokenizer.json"))
    words = ["".join(random.Random(length).choices("abc", k=length)) for length in (20, 21, 100, 101, 300, 301)]
    assert wordpiece.encode(words).count([1]) == sum(len(word) > limit for word in words)
    wordpiece.save(tmp_path / "saved")
    opened = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert opened(words, add_special_tokens=False).input_ids == wordpiece.encode(words)
