"""Blocks to choose from, each against transformers' or a plain formula: T5's bias, norms, start values, costs."""

from dataclasses import replace

import pytest
import torch
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from peer_scale.errors import UserError
from peer_scale.flops import actual_train_flops, square_cost_ratio
from peer_scale.kernels.attention import padded_attention
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.models.costs import Blocks, layer_matmul_flops
from peer_scale.models.layers import TransformerLayer
from peer_scale.models.positions import RelativeBias
from peer_scale.objectives.graph import SampleSize
from peer_scale.objectives.masked_lm import MaskedLanguageModel
from peer_scale.objectives.task import build_model
from peer_scale.parallel.initialization import initialize_weights
from peer_scale.parallel.topology import single_process_topology
from peer_scale.sequences import Sequences

SHAPE = EncoderShape(num_layers=3, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4)
PLAIN = ModelConfig(
    generator=SHAPE,
    ranker=None,
    vocab_size=64,
    embedding_size=32,
    max_position_embeddings=64,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)


@pytest.fixture
def ranks():
    return single_process_topology().tensor_parallel


@pytest.mark.parametrize(("buckets", "farthest", "length"), [(32, 128, 301), (8, 20, 33), (4, 5, 1), (32, 64, 7)])
def test_the_bias_and_its_gradient_are_t5s(buckets, farthest, length, ranks):
    config = replace(PLAIN, relative_attention_num_buckets=buckets, relative_attention_max_distance=farthest)
    t5 = T5Attention(
        T5Config(
            d_model=32,
            num_heads=4,
            d_kv=8,
            relative_attention_num_buckets=buckets,
            relative_attention_max_distance=farthest,
        ),
        has_relative_attention_bias=True,
    )
    ours = RelativeBias(SHAPE, config, ranks)
    with torch.no_grad():
        t5.relative_attention_bias.weight.copy_(ours.weight)
    bias, expected = ours(length), t5.compute_bias(length, length)[0]
    assert torch.equal(bias, expected)
    grad = torch.randn(bias.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bias.backward(grad.float())
    t5.double().compute_bias(length, length)[0].backward(grad)
    torch.testing.assert_close(ours.weight.grad.double(), t5.relative_attention_bias.weight.grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("norm_position", ["post", "pre"])
def test_a_layer_with_rms_norm_swiglu_and_t5s_bias_is_its_formula(norm_position, ranks):
    config = replace(
        PLAIN,
        position_embedding="t5_bias",
        norm="rms_norm",
        norm_position=norm_position,
        activation="swiglu",
        layer_norm_eps=1e-6,
    )
    layer = TransformerLayer(SHAPE, config, ranks, 1)
    initialize_weights(layer, seed=1, std=0.2, vocab_size=64, tensor_parallel=ranks)
    w = {name: p.detach().add_(0.1 * torch.randn_like(p)) for name, p in layer.named_parameters()}
    sequences = Sequences.of([9, 4, 1])
    hidden = torch.randn(14, 32)

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w[f"{name}.weight"]

    def attention(x):
        qkv = x @ w["attention.qkv.weight"].t() + w["attention.qkv.bias"]
        query, key, value = qkv.view(14, 4, 3, 8).unbind(2)
        bias = layer.attention.relative_bias(9)
        context = padded_attention(query, key, value, sequences, score_bias=bias).flatten(1)
        return context @ w["attention.dense.weight"].t() + w["attention.dense.bias"]

    def feed_forward(x):
        gate, inner = (
            x @ weight.t() + bias
            for weight, bias in zip(w["feed_forward.up.weight"], w["feed_forward.up.bias"], strict=True)
        )
        return (gate * gate.sigmoid() * inner) @ w["feed_forward.down.weight"].t() + w["feed_forward.down.bias"]

    if norm_position == "post":
        attended = norm(hidden + attention(hidden), "attention_norm")
        expected = norm(attended + feed_forward(attended), "feed_forward_norm")
    else:
        attended = hidden + attention(norm(hidden, "attention_norm"))
        expected = attended + feed_forward(norm(attended, "feed_forward_norm"))
    torch.testing.assert_close(layer(hidden, sequences), expected, atol=1e-5, rtol=1e-5)


def test_biases_and_tables_are_there_as_the_options_say(ranks):
    def names(**changes):
        model = build_model(replace(PLAIN, **changes), MaskedLanguageModel(), ranks)
        return {name for name, _ in model.named_parameters()}

    plain = names()
    norms = {name for name in plain if name.endswith("norm.bias")}
    assert plain - names(norm_bias=False) == norms == plain - names(norm="rms_norm")
    linear = {name for name in plain if name.endswith(".bias")} - norms - {"mlm_head.bias"}
    assert plain - names(linear_bias=False) == linear
    assert plain - names(position_embedding="rotary") == {"embeddings.position.weight"}
    assert plain - names(num_token_types=0) == {"embeddings.token_type.weight"}
    tables = {f"generator.layers.{number}.attention.relative_bias.weight" for number in range(3)}
    assert names(position_embedding="t5_bias") - plain == tables
    assert names(norm_position="pre") - plain == {f"generator.final_norm.{kind}" for kind in ("weight", "bias")}


def test_start_values_by_depth_and_width(ranks):
    def spread(**changes):
        config = replace(PLAIN, init_std=0.05, **changes)
        model = build_model(config, MaskedLanguageModel(), ranks)
        initialize_weights(
            model,
            seed=1,
            std=config.init_std,
            vocab_size=64,
            tensor_parallel=ranks,
            residual_scale=config.residual_init_scale,
            by_width=config.width_scaled_init,
        )
        layer = model.generator.layers["1"]
        weights = layer.feed_forward.down.weight, layer.feed_forward.up.weight, model.embeddings.word.weight
        return [weight.std().item() for weight in weights]

    plain, deep, wide = spread(), spread(depth_scaled_init=True), spread(width_scaled_init=True)
    assert deep[0] == pytest.approx(plain[0] / 6**0.5)
    assert deep[1:] == plain[1:]
    assert wide[0] == pytest.approx(plain[0] / 0.05 / 48**0.5)
    assert wide[1] == pytest.approx(plain[1] / 0.05 / 32**0.5)
    assert wide[2] == plain[2]


@pytest.mark.parametrize("window", [None, 2, 8, 38, 40, 100])
@pytest.mark.parametrize("is_gated", [False, True])
def test_flops_are_those_of_a_plain_count(window, is_gated):
    """Of each layer's products, counted by their shapes, and of the pairs of tokens that see each other."""
    length, hidden, ffn = 20, 32, 48
    places = torch.arange(length)
    distances = (places[:, None] - places).abs()
    total = 0
    for layer in range(SHAPE.num_layers):
        is_local = window is not None and layer % 2
        pairs = (distances <= window // 2).sum().item() if is_local else length**2
        matrices = 4 * hidden * hidden + (3 if is_gated else 2) * hidden * ffn
        total += 2 * matrices * length + 2 * 2 * hidden * pairs
    counted = SHAPE.num_layers * layer_matmul_flops(SHAPE, 3 * length, 3 * length**2, Blocks(is_gated, window, 2))
    assert counted == pytest.approx(3 * total, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding": "rotary", "generator": replace(SHAPE, num_attention_heads=32)}, "heads have 1"),
        ({"attention_window": 7}, "attention_window is 7; it must be even"),
        ({"local_rotary_base": 10.0}, "local_rotary_base needs an attention_window"),
        ({"relative_attention_num_buckets": 5}, "relative_attention_num_buckets is 5; it must be even"),
        ({"relative_attention_max_distance": 8}, "it must be above 8"),
        ({"num_token_types": 1}, "num_token_types is 1"),
        ({"activation": "relu"}, "activation is relu; it must be one of gelu, geglu, swiglu"),
    ],
)
def test_options_that_do_not_go(changes, message):
    with pytest.raises(UserError, match=message):
        replace(PLAIN, **changes)


@pytest.mark.parametrize("window", [None, 8, 40])
def test_the_cost_of_a_pair_over_a_tokens_gives_that_of_a_sequence(window):
    model, objective = replace(PLAIN, attention_window=window), MaskedLanguageModel()
    ratio = square_cost_ratio(model, objective, SampleSize(64, 8, 64**2))

    def cost(length):
        return actual_train_flops(model, objective, SampleSize(length, length / 8, length**2), samples=1)

    for length in (32, 64):
        assert cost(length) / cost(64) == pytest.approx((length + ratio * length**2) / (64 + ratio * 64**2), rel=1e-9)
