"""What a model is: the sizes of its networks and of what they share."""

from __future__ import annotations

from dataclasses import dataclass

from peer_scale.errors import UserError


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of one Transformer encoder."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ModelConfig:
    """A pre-training model: a generator with an MLM head and, but for BERT, a ranker with a TQR head.

    `generator` is the network under the MLM head: all there is for BERT, where `ranker` is None. The two networks share
    the word, position and type embeddings with their LayerNorm, and the bottom `num_shared_layers` layers (PEER,
    Section 4.1).
    """

    generator: EncoderShape
    ranker: EncoderShape | None
    num_shared_layers: int = 0
    vocab_size: int = 30522
    embedding_size: int = 128
    max_position_embeddings: int = 512
    num_token_types: int = 2
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    init_std: float = 0.02
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embedding_size", "max_position_embeddings", "num_token_types"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if self.num_shared_layers:
            self._check_sharing()

    @property
    def networks(self) -> dict[str, EncoderShape]:
        """The encoders by name, in the order in which they run."""
        shapes = {"generator": self.generator, "ranker": self.ranker}
        return {name: shape for name, shape in shapes.items() if shape is not None}

    @property
    def main_network(self) -> EncoderShape:
        """The encoder that is trained to be used: the ranker, or BERT's only one."""
        return self.ranker or self.generator

    def _check_sharing(self) -> None:
        if self.ranker is None:
            raise UserError(f"num_shared_layers is {self.num_shared_layers}, but the model has no ranker to share with")
        limit = min(self.generator.num_layers, self.ranker.num_layers)
        if not 0 <= self.num_shared_layers <= limit:
            raise UserError(f"num_shared_layers is {self.num_shared_layers}; it must be between 0 and {limit}")
        for name in ("hidden_size", "ffn_hidden_size", "num_attention_heads"):
            ours, theirs = getattr(self.generator, name), getattr(self.ranker, name)
            if ours != theirs:
                raise UserError(f"shared layers need one {name}, but the generator has {ours} and the ranker {theirs}")


@dataclass(frozen=True)
class ModelPart:
    """What of the model a rank has.

    Attributes:
        shared_layers: numbers of the layers that all networks share.
        own_layers: for each network, by name, numbers of its own layers, which count from 0.
        has_embeddings: whether embeddings, projections and the heads beside the word table are here.
        ends: networks whose last layer is here, and with it the heads on top of them.
    """

    shared_layers: range
    own_layers: tuple[tuple[str, range], ...]
    has_embeddings: bool
    ends: tuple[str, ...]

    def layers(self, network: str) -> range:
        """Numbers of the network's own layers."""
        return dict(self.own_layers)[network]

    def num_layers(self, network: str) -> int:
        """Count the layers that the network's pass runs through here, shared ones included."""
        return len(self.shared_layers) + len(self.layers(network))


def padded_vocab_size(vocab_size: int, tensor_parallel: int, multiple: int = 8) -> int:
    """Rows of the word-embedding table: a multiple of `multiple` for every tensor-parallel rank."""
    step = multiple * tensor_parallel
    return -(-vocab_size // step) * step
