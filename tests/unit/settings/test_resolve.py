"""What flags, YAML file, ds_config and preset come to together: precedence, contradictions, relations."""

import operator
from pathlib import Path

import pytest

from peer_scale.errors import UserError
from peer_scale.models.config import EncoderShape
from peer_scale.settings.flags import build_parser
from peer_scale.settings.presets import find_preset, preset_names
from peer_scale.settings.resolve import resolve, resolve_model
from runs import ds_config


def parse(*flags):
    return build_parser().parse_args(list(map(str, flags)))


def resolved(*flags, world_size=1, **environ):
    return resolve(parse(*flags), world_size, environ)


def refused(*flags, world_size=1) -> str:
    with pytest.raises(UserError) as error:
        resolved(*flags, world_size=world_size)
    assert "\n" not in str(error.value)
    return str(error.value)


def yaml_file(folder, text):
    path = folder / "some.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_alone_is_taken_as_it_is(name):
    run, preset = resolved("--model", name, XDG_CACHE_HOME="/caches"), find_preset(name)
    assert (run.name, run.model, run.objective, run.masking) == (name, preset.model, preset.objective, preset.masking)
    assert run.training == preset.training
    assert run.data.cache_dir == Path("/caches/peer_scale")


def test_without_any_flag_peer_tiny_is_trained_as_it_learns():
    run = resolved()
    assert (run.name, run.seed, run.zero_stage, run.data.data_path) == ("peer-tiny", 1234, 2, ("builtin",))
    assert (run.model.position_embedding, run.model.norm_position, run.training.lr) == ("rotary", "pre", 3e-3)
    named = resolved("--model", "peer-tiny")
    assert (named.model.position_embedding, named.model.norm_position, named.training.lr) == ("absolute", "post", 1e-3)
    assert run.data.cache_dir == Path.home() / ".cache/peer_scale"


# where a value stands in the run; its value in the preset; in a file; given by flags
PRECEDENCE = [
    ("training.lr", 3e-3, "training: {lr: 2e-3}", 2e-3, ("--lr", 4e-3), 4e-3),
    ("training.weight_decay", 0.01, "training: {weight_decay: 0.5}", 0.5, ("--weight-decay", 0), 0.0),
    ("training.precision", "fp32", "training: {precision: fp16}", "fp16", ("--bf16",), "bf16"),
    ("training.adam_bias_correction", True, "", True, ("--no-adam-bias-correction",), False),
    ("training.activation_checkpointing", False, "training: {activation_checkpointing: true}", True,
     ("--no-activation-checkpointing",), False),
    ("model.hidden_dropout", 0.0, "model: {hidden_dropout: 0.2}", 0.2, ("--hidden-dropout", 0), 0.0),
    ("model.main_network.num_layers", 4, "model: {ranker: {num_layers: 5}}", 5, ("--num-layers", 6), 6),
    ("objective.delta", 3.0, "objective: {delta: 2}", 2.0, ("--delta", 0), 0.0),
    ("masking.mask_fraction", 0.3, "masking: {mask_fraction: 0.2}", 0.2, ("--mask-fraction", 0.4), 0.4),
    ("data.num_workers", None, "data: {num_workers: 2}", 2, ("--num-workers", 0), 0),
    ("data.validation_fraction", 0.01, "data: {validation_fraction: 0.5}", 0.5, ("--validation-fraction", 0), 0.0),
    ("output.keep_last", 3, "output: {keep_last: 5}", 5, ("--keep-last", 7), 7),
    ("output.exit_duration_in_mins", None, "output: {exit_duration_in_mins: 5}", 5.0,
     ("--exit-duration-in-mins", 0), 0.0),
    ("output.async_save", True, "output: {async_save: false}", False, ("--async-save",), True),
    ("seed", 1234, "seed: 5", 5, ("--seed", 0), 0),
    ("name", "peer-tiny", "name: electra-tiny", "electra-tiny", ("--model", "teams-tiny"), "teams-tiny"),
    ("tensor_parallel", 1, "tensor_parallel: 2", 2, ("--tensor-model-parallel-size", 1), 1),
    ("num_threads", None, "num_threads: 2", 2, ("--num-threads", 3), 3),
]  # fmt: skip


