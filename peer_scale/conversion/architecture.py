"""An export in Hugging Face's terms: the map of all its parameters, transformers' model, the logits of the two."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from peer_scale.conversion import electra, modern_bert
from peer_scale.conversion.lent_weights import Read, lend, lend_each_block
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.models.networks import Encoder, PretrainingModel
from peer_scale.objectives.exports import Entry, Export, Family
from peer_scale.objectives.objective import Objective
from peer_scale.sequences import Sequences

TOLERANCE = 1e-5
PREFIXES: dict[Family, str] = {"electra": "electra", "bert": "bert", "modernbert": modern_bert.PREFIX}
_CONFIGS: dict[Family, Callable[..., Any]] = {
    "electra": electra.electra_config,
    "bert": electra.bert_config,
    "modernbert": modern_bert.modern_bert_config,
}


@dataclass(frozen=True)
class Architecture:
    """An export of a model; `shape` is that of all layers, those above the network's own included."""

    export: Export
    model: ModelConfig
    shape: EncoderShape

    @staticmethod
    def of(export: Export, model: ModelConfig, objective: Objective) -> Architecture:
        """Describe an export of what `objective` makes of `model`."""
        shape = objective.graph(model).shape(export.network)
        return Architecture(export, model, replace(shape, num_layers=shape.num_layers + len(export.top_layers)))

    @property
    def ties(self) -> dict[str, str]:
        """Names under which a tensor may stand once more."""
        return (electra.TIES | modern_bert.TIES).get(self.export.class_name, {})

    @property
    def prefix(self) -> str:
        """What the encoder is called within a model with a head."""
        return PREFIXES[self.export.family]

    @property
    def entries(self) -> list[Entry]:
        """The map between our names and theirs."""
        encoder = modern_bert if self.export.family == "modernbert" else electra
        return [*encoder.encoder_entries(self.export, self.model, self.shape), *self.export.head]

    def config(self, pad_token_id: int, **more: Any) -> Any:
        """Make transformers' configuration."""
        return _CONFIGS[self.export.family](self.model, self.shape, pad_token_id, **more)

    def build(self, config: Any) -> nn.Module:
        """Build transformers' model with its parameters on the meta device."""
        cls: Any = getattr(transformers, self.export.class_name)
        has_pooler = "add_pooling_layer" in inspect.signature(cls).parameters
        with torch.device("meta"):
            model = cls(config, add_pooling_layer=False) if has_pooler else cls(config)
        for module in model.modules():
            if hasattr(module, "rotary_emb"):  # its angles are in no file
                module.rotary_emb = type(module.rotary_emb)(config)
        return model

    def names(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """List what a file of the model holds, and the shapes: each tensor once, and with the family's prefix."""
        prefix = "" if self.export.head else f"{self.prefix}."
        state = {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return {name: shape for name, shape in state.items() if name not in self.ties}

    @torch.no_grad()
    def difference(self, ours: PretrainingModel, our_weights: Read, theirs: nn.Module, their_weights: Read) -> float:
        """Give the largest difference of the two models' logits on a fixed batch, in fp64.

        Both models are on the meta device. In fp64 the rounding of a deep network's sums cannot hide, or pass for, a
        wrong weight.
        """
        ids, token_types, mask = _fixed_batch(ours.config.vocab_size, ours.config.max_position_embeddings)
        sequences = Sequences.of(mask.sum(1).tolist())
        expected = self._our_logits(
            ours, lambda name: our_weights(name).double(), ids[mask], token_types[mask], sequences
        )
        is_bare = not self.export.head

        def read(name: str) -> Tensor:
            name = f"{self.prefix}.{name}" if is_bare else name
            return their_weights(self.ties.get(name, name)).double()

        positions = torch.arange(ids.shape[1]).expand_as(ids)  # the model's own are on the meta device
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        if self.model.num_token_types:
            inputs["token_type_ids"] = token_types
        with lend_each_block(theirs.eval(), read):
            outputs = theirs(**inputs)
        found = outputs.last_hidden_state if is_bare else outputs.logits
        ours_alone = (..., *map(slice, expected.shape[1:]))  # their vocabulary may have rows that no token has
        return (found[mask][ours_alone] - expected).abs().max().item()

    def _our_logits(
        self, model: PretrainingModel, read: Read, ids: Tensor, token_types: Tensor, sequences: Sequences
    ) -> Tensor:
        with lend_each_block(model, read):
            hidden = model.encode(self.export.network, ids, token_types, sequences)
        with contextlib.ExitStack() as loans:
            # an export may use any part of what is beside the layers, not only a whole block's `forward`
            for name, block in model.named_children():
                if not isinstance(block, (Encoder, nn.ModuleDict)):
                    loans.enter_context(lend(block, name, read))
            for name in self.export.top_layers:
                hidden = model.get_submodule(name)(hidden, sequences)
            if self.export.top_norm is not None:
                hidden = model.get_submodule(self.export.top_norm)(hidden)
            return hidden if self.export.logits is None else self.export.logits(model, hidden)


def _fixed_batch(vocab_size: int, max_positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make ids, token types and mask [4, S]: two segments, lengths from full to short, ids of the whole vocabulary."""
    length = min(max_positions, 128)
    ids = torch.randint(vocab_size, (4, length), generator=torch.Generator().manual_seed(0))
    token_types = (torch.arange(length) >= length // 2).long().expand(4, length)
    mask = torch.arange(length) < torch.tensor([length, length, length * 3 // 4 + 1, length // 4 + 1])[:, None]
    return ids, token_types, mask
