"""How networks with their heads become Hugging Face's classes: data only, read by peer_scale.conversion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from peer_scale.models.networks import PretrainingModel


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
        logits: our logits [S, B, ...] from the hidden states [S, B, H] after all layers; None for a bare encoder, whose
            logits are the hidden states. The class must give the same.
        usage: a sentence for the model card.
        extras: parameters that the class has only a part of, by the keys under which config.json has all of them.
        left_out: parameters of the branch that the class has no place for; they are lost, which the user is told.
    """

    branch: str
    network: str
    family: Literal["electra", "bert"]
    class_name: str
    head: tuple[Entry, ...]
    usage: str
    logits: Callable[[PretrainingModel, Tensor], Tensor] | None
    top_layers: tuple[str, ...] = ()
    extras: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def dense_entries(ours: str, theirs: str) -> tuple[Entry, ...]:
    """Map a weight and its bias, as they are."""
    return tuple(Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",), same, first) for kind in ("weight", "bias"))


def vocabulary_entry(ours: str, theirs: str, vocab_size: int) -> Entry:
    """Map a parameter with a row per vocabulary entry, leaving out the rows that only pad the vocabulary."""
    return Entry(ours, (theirs,), lambda tensor: (tensor[:vocab_size],), lambda tensors: tensors[0][:vocab_size])


def same(tensor: Tensor) -> tuple[Tensor, ...]:
    """Convert one tensor to itself."""
    return (tensor,)


def first(tensors: tuple[Tensor, ...]) -> Tensor:
    """Restore one tensor from itself."""
    return tensors[0]
