"""Adam and its schedule against formulas written out in numpy."""

import numpy as np
import pytest
import torch

from peer_scale.settings.run import TrainingConfig
from peer_scale.training.optimizer import build_optimizer, learning_rate, set_hyperparameters


def config(**changes):
    defaults = {"seq_length": 8, "train_iters": 30, "micro_batch_size": 1, "global_batch_size": 1, "lr": 0.1}
    return TrainingConfig(**(defaults | {"lr_warmup_iters": 10} | changes))


def numpy_adam(weight, gradients, rates, decay, *, bias_correction):
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        if bias_correction:
            update = (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-6)
        else:
            update = mean / (np.sqrt(square) + 1e-6)
        weight = weight - rate * decay * weight - rate * update
    return weight


@pytest.mark.parametrize("bias_correction", [True, False])
def test_adam(bias_correction):
    settings = config(adam_bias_correction=bias_correction)
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3).double()
    start = [p.detach().numpy().copy() for p in (layer.weight, layer.bias)]
    optimizer = build_optimizer(layer, settings)
    rng = np.random.default_rng(0)
    gradients = [[rng.normal(size=p.shape) for p in start] for _ in range(30)]
    rates = []
    for step, pair in enumerate(gradients, start=1):
        rates.append(set_hyperparameters(optimizer, settings, step, num_updates=step))
        for parameter, gradient in zip((layer.weight, layer.bias), pair, strict=True):
            parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    for index, decay in ((0, 0.01), (1, 0.0)):
        expected = numpy_adam(
            start[index], [pair[index] for pair in gradients], rates, decay, bias_correction=bias_correction
        )
        found = (layer.weight, layer.bias)[index].detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_schedule_rises_to_lr_and_falls_to_nothing():
    rates = [learning_rate(config(), step) for step in range(1, 31)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 100)
    np.testing.assert_allclose(np.diff(rates[9:]), -0.1 / 21)
    assert rates[-1] == pytest.approx(0.1 / 21)
    assert learning_rate(config(), 31) == 0
    assert learning_rate(config(lr_warmup_iters=0), 1) == 0.1
