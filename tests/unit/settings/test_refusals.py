"""What is refused, through the whole command: exit code 2 and exactly this line, before any rank starts."""

import base64
import json
from ctypes.util import find_library
from pathlib import Path

import pytest

from peer_scale.commands import convert, data, plan
from peer_scale.pretrain import main
from peer_scale.settings.flags import build_parser
from peer_scale.settings.resolve import resolve


@pytest.fixture
def line(capfd):
    """Run the trainer, or another command, on flags that it must refuse; gives its one line."""

    def run(*flags, command=main):
        capfd.readouterr()
        assert command(list(map(str, flags))) == 2
        captured = capfd.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        return captured.err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.fixture
def resolved(tmp_path):
    def run(content, *flags, notify=None):
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        args = build_parser().parse_args(["--deepspeed_config", str(path), *map(str, flags)])
        return resolve(args, 1, notify=notify)

    return run


def zero(stage=2, **keys):
    return {"zero_optimization": {"stage": stage, **keys}}


def optimizer(**params):
    return {**zero(), "optimizer": {"type": "AdamW", "params": params}}


def scheduler(**params):
    return {**zero(), "scheduler": {"type": "WarmupDecayLR", "params": params}}


IN_FILE = [
    # what the optimizer and the schedule here are not
    (scheduler(warmup_type="log"), "scheduler.params.warmup_type is log; it must be linear: the learning rate rises "
     "linearly"),
    (optimizer(adam_w_mode=False), "optimizer.params.adam_w_mode is false; it must be true: the optimizer is AdamW, "
     "whose weight decay is decoupled"),
    (optimizer(amsgrad=True), "optimizer.params.amsgrad is true; it must be false: the optimizer is AdamW without it"),
    (optimizer(max_grad_norm=1), "optimizer.params.max_grad_norm has no effect here: gradient_clipping does it; "
     "leave it out"),
    (optimizer(momentum=0.9), "unknown key optimizer.params.momentum; known are lr, betas, eps, weight_decay, "
     "bias_correction, torch_adam, adam_w_mode, amsgrad"),
    (scheduler(warmup_steps=9), "unknown key scheduler.params.warmup_steps; did you mean warmup_num_steps?"),
    (scheduler(last_batch_iteration=3), "unknown key scheduler.params.last_batch_iteration; known are warmup_min_lr, "
     "warmup_max_lr, warmup_num_steps, total_num_steps, warmup_type"),
    # kinds of values
    (optimizer(lr="1e-4"), 'optimizer.params.lr is the text "1e-4"; it must be a number above 0'),
    (optimizer(bias_correction="false"), 'optimizer.params.bias_correction is the text "false"; it must be true or '
     "false"),
    (optimizer(betas=[0.9, 0.99, 0.999]), "optimizer.params.betas is [0.9, 0.99, 0.999]; it must be a list of two "
     "numbers"),
    (optimizer(betas=["0.9", 0.99]), "optimizer.params.betas is [0.9, 0.99]; it must be a list of numbers"),
    ({**zero(), "bf16": {"enabled": "false"}}, 'bf16.enabled is the text "false"; it must be true or false'),
    ({**zero(), "bf16": {"enabled": 1}}, "bf16.enabled is 1; it must be true or false"),
    ({**zero(), "train_batch_size": "16"}, 'train_batch_size is the text "16"; it must be a whole number of at least '
     "1"),
    ({**zero(), "gradient_accumulation_steps": True}, "gradient_accumulation_steps is true; it must be a whole number "
     "of at least 1"),
    ({**zero(), "gradient_clipping": None}, "gradient_clipping is null; it must be a number of at least 0"),
    (zero(overlap_comm="yes"), 'zero_optimization.overlap_comm is the text "yes"; it must be true or false'),
    (zero(reduce_bucket_size=True), "zero_optimization.reduce_bucket_size is true; it must be a whole number of at "
     "least 1"),
    (zero(stage="2"), 'zero_optimization.stage is the text "2"; it must be a whole number'),
    (zero(True), "zero_optimization.stage is true; it must be a whole number"),
    ({**zero(), "tensorboard": {"enabled": "true"}}, 'tensorboard.enabled is the text "true"; it must be true or '
     "false"),
    # numbers that DeepSpeed would divide by, or raise 2 to
    (zero(allgather_bucket_size=0), "zero_optimization.allgather_bucket_size is 0; it must be a whole number of at "
     "least 1"),
    (zero(3, sub_group_size=0), "zero_optimization.sub_group_size is 0; it must be a whole number of at least 1"),
    ({**zero(), "fp16": {"initial_scale_power": 1000}}, "fp16.initial_scale_power is 1000; it must be a whole number "
     "from 0 to 127"),
    # nested blocks
    (zero(offload_optimizer={"devise": "cpu"}), "unknown key zero_optimization.offload_optimizer.devise; did you mean "
     "device?"),
    (zero(offload_optimizer="cpu"), "zero_optimization.offload_optimizer must be a JSON object, not cpu"),
    ({**zero(), "data_types": {"grad_dtype": "fp32"}}, "unknown key data_types.grad_dtype; did you mean "
     "grad_accum_dtype?"),
    ({**zero(), "wandb": {"enable": True}}, "unknown key wandb.enable; did you mean enabled?"),
    ({**zero(), "aio": {"thread_count": 1}}, "unknown key aio.thread_count; known are block_size, queue_depth, "
     "intra_op_parallelism, single_submit, overlap_events, use_gds"),
    # guesses only where they are near
    ({**zero(), "gradient_cliping": 1.0}, "unknown key gradient_cliping; did you mean gradient_clipping?"),
    ({**zero(), "gpus": 8}, "unknown key gpus"),
    # blocks whose work is done otherwise
    ({**zero(), "activation_checkpointing": {"partition_activations": True}}, "activation_checkpointing has no effect "
     "here: --activation-checkpointing does it; leave it out"),
    ({**zero(), "checkpoint": {"load_universal": True}}, "checkpoint has no effect here: --save, --save-interval, "
     "--keep-last and --async-save say how checkpoints are written; leave it out"),
    ({**zero(), "tensor_parallel": {"autotp_size": 2}}, "tensor_parallel has no effect here: "
     "--tensor-model-parallel-size says it; leave it out"),
    ({**zero(), "flops_profiler": {"enabled": True}}, "flops_profiler.enabled is true; it must be false: metrics.jsonl "
     "has train_flops, tflops_per_device and mfu (--log-dir)"),
    ({**zero(), "comms_logger": {"enabled": True}}, "comms_logger.enabled is true; it must be false: peer-scale plan "
     "says what a step sends"),
    ({**zero(), "gradient_allreduce_op": "sum"}, "gradient_allreduce_op is sum; it must be mean: the loss is that of "
     "the whole global batch"),
    ({**zero(), "zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer is true; it must be false: the "
     "optimizer is torch's AdamW, on the host too"),
    (zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}), "zero_optimization.offload_optimizer.ratio is 0.5; it "
     "must be 1: the optimizer is torch's AdamW, on the host too"),
    ({**zero(), "bf16": {"bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads is true; it must "
     "be false: master weights and Adam's means are kept in fp32"),
    # old names
    (zero(cpu_offload=True), "zero_optimization.cpu_offload is an old name: give zero_optimization.offload_optimizer "
     "instead"),
    ({**zero(), "amp": {"enabled": False}}, "amp is not in this version of DeepSpeed: NVIDIA Apex AMP integration has "
     "been removed"),
    (zero(3, mics_shard_size=2), "zero_optimization.mics_shard_size is not in this version of DeepSpeed: MiCS ZeRO-3 "
     "sharding has been removed; 'zero_optimization.mics_shard_size' is no longer supported"),
    ({**zero(), "bf16": {}, "bfloat16": {}}, "bfloat16 and bf16 are one block: leave one of them out"),
    (zero(3, prefetch_bucket_size=1, stage3_prefetch_bucket_size=2),
     "zero_optimization.stage3_prefetch_bucket_size stands twice, under two names"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "said"), IN_FILE)
def test_a_ds_config(line, tmp_path, content, said):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    assert line("--deepspeed_config", path) == f"{path}: {said}"


AT_START = [
    ({**zero(), "prescale_gradients": True}, "prescale_gradients needs zero_optimization.reduce_scatter false under "
     "ZeRO-2"),
    ({**zero(2), "gradient_predivide_factor": 2.0}, "gradient_predivide_factor needs zero_optimization.reduce_scatter "
     "false under ZeRO-2"),
    ({**zero(3, reduce_scatter=False), "gradient_predivide_factor": 2.0}, "gradient_predivide_factor must be 1 under "
     "ZeRO-3: DeepSpeed leaves the gradients divided by it"),
    ({**zero(reduce_scatter=False), "prescale_gradients": True, "gradient_predivide_factor": 2.0},
     "gradient_predivide_factor has no effect with prescale_gradients: give one of them"),
    (zero(3, offload_optimizer={"device": "nvme"}), "zero_optimization.offload_optimizer.device nvme needs "
     "offload_optimizer.nvme_path"),
    (zero(2, offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}), "zero_optimization.offload_optimizer.device "
     "nvme needs zero_optimization.stage 3, not 2"),
    (zero(2, offload_param={"device": "cpu"}), "zero_optimization.offload_param needs zero_optimization.stage 3, not "
     "2"),
    (zero(3, zero_quantized_weights=True), "zero_optimization.zero_quantized_weights needs GPUs: DeepSpeed has no such "
     "kernels for CPUs"),
    (zero(2, zero_quantized_gradients=True), "zero_optimization.zero_quantized_gradients needs zero_optimization.stage "
     "3, not 2"),
    (zero(3, zero_hpz_partition_size=2), "zero_optimization.zero_hpz_partition_size needs GPUs: DeepSpeed has no such "
     "kernels for CPUs"),
    ({**zero(), "data_types": {"param_dtype": "bf16"}}, "data_types.param_dtype is bf16, but training is in fp32"),
    ({**zero(), "comet": {"enabled": True}}, "comet.enabled needs the package comet_ml: pip install comet_ml"),
    ({**zero(), "wall_clock_breakdown": True}, "wall_clock_breakdown goes into DeepSpeed's log, which only --verbose "
     "lets through"),
    ({**zero(), "dump_state": True}, "dump_state goes into DeepSpeed's log, which only --verbose lets through"),
    ({**zero(), "gradient_clipping": 0.5, "optimizer": {"params": {"betas": [0.9, 1]}}},
     "optimizer.params.betas.1 is 1; it must be a number of at least 0 and below 1"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "said"), AT_START)
