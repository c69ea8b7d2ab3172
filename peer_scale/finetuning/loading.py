"""Models to fine-tune: found, converted where they are checkpoints of ours, and loaded so that nothing is lost unsaid.

`from_pretrained` starts afresh what it does not find and only warns; here the encoder's weights are all there, or the
model is refused with the names of those that are not. The head always starts afresh.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ElectraConfig,
    set_seed,
)

from peer_scale.errors import DamagedError, UserError
from peer_scale.finetuning.head import LinearHead
from peer_scale.finetuning.recipes import Head, Recipe
from peer_scale.finetuning.tasks import Task

_POOLER = "pooler."
_DROPOUTS = ("hidden_dropout_prob", "embedding_dropout", "mlp_dropout", "classifier_dropout")
_ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout")


@dataclass(frozen=True)
class Pretrained:
    """An encoder as transformers opens it; `name` is what the user calls it.

    `weights` are the encoder's, without its pooler, by the names in the encoder; None: it starts from random ones.
    """

    name: str
    config: Any
    tokenizer: Any
    weights: dict[str, Tensor] | None

    @cached_property
    def digest(self) -> str:
        """What tells it from others: of its sizes and its weights."""
        digest = hashlib.sha256(repr(sorted(self.config.to_diff_dict().items(), key=lambda item: item[0])).encode())
        for name, tensor in sorted((self.weights or {}).items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def max_length(self, asked: int) -> int:
        """Give the tokens of a sequence: `asked`, or fewer where the model takes no more."""
        limits = [asked, getattr(self.config, "max_position_embeddings", asked), self.tokenizer.model_max_length]
        return int(min(limits))


def find_model(model: str, converted: Path, *, branch: str | None = None, writes: bool = True) -> str:
    """Give the folder, or the id on the hub, that transformers opens for what the user named.

    A checkpoint of ours is converted into a folder in `converted`, unless that was done before; a rank that is not to
    write names the folder only.

    Raises:
        UserError: `model` is a folder that holds neither, or the checkpoint is damaged.
    """
    path = Path(model)
    if not path.exists():
        return model
    if (path / "config.json").is_file():
        return str(path)
    from peer_scale.checkpoints.folder import require_found

    try:
        folder, _ = require_found(path)
    except DamagedError:
        raise
    except UserError:
        raise UserError(
            f"--model {model}: neither a folder with the config.json of a model nor one with a committed checkpoint"
        ) from None
    output = converted / f"{folder.absolute().parent.name}_{folder.name}_{branch or 'main'}"
    if writes and not (output / "config.json").is_file():
        _convert(folder, branch, output)
    return str(output)


def _convert(folder: Path, branch: str | None, output: Path) -> None:
    import torch.distributed as dist

    from peer_scale.checkpoints.reader import read_checkpoint
    from peer_scale.conversion.to_hugging_face import choose_export, to_hugging_face

    had_group = dist.is_initialized()
    checkpoint = read_checkpoint(folder)
    try:
        to_hugging_face(checkpoint, choose_export(checkpoint, branch), output)
    finally:
        if dist.is_initialized() and not had_group:
            dist.destroy_process_group()


def open_pretrained(source: str, name: str, *, random_init: bool = False) -> Pretrained:
    """Open an encoder and its tokenizer.

    Args:
        source: a folder or a Hugging Face id.
        name: what messages call it.
        random_init: take the sizes alone.

    Raises:
        UserError: transformers does not open it, or a weight of the encoder is missing, superfluous or of another
            shape; all are named.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        weights = None if random_init else _encoder_weights(source, name, config)
    except UserError:
        raise
    except Exception as error:  # of many kinds, by what is wrong
        raise UserError(f"--model {name}: transformers does not open it: {' '.join(str(error).split())}") from None
    return Pretrained(name, config, tokenizer, weights)


def _encoder_weights(source: str, name: str, config: Any) -> dict[str, Tensor]:
    encoder, info = AutoModel.from_pretrained(
        source,
        config=copy.deepcopy(config),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
        trust_remote_code=False,
    )
    prefix = f"{encoder.base_model_prefix}."
    problems = {
        "lacks": _of_encoder(info["missing_keys"], prefix),
        "has, which its config.json has no place for,": [
            key for key in info["unexpected_keys"] if key.startswith(prefix)
        ],
        "has in another shape than its config.json says": _of_encoder(
            (key for key, *_ in info["mismatched_keys"]), prefix
        ),
    }
    told = "; ".join(f"{what} {', '.join(sorted(keys))}" for what, keys in problems.items() if keys)
    if told:
        raise UserError(f"--model {name}: the encoder's file {told}")
    return {key: tensor for key, tensor in encoder.state_dict().items() if not key.startswith(_POOLER)}


def _of_encoder(keys: Iterable[str], prefix: str) -> list[str]:
    return [key for key in keys if not key.removeprefix(prefix).startswith(_POOLER)]


def build_classifier(pretrained: Pretrained, task: Task, recipe: Recipe, seed: int) -> nn.Module:
    """Build a model for a task, its head from `seed`, its encoder's weights those of `pretrained`.

    Raises:
        UserError: the model cannot have the recipe's head.
    """
    config = classifier_config(pretrained, task, recipe)
    set_seed(seed)
    model: Any = AutoModelForSequenceClassification.from_config(config)
    if recipe.head == "linear":
        model.classifier = LinearHead(config.hidden_size, task.num_outputs, recipe.dropout)
    if pretrained.weights is not None:
        missing, unexpected = model.base_model.load_state_dict(pretrained.weights, strict=False)
        assert not unexpected, unexpected
        assert all(name.startswith(_POOLER) for name in missing), missing
    return model


def classifier_config(pretrained: Pretrained, task: Task, recipe: Recipe) -> Any:
    """Give transformers' configuration of the model for a task: its classes, the recipe's dropout.

    A BERT that gets ELECTRA's head becomes an ELECTRA of the same sizes, which computes the same without a pooler.
    """
    config = copy.deepcopy(pretrained.config)
    _check_head(pretrained.name, config, recipe.head, task)
    if recipe.head == "linear" and config.model_type == "bert":
        taken = config.to_dict()
        for key in ("model_type", "architectures", "transformers_version"):
            taken.pop(key, None)
        config = ElectraConfig(**taken, embedding_size=config.hidden_size)
    names = ["LABEL_0"] if task.is_regression else list(task.labels)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type = "regression" if task.is_regression else "single_label_classification"
    for keys, value in ((_DROPOUTS, recipe.dropout), (_ATTENTION_DROPOUTS, recipe.attention_dropout)):
        for key in keys:
            if getattr(config, key, None) is not None:
                setattr(config, key, value)
    return config


def _check_head(name: str, config: Any, head: Head, task: Task) -> None:
    if head == "transformers":
        return
    if config.model_type not in ("electra", "bert"):
        raise UserError(
            f"--head linear: {name} is a {config.model_type} model, whose classes in transformers have no place for "
            "it; give --head transformers"
        )
    if 2 * task.num_outputs > config.hidden_size:
        raise UserError(
            f"--head linear: {task.num_outputs} classes are more than half of the hidden size {config.hidden_size}; "
            "give --head transformers"
        )
