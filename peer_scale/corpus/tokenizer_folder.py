"""What lies beside a `vocab.txt` or `tokenizer.json`, read as transformers reads it.

What is honoured gives the ids of `transformers.BertTokenizer` on the same folder; what would give others is refused.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers

from peer_scale.errors import UserError

FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
SPECIAL_NAMES = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_CLASSES = (
    "BertTokenizer",
    "ElectraTokenizer",
    "ConvBertTokenizer",
    "DistilBertTokenizer",
    "LayoutLMTokenizer",
    "LxmertTokenizer",
    "MobileBertTokenizer",
    "RealmTokenizer",
    "RetriBertTokenizer",
    "SqueezeBertTokenizer",
)
_MODEL_TYPES_OF_OTHERS = ("bert-japanese", "roc_bert", "roformer")  # with BERT's special tokens, but another splitter
_SPLITTING: Mapping[str, tuple[Any, ...]] = {  # or null
    "word_tokenizer_type": ("basic",),
    "subword_tokenizer_type": ("wordpiece",),
    "do_word_tokenize": (True,),
    "do_subword_tokenize": (True,),
    "do_basic_tokenize": (True,),
}
_FLAGS: Mapping[str, tuple[Any, ...]] = {
    "do_lower_case": (True, False),
    "tokenize_chinese_chars": (True, False),
    "strip_accents": (True, False, None),
}
_NORMALIZER_KEYS = {
    "do_lower_case": "lowercase",
    "tokenize_chinese_chars": "handle_chinese_chars",
    "strip_accents": "strip_accents",
}
_CASED_FROM = 0.05  # share of the tokens with a capital; a lower-cased vocabulary has next to none
_UNREACHED_FROM = 0.05


@dataclass(frozen=True)
class TokenizerSettings:
    """The settings beside a vocabulary.

    Attributes:
        flags: those of `do_lower_case`, `tokenize_chinese_chars` and `strip_accents` that are given.
        added: the tokens that are found in the text as a whole, with their ids where a file gives them, in the order
            in which transformers adds them; without BERT's own.
        names_other_class: whether transformers takes the pipeline of a tokenizer.json as it is.
    """

    flags: Mapping[str, bool | None]
    added: tuple[tuple[AddedToken, int | None], ...]
    names_other_class: bool


def read_settings(folder: str) -> TokenizerSettings:
    """Read the files of a tokenizer's folder that are there.

    Raises:
        UserError: a file cannot be read, a value has the wrong type or asks for what is not done here.
    """
    config_path, map_path, added_path, model_path = (os.path.join(folder, name) for name in FILES)
    config, named = _read_object(config_path), _read_object(map_path)
    class_path, class_name = config_path, config.get("tokenizer_class")
    if class_name is None:
        model = _read_object(model_path)
        class_path, class_name = model_path, model.get("tokenizer_class")
        if class_name is None and model.get("model_type") in _MODEL_TYPES_OF_OTHERS:
            raise UserError(f"{model_path}: model_type {_show(model['model_type'])} splits words otherwise than BERT")
    other_class = class_name is not None and str(class_name).removesuffix("Fast") not in _CLASSES
    names = ", ".join(_CLASSES[:4])
    if other_class and not os.path.exists(os.path.join(folder, "tokenizer.json")):
        raise UserError(f"{class_path}: tokenizer_class {_show(class_name)} is not one of BERT's ({names} ...)")
    _check_splitting(config_path, config)
    for path, content in ((config_path, config), (map_path, named)):
        for key, expected in SPECIAL_NAMES.items():
            if content.get(key) is not None and _text_of(path, key, content[key]) != expected:
                raise UserError(f"{path}: {key} {_show(content[key])}, but only {expected} is read")
    added = tuple(_added_tokens(config_path, config, named, added_path))
    flags = {key: config[key] for key in _FLAGS if key in config}
    return TokenizerSettings(flags, added, other_class)


def add_tokens(backend: Tokenizer, settings: TokenizerSettings, folder: str) -> None:
    """Add the tokens of a folder to the tokenizer of its vocab.txt.

    Raises:
        UserError: one would get another id than a file gives it.
    """
    for token, expected in settings.added:
        backend.add_tokens([token])
        _check_id(backend, token, expected, folder)


def check_agreement(backend: Tokenizer, settings: TokenizerSettings, folder: str) -> None:
    """Compare a folder's tokenizer.json with what lies beside it.

    Raises:
        UserError: they differ, so that other libraries would not give the ids of the tokenizer.json.
    """
    for token, expected in settings.added:
        _check_id(backend, token, expected, folder)
    if settings.names_other_class or not isinstance(backend.normalizer, normalizers.BertNormalizer):
        return
    for key, value in settings.flags.items():
        actual = getattr(backend.normalizer, _NORMALIZER_KEYS[key])
        if value != actual:
            raise UserError(
                f"{os.path.join(folder, FILES[0])}: {key} {_show(value)}, but {_show(actual)} in the tokenizer.json "
                "beside it; make them equal, or name the tokenizer.json itself"
            )


def check_case(path: str, vocab: Mapping[str, int], settings: TokenizerSettings) -> None:
    """Refuse a vocab.txt with capitals where nothing says whether text is lower-cased, as it then is.

    Raises:
        UserError: it is so.
    """
    if "do_lower_case" in settings.flags:
        return
    tokens = _words(vocab)
    share = sum(token != token.lower() for token in tokens) / max(len(tokens), 1)
    if share > _CASED_FROM:
        raise UserError(
            f"{path}: {share:.0%} of its tokens have capitals, which lower-cased text never reaches; say "
            f'{{"do_lower_case": false}} (or true) in a tokenizer_config.json beside it'
        )


def unreached_notice(path: str, backend: Tokenizer) -> tuple[str, ...]:
    """Return a line where a good share of a vocabulary cannot occur in what the normaliser leaves of a text."""
    vocab = backend.get_vocab()
    tokens = _words(dict(sorted(vocab.items(), key=lambda item: item[1])))
    unreached = [token for token in tokens if "".join(backend.normalizer.normalize_str(token).split()) != token]
    if len(unreached) <= _UNREACHED_FROM * len(tokens):
        return ()
    example = _show(unreached[len(unreached) // 2])
    return (
        f"{path}: {len(unreached) / len(tokens):.0%} of its tokens are never used, because capitals or accents are "
        f"taken from the text first (such as {example}); do_lower_case and strip_accents in "
        "the tokenizer_config.json beside it say so",
    )


def split_special_notice(path: str, backend: Tokenizer) -> tuple[str, ...]:
    """Return a line where a tokenizer.json has special tokens beside BERT's own, which are not found in a text."""
    tokens = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    others = [token for token in tokens if token not in SPECIAL_NAMES.values()]
    if not others:
        return ()
    shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    return (
        f"{path}: a text that spells {shown} is split as other text is, because they are special; with "
        '"special": false in added_tokens they are kept whole',
    )


