"""What a model is: the sizes of its networks and of what they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from peer_scale.configuration import configuration, option
from peer_scale.errors import UserError

_Probability = Annotated[float, Field(ge=0, lt=1)]
_NumLayers = Annotated[int, Field(ge=1, le=1000)]  # a stranger's file must not have a billion layers built


@configuration
class EncoderShape:
    """Sizes of one Transformer encoder; help texts say {network} where the network's name belongs."""

    num_layers: _NumLayers = option(help="Transformer layers of {network}, shared ones included.", metavar="N")
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
    num_token_types: NonNegativeInt = option(
        default=2,
        help="Type embeddings, which tell the two segments of a sample apart; 0 for none.",
        metavar="N",
    )
    position_embedding: Literal["absolute", "rotary", "t5_bias"] = option(
        default="absolute",
        help="How a token's place is known: absolute, a learned vector added to its embedding; rotary, queries and "
        "keys turned by an angle per place; t5_bias, a learned number per head and distance added to the scores.",
        metavar="NAME",
        flag="position-embedding-type",
    )
    rotary_base: PositiveFloat = option(
        default=10000.0, help="Base of the rotary angles: a large one tells far places apart.", metavar="X"
    )
    local_rotary_base: PositiveFloat | None = option(
        default=None,
        help="Base of the rotary angles in the layers with local attention.",
        metavar="X",
        default_text="--rotary-base",
    )
    relative_attention_num_buckets: Annotated[int, Field(ge=4)] = option(
        default=32, help="Of t5_bias: numbers per head, an even count; distances share them.", metavar="N"
    )
    relative_attention_max_distance: PositiveInt = option(
        default=128, help="Of t5_bias: the distance from which on all share one number.", metavar="N"
    )
    attention_window: PositiveInt | None = option(
        default=None,
        help="Tokens that each sees around it in the layers with local attention, half on either side; an even number.",
        metavar="N",
        default_text="all layers see the whole sequence",
    )
    global_attention_every_n: PositiveInt = option(
        default=3,
        help="With --attention-window: layers 0, N, 2N, ... of a network see the whole sequence all the same.",
        metavar="N",
    )
    norm: Literal["layer_norm", "rms_norm"] = option(
        default="layer_norm",
        help="Normalization: layer_norm, or rms_norm, which neither subtracts the mean nor adds a bias.",
        metavar="NAME",
        flag="normalization",
    )
    norm_position: Literal["post", "pre"] = option(
        default="post",
        help="Where layers normalize: post, the sum after each block, as in BERT; pre, what goes into each block, with "
        "one more norm at the top.",
        metavar="NAME",
    )
    norm_bias: bool = option(default=True, help="Give LayerNorms a bias.")
    activation: Literal["gelu", "geglu", "swiglu"] = option(
        default="gelu",
        help="Inside the feed-forward blocks: gelu, or the product of two halves of that width, one of which goes "
        "through GELU (geglu) or SiLU (swiglu).",
        metavar="NAME",
    )
    linear_bias: bool = option(default=True, help="Give linear layers a bias.")
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
    depth_scaled_init: bool = option(
        default=False,
        help="Divide the standard deviation of the matrices at a block's end by the square root of twice the main "
        "network's layers.",
    )
    width_scaled_init: bool = option(
        default=False,
        help="Draw a matrix with a standard deviation of one over the square root of its inputs; tables keep "
        "--init-method-std.",
    )
    unigram_output_bias: bool = option(
        default=False,
        help="Begin with the MLM head's biases at the logarithm of how often each token stands in the text, so that "
        "the generator does not have to learn that first.",
    )
    layer_norm_eps: PositiveFloat = option(
        default=1e-12, help="What normalization adds to the variance.", metavar="X", flag="norm-epsilon"
    )

    def __post_init__(self) -> None:
        if self.num_shared_layers:
            self._check_sharing()
        self._check_positions()
        if self.num_token_types == 1:
            raise UserError("num_token_types is 1; a sample has two segments: it must be 2 or more, or 0 for none")

    @property
    def residual_init_scale(self) -> float:
        """Factor for the start values of the matrices at a block's end."""
        return (2 * self.main_network.num_layers) ** -0.5 if self.depth_scaled_init else 1.0

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward blocks multiply two halves."""
        return self.activation != "gelu"

    @property
    def has_norm_bias(self) -> bool:
        """Whether norms add a bias."""
        return self.norm_bias and self.norm == "layer_norm"

    @property
    def is_pre_norm(self) -> bool:
        """Whether layers normalize what goes into their blocks."""
        return self.norm_position == "pre"

    def window_of(self, layer: int) -> int | None:
        """Give the attention window of a layer by its number in its network; None: it sees the whole sequence."""
        return None if layer % self.global_attention_every_n == 0 else self.attention_window

    def rotary_base_of(self, layer: int) -> float:
        """Give the base of the rotary angles of a layer by its number in its network."""
        is_local = self.window_of(layer) is not None
        return self.local_rotary_base if is_local and self.local_rotary_base is not None else self.rotary_base

    @property
    def networks(self) -> dict[str, EncoderShape]:
        """The encoders by name, in the order in which they run."""
        shapes = {"generator": self.generator, "ranker": self.ranker}
        return {name: shape for name, shape in shapes.items() if shape is not None}

    @property
    def main_network(self) -> EncoderShape:
        """The encoder that is trained to be used: the ranker, or BERT's only one."""
        return self.ranker or self.generator

    def _check_positions(self) -> None:
        if self.position_embedding == "rotary":
            for name, shape in self.networks.items():
                if shape.head_size % 2:
                    raise UserError(
                        f"rotary positions turn pairs of numbers, but the {name}'s heads have {shape.head_size} "
                        "(hidden_size / num_attention_heads)"
                    )
        if self.attention_window is not None and self.attention_window % 2:
            raise UserError(f"attention_window is {self.attention_window}; it must be even: half of it on either side")
        if self.local_rotary_base is not None and (
            self.attention_window is None or self.position_embedding != "rotary"
        ):
            raise UserError("local_rotary_base needs an attention_window and the position_embedding rotary")
        buckets, farthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets % 2:
            raise UserError(f"relative_attention_num_buckets is {buckets}; it must be even: half of it on either side")
        if farthest <= buckets // 4:
            raise UserError(
                f"relative_attention_max_distance is {farthest}; with {buckets} buckets it must be above {buckets // 4}"
            )

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


def decays(name: str, num_dimensions: int) -> bool:
    """Say whether weight decay applies to a parameter: to matrices and tables, but not to biases and norms."""
    return num_dimensions >= 2 and not name.endswith("bias")
