"""The ds_config: which keys it may have, what "auto" stands for, what DeepSpeed gets of it."""

import json

import pytest

from peer_scale.configuration import Given
from peer_scale.errors import UserError
from peer_scale.settings.ds_config import (
    given_by,
    look_up,
    precision_of,
    read_ds_config,
    resolved_ds_config,
    with_autos,
    with_bucket_sizes,
)
from peer_scale.settings.presets import find_preset
from peer_scale.settings.run import TrainingConfig
from runs import PROJECT

TINY = find_preset("peer-tiny").training


def read(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_ds_config(path)


def optimizer(**params):
    return {"optimizer": {"type": "AdamW", "params": params}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"zero_optimization": {\n"stage": }}', ("ds.json:2", "not JSON")),
        ("[]", ("ds.json", "JSON object", "list")),
        ({"gradient_cliping": 1.0}, ("unknown key gradient_cliping", "did you mean gradient_clipping")),
        ({"zero_optimization": {"overlapcomm": True}}, ("zero_optimization.overlapcomm", "overlap_comm")),
        ({"zero_optimization": 2}, ("zero_optimization", "must be a JSON object")),
        ({"zero_optimization": {"stage": 4}}, ("zero_optimization.stage is 4", "1, 2 or 3")),
        ({"zero_optimization": {"stage": 0}}, ("zero_optimization.stage is 0", "1, 2 or 3")),
        ({}, ("zero_optimization.stage is 0", "1, 2 or 3")),
        ({"fp16": {"enable": True}}, ("fp16.enable", "did you mean enabled")),
        (optimizer(learning_rate=1), ("unknown key optimizer.params.learning_rate; known are lr, betas, eps",)),
        ({"optimizer": {"type": "Lamb"}}, ("optimizer.type is Lamb", "Adam or AdamW")),
        ({"scheduler": {"type": "OneCycle"}}, ("scheduler.type is OneCycle", "WarmupDecayLR")),
        (optimizer(betas=[0.9]), ("optimizer.params.betas is [0.9]", "list of two numbers")),
        (optimizer(betas=0.9), ("optimizer.params.betas is 0.9", "list of numbers")),
    ],
)
def test_what_is_refused(tmp_path, content, said):
    with pytest.raises(UserError) as error:
        read(tmp_path, content)
    assert "\n" not in str(error.value)
    for part in said:
        assert part in str(error.value)


def test_a_missing_file_and_none(tmp_path):
    with pytest.raises(UserError, match=r"gone\.json: no such file"):
        read_ds_config(tmp_path / "gone.json")
    assert read_ds_config(None) == {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}