def read_text(path: str) -> str:
    """Return the text of a tokenizer's file without its byte order mark.

    Raises:
        UserError: it cannot be read or is not UTF-8.
    """
    if not Path(path).is_file():  # of a pipe there may be no end
        raise UserError(f"{path}: the tokenizer cannot be read (it is no regular file)")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the tokenizer cannot be read ({error})") from error


def _check_splitting(path: str, config: Mapping[str, Any]) -> None:
    for key, allowed in {**_SPLITTING, **_FLAGS}.items():
        if key not in config or (config[key] is None and key in _SPLITTING):
            continue
        if not any(value == config[key] and type(value) is type(config[key]) for value in allowed):
            choices = " or ".join(map(_show, allowed))
            raise UserError(f"{path}: {key} {_show(config[key])}, but only {choices} is read")
    never_split = config.get("never_split") or []
    if not isinstance(never_split, list) or not set(map(str, never_split)) <= set(SPECIAL_NAMES.values()):
        raise UserError(f"{path}: never_split {_show(never_split)} is not read; added_tokens.json keeps tokens whole")
    auto_map = config.get("auto_map")
    if isinstance(auto_map, list) or (isinstance(auto_map, dict) and auto_map.get("AutoTokenizer")):
        raise UserError(f"{path}: auto_map {_show(auto_map)}: a tokenizer that is code of its own is not run")


