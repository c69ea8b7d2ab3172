"""What is accepted of a ds_config beside its numbers changes how a step is done, and not what it does."""

import pytest

from runs import corpus, ds_config, train_in_pool

SCATTERED = {"zero_optimization": {"reduce_scatter": False}}
CASES = [
    (1, {"gradient_predivide_factor": 2.0}),
    (2, {**SCATTERED, "gradient_predivide_factor": 2.0}),
    (3, {**SCATTERED, "prescale_gradients": True}),
    (2, {"zero_optimization": {"parameter_alignment": True, "round_robin_gradients": True}}),
    (2, {"wall_clock_breakdown": True, "memory_breakdown": True, "dump_state": True}),
]


@pytest.mark.slow
def test_gradients_stay_those_of_the_global_batch(two_ranks, tmp_path, text_file):
    def train(number, stage, blocks):
        flags = [*corpus(text_file), "--train-iters", "2", "--fp32", "--micro-batch-size", "4", "--verbose"]
        flags += ["--deepspeed_config", str(ds_config(tmp_path, stage, **blocks))]
        metrics = two_ranks.run(train_in_pool, [*flags, "--log-dir", str(tmp_path / str(number))])[0]
        return [line["loss"] for line in metrics] + [line["grad_norm"] for line in metrics]

    plain = train("plain", 2, {})
    for number, (stage, blocks) in enumerate(CASES):
        assert train(number, stage, {**blocks}) == pytest.approx(plain, rel=1e-5), (stage, blocks)
