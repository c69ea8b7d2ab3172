"""What GPUs take a way of their own for, in plain torch on the CPU's tensors: the twin's numbers, and no waiting."""

import contextlib
from dataclasses import replace

import pytest
import torch

from peer_scale.kernels.attention import describe_attention, self_attention
from peer_scale.kernels.availability import gpu_branches, on_gpu, use_triton
from peer_scale.kernels.dropout import keep_mask
from peer_scale.kernels.gated import gated_activation
from peer_scale.kernels.gelu import bias_gelu
from peer_scale.kernels.norm import bias_dropout_residual_norm
from peer_scale.kernels.residual import bias_dropout_residual
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.models.generator_head import generator_head
from peer_scale.models.layers import TransformerLayer
from peer_scale.parallel.initialization import initialize_weights
from peer_scale.parallel.topology import single_process_topology
from peer_scale.sequences import Sequences
from peer_scale.settings.run import TrainingConfig
from peer_scale.training.optimizer import build_optimizer, set_hyperparameters
from sync_detector import DeviceWait, no_device_wait

CPU = torch.device("cpu")
N, D = 2, 5
LENGTHS = (40, 17, 16, 3, 1)


def numbers(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def check(compute, leaves):
    """The same output and gradients both ways, to 1e-6 of the greatest of them."""
    grad = torch.randn(compute(*leaves).shape, generator=torch.Generator().manual_seed(9))

    def both(*leaves):
        output = compute(*leaves)
        return output, *torch.autograd.grad(output, leaves, grad)

    expected = both(*leaves)
    with gpu_branches(triton=False), no_device_wait():
        found = both(*leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * max(1.0, other.abs().max().item()))


def test_the_switch():
    tensor = torch.ones(2)
    assert not on_gpu(CPU) and not use_triton(tensor) and on_gpu(torch.device("cuda"))
    for triton in (False, True):
        with gpu_branches(triton=triton):
            assert on_gpu(CPU) and use_triton(tensor) == triton
            assert "padded" in describe_attention(CPU, torch.float32, 64, has_score_bias=False)
    assert not on_gpu(CPU)


def test_the_detector_finds_what_the_way_of_the_cpu_asks():
    logits = numbers((5, 3))[0]
    with no_device_wait(), pytest.raises(DeviceWait):
        generator_head(logits, logits, logits[:, 0], torch.zeros(5, dtype=torch.long), torch.zeros(5))


@pytest.mark.parametrize(("has_score_bias", "window"), [(False, None), (True, None), (False, 6), (True, 6)])
def test_attention(has_score_bias, window):
    sequences, longest = Sequences.of(LENGTHS), max(LENGTHS)
    shapes = [(sum(LENGTHS) + 3, N * 3 * D), (N * 3 * D,), *([(N, longest, longest)] if has_score_bias else [])]

    def attend(qkv, bias, score_bias=None):
        return self_attention(qkv, bias, sequences, head_size=D, score_bias=score_bias, window=window)

    check(attend, numbers(*shapes))


def test_norm_gelu_and_gates():
    rows, width = 33, 48
    x, bias, residual, weight, norm_bias, wide, wide_bias = numbers(
        (rows, width), (width,), (rows, width), (width,), (width,), (rows, 2 * width), (2 * width,)
    )

    def norm(*tensors):
        return bias_dropout_residual_norm(*tensors, dropout=0.0, eps=1e-12)

    check(norm, [x, bias, residual, weight, norm_bias])
    check(bias_gelu, [x, bias])
    check(lambda x, bias, residual: bias_dropout_residual(x, bias, residual, dropout=0.0), [x, bias, residual])
    for activation in ("geglu", "swiglu"):
        check(lambda wide, bias, kind=activation: gated_activation(wide, bias, kind), [wide, wide_bias])


@pytest.mark.parametrize("post", [True, False])
def test_gradients_under_dropout_belong_to_the_mask_that_was_drawn(post):
    x, bias, residual, weight, norm_bias = (t.double() for t in numbers((6, 5), (5,), (6, 5), (5,), (5,)))

    def with_fixed_seed(x, bias, residual):
        torch.manual_seed(5)
        if post:
            return bias_dropout_residual_norm(x, bias, residual, weight, norm_bias, dropout=0.4, eps=1e-5)
        return bias_dropout_residual(x, bias, residual, dropout=0.4)

    with gpu_branches(triton=False):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, bias, residual)]
        assert torch.autograd.gradcheck(with_fixed_seed, leaves, eps=1e-6, atol=1e-5)
        with no_device_wait():
            torch.autograd.grad(with_fixed_seed(*leaves).sum(), leaves)


def test_the_mask_keeps_its_share():
    torch.manual_seed(2)
    with gpu_branches(triton=False), no_device_wait():
        one, other = (keep_mask((999, 1001), 0.1, torch.float32) for _ in range(2))
    for mask in (one, other):
        assert abs(mask.mean().item() - 0.9) < 4 * (0.09 / mask.numel()) ** 0.5
    assert (one == other).float().mean().item() == pytest.approx(0.82, abs=5e-3)


@pytest.mark.parametrize(
    "blocks",
    [
        {},
        {"position_embedding": "rotary", "norm": "rms_norm", "norm_position": "pre", "activation": "swiglu"},
        {"position_embedding": "t5_bias", "norm_position": "pre", "activation": "geglu", "attention_window": 6},
    ],
)
def test_a_layer(blocks):
    shape = EncoderShape(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4)
    config = ModelConfig(shape, None, vocab_size=64, embedding_size=32, max_position_embeddings=64)
    config = replace(config, hidden_dropout=0.0, attention_dropout=0.0, **blocks)
    ranks = single_process_topology().tensor_parallel
    layer = TransformerLayer(shape, config, ranks, 1)
    initialize_weights(layer, seed=1, std=0.2, vocab_size=64, tensor_parallel=ranks)
    sequences = Sequences.of(LENGTHS)
    check(lambda hidden, *_: layer(hidden, sequences), [*numbers((sum(LENGTHS), 32)), *layer.parameters()])


def test_the_optimizers_step():
    """Its settings are numbers of the host, and to use them asks the device for nothing."""
    training = TrainingConfig(seq_length=8, train_iters=30, micro_batch_size=1, global_batch_size=1, lr=0.1)
    found = []
    for watch in (contextlib.nullcontext, no_device_wait):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        optimizer = build_optimizer(layer, training)
        for step in (1, 2, 3):
            layer.weight.grad = torch.randn(3, 4)
            with watch():
                set_hyperparameters(optimizer, training, step, num_updates=step)
                optimizer.step()
        found.append(layer.weight)
    assert torch.equal(*found)