def _added_tokens(
    config_path: str, config: Mapping[str, Any], named: Mapping[str, Any], added_path: str
) -> Iterator[tuple[AddedToken, int | None]]:
    """Yield the added tokens of all files in the order of their ids, and last those that have none yet."""
    split_special = config.get("split_special_tokens") is True
    by_id: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:  # the other files are older, and not read beside it
        without_id = _extra_special(config_path, config, split_special)
        key = "added_tokens_decoder"
        for index, value in _object(config_path, key, config[key]).items():
            token = _token(
                config_path, key, _object(config_path, key, value), special=False, split_special=split_special
            )
            by_id[_id(config_path, value, int(index) if index.isdecimal() else index)] = token
    else:
        without_id = _extra_special(config_path, {**config, **named}, split_special)
        contents = {token.content for token in without_id}
        for text, index in _read_object(added_path).items():
            token = _token(added_path, text, text, special=text in contents, split_special=split_special)
            by_id[_id(added_path, text, index)] = token
    seen = set(SPECIAL_NAMES.values())
    numbered: list[tuple[AddedToken, int | None]] = [(token, index) for index, token in sorted(by_id.items())]
    for token, number in numbered + [(token, None) for token in without_id]:
        if token.content not in seen:
            seen.add(token.content)
            yield token, number


def _extra_special(path: str, names: Mapping[str, Any], split_special: bool) -> list[AddedToken]:
    """Return the special tokens beside BERT's own: those with a name, then those of a list."""
    first = [key for key in ("bos_token", "eos_token") if key in names]
    others = [key for key in names if key.endswith("_token") and key not in (*first, *SPECIAL_NAMES)]
    found = [(key, names[key]) for key in first + others if names[key] and not isinstance(names[key], bool)]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = names.get(key) or []
        if isinstance(value, dict):
            value = list(value.values())
        if not isinstance(value, list):
            raise UserError(f"{path}: {key} {_show(value)} is not a list of tokens")
        found += [(key, item) for item in value]
    return [_token(path, key, value, special=True, split_special=split_special) for key, value in found]


def _token(path: str, key: str, value: Any, *, special: bool, split_special: bool) -> AddedToken:
    """Make a token of its text, or of an object of text and flags.

    Args:
        path: the file.
        key: where it stands in it.
        value: the text or the object.
        special: whether it is special where that is not said.
        split_special: whether a text that spells a special token is split as other text.
    """
    given = value if isinstance(value, dict) else {}
    special = given.get("special", special)
    flags = {name: given.get(name, False) for name in ("single_word", "lstrip", "rstrip")}
    flags |= {"special": special, "normalized": given.get("normalized", not special)}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise UserError(f"{path}: {key}: {name} {_show(flag)}, but only true or false is read")
    # The tokenizers here never find a token marked special in a text, which is meant for BERT's own.
    flags["special"] = special and split_special
    return AddedToken(_text_of(path, key, value), **flags)


def _text_of(path: str, key: str, value: Any) -> str:
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise UserError(f"{path}: {key} {_show(value)} is not a token")
    return content


def _id(path: str, token: Any, index: Any) -> int:
    if isinstance(index, bool) or not isinstance(index, int):
        raise UserError(f"{path}: the id of {_show(token)} is {_show(index)}, but must be a whole number")
    return index


def _check_id(backend: Tokenizer, token: AddedToken, expected: int | None, folder: str) -> None:
    actual = backend.token_to_id(token.content)
    if actual is None:
        raise UserError(f"{folder}: the tokenizer.json lacks the token {_show(token.content)} of the files beside it")
    if expected not in (None, actual):
        raise UserError(
            f"{folder}: the added token {_show(token.content)} has the id {expected} in the files beside the "
            f"vocabulary, but gets {actual}, as in transformers"
        )


def _words(vocab: Mapping[str, int]) -> list[str]:
    """Return the tokens that are text: no prefix, and nothing in brackets, as special tokens are written."""
    tokens = [token.removeprefix("##") for token in vocab]
    return [token for token in tokens if token and not (token[0] in "[<" and token[-1] in "]>" and len(token) > 1)]


def _read_object(path: str) -> dict[str, Any]:
    if not os.path.exists(path):
        return {}
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def _object(path: str, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key} {_show(value)} is not an object")
    return value


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
