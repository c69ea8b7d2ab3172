"""What a model is: the sizes of its networks and of what they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from peer_scale.configuration import configuration, option
from peer_scale.errors import UserError

_Probability = Annotated[float, Field(ge=0, lt=1)]


@configuration
class EncoderShape:
    """Sizes of one Transformer encoder; help texts say {network} where the network's name belongs."""

    num_layers: PositiveInt = option(help="Transformer layers of {network}, shared ones included.", metavar="N")
    hidden_size: PositiveInt = option(help="Width of the hidden states of {network}.", metavar="N")
    ffn_hidden_size: PositiveInt = option(help="Width inside the feed-forward blocks of {network}.", metavar="N")
    num_attention_heads: PositiveInt = option(
        help="Attention heads per layer of {network}; they divide the hidden size.", metavar="N"
    )

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@configuration
class ModelConfig:
    """A pre-training model: a generator with an MLM head and, but for BERT, a ranker with a TQR head.

    `generator` is the network under the MLM head: all there is for BERT, where `ranker` is None. The two networks share
    the word, position and type embeddings with their LayerNorm, and the bottom `num_shared_layers` layers (PEER,
    Section 4.1).
    """

    generator: EncoderShape
    ranker: EncoderShape | None
    num_shared_layers: NonNegativeInt = option(
        default=0, help="Bottom layers that generator and ranker share; they must be of one size then.", metavar="N"
    )
    vocab_size: PositiveInt = option(
        default=30522, help="Entries of the vocabulary, where a tokenizer is trained on the text.", metavar="N"
    )
    embedding_size: PositiveInt = option(
        default=128,
        help="Width of the embeddings, which all networks share; projected where a network's hidden size differs.",
        metavar="N",
    )
    max_position_embeddings: PositiveInt = option(
        default=512, help="Positions that the model knows: the longest sequence.", metavar="N"
    )
    num_token_types: PositiveInt = option(default=2, no_flag="a sample has two segments")
    hidden_dropout: _Probability = option(
        default=0.1, help="Dropout after embeddings, attention and feed-forward blocks.", metavar="P"
    )
    attention_dropout: _Probability = option(default=0.1, help="Dropout of the attention weights.", metavar="P")
    init_std: PositiveFloat = option(
        default=0.02,
        help="Standard deviation of the normal distribution that initial weights are drawn from.",
        metavar="X",
        flag="init-method-std",
    )
    layer_norm_eps: PositiveFloat = option(
        default=1e-12, help="What LayerNorm adds to the variance.", metavar="X", flag="norm-epsilon"
    )

    def __post_init__(self) -> None:
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
        if self.num_shared_layers > limit:
            raise UserError(f"num_shared_layers is {self.num_shared_layers}; the smaller network has {limit} layers")
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
        """Give the numbers of the network's own layers."""
        return dict(self.own_layers)[network]

    def num_layers(self, network: str) -> int:
        """Count the layers that the network's pass runs through here, shared ones included."""
        return len(self.shared_layers) + len(self.layers(network))


def padded_vocab_size(vocab_size: int, tensor_parallel: int, multiple: int = 8) -> int:
    """Give the rows of the word-embedding table: a multiple of `multiple` for every tensor-parallel rank."""
    step = multiple * tensor_parallel
    return -(-vocab_size // step) * step