def test_what_deepspeed_would_refuse_or_pass_over_at_its_start(line, tmp_path, content, said):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    assert line("--deepspeed_config", path, "--model", "peer-tiny") == f"the ds_config's {said}"


def test_nvme_without_libaio(line, tmp_path):
    if find_library("aio") is not None:
        pytest.skip("libaio is here")
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(zero(3, offload_param={"device": "nvme", "nvme_path": str(tmp_path)})))
    said = "the ds_config's zero_optimization.offload_param.device nvme needs libaio and its headers: install them, "
    assert line("--deepspeed_config", path) == f"{said}or use cpu"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"zero_optimization": {"stage": 2}, "zero_optimization": {"stage": 3}}', "not JSON that DeepSpeed reads: the "
         "key zero_optimization stands twice in one object"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "not JSON that DeepSpeed reads: the key stage stands twice "
         "in one object"),
        ('{"gradient_clipping": 1e999}', "not JSON that DeepSpeed reads: cannot convert float infinity to integer"),
        ("[1, 2]", "must hold a JSON object, not list"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_ds_config(line, tmp_path, text, said):
    path = tmp_path / "ds.json"
    path.write_text(text)
    assert line("--deepspeed_config", path) == f"{path}: {said}"


def test_other_files(line, tmp_path):
    latin = tmp_path / "latin.json"
    latin.write_bytes(b'{"wandb": {"project": "caf\xe9"}}')
    assert line("--deepspeed_config", latin).startswith(f"--deepspeed_config {latin}: cannot be read: 'utf-8' codec")
    assert line("--deepspeed_config", tmp_path).startswith(f"--deepspeed_config {tmp_path}: cannot be read: ")
    assert "File name too long" in line("--deepspeed_config", "x" * 300)
    deep = tmp_path / "deep.json"
    deep.write_text('{"a":' * 5000 + "1" + "}" * 5000)
    assert line("--deepspeed_config", deep).startswith(f"{deep}: not JSON that DeepSpeed reads: ")


def test_what_deepspeed_reads_is_read(resolved, tmp_path):
    text = """\ufeff// ours
    {
      "zero_optimization": {"stage": 1, /* small */ "reduce_bucket_size": 5e8,},
      "optimizer": {"type": "adamw", "params": {"lr": 2e-4, "betas": [0.9, 0.98]}}, # names in any case
      "bfloat16": {"enabled": true},
      "communication_data_type": "FP32",
    }
    """
    run = resolved(text)
    assert (run.zero_stage, run.training.precision, run.training.lr, run.training.adam_beta2) == (1, "bf16", 2e-4, 0.98)
    assert run.deepspeed["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 500_000_000}
    assert run.deepspeed["communication_data_type"] == "FP32"
    encoded = base64.urlsafe_b64encode(json.dumps(zero(3, overlap_comm=False)).encode()).decode()
    run = resolve(build_parser().parse_args(["--deepspeed_config", encoded]), 1)
    assert run.deepspeed["zero_optimization"] == {"stage": 3, "overlap_comm": False}


def test_what_asks_for_nothing_changes_nothing(resolved):
    nothing = {
        **{key: {"enabled": False} for key in ("autotuning", "flops_profiler", "hybrid_engine", "comms_logger")},
        **{"activation_checkpointing": {}, "train_batch_size": None, "zero_allow_untested_optimizer": False},
    }
    changed = {"flops_profiler", "comms_logger", "zero_allow_untested_optimizer"}
    plain, run = resolved(zero()), resolved({**zero(offload_optimizer=None), **nothing})
    assert {key: value for key, value in run.deepspeed.items() if key not in changed} == plain.deepspeed
    assert run.training == plain.training


IN_YAML = [
    ("seed: 1\nseed: 2\n", "the key seed stands twice (line 2)"),
    ("training:\n  lr: 1e-3\n  lr: 1e-4\n", "the key lr stands twice (line 3)"),
    ("seed: 010\n", "010 is no decimal number: put text into quotes (line 1)"),
    ("output: {exit_duration_in_mins: 12:30}\n", "12:30 is no decimal number: put text into quotes (line 1)"),
    ("a: b: c\n", "mapping values are not allowed here (line 1)"),
    ("seed: 1\n---\nseed: 2\n", "but found another document (line 2)"),
    ("data: &x {tokenizer: *x}\n", "Circular reference detected"),
]


@pytest.mark.parametrize(("text", "said"), IN_YAML)
def test_yaml_that_can_be_misread(line, tmp_path, text, said):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    assert line("--config", path) == f"--config {path}: cannot be read as YAML: {said}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("objective: {kind: [1]}\n", "objective.kind is [1]; it must be text"),
        ("objective: {mask_fraction: 0.2}\nmasking: 3\n", "masking must be a mapping, not 3"),
        ("objective: {mask_fraction: 0.2}\nmasking: {mask_fraction: 0.3}\n",
         "mask_fraction stands twice, as objective.mask_fraction and as masking.mask_fraction"),
        ("gpus: 8\n", "unknown key gpus"),
        ("training: {lr: .inf}\n", "training.lr is inf; it must be a number above 0"),
        ("deepspeed: {zero_optimization: {stage: 2}, gradient_clipping: .inf}\n",
         "deepspeed: gradient_clipping is inf; it must be a number of at least 0"),
        ("deepspeed: {zero_optimization: {stage: 2}, optimizer: {params: {adam_w_mode: off}}}\n", "deepspeed: "
         "optimizer.params.adam_w_mode is false; it must be true: the optimizer is AdamW, whose weight decay is "
         "decoupled"),
        ("deepspeed: {zero_optimization: {stage: 2}, activation_checkpointing: {profile: true}}\n", "deepspeed: "
         "activation_checkpointing has no effect here: --activation-checkpointing does it; leave it out"),
    ],
)  # fmt: skip
def test_yaml_that_asks_for_what_is_not(line, tmp_path, text, said):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    assert line("--config", path) == f"{path}: {said}"


