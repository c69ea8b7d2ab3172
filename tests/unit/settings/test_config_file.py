"""YAML files: what they may say, and that a run's own run.yaml repeats it."""

import pytest
import yaml

from peer_scale.errors import UserError
from peer_scale.models.config import EncoderShape
from peer_scale.objectives.masked_lm import MaskedLanguageModel
from peer_scale.objectives.tqr import TokenQualityRanking
from peer_scale.settings.config_file import read_config_file, run_yaml
from peer_scale.settings.flags import build_parser
from peer_scale.settings.presets import find_preset, preset_names
from peer_scale.settings.resolve import resolve, with_yaml
from runs import corpus, ds_config, read_metrics, train_in_pool


def resolved(*flags, world_size=1):
    return resolve(build_parser().parse_args(list(map(str, flags))), world_size)


def written(folder, text, name="some.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def refused(path, *flags) -> str:
    with pytest.raises(UserError) as error:
        resolved("--config", path, *flags)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", preset_names())
def test_run_yaml_repeats_every_preset(tmp_path, name):
    run = resolved("--model", name, "--log-dir", tmp_path / "logs")
    path = written(tmp_path, run_yaml(run))
    again = resolved("--config", path)
    assert again == run
    assert run_yaml(again) == run_yaml(run)


def test_run_yaml_repeats_what_flags_files_and_ds_config_said(tmp_path):
    blocks = {"bf16": {"enabled": True}, "gradient_clipping": 0.5, "communication_data_type": "fp32"}
    own = written(tmp_path, "objective:\n  num_levels: 4\n  taus: [1, 8]\n  gammas: [0.5, 1e-1]\n", "own.yaml")
    flags = ("--config", own, "--deepspeed_config", ds_config(tmp_path, 1, **blocks), "--seed", 7, "--num-threads", 3)
    flags += ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--data-path", "a.txt", "b c.jsonl")
    flags += (
        "--global-batch-size",
        24,
        "--lr",
        "3e-4",
        "--mask-fraction",
        0.25,
        "--save",
        tmp_path / "save",
        "--no-async-save",
    )
    flags += ("--exit-duration-in-mins", 1.5, "--generator-num-layers", 3, "--norm-epsilon", "1e-6")
    run = resolved(*flags, world_size=4)
    again = resolved("--config", written(tmp_path, run_yaml(run), "run.yaml"), world_size=4)
    assert again == run
    assert run_yaml(again) == run_yaml(run)
    assert (run.seed, run.num_threads, run.zero_stage, run.training.clip_grad, run.training.precision) == (
        7,
        3,
        1,
        0.5,
        "bf16",
    )


def test_run_yaml_stays_open_to_flags(tmp_path):
    """What DeepSpeed is told stands in one place there: no flag can contradict it."""
    path = written(tmp_path, run_yaml(resolved("--global-batch-size", 32)))
    run = resolved("--config", path, "--global-batch-size", 8, "--micro-batch-size", 2, "--clip-grad", 0, "--bf16")
    assert (run.num_micro_batches, run.deepspeed["train_batch_size"], run.deepspeed["gradient_clipping"]) == (4, 8, 0.0)
    assert run.deepspeed["bf16"]["enabled"] is True
    other = resolved("--config", path, "--deepspeed_config", ds_config(tmp_path, 3))
    assert (other.zero_stage, other.training) == (3, resolved("--config", path).training)
    more_ranks = resolved("--config", path, world_size=4)
    assert (more_ranks.training.micro_batch_size, more_ranks.num_micro_batches) == (8, 1)


def test_run_yaml_says_everything(tmp_path):
    content = yaml.safe_load(run_yaml(resolved("--model", "electra-tiny")))
    assert list(content)[:4] == ["name", "model", "objective", "masking"]
    assert content["objective"]["kind"] == "tqr"
    assert content["objective"]["top_t"] == 2**31
    assert content["model"]["layer_norm_eps"] == 1e-12
    assert content["training"]["lr"] == 1e-3


def settings_in(path):
    """The file without its comments, which say when and by what the run was started."""
    return "".join(line for line in path.read_text().splitlines(keepends=True) if not line.startswith("#"))


def test_a_run_repeats_itself(one_rank, tmp_path, text_file):
    flags = [
        *corpus(text_file),
        "--train-iters",
        "2",
        "--global-batch-size",
        "2",
        "--num-levels",
        "4",
        "--taus",
        "1",
        "8",
    ]
    (first,) = one_rank.run(train_in_pool, [*flags, "--log-dir", str(tmp_path / "first")])
    said = ["--config", str(tmp_path / "first/run.yaml"), "--log-dir", str(tmp_path / "second")]
    (second,) = one_rank.run(train_in_pool, said)
    one, two = (settings_in(tmp_path / name / "run.yaml") for name in ("first", "second"))
    assert two == one.replace(f"log_dir: {tmp_path / 'first'}\n", f"log_dir: {tmp_path / 'second'}\n")
    assert one != two
    assert read_metrics(tmp_path / "second") == second
    assert [step["loss"] for step in first] == [step["loss"] for step in second]


def test_a_file_of_some_sections_changes_those(tmp_path):
    """Files from before `kind` and the section `masking` were there."""
    text = """
name: peer-tiny
model: {ranker: {num_layers: 6}, init_std: 5e-2}
objective: {delta: 5, mask_fraction: 0.2}
training:
  lr: 5e-4
"""
    path = written(tmp_path, text)
    run, preset = resolved("--config", path), find_preset("peer-tiny")
    assert run.model.ranker == EncoderShape(6, 128, 512, 2)
    assert run.model.generator == preset.model.generator
    assert (run.model.init_std, run.training.lr, run.masking.mask_fraction) == (0.05, 5e-4, 0.2)
    assert run.objective == TokenQualityRanking(delta=5.0, warmup_epochs=preset.objective.warmup_epochs)
    assert with_yaml(preset, path).model == run.model
    assert resolved("--config", path, "--mask-fraction", 0.3).masking.mask_fraction == 0.3
    assert resolved("--config", written(tmp_path, "")) == resolved()


def test_the_files_objective_replaces_the_presets(tmp_path):
    """With its own defaults, where it is of another kind."""
    path = written(tmp_path, "model: {ranker: null, num_shared_layers: 0}\nobjective: {kind: mlm}\n")
    run = resolved("--config", path)
    assert run.objective == MaskedLanguageModel()
    assert list(run.model.networks) == ["generator"]
    ranker = "{num_layers: 2, hidden_size: 64, ffn_hidden_size: 96, num_attention_heads: 4}"
    path = written(tmp_path, f"name: bert-tiny\nmodel:\n  ranker: {ranker}\nobjective: {{kind: tqr, top_t: 5}}\n")
    run = resolved("--config", path, "--tqr-weight", 40)
    assert run.objective == TokenQualityRanking(top_t=5, tqr_weight=40.0)
    assert run.model.ranker == EncoderShape(2, 64, 96, 4)
    kept = resolved("--config", written(tmp_path, "objective: {kind: tqr}\n"), "--model", "electra-tiny")
    assert kept.objective == find_preset("electra-tiny").objective


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", ("--config", "some.yaml", "cannot be read as YAML")),
        ("- 1\n", ("some.yaml: must be a mapping, not [1]",)),
        ("modle: {}\n", ("some.yaml: unknown key modle", "did you mean model?")),
        ("model:\n  rnaker: {}\n", ("some.yaml: unknown key model.rnaker", "did you mean ranker?")),
        ("model:\n  ranker: {layers: 2}\n", ("unknown key model.ranker.layers", "did you mean num_layers?")),
        ("model: {ranker: 3}\n", ("some.yaml: model.ranker must be a mapping, not 3",)),
        ("model: {generator: null}\n", ("some.yaml: model.generator must be a mapping, not null",)),
        ("name: bert-tiny\nmodel: {ranker: {num_layers: 3}}\n", ("model.ranker needs hidden_size, ffn_hidden_size",)),
        ("training:\n  lr: quick\n", ("some.yaml: training.lr is quick; it must be a number above 0",)),
        ("training: {train_iters: 0}\n", ("training.train_iters is 0; it must be a whole number of at least 1",)),
        ("training: {train_iters: true}\n", ("training.train_iters is true; it must be a whole number",)),
        ("training: {train_iters: null}\n", ("training.train_iters is null; it must be a whole number",)),
        ("training: {lr: .nan}\n", ("training.lr is nan; it must be a number above 0",)),
        ("training: {precision: fp8}\n", ("training.precision is fp8; it must be one of fp32, bf16, fp16",)),
        ("training: 3\n", ("some.yaml: training must be a mapping, not 3",)),
        ("objective: {taus: 1}\n", ("objective.taus is 1; it must be a list of numbers above 0",)),
        ("objective: {kind: nsp}\n", ("some.yaml: objective 'nsp': unknown", "tqr")),
        ("objective: {kind: mlm, delta: 3}\n", ("some.yaml: unknown key objective.delta", "there are none here")),
        ("objective: {kind: mlm}\n", ("the objective mlm trains one network",)),
        ("seed: -1\n", ("some.yaml: seed is -1; it must be a whole number from 0",)),
        ("data: {data_path: a.txt}\n", ("data.data_path is a.txt; it must be one or more texts",)),
        ("output: {save_interval: 5}\n", ("--save-interval 5 needs --save",)),
        ("deepspeed: {zero_optimizations: {}}\n", ("some.yaml: deepspeed: unknown key zero_optimizations",)),
        ("name: peer-smal\n", ("peer-smal", "did you mean peer-small?")),
    ],
)
def test_what_is_refused(tmp_path, text, said):
    line = refused(written(tmp_path, text))
    for part in said:
        assert part in line


def test_a_file_that_is_not_there(tmp_path):
    assert "no-such.yaml" in refused(tmp_path / "no-such.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    assert "latin.yaml" in refused(tmp_path / "latin.yaml")


def test_no_file_is_an_empty_one():
    assert read_config_file(None).content == {}
    assert read_config_file(None).ds_config is None
