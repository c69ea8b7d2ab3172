"""A folder (or id) that transformers would open: its configuration, and its tensors one at a time."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig

from peer_scale.conversion import modern_bert
from peer_scale.conversion.architecture import PREFIXES
from peer_scale.errors import UserError
from peer_scale.models.config import EncoderShape
from peer_scale.objectives.exports import ELECTRA_BLOCKS, Family
from peer_scale.storage import stays_below

FAMILIES = ("electra", "bert", "modernbert")
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_OLD_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}  # LayerNorm's in files of BERT's first years


@dataclass(frozen=True)
class HuggingFaceFolder:
    """A model's folder, `name` to the user; `weights` are named as in a model with a head ("bert.encoder...")."""

    name: str
    path: Path
    family: Family
    config: Any
    weights: HuggingFaceWeights

    @property
    def class_name(self) -> str:
        """Transformers' class that was saved; "" where config.json does not say it."""
        return (self.config.architectures or [""])[0]

    @property
    def shape(self) -> EncoderShape:
        """Sizes of the encoder."""
        return EncoderShape(
            num_layers=self.config.num_hidden_layers,
            hidden_size=self.config.hidden_size,
            ffn_hidden_size=self.config.intermediate_size,
            num_attention_heads=self.config.num_attention_heads,
        )

    @property
    def model_fields(self) -> dict[str, Any]:
        """What it says of `ModelConfig`, its dropout left out."""
        if self.family == "modernbert":
            return modern_bert.model_fields(self.config)
        return {
            **ELECTRA_BLOCKS,
            "embedding_size": getattr(self.config, "embedding_size", self.config.hidden_size),
            "max_position_embeddings": self.config.max_position_embeddings,
            "num_token_types": self.config.type_vocab_size,
            "layer_norm_eps": self.config.layer_norm_eps,
        }


def open_folder(name: str, flag: str) -> HuggingFaceFolder:
    """Open an ELECTRA, BERT or ModernBERT model.

    Args:
        name: a folder, or a Hugging Face id, whose files are downloaded.
        flag: by which the user gave it, for messages.

    Raises:
        UserError: it is neither, its weights cannot be read, or its architecture is not what ours computes.
    """
    path = Path(name) if Path(name).exists() else _download(name, flag)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of many kinds, by what is wrong
        raise UserError(
            f"{flag} {name}: no config.json that transformers opens: {' '.join(str(error).split())}"
        ) from None
    if config.model_type not in FAMILIES:
        saved = f" ({config.architectures[0]})" if config.architectures else ""
        raise UserError(f"{flag} {name}: a {config.model_type} model{saved}; it must be one of {', '.join(FAMILIES)}")
    if config.model_type == "modernbert":
        problem = modern_bert.problem(config)
        if problem is not None:
            raise UserError(f"{flag} {name}: config.json: {problem}, which the models here have not")
    else:
        _check_bert(config, f"{flag} {name}")
    weights = HuggingFaceWeights(path, PREFIXES[config.model_type])
    return HuggingFaceFolder(name, path, config.model_type, config, weights)


def _check_bert(config: Any, where: str) -> None:
    """Raise UserError unless ELECTRA's or BERT's configuration is what ours computes."""
    for key, wanted in (("hidden_act", "gelu"), ("position_embedding_type", "absolute"), ("is_decoder", False)):
        found = getattr(config, key, wanted)
        if found != wanted:
            raise UserError(f"{where}: config.json: {key} is {found!r}, but the models here have {wanted!r}")
    if config.type_vocab_size < 2:
        raise UserError(f"{where}: config.json: type_vocab_size is {config.type_vocab_size}; samples have 2 types")


class HuggingFaceWeights(Mapping[str, Tensor]):
    """A model's tensors in fp32, read when asked for; every method raises UserError naming a file that is bad.

    They are named as in a model with a head, in which the encoder's begin with `prefix`.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder = folder
        self._open = functools.lru_cache(maxsize=2)(self._open_file)
        files = {original: file for file in self._files() for original in self._names(file)}
        is_bare = not any(name.startswith(f"{prefix}.") for name in files)
        added = f"{prefix}." if is_bare else ""  # as a BertModel without a head is saved
        self._places = {added + _modern(original): (file, original) for original, file in files.items()}

    def __getitem__(self, name: str) -> Tensor:
        file, original = self._places[name]
        opened = self._open(file)
        return (opened[original] if isinstance(opened, dict) else opened.get_tensor(original)).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Give the shape of a tensor without reading it."""
        file, original = self._places[name]
        opened = self._open(file)
        return tuple(opened[original].shape if isinstance(opened, dict) else opened.get_slice(original).get_shape())

    def original_name(self, name: str) -> str:
        """Give the name that the file has."""
        return self._places[name][1]

    def _files(self) -> list[str]:
        for name in _FILES:
            path = self._folder / name
            if path.is_file() and name.endswith(".json"):
                try:
                    files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
                    outside = next((file for file in files if not stays_below(file)), None)
                except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    raise UserError(f"{path}: not an index of weights") from None
                if outside is not None:
                    raise UserError(f"{path}: names the file {outside}, which is not within its folder")
                return files
            if path.is_file():
                return [name]
        raise UserError(f"{self._folder}: holds no weights ({', '.join(_FILES)})")

    def _names(self, file: str) -> list[str]:
        return list(self._open(file).keys())

    def _open_file(self, file: str) -> Any:
        path = self._folder / file
        try:
            if file.endswith(".bin"):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


def _modern(name: str) -> str:
    for old, new in _OLD_ENDINGS.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _download(name: str, flag: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "model*.safetensors", "vocab.txt"]
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if not any((folder / file).is_file() for file in _FILES[:2]):
            snapshot_download(name, allow_patterns=["pytorch_model*.bin"])
        return folder
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{flag} {name}: neither a folder nor a model that can be downloaded ({reason})") from None
