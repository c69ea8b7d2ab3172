"""The pre-training model: encoders over shared embeddings and shared bottom layers, with heads on top."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from torch import Tensor, nn

from peer_scale.models.config import EncoderShape, ModelConfig, ModelPart
from peer_scale.models.layers import Embeddings, TransformerLayer
from peer_scale.models.norms import Norm
from peer_scale.parallel.sequence import gather_tokens, scatter_tokens
from peer_scale.parallel.tensor_parallel import TensorParallel
from peer_scale.sequences import Sequences

HeadBuilder: TypeAlias = Callable[[TensorParallel], nn.Module]


class Encoder(nn.Module):
    """What one encoder does not share: its projection (where E != H), its layers above the shared ones, its last norm.

    Post-norm layers need no last norm.
    """

    def __init__(
        self,
        shape: EncoderShape,
        config: ModelConfig,
        layers: range,
        tensor_parallel: TensorParallel,
        *,
        has_projection: bool,
        has_final_norm: bool,
    ) -> None:
        super().__init__()
        needs_projection = has_projection and config.embedding_size != shape.hidden_size
        self.projection: nn.Module = nn.Identity()
        if needs_projection:
            self.projection = nn.Linear(config.embedding_size, shape.hidden_size, bias=config.linear_bias)
        self.layers = layer_stack(layers, shape, config, tensor_parallel, below=config.num_shared_layers)
        self.final_norm = last_norm(shape, config, tensor_parallel) if has_final_norm else nn.Identity()


class PretrainingModel(nn.Module):
    """Encoders and heads by name, over one embedding and shared bottom layers; of a `part` only what belongs to it.

    Parameters are named alike in a part and in the whole. T tokens of a micro-batch, H hidden size.
    """

    def __init__(
        self,
        config: ModelConfig,
        networks: Mapping[str, EncoderShape],
        heads: Mapping[str, Mapping[str, HeadBuilder]],
        tensor_parallel: TensorParallel,
        part: ModelPart | None = None,
        *,
        topped: frozenset[str] = frozenset(),
    ) -> None:
        """Build the model.

        Args:
            config: sizes of what the networks have in common.
            networks: each network's shape; `num_layers` counts the shared ones.
            heads: for each network, the makers of the heads that come after it, by name.
            tensor_parallel: the ranks that share each layer.
            part: None for the whole model.
            topped: networks whose last layers, and with them the last norm, are in their heads.
        """
        super().__init__()
        self.config, self.tensor_parallel = config, tensor_parallel
        part = part or whole_model(config, networks)
        if part.has_embeddings:
            self.embeddings = Embeddings(config, tensor_parallel)
        bottom = next(iter(networks.values()))
        self.shared_layers = layer_stack(part.shared_layers, bottom, config, tensor_parallel)
        for name, shape in networks.items():
            encoder = Encoder(
                shape,
                config,
                part.layers(name),
                tensor_parallel,
                has_projection=part.has_embeddings,
                has_final_norm=name in part.ends and name not in topped,
            )
            self.add_module(name, encoder)
            for head, build in heads.get(name, {}).items():
                self.add_module(head, build(tensor_parallel))

    def encode(self, network: str, ids_T: Tensor, token_types_T: Tensor, sequences: Sequences) -> Tensor:
        """Give the network's hidden states [T, H]."""
        hidden = self.run_layers(network, self.embed(network, ids_T, token_types_T, sequences), sequences)
        return self.all_tokens(hidden, sequences)

    def embed(self, network: str, ids_T: Tensor, token_types_T: Tensor, sequences: Sequences) -> Tensor:
        """Make what goes into the first layer: [T, H], this rank's slice of it under sequence parallelism."""
        projection = self._encoder(network).projection
        return scatter_tokens(projection(self.embeddings(ids_T, token_types_T, sequences)), self.tensor_parallel)

    def run_layers(self, network: str, hidden_TH: Tensor, sequences: Sequences) -> Tensor:
        """Run the shared layers, the network's own and its last norm, as far as they are here: [T, H] -> [T, H]."""
        for layer in (*self.shared_layers.values(), *self._encoder(network).layers.values()):
            hidden_TH = layer(hidden_TH, sequences)
        return self._encoder(network).final_norm(hidden_TH)

    def all_tokens(self, hidden: Tensor, sequences: Sequences) -> Tensor:
        """Give the hidden states of all tokens where sequence parallelism left a slice of them."""
        return gather_tokens(hidden, sequences.num_tokens, self.tensor_parallel)

    def head(self, name: str) -> nn.Module:
        """Give the head of that name."""
        return self.get_submodule(name)

    def _encoder(self, network: str) -> Encoder:
        encoder = self.get_submodule(network)
        assert isinstance(encoder, Encoder)
        return encoder


def whole_model(config: ModelConfig, networks: Mapping[str, EncoderShape]) -> ModelPart:
    """Describe all of a model as a part."""
    own = tuple((name, range(shape.num_layers - config.num_shared_layers)) for name, shape in networks.items())
    return ModelPart(range(config.num_shared_layers), own, has_embeddings=True, ends=tuple(networks))


def layer_stack(
    numbers: Iterable[int], shape: EncoderShape, config: ModelConfig, tensor_parallel: TensorParallel, *, below: int = 0
) -> nn.ModuleDict:
    """Make layers by their numbers, so that a part's parameters are named as in the whole; `below` are beneath them."""
    return nn.ModuleDict(
        {str(number): TransformerLayer(shape, config, tensor_parallel, below + number) for number in numbers}
    )


def last_norm(shape: EncoderShape, config: ModelConfig, tensor_parallel: TensorParallel) -> nn.Module:
    """Make what comes after a network's last layer: a norm, or nothing where the layers end in one."""
    return Norm(shape.hidden_size, config, tensor_parallel) if config.is_pre_norm else nn.Identity()
