"""Random ds_configs of DeepSpeed's keys: what is accepted has the effect that DeepSpeed gives it, the rest is a line.

The oracle is DeepSpeed's own parser, on the file as it was given.
"""

import json
import tempfile
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from peer_scale.errors import UserError
from peer_scale.settings.config_file import run_yaml
from peer_scale.settings.flags import build_parser
from peer_scale.settings.resolve import resolve

JUNK = st.sampled_from(["auto", "true", "1", "", None, True, False, -1, 0, 1, 2.5, 1e-9, 5e8, 10**30, [], [1], {}])
FLAG = st.booleans()
COUNT = st.integers(1, 10**6)
DTYPE = st.sampled_from(["fp32", "bf16", "fp16", "float"])


def mostly(strategy, other=JUNK):
    """Give what DeepSpeed's documentation says, but in one of forty cases anything."""
    return st.sampled_from(range(40)).flatmap(lambda number: other if number == 23 else strategy)


def block(**keys):
    """Give some of the keys, and seldom one that is not known."""
    known = st.fixed_dictionaries({}, optional={key: mostly(strategy) for key, strategy in keys.items()})
    return mostly(known, st.fixed_dictionaries({"enabeld": FLAG}))


DEVICE = mostly(st.sampled_from(["none", "cpu"]), st.just("nvme"))
OFFLOAD_PARAM = block(device=DEVICE, pin_memory=FLAG, buffer_count=COUNT)
OFFLOAD_OPTIMIZER = block(device=DEVICE, pin_memory=FLAG, buffer_count=COUNT, ratio=st.just(1.0))
ZERO = st.builds(
    lambda stage, rest: {"stage": stage, **rest},
    mostly(st.sampled_from([1, 2, 3]), st.integers(0, 4)),
    block(
        contiguous_gradients=FLAG,
        reduce_scatter=FLAG,
        reduce_bucket_size=COUNT | st.just(5e8),
        allgather_partitions=FLAG,
        allgather_bucket_size=COUNT,
        overlap_comm=FLAG,
        sub_group_size=COUNT,
        stage3_prefetch_bucket_size=COUNT,
        stage3_param_persistence_threshold=COUNT,
        max_live_parameters=COUNT,
        stage3_gather_16bit_weights_on_model_save=FLAG,
        round_robin_gradients=FLAG,
        ignore_unused_parameters=FLAG,
        zero_hpz_partition_size=st.just(1),
        zero_quantized_weights=st.just(False),
        offload_optimizer=OFFLOAD_OPTIMIZER,
        offload_param=OFFLOAD_PARAM,
        compute_grad_norm=st.just(True),
    ),
)
RATE = st.floats(1e-6, 1e-2)
OPTIMIZER = st.fixed_dictionaries(
    {},
    optional={
        "type": mostly(st.sampled_from(["Adam", "AdamW", "adamw"])),
        "params": block(
            lr=RATE,
            betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.999)).map(list),
            eps=RATE,
            weight_decay=st.floats(0, 1),
            bias_correction=FLAG,
            torch_adam=FLAG,
            adam_w_mode=st.just(True),
        ),
    },
)
SCHEDULER = st.fixed_dictionaries(
    {},
    optional={
        "type": mostly(st.just("WarmupDecayLR")),
        "params": block(
            warmup_min_lr=st.just(0),
            warmup_max_lr=RATE,
            warmup_num_steps=COUNT,
            total_num_steps=COUNT,
            warmup_type=st.sampled_from(["linear", "linear", "linear", "log"]),
        ),
    },
)
BLOCKS = {
    "optimizer": OPTIMIZER,
    "scheduler": SCHEDULER,
    "fp16": block(
        enabled=st.just(False),
        loss_scale=st.integers(0, 1024),
        initial_scale_power=st.integers(0, 32),
        loss_scale_window=COUNT,
        hysteresis=st.integers(1, 4),
        min_loss_scale=COUNT,
    ),
    "bf16": block(enabled=FLAG, immediate_grad_update=FLAG, check_grad_overflow=FLAG),
    "gradient_clipping": st.floats(0, 10),
    "train_batch_size": st.sampled_from([16, 32, 48]),
    "train_micro_batch_size_per_gpu": st.sampled_from([4, 16]),
    "gradient_accumulation_steps": st.integers(1, 3),
    "communication_data_type": st.sampled_from(["fp32", "BF16", "fp16"]),
    "prescale_gradients": FLAG,
    "gradient_predivide_factor": st.sampled_from([1.0, 2.0]),
    "steps_per_print": COUNT,
    "wall_clock_breakdown": FLAG,
    "memory_breakdown": FLAG,
    "dump_state": FLAG,
    "data_types": block(grad_accum_dtype=DTYPE, param_dtype=st.just("fp32"), buffer_dtype=DTYPE),
    "tensorboard": block(enabled=FLAG, output_path=st.just("logs"), job_name=st.just("job")),
    "csv_monitor": block(enabled=FLAG, output_path=st.just("logs")),
    "wandb": block(enabled=st.just(False), group=st.just("group"), project=st.just("project")),
    "flops_profiler": block(enabled=st.just(False), profile_step=COUNT, module_depth=st.just(-1), detailed=FLAG),
    "comms_logger": block(enabled=st.just(False), verbose=FLAG, prof_all=FLAG),
    "aio": block(block_size=COUNT, queue_depth=COUNT, single_submit=FLAG, use_gds=st.just(False)),
    "activation_checkpointing": mostly(st.just({}), st.just({"partition_activations": True})),
    "checkpoint": mostly(st.just({}), st.just({"tag_validation": "Warn"})),
    "autotuning": mostly(st.just({"enabled": False}), st.just({"enabled": True})),
    "amp": st.just({"enabled": False}),
}


