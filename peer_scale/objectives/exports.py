"""How networks with their heads become Hugging Face's classes: data only, read by peer_scale.conversion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from peer_scale.errors import UserError
from peer_scale.models.config import EncoderShape, ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from peer_scale.models.networks import PretrainingModel


Family: TypeAlias = Literal["electra", "bert", "modernbert"]
"""Transformers' model types."""

ENCODER_CLASSES: dict[Family, str] = {"electra": "ElectraModel", "bert": "BertModel", "modernbert": "ModernBertModel"}
"""Transformers' classes of bare encoders."""

ELECTRA_BLOCKS: dict[str, Any] = {
    "position_embedding": "absolute",
    "norm": "layer_norm",
    "norm_position": "post",
    "norm_bias": True,
    "activation": "gelu",
    "linear_bias": True,
    "attention_window": None,
}
"""What models must be to be transformers' ELECTRA or BERT; `num_token_types` is at least 2 there."""


class Entry(NamedTuple):
    """One of our parameters and what it is at Hugging Face: names there, and the way to the tensors and back.

    Where they have only a part of it, `restore` gives that part, and `complete` puts it into a whole parameter.
    """

    ours: str
    theirs: tuple[str, ...]
    convert: Callable[[Tensor], tuple[Tensor, ...]]
    restore: Callable[[tuple[Tensor, ...]], Tensor]
    complete: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Export:
    """A network as one of transformers' classes.

    Attributes:
        branch: what the user chooses it by. Of several exports of one branch, in different families, the first is
            what is written; all are read.
        network: whose embeddings, projection and layers are taken.
        family: transformers' model type.
        class_name: transformers' class.
        head: the map of the head's parameters; empty for a bare encoder.
        top_layers: our names of layers above the network's own, in their order.
        top_norm: our name of the norm after these, of pre-norm models; else it is the network's own.
        logits: our logits [T, ...] from the hidden states [T, H] after all layers; None for a bare encoder, whose
            logits are the hidden states. The class must give the same.
        usage: a sentence for the model card.
        extras: parameters that the class has only a part of, by the keys under which config.json has all of them.
        labels: names of the logits, where the class has several of a token's.
        left_out: parameters of the branch that the class has no place for; they are lost, which the user is told.
    """

    branch: str
    network: str
    family: Family
    class_name: str
    head: tuple[Entry, ...]
    usage: str
    logits: Callable[[PretrainingModel, Tensor], Tensor] | None
    top_layers: tuple[str, ...] = ()
    top_norm: str | None = None
    extras: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def last_norm(self) -> str:
        """Our name of the norm after all layers, of pre-norm models."""
        return self.top_norm or f"{self.network}.final_norm"

    def layer_names(self, model: ModelConfig, shape: EncoderShape) -> list[str]:
        """List our names of all layers from the bottom; `shape` is that of all of them."""
        shared, top = model.num_shared_layers, self.top_layers
        return [
            *(f"shared_layers.{index}" for index in range(shared)),
            *(f"{self.network}.layers.{index}" for index in range(shape.num_layers - len(top) - shared)),
            *top,
        ]


def family_of(model: ModelConfig) -> Literal["electra", "modernbert"]:
    """Say which of transformers' families a model belongs to by its blocks; BERT's classes have ELECTRA's.

    Raises:
        UserError: transformers has no class for them.
    """
    unlike_electra = [
        f"{name} {getattr(model, name)}" for name, wanted in ELECTRA_BLOCKS.items() if getattr(model, name) != wanted
    ]
    if model.num_token_types == 0:
        unlike_electra.append("num_token_types 0")
    if not unlike_electra:
        return "electra"
    unlike_modern_bert = [
        text
        for text, is_so in (
            (f"position_embedding {model.position_embedding}", model.position_embedding != "rotary"),
            (f"norm {model.norm}", model.norm != "layer_norm"),
            (f"norm_position {model.norm_position}", not model.is_pre_norm),
            (f"activation {model.activation}", not model.is_gated),
            (f"num_token_types {model.num_token_types}", model.num_token_types != 0),
            *(
                (f"embedding_size {model.embedding_size} beside hidden_size {shape.hidden_size}", True)
                for shape in model.networks.values()
                if shape.hidden_size != model.embedding_size
            ),
        )
        if is_so
    ]
    if not unlike_modern_bert:
        return "modernbert"
    raise UserError(
        f"transformers has no class for this model: its ELECTRA and BERT have no {', '.join(unlike_electra)}; its "
        f"ModernBERT no {', '.join(unlike_modern_bert)}"
    )


def dense_entries(ours: str, theirs: str, *, has_bias: bool = True) -> tuple[Entry, ...]:
    """Map a weight and its bias, as they are."""
    kinds = ("weight", "bias") if has_bias else ("weight",)
    return tuple(Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",), same, first) for kind in kinds)


def norm_entries(ours: str, theirs: str, model: ModelConfig) -> tuple[Entry, ...]:
    """Map a LayerNorm, as it is."""
    return dense_entries(ours, theirs, has_bias=model.norm_bias)


def vocabulary_entry(ours: str, theirs: str, vocab_size: int) -> Entry:
    """Map a parameter with a row per vocabulary entry, leaving out the rows that only pad the vocabulary."""
    return Entry(ours, (theirs,), lambda tensor: (tensor[:vocab_size],), lambda tensors: tensors[0][:vocab_size])


def same(tensor: Tensor) -> tuple[Tensor, ...]:
    """Convert one tensor to itself."""
    return (tensor,)


def first(tensors: tuple[Tensor, ...]) -> Tensor:
    """Restore one tensor from itself."""
    return tensors[0]