def test_numbers_of_yaml_are_numbers(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "\ufefftraining: {lr: 1e-4}\ndeepspeed: {zero_optimization: {stage: 1}, optimizer: {params: {eps: 2E-8}}}\n",
        encoding="utf-8",
    )
    training = resolve(build_parser().parse_args(["--config", str(path)]), 1).training
    assert (training.lr, training.adam_eps) == (1e-4, 2e-8)


FLAGS = [
    (("--deepspeed", "ds.json"), "--deepspeed ds.json: the ds_config's flag is --deepspeed_config ds.json"),
    (("--deepspeed=ds.json",), "--deepspeed ds.json: the ds_config's flag is --deepspeed_config ds.json"),
    (("--async-save", "false"), "--async-save false: --async-save is a switch without a value: give --async-save or "
     "--no-async-save"),
    (("--no-async-save=1",), "--no-async-save 1: --no-async-save is a switch without a value: give --no-async-save or "
     "--async-save"),
    (("--bf16", "true", "--lr", "1"), "--bf16 true: --bf16 is a switch without a value: give --bf16 alone"),
    (("--eval-interval", 5, "--validation-fraction", 0), "--eval-interval 5 needs held-out text: --validation-fraction "
     "is 0"),
    (("--save-interval", 5), "--save-interval 5 needs --save DIR"),
    (("--keep-every", 5), "--keep-every 5 needs --save DIR"),
    (("--compile", "--deepspeed_config", "zero3"), "--compile does not go with ZeRO-3, which gathers parameters while "
     "the layers run: leave it out, or take ZeRO-1 or ZeRO-2"),
    (("--lr", "nan"), "--lr is nan; it must be a number above 0"),
    (("--seed", "1" * 5000), f"--seed is {'1' * 100}...; it must be a whole number from 0 to 4294967295"),
    (("--model", "gpt"), "--model gpt: unknown (presets: peer-tiny, "),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "said"), FLAGS)