@pytest.mark.parametrize(("where", "preset", "text", "in_file", "flags", "given"), PRECEDENCE)
def test_a_flag_beats_the_file_and_the_file_beats_the_preset(tmp_path, where, preset, text, in_file, flags, given):
    read, path = operator.attrgetter(where), yaml_file(tmp_path, text)
    assert read(resolved(world_size=2)) == preset
    assert read(resolved("--config", path, world_size=2)) == in_file
    assert read(resolved(*flags, world_size=2)) == given
    assert read(resolved("--config", path, *flags, world_size=2)) == given


def test_auto_stands_for_the_flag_the_file_or_the_preset(tmp_path):
    auto = ds_config(
        tmp_path,
        gradient_clipping="auto",
        train_batch_size="auto",
        bf16={"enabled": "auto"},
        optimizer={"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
    )
    path = yaml_file(tmp_path, "training: {lr: 2e-3, clip_grad: 2}")
    assert resolved("--deepspeed_config", auto, "--model", "peer-tiny").training == find_preset("peer-tiny").training
    training = resolved("--deepspeed_config", auto, "--config", path, "--lr", "3e-3", "--bf16").training
    assert (training.lr, training.clip_grad, training.precision) == (3e-3, 2.0, "bf16")


def test_the_ds_configs_numbers_are_taken(tmp_path):
    numbers = ds_config(
        tmp_path,
        gradient_clipping=0,
        train_batch_size=32,
        fp16={"enabled": True},
        optimizer={"type": "Adam", "params": {"lr": 1e-4, "betas": [0.8, 0.9], "weight_decay": 0}},
        scheduler={"type": "WarmupDecayLR", "params": {"warmup_num_steps": 0, "total_num_steps": 50}},
    )
    training = resolved("--deepspeed_config", numbers, "--lr", "1e-4").training
    assert (training.lr, training.weight_decay, training.adam_beta1, training.adam_beta2) == (1e-4, 0.0, 0.8, 0.9)
    assert (training.clip_grad, training.global_batch_size, training.precision) == (0.0, 32, "fp16")
    assert (training.lr_warmup_iters, training.train_iters) == (0, 50)


@pytest.mark.parametrize(
    ("blocks", "flags", "in_file", "said"),
    [
        ({"train_batch_size": 32}, ("--global-batch-size", 16), "", ("--global-batch-size 16", "train_batch_size 32")),
        ({"optimizer": {"params": {"lr": 1e-4}}}, ("--lr", "1e-3"), "", ("--lr 0.001", "optimizer.params.lr 0.0001")),
        ({"optimizer": {"params": {"lr": 1e-4}}}, (), "training: {lr: 1e-3}", ("yaml: training.lr 0.001", "lr 0.0001")),
        ({"gradient_clipping": 1.0}, ("--clip-grad", 0), "", ("--clip-grad 0", "gradient_clipping 1:")),
        ({"bf16": {"enabled": True}}, ("--fp32",), "", ("--fp32", "bf16")),
        ({"bf16": {"enabled": True}}, (), "training: {precision: fp32}", ("training.precision", "ask for bf16")),
        ({"scheduler": {"params": {"warmup_min_lr": 1e-5}}}, (), "", ("warmup_min_lr is 1e-05; it must be 0:",)),
        ({"gradient_accumulation_steps": 0}, (), "", ("gradient_accumulation_steps is 0",)),
    ],
)  # fmt: skip
def test_contradictions_name_both(tmp_path, blocks, flags, in_file, said):
    line = refused(
        "--deepspeed_config", ds_config(tmp_path, **blocks), "--config", yaml_file(tmp_path, in_file), *flags
    )
    for part in said:
        assert part in line


def test_a_flag_over_the_file_settles_it_with_the_ds_config(tmp_path):
    config = ds_config(tmp_path, optimizer={"params": {"lr": 1e-4}})
    path = yaml_file(tmp_path, "training: {lr: 1e-3}")
    assert resolved("--deepspeed_config", config, "--config", path, "--lr", "1e-4").training.lr == 1e-4


@pytest.mark.parametrize(
    ("flags", "blocks", "world_size", "sizes"),
    [
        ((), {}, 1, (16, 16, 1)),
        ((), {}, 4, (16, 4, 1)),
        (("--global-batch-size", 24), {}, 1, (24, 12, 2)),
        (("--global-batch-size", 24), {}, 2, (24, 12, 1)),
        (("--micro-batch-size", 2), {}, 2, (16, 2, 4)),
        ((), {"gradient_accumulation_steps": 4}, 2, (16, 2, 4)),
        (("--micro-batch-size", 3), {"gradient_accumulation_steps": 5}, 2, (30, 3, 5)),
        ((), {"train_batch_size": 40, "train_micro_batch_size_per_gpu": 10}, 1, (40, 10, 4)),
        (("--tensor-model-parallel-size", 2, "--micro-batch-size", 4), {}, 4, (16, 4, 2)),
    ],
)
def test_batch_sizes(tmp_path, flags, blocks, world_size, sizes):
    """Global batch, micro-batch and micro-batches per step; DeepSpeed is told the same."""
    config = ds_config(tmp_path, **blocks)
    run = resolved("--model", "peer-tiny", *flags, "--deepspeed_config", config, world_size=world_size)
    total, micro, number = sizes
    assert (run.training.global_batch_size, run.training.micro_batch_size, run.num_micro_batches) == sizes
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert tuple(run.deepspeed[key] for key in keys) == sizes
    data_parallel = world_size // run.tensor_parallel
    assert total == micro * number * data_parallel


def test_a_budget_of_tokens_takes_the_place_of_a_number_of_sequences(tmp_path):
    budget = ("--model", "peer-tiny", "--micro-batch-tokens", 4096)
    run = resolved(*budget, "--global-batch-size", 24, world_size=2)
    assert (run.training.micro_batch_tokens, run.training.micro_batch_size, run.num_micro_batches) == (4096, 12, None)
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert tuple(run.deepspeed[key] for key in keys) == (24, 12, 1)
    in_file = yaml_file(tmp_path, "training: {micro_batch_tokens: 512, micro_batch_size: 8}")
    assert resolved("--config", in_file).training.micro_batch_tokens == 512
    by_flag = resolved("--model", "peer-tiny", "--config", in_file, "--micro-batch-size", 4)
    assert (by_flag.training.micro_batch_tokens, by_flag.num_micro_batches) == (None, 4)
    in_file = yaml_file(tmp_path, "training: {micro_batch_tokens: 512}")
    ours = f"{in_file}: training.micro_batch_tokens 512"
    for blocks, flags, said in (
        ({}, (*budget, "--micro-batch-size", 4), "--micro-batch-tokens 4096 leaves no room for --micro-batch-size 4"),
        ({"train_micro_batch_size_per_gpu": 4}, ("--config", in_file),
         f"{ours} leaves no room for the ds_config's train_micro_batch_size_per_gpu 4"),
        ({"gradient_accumulation_steps": 2}, budget,
         "--micro-batch-tokens 4096 leaves no room for the ds_config's gradient_accumulation_steps 2"),
    ):  # fmt: skip
        line = refused("--deepspeed_config", ds_config(tmp_path, **blocks), *flags)
        assert line == f"{said}: give one of them"


@pytest.mark.parametrize(
    ("flags", "world_size", "said"),
    [
        (("--model", "peer-tiny", "--micro-batch-tokens", 127), 1, ("--micro-batch-tokens 127", "--seq-length 128")),
        (("--micro-batch-tokens", 512, "--global-batch-size", 6), 4, ("batch size 6", "data-parallel size 4")),
        (("--global-batch-size", 10, "--micro-batch-size", 4), 1, ("10", "4", "micro-batch", "--global-batch-size")),
        (("--global-batch-size", 2), 4, ("2", "data-parallel size 4")),
        (("--seq-length", 129), 1, ("--seq-length 129", "128 positions", "max_position_embeddings")),
        (("--hidden-size", 130, "--num-attention-heads", 4), 1, ("130", "4", "divisible")),
        (("--num-levels", 4, "--taus", 1, 2), 1, ("tau_1", "delta")),
        (("--num-levels", 4, "--taus", 1), 1, ("taus [1.0]", "take 2 values")),
        (("--gammas", 1, 2), 1, ("gammas [1.0, 2.0]", "one weight, or 1")),
        (("--num-shared-layers", 3), 1, ("num_shared_layers is 3", "1")),
        (("--model", "bert-tiny", "--num-shared-layers", 1), 1, ("num_shared_layers", "no ranker")),
        (("--generator-hidden-size", 64), 1, ("shared layers need one hidden_size", "64", "128")),
        (("--model", "peer-smal"), 1, ("--model peer-smal", "did you mean peer-small")),
        (("--pipeline-model-parallel-size", 2), 1, ("--pipeline-model-parallel-size 2", "must divide")),
        (("--tensor-model-parallel-size", 3), 3, ("--tensor-model-parallel-size 3 does not divide",)),
        (("--save-interval", 5), 1, ("--save-interval 5", "--save")),
        (("--model", "bert-tiny", "--num-levels", 4), 1, ("--num-levels belongs to the objective tqr", "mlm")),
        (("--model", "teams-tiny", "--tqr-weight", 0), 1, ("--tqr-weight belongs to the objective tqr", "teams")),
        (("--num-negatives", 4), 1, ("--num-negatives belongs to the objective teams", "peer-tiny", "tqr")),
        (("--model", "teams-tiny", "--vocab-size", 4), 1, ("num_negatives is 4", "vocabulary of 4")),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(flags, world_size, said):
    line = refused(*flags, world_size=world_size)
    for part in said:
        assert part in line


def test_the_main_networks_flags():
    """PEER's networks share layers, so the generator follows in all but its number; ELECTRA's stands alone."""
    run = resolved("--model", "peer-tiny", "--hidden-size", 256, "--num-layers", 6, "--num-attention-heads", 4)
    assert run.model.ranker == EncoderShape(6, 256, 512, 4)
    assert run.model.generator == EncoderShape(2, 256, 512, 4)
    assert run.model.embedding_size == 256
    run = resolved("--model", "electra-tiny", "--hidden-size", 256, "--generator-num-layers", 1)
    assert run.model.ranker == EncoderShape(4, 256, 512, 2)
    assert run.model.generator == EncoderShape(1, 64, 256, 1)
    assert run.model.embedding_size == 256
    run = resolved("--model", "bert-tiny", "--num-layers", 3, "--generator-hidden-size", 64, "--embedding-size", 32)
    assert run.model.networks == {"generator": EncoderShape(3, 64, 512, 2)}
    assert run.model.embedding_size == 32
    run = resolved("--model", "electra-small", "--hidden-size", 512)
    assert run.model.embedding_size == 128, "narrow embeddings stay"


def test_two_levels_need_no_taus(tmp_path):
    assert resolved("--num-levels", 2).objective.taus == ()
    assert resolved("--config", yaml_file(tmp_path, "objective: {num_levels: 2}")).objective.taus == ()
    whole = yaml_file(tmp_path, "objective: {num_levels: 3, taus: [2.0]}")
    assert resolved("--config", whole, "--num-levels", 2).objective.taus == ()


def test_a_run_cut_short_warms_up_in_the_same_share(tmp_path):
    assert resolved("--model", "peer-tiny", "--train-iters", 100).training.lr_warmup_iters == 10
    assert resolved("--model", "peer-tiny", "--train-iters", 6000).training.lr_warmup_iters == 60
    assert resolved("--model", "peer-tiny", "--train-iters", 100, "--lr-warmup-iters", 0).training.lr_warmup_iters == 0
    warmup = ds_config(tmp_path, scheduler={"params": {"warmup_num_steps": 5}})
    assert (
        resolved("--model", "peer-tiny", "--train-iters", 100, "--deepspeed_config", warmup).training.lr_warmup_iters
        == 5
    )


def test_the_launchers_own_flags_change_nothing():
    assert resolved("--deepspeed", "--local_rank=1", "--verbose") == resolved()


def test_resolve_model_takes_the_models_and_the_objectives_flags():
    preset = resolve_model(
        parse("--model", "electra-tiny", "--num-layers", 3, "--mask-fraction", 0.2, "--tqr-weight", 5)
    )
    assert preset.model.main_network.num_layers == 3
    assert (preset.masking.mask_fraction, preset.objective.tqr_weight) == (0.2, 5.0)