@pytest.mark.parametrize("path", sorted((PROJECT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_the_shipped_files_leave_everything_to_flags_and_presets(path):
    config = read_ds_config(path)
    assert given_by(config, TrainingConfig, {}) == {}
    precision = "fp16" if "fp16" in path.name else None
    assert precision_of(config) == precision


def test_look_up():
    config = {"a": {"b": [1, "auto"], "c": "auto", "d": 0}, "e": "auto"}
    assert [look_up(config, key) for key in ("a.b.0", "a.b.1", "a.c", "a.d", "e.0", "x.y")] == [
        1,
        None,
        None,
        0,
        None,
        None,
    ]


def test_each_key_gives_its_field():
    config = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0,
        **optimizer(lr=1e-4, betas=[0.8, 0.95], eps=1e-8, weight_decay=0, bias_correction=False),
        "scheduler": {"params": {"warmup_num_steps": 7, "total_num_steps": 70, "warmup_max_lr": 0.0001}},
    }
    assert {name: one.value for name, one in given_by(config, TrainingConfig, {}).items()} == {
        "global_batch_size": 32,
        "micro_batch_size": 4,
        "clip_grad": 0.0,
        "lr": 1e-4,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_eps": 1e-8,
        "weight_decay": 0.0,
        "adam_bias_correction": False,
        "lr_warmup_iters": 7,
        "train_iters": 70,
    }


@pytest.mark.parametrize(
    ("config", "others", "said"),
    [
        (
            optimizer(lr=1e-4),
            {"lr": Given(1e-3, "--lr")},
            "--lr 0.001 contradicts the ds_config's optimizer.params.lr 0.0001: "
            'give one of them, or "auto" in the ds_config',
        ),
        ({"gradient_clipping": 1.0}, {"clip_grad": Given(0.0, "--clip-grad")}, "--clip-grad 0.0 contradicts"),
        (optimizer(betas=[0.9, 0.99]), {"adam_beta2": Given(0.999, "a.yaml: training.adam_beta2")}, "a.yaml: training"),
        (
            {**optimizer(lr=1e-4), "scheduler": {"params": {"warmup_max_lr": 1e-3}}},
            {},
            "the ds_config's optimizer.params.lr 0.0001 contradicts the ds_config's scheduler.params.warmup_max_lr",
        ),
        ({"train_batch_size": True}, {}, "the ds_config's train_batch_size is true; it must be a whole number"),
        (
            optimizer(lr="fast"),
            {},
            'the ds_config\'s optimizer.params.lr is the text "fast"; it must be a number above 0',
        ),
        ({"gradient_clipping": -1}, {}, "the ds_config's gradient_clipping is -1; it must be a number of at least 0"),
    ],
)
def test_contradictions_and_bounds_name_the_key(config, others, said):
    with pytest.raises(UserError) as error:
        given_by(config, TrainingConfig, others)
    assert str(error.value).startswith(said)


def test_equal_values_do_not_contradict():
    found = given_by({**optimizer(lr=1e-3), "train_batch_size": 16}, TrainingConfig, {"lr": Given(0.001, "--lr")})
    assert found["lr"] == (0.001, "the ds_config's optimizer.params.lr")


@pytest.mark.parametrize(
    ("blocks", "precision"),
    [
        ({}, None),
        ({"bf16": {"enabled": "auto"}}, None),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, "fp16"),
        ({"bf16": {"enabled": False}}, "fp32"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": "auto"}}, None),
    ],
)
def test_precision(blocks, precision):
    assert precision_of(blocks) == precision


def test_two_precisions_are_refused():
    with pytest.raises(UserError, match=r"both fp16.enabled and bf16.enabled"):
        precision_of({"fp16": {"enabled": True}, "bf16": {"enabled": True}})


def resolved(config, **more):
    return resolved_ds_config(config, TINY, **{"num_micro_batches": 4, "hidden_size": 128, **more})


def test_what_deepspeed_gets():
    given = {
        "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
        "gradient_clipping": "auto",
        **optimizer(),
    }
    config = resolved(given)
    assert "optimizer" not in config
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert [config[key] for key in sizes] == [16, 16, 4, 1.0]
    assert config["zero_optimization"] == given["zero_optimization"], "to be chosen when the model is built"
    assert config["bf16"]["enabled"] is config["fp16"]["enabled"] is False
    assert given["gradient_clipping"] == "auto", "the given one stays as it is"


# numbers of parameters, data-parallel ranks; what is sent and what is fetched at once
BUCKETS = [
    (110_000_000, 8, 27_500_000, 10_000_000),
    (335_000_000, 2, 50_000_000, 10_000_000),  # the most
    (14_000_000, 256, 3_500_000, 3_500_000),
    (2_000_000, 2, 1 << 20, 1 << 20),
    (335_000_000, 1, 50_000_000, 10_000_000),  # nobody to send to, on a GPU
]


@pytest.mark.parametrize(("parameters", "ranks", "reduce", "prefetch"), BUCKETS)
def test_auto_buckets_follow_the_model(parameters, ranks, reduce, prefetch):
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
    given = resolved({"zero_optimization": zero})
    sizes = with_bucket_sizes(given, num_parameters=parameters, data_parallel=ranks, on_gpu=True)["zero_optimization"]
    assert sizes == {"stage": 3, "reduce_bucket_size": reduce, "stage3_prefetch_bucket_size": prefetch}
    assert given["zero_optimization"] == zero, "the given one stays as it is"
    own = resolved({"zero_optimization": {**zero, "reduce_bucket_size": 7}})
    kept = with_bucket_sizes(own, num_parameters=parameters, data_parallel=ranks, on_gpu=True)["zero_optimization"]
    assert kept["reduce_bucket_size"] == 7
    alone = with_bucket_sizes(given, num_parameters=parameters, data_parallel=1, on_gpu=False)["zero_optimization"]
    assert alone["reduce_bucket_size"] == alone["stage3_prefetch_bucket_size"] == 1 << 20, "in a CPU's caches"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"zero_optimization": {"stage": 2, "overlap_comm": "auto"}}, "zero_optimization.overlap_comm is \"auto\""),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "large"}}, "zero_optimization.reduce_bucket_size"),
    ],
)  # fmt: skip
def test_what_deepspeed_would_refuse(config, said):
    with pytest.raises(UserError) as error:
        resolved(config)
    assert said in str(error.value)


def test_with_autos_takes_back_what_was_filled_in():
    config = with_autos(resolved({"zero_optimization": {"stage": 2}, "fp16": {"loss_scale": 0}}), TrainingConfig)
    assert given_by(config, TrainingConfig, {}) == {}
    assert precision_of(config) is None
    assert config["fp16"] == {"loss_scale": 0, "enabled": "auto"}
    assert look_up(config, "gradient_accumulation_steps") is None
    assert resolved(config) == resolved({"zero_optimization": {"stage": 2}, "fp16": {"loss_scale": 0}})