def test_flags(line, flags, said):
    found = line(*flags)
    assert found == said or (said.endswith(", ") and found.startswith(said))


PLAN = ("--model", "peer-base", "--nodes", 1, "--gpus-per-node", 8)
TOOLS = [
    (plan.main, (*PLAN, "--seq-length", 0), "--seq-length is 0; it must be a whole number of at least 8"),
    (plan.main, (*PLAN, "--tokens", 0), "--tokens is 0; it must be a number above 0"),
    (plan.main, (*PLAN, "--tokens", "inf"), "--tokens is inf; it must be a number above 0"),
    (plan.main, (*PLAN, "--micro-batch-size", 0), "--micro-batch-size is 0; it must be a whole number of at least 1"),
    (plan.main, (*PLAN, "--peak-tflops", 0), "--peak-tflops is 0; it must be a number above 0"),
    (plan.main, (*PLAN, "--overlap", 1.5), "--overlap is 1.5; it must be a number from 0 to 1"),
    (plan.main, (*PLAN, "--search", "--top", 0), "--top is 0; it must be a whole number of at least 1"),
    (plan.main, (*PLAN, "--search", "--zero-stage", 3), "--zero-stage has no effect with --search, which tries all "
     "layouts"),
    (plan.main, (*PLAN, "--sequence-parallel"), "--sequence-parallel needs --tensor-model-parallel-size of 2 or more"),
    (plan.main, ("--model", "peer-base"), "the following arguments are required: --nodes, --gpus-per-node (see "
     "--help)"),
    (convert.main, ("reshape", "--load", "x", "--output", "y", "--num-files", 0), "--num-files is 0; it must be a "
     "whole number of at least 1"),
    (convert.main, ("from-hf", "--bert", "x", "--output", "y", "--seed", -1), "--seed is -1; it must be a whole number "
     "from 0 to 4294967295"),
    (convert.main, ("from-hf", "--bert", "x", "--output", "y", "--hidden-size", 0), "--hidden-size is 0; it must be a "
     "whole number of at least 1"),
    (convert.main, ("from-hf", "--output", "y"), "one of the arguments --discriminator --bert is required (see "
     "--help)"),
    (data.main, ("--input", "x", "--vocab-size", 0), "--vocab-size is 0; it must be a whole number of at least 1"),
    (data.main, ("--input", "x", "--part-megabytes", "nan"), "--part-megabytes is nan; it must be a number above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "flags", "said"), TOOLS)
def test_numbers_of_other_commands(line, command, flags, said):
    assert line(*flags, command=command) == said


def test_the_launchers_deepspeed_flag_stays(resolved):
    assert resolved(zero(), "--deepspeed", "--local_rank=0") == resolved(zero())
    assert resolve(build_parser().parse_args(["--deepspeed", "--seed", "5"]), 1).seed == 5


def test_notices(resolved, tmp_path):
    """One line where a run goes on otherwise than its settings might make a user think."""

    def said(content, *flags):
        lines: list[str] = []
        resolved(content, "--model", "peer-tiny", *flags, notify=lines.append)
        return lines

    assert said(zero()) == []
    lines: list[str] = []
    resolved(zero(), notify=lines.append)
    assert lines == [
        "no --model is named: peer-tiny as it learns within minutes; --model peer-tiny has BERT's blocks",
    ]
    assert said(zero(), "--exit-duration-in-mins", 0) == [
        "--exit-duration-in-mins ends the run without saving it: --save is not given"
    ]
    assert said(zero(), "--exit-signal-handler") == []
    assert said(zero(), "--keep-last", 9) == ["--keep-last 9 has no effect: --save is not given"]
    kept = ("--exit-signal-handler", "--exit-duration-in-mins", 5, "--keep-last", 9)
    assert said(zero(), "--save", tmp_path, *kept) == []
    assert said(zero(), "--eval-iters", 3) == ["--eval-iters 3 has no effect: --eval-interval is not given"]
    assert said(zero(), "--train-iters", 10, "--lr-warmup-iters", 11) == [
        "the learning rate never reaches 0.001: its warm-up takes 11 steps (--lr-warmup-iters), the run 10"
    ]
    assert said(scheduler(total_num_steps=100)) == [
        "the ds_config's scheduler leaves warmup_type open, where DeepSpeed would take log: the warm-up is linear"
    ]
    assert said(scheduler(warmup_type="linear")) == []
    assert said({**zero(), "steps_per_print": 10}) == [
        "the ds_config's steps_per_print is for DeepSpeed's own lines, which --verbose shows; --log-interval is for "
        "those here"
    ]
    assert said(zero(3, stage3_gather_16bit_weights_on_model_save=True)) == [
        "the ds_config's stage3_gather_16bit_weights_on_model_save has no effect: peer-scale convert to-hf makes one "
        "file of any checkpoint"
    ]


@pytest.mark.parametrize("name", sorted(path.stem for path in Path("ds_configs").glob("*.json")))
def test_the_shipped_files_need_no_notice(name):
    lines: list[str] = []
    resolve(build_parser().parse_args(["--deepspeed_config", name, "--model", "peer-tiny"]), 1, notify=lines.append)
    assert lines == []
