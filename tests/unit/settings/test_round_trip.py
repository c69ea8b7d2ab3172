"""run.yaml as --config: every preset with random flags comes back as it was."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from peer_scale.errors import UserError
from peer_scale.settings.config_file import run_yaml
from peer_scale.settings.flags import build_parser
from peer_scale.settings.presets import preset_names
from peer_scale.settings.resolve import resolve

# what YAML would take for a number, a truth value, nothing, or its own signs
WORDS = "1e-4 1e5 .5e3 5. 010 12:30 0x1f 1_000 no null ~ true .inf 2020-01-01 #a a#b a: {b} *c &d %e !f ' é \ufeff| -"
TEXTS = st.sampled_from([*WORDS.split(), '"', "", " a", "a: b", "a\nb", "a #b", "1e-4 ", "\x85", "日本"])
COUNT = st.integers(1, 2**31)
RATE = st.floats(1e-30, 10)
SHARE = st.floats(0.01, 0.99)
FLAGS = {
    "lr": RATE,
    "weight-decay": st.floats(0, 10),
    "adam-eps": RATE,
    "adam-beta1": SHARE,
    "clip-grad": st.floats(0, 10),
    "lr-warmup-iters": st.integers(0, 2**31),
    "train-iters": COUNT,
    "global-batch-size": st.integers(1, 64),
    "micro-batch-size": st.integers(1, 4),
    "micro-batch-tokens": st.integers(8, 256),
    "seq-length": st.integers(8, 128),
    "max-skipped-steps": COUNT,
    "hidden-dropout": st.floats(0, 0.9),
    "init-method-std": RATE,
    "norm-epsilon": RATE,
    "position-embedding-type": st.sampled_from(["absolute", "rotary", "t5_bias"]),
    "rotary-base": RATE,
    "attention-window": st.integers(1, 99).map(lambda half: 2 * half),
    "norm-position": st.sampled_from(["post", "pre"]),
    "activation": st.sampled_from(["gelu", "geglu", "swiglu"]),
    "num-token-types": st.sampled_from([0, 2, 3]),
    "mask-fraction": SHARE,
    "mask-probability": st.floats(0, 1),
    "warmup-epochs": st.floats(0, 2),
    "delta": st.floats(0, 10),
    "num-negatives": st.integers(1, 9),
    "data-path": TEXTS,
    "tokenizer": TEXTS,
    "text-key": TEXTS,
    "cache-dir": TEXTS,
    "num-workers": st.integers(0, 9),
    "validation-fraction": st.floats(0, 0.9),
    "save": TEXTS,
    "save-interval": COUNT,
    "keep-last": COUNT,
    "keep-every": COUNT,
    "log-dir": TEXTS,
    "log-interval": COUNT,
    "eval-interval": COUNT,
    "eval-iters": COUNT,
    "exit-duration-in-mins": st.floats(0, 1e9),
    "seed": st.integers(0, 2**32 - 1),
    "num-threads": COUNT,
    "tensor-model-parallel-size": st.sampled_from([1, 2]),
    "pipeline-model-parallel-size": st.sampled_from([1, 2]),
    **dict.fromkeys(("async-save", "exit-signal-handler", "activation-checkpointing", "sequence-parallel"), st.none()),
    **dict.fromkeys(("no-async-save", "no-report", "no-adam-bias-correction", "bf16", "fp16", "fp32"), st.none()),
}


@st.composite
def command_lines(draw):
    names = draw(st.lists(st.sampled_from(sorted(FLAGS)), max_size=8, unique=True))
    values = {name: draw(FLAGS[name]) for name in names}
    flags = [f"--{name}" if value is None else f"--{name}={value}" for name, value in values.items()]
    return [f"--model={draw(st.sampled_from(preset_names()))}", *flags]


def check(flags, ds_config):
    parser = build_parser()
    try:
        run = resolve(parser.parse_args([*flags, "--deepspeed_config", ds_config]), 4)
    except UserError:
        assume(False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(run_yaml(run), encoding="utf-8")
        again = resolve(parser.parse_args(["--config", str(path)]), 4)
        assert again == run
        assert run_yaml(again) == run_yaml(run)


def explore(examples):
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(command_lines(), st.sampled_from(["zero1", "zero2", "zero3", "zero3_offload", "zero2_fp16"]))
    def run(flags, ds_config):
        check(flags, ds_config)

    run()


def test_run_yaml_with_random_flags():
    explore(30)


@pytest.mark.slow
def test_run_yaml_with_many_random_flags():
    explore(500)
