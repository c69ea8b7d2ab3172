"""A linear probe: how much of a task stands in a frozen encoder's states for a linear model to read.

The states of a text's tokens are averaged, the special ones included; scikit-learn fits a logistic regression to
them, or a ridge regression. It takes seconds, and moves earlier in pre-training than fine-tuned scores do.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, set_seed

from peer_scale.finetuning.data import load_task, subset
from peer_scale.finetuning.encoding import EncodedExamples, Padded, encode, inputs_of
from peer_scale.finetuning.loading import Pretrained, find_model, open_pretrained
from peer_scale.finetuning.metrics import score
from peer_scale.finetuning.tasks import Examples, Task, TaskData

Layers = Literal["last", "all"]
_STRENGTHS = (0.001, 0.01, 0.1, 1.0)
"""Of the regularisation's inverse; the one that is best on dev is taken."""
_BATCH = 64


def probe(
    model: str,
    task: str | TaskData,
    *,
    layers: Layers = "last",
    data_dir: Path | None = None,
    random_init: bool = False,
    seed: int = 0,
    max_train_examples: int | None = None,
    max_length: int = 128,
) -> float:
    """Score a linear model on the frozen states of an encoder.

    Args:
        model: as for fine-tuning: a folder that transformers opens, a checkpoint of ours or a Hugging Face id.
        task: as for fine-tuning, or a task that is loaded already.
        layers: whose states are read: the last layer's, or those of the embeddings and all layers beside each other.
        data_dir: of GLUE's own files; None: the hub.
        random_init: take the model's sizes alone, with random weights from `seed`.
        seed: of the random weights and of the subset.
        max_train_examples: to fit to; None: all.
        max_length: tokens of a text or pair.

    Returns:
        The task's metric on its test parts, where these have labels, else on its dev parts; the mean over the parts.

    Raises:
        UserError: as fine-tuning does.
    """
    data = task if isinstance(task, TaskData) else load_task(task, data_dir)
    with tempfile.TemporaryDirectory(prefix="peer-scale-probe-") as folder:
        source = find_model(model, Path(folder))
        pretrained = open_pretrained(source, model, random_init=random_init)
    encoder = _encoder(pretrained, seed)

    def features(examples: Examples) -> np.ndarray:
        wanted = inputs_of(encoder)
        encoded = encode(examples, pretrained.tokenizer, wanted, pretrained.max_length(max_length))
        return mean_states(encoder, encoded, pretrained.tokenizer.pad_token_id or 0, layers=layers)

    train = data.train.take(subset(len(data.train), max_train_examples, seed))
    dev = {name: (features(part), part.known_labels) for name, part in data.dev.items()}
    test = {name: (features(part), part.labels) for name, part in data.test.items() if part.labels is not None}
    fitted = _fitted(data.task, features(train), train.known_labels)
    on_dev = [_mean_score(data.task, model, dev) for model in fitted]
    best = fitted[int(np.argmax(on_dev))]
    return _mean_score(data.task, best, test) if test else max(on_dev)


def _encoder(pretrained: Pretrained, seed: int) -> Any:
    set_seed(seed)
    encoder: Any = AutoModel.from_config(copy.deepcopy(pretrained.config))
    if pretrained.weights is not None:
        encoder.load_state_dict(pretrained.weights, strict=False)
    return encoder.eval().to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def mean_states(encoder: Any, encoded: EncodedExamples, pad_id: int, *, layers: Layers) -> np.ndarray:
    """Average the states of each example's tokens: [N, H], or [N, (layers + 1) H] of all layers."""
    in_order, numbers = encoded.by_length()
    collate, found = Padded(pad_id), []
    for begin in range(0, len(in_order), _BATCH):
        rows = [in_order[number] for number in range(begin, min(begin + _BATCH, len(in_order)))]
        batch = {name: tensor.to(encoder.device) for name, tensor in collate(rows).items()}
        outputs = encoder(**batch, output_hidden_states=layers == "all")
        states = list(outputs.hidden_states) if layers == "all" else [outputs.last_hidden_state]
        mask = batch["attention_mask"].unsqueeze(-1).float()
        means = [(state.float() * mask).sum(1) / mask.sum(1) for state in states]
        found.append(torch.cat(means, 1).cpu().numpy())
    result = np.concatenate(found)
    result[numbers] = result.copy()
    return result


def _fitted(task: Task, features: np.ndarray, labels: np.ndarray) -> list[Any]:
    models = []
    for strength in _STRENGTHS:
        linear: Any = Ridge(1 / strength) if task.is_regression else LogisticRegression(C=strength, max_iter=1000)
        models.append(make_pipeline(StandardScaler(), linear).fit(features, labels))
    return models


def _mean_score(task: Task, model: Any, parts: dict[str, tuple[np.ndarray, np.ndarray]]) -> float:
    scores = []
    for features, labels in parts.values():
        predictions = model.predict(features)
        outputs = predictions[:, None] if task.is_regression else np.eye(task.num_outputs)[predictions]
        scores.append(score(task, outputs, labels)[task.metric])
    return float(np.mean(scores))
