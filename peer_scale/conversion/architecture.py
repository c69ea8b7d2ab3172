"""Which of transformers' classes a network of ours is, and the logits by which the two are compared."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from peer_scale.conversion import electra
from peer_scale.conversion.lent_weights import Read, lend, lend_each_block
from peer_scale.errors import UserError
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.models.networks import Network, PretrainingModel

TOLERANCE = 1e-5
RANKER, GENERATOR = "ranker", "generator"


@dataclass(frozen=True)
class Architecture:
    """A network ("ranker" or "generator") in one of transformers' families, with its head or without.

    Without a head it is the bare encoder and its logits are hidden states.
    """

    network: str
    family: str
    has_head: bool = True

    @property
    def class_name(self) -> str:
        """Transformers' class."""
        prefix = self.family.capitalize()
        if not self.has_head:
            return f"{prefix}Model"
        return "ElectraForPreTraining" if self.network == RANKER else f"{prefix}ForMaskedLM"

    @property
    def ties(self) -> dict[str, str]:
        """Names under which a tensor may stand once more."""
        return electra.TIES[self.family] if self.network == GENERATOR else {}

    def shape(self, config: ModelConfig) -> EncoderShape:
        """Sizes of the network."""
        shape = config.ranker if self.network == RANKER else config.generator
        if shape is None:
            raise UserError("this checkpoint is of a BERT model: it has no ranker, only a generator")
        return shape

    def entries(self, config: ModelConfig) -> list[electra.Entry]:
        """The map between our names and theirs."""
        entries = electra.encoder_entries(config, self.shape(config), self.network, self.family)
        if not self.has_head:
            return entries
        if self.network == RANKER:
            return entries + electra.ranking_head_entries()
        heads = {"bert": electra.bert_mlm_head_entries, "electra": electra.mlm_head_entries}
        return entries + heads[self.family](config)

    def build(self, config: Any) -> nn.Module:
        """Transformers' model on the meta device."""
        cls: Any = getattr(transformers, self.class_name)
        has_pooler = "add_pooling_layer" in inspect.signature(cls).parameters
        with torch.device("meta"):
            return cls(config, add_pooling_layer=False) if has_pooler else cls(config)

    def names(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """What a file of the model holds, and the shapes: each tensor once, and with the family's prefix."""
        prefix = "" if self.has_head else f"{self.family}."
        state = {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return {name: shape for name, shape in state.items() if name not in self.ties}

    @torch.no_grad()
    def difference(self, ours: PretrainingModel, our_weights: Read, theirs: nn.Module, their_weights: Read) -> float:
        """Largest difference of the two models' logits on a fixed batch, in fp64; both models are on the meta device.

        In fp64 the rounding of a deep network's sums cannot hide, or pass for, a wrong weight.
        """
        ids, token_types, mask = _fixed_batch(ours.config.vocab_size, ours.config.max_position_embeddings)
        with lend_each_block(ours, lambda name: our_weights(name).double()):
            expected = self._our_logits(ours, our_weights, ids, token_types, mask)

        def read(name: str) -> Tensor:
            name = name if self.has_head else f"{self.family}.{name}"
            return their_weights(self.ties.get(name, name)).double()

        positions = torch.arange(ids.shape[1]).expand_as(ids)  # the model's own are on the meta device
        with lend_each_block(theirs.eval(), read):
            outputs = theirs(input_ids=ids, token_type_ids=token_types, attention_mask=mask, position_ids=positions)
        found = outputs.logits if self.has_head else outputs.last_hidden_state
        ours_alone = (..., *map(slice, expected.shape[2:]))  # their vocabulary may have rows that no token has
        return (found[ours_alone] - expected)[mask].abs().max().item()

    def _our_logits(
        self, model: PretrainingModel, weights: Read, ids: Tensor, token_types: Tensor, mask: Tensor
    ) -> Tensor:
        network = model.ranker if self.network == RANKER else model.generator
        assert isinstance(network, Network)
        hidden = model.encode(network, ids, token_types, mask)
        if not self.has_head:
            return hidden.transpose(0, 1)
        if self.network == RANKER:
            scores, thresholds = model.ranking_head(hidden)
            return thresholds[-1] - scores.transpose(0, 1)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        states, bias = model.generate(hidden, positions)
        with lend(model.embeddings, "embeddings", lambda name: weights(name).double()):
            logits = F.linear(states, model.embeddings.word.weight, bias)
        return logits[:, : model.config.vocab_size].unflatten(0, ids.shape)


def _fixed_batch(vocab_size: int, max_positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, token types and mask [4, S]: two segments, lengths from full to short, ids from all over the vocabulary."""
    length = min(max_positions, 128)
    ids = torch.randint(vocab_size, (4, length), generator=torch.Generator().manual_seed(0))
    token_types = (torch.arange(length) >= length // 2).long().expand(4, length)
    mask = torch.arange(length) < torch.tensor([length, length, length * 3 // 4 + 1, length // 4 + 1])[:, None]
    return ids, token_types, mask