@st.composite
def ds_configs(draw):
    chosen = draw(st.lists(st.sampled_from(sorted(BLOCKS)), max_size=5, unique=True))
    content = {key: draw(mostly(BLOCKS[key])) for key in chosen}
    return {**content, "zero_optimization": draw(mostly(ZERO))}


@st.composite
def written(draw, content):
    """Write it as people do: with comments, a trailing comma or a byte order mark."""
    text = json.dumps(content, indent=draw(st.sampled_from([None, 2])))
    if draw(FLAG) and content:
        text = text[:-1].rstrip() + ",}"
    if draw(FLAG):
        text = f"// a comment\n{text}\n# another"
    return text.encode("utf-8-sig" if draw(FLAG) else "utf-8")


def without_autos(value):
    if isinstance(value, dict):
        return {key: without_autos(one) for key, one in value.items() if one != "auto"}
    return value


def effect(content, run):
    """What DeepSpeed's own parser makes of the file, with the batch sizes that it may leave to flags."""
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps({**{key: run.deepspeed[key] for key in keys}, **without_autos(content)}))
        return DeepSpeedConfig(str(path))


def check_the_effect(content, run):
    theirs, ours = effect(content, run), DeepSpeedConfig(run.deepspeed)
    for key, value in without_autos(content).items():
        if key == "zero_optimization":
            for name in value:
                field = next(n for n, f in type(ours.zero_config).model_fields.items() if name in (n, f.alias))
                assert getattr(ours.zero_config, field) == getattr(theirs.zero_config, field), field
        elif key in ("fp16", "bf16"):
            config = {"fp16": "float16_config", "bf16": "bfloat16_config"}[key]
            for name in value:
                assert getattr(getattr(ours, config), name) == getattr(getattr(theirs, config), name), name
        elif key in ("tensorboard", "csv_monitor", "wandb"):
            assert getattr(ours.monitor_config, key) == getattr(theirs.monitor_config, key)
        elif key == "aio":
            assert ours.aio_config == theirs.aio_config
        elif key == "data_types":
            for name in value:
                assert getattr(ours, name) == getattr(theirs, name)
        elif key == "optimizer":
            check_the_optimizer(value, theirs, run.training)
        elif key == "scheduler":
            check_the_schedule(value.get("params", {}), run.training)
        elif hasattr(theirs, key) and value is not None:
            assert getattr(ours, key) == getattr(theirs, key), key
    assert run.training.precision == ("bf16" if ours.bfloat16_config.enabled else "fp32")
    assert (run.training.clip_grad, run.training.global_batch_size) == (ours.gradient_clipping, ours.train_batch_size)


def check_the_optimizer(value, theirs, training):
    if theirs.optimizer_name is not None:
        assert theirs.optimizer_name in ("adam", "adamw")
    params = value.get("params", {})
    ours = {
        "lr": training.lr,
        "betas": [training.adam_beta1, training.adam_beta2],
        "eps": training.adam_eps,
        "weight_decay": training.weight_decay,
        "bias_correction": training.adam_bias_correction,
        "adam_w_mode": True,
    }
    assert {key: ours.get(key, one) for key, one in params.items()} == params


def check_the_schedule(params, training):
    ours = {
        "warmup_min_lr": 0,
        "warmup_max_lr": training.lr,
        "warmup_num_steps": training.lr_warmup_iters,
        "total_num_steps": training.train_iters,
        "warmup_type": "linear",
    }
    assert {key: ours[key] for key in params} == params


def check(content, text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_bytes(text)
        try:
            run = resolve(build_parser().parse_args(["--deepspeed_config", str(path), "--verbose"]), 1)
        except UserError as error:
            line = str(error)
            assert line and "\n" not in line
            event("refused")
            return
        event("accepted")
        check_the_effect(content, run)
        repeated = Path(folder) / "run.yaml"
        repeated.write_text(run_yaml(run))
        assert resolve(build_parser().parse_args(["--config", str(repeated), "--verbose"]), 1) == run


def explore(examples):
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data):
        content = data.draw(ds_configs())
        check(content, data.draw(written(content)))

    run()


def test_random_ds_configs():
    explore(30)


@pytest.mark.slow
def test_many_random_ds_configs():
    explore(500)


def test_the_oracle_tells_a_difference(tmp_path):
    path = tmp_path / "ds.json"
    content = {"zero_optimization": {"stage": 2, "overlap_comm": True}, "gradient_clipping": 0.5}
    path.write_text(json.dumps(content))
    run = resolve(build_parser().parse_args(["--deepspeed_config", str(path)]), 1)
    check_the_effect(content, run)
    for other in ({"overlap_comm": False}, {"stage": 1}):
        with pytest.raises(AssertionError):
            check_the_effect({**content, "zero_optimization": {**content["zero_optimization"], **other}}, run)
    with pytest.raises(AssertionError):
        check_the_effect({**content, "gradient_clipping": 1.0}, run)
