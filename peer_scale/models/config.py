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
    """What of the model a rank has: ranges of layers (the networks' own ones count from 0), and which ends."""

    shared_layers: range
    generator_layers: range
    ranker_layers: range
    has_embeddings: bool = True
    has_mlm_head: bool = True
    has_ranking_head: bool = True

    @staticmethod
    def whole(config: ModelConfig) -> ModelPart:
        """All of it: without pipeline parallelism."""
        own_ranker_layers = 0 if config.ranker is None else config.ranker.num_layers - config.num_shared_layers
        return ModelPart(
            range(config.num_shared_layers),
            range(config.generator.num_layers - config.num_shared_layers),
            range(own_ranker_layers),
            has_ranking_head=config.ranker is not None,
        )


def padded_vocab_size(vocab_size: int, tensor_parallel: int, multiple: int = 8) -> int:
    """Rows of the word-embedding table: a multiple of `multiple` for every tensor-parallel rank."""
    step = multiple * tensor_parallel
    return -(-vocab_size // step) * step
