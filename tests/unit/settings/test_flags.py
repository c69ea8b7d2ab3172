"""The command line: each field a flag, each flag a field, and help that says what holds."""

import argparse
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peer_scale.configuration import settings
from peer_scale.errors import UserError
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.objectives.registry import OBJECTIVES
from peer_scale.samples.masking import MaskingConfig
from peer_scale.settings.flags import GENERATOR, build_parser, given
from peer_scale.settings.presets import find_preset, preset_names
from peer_scale.settings.run import DataConfig, LaunchConfig, OutputConfig, RunConfig, TrainingConfig

CONFIGURATIONS = (
    *(EncoderShape, ModelConfig, MaskingConfig, TrainingConfig, DataConfig, OutputConfig, RunConfig, LaunchConfig),
    *OBJECTIVES.values(),
)
# configurations within others; they have flags of their own
NESTED = {"generator", "ranker", "model", "objective", "masking", "training", "data", "output"}
# what scripts of other people may use
ESTABLISHED = (
    "model config num-layers generator-num-layers hidden-size generator-hidden-size ffn-hidden-size "
    "generator-ffn-hidden-size num-attention-heads generator-num-attention-heads num-shared-layers embedding-size "
    "max-position-embeddings hidden-dropout attention-dropout num-levels taus top-t delta gammas tqr-weight "
    "warmup-epochs mask-fraction mask-probability deepspeed_config deepspeed seq-length train-iters micro-batch-size "
    "micro-batch-tokens "
    "global-batch-size lr-warmup-iters lr weight-decay clip-grad adam-beta1 adam-beta2 adam-eps seed "
    "no-adam-bias-correction max-skipped-steps activation-checkpointing fp32 bf16 fp16 tensor-model-parallel-size "
    "pipeline-model-parallel-size sequence-parallel local_rank local-rank num-threads data-path tokenizer vocab-size "
    "text-key cache-dir num-workers validation-fraction save save-interval keep-last keep-every async-save "
    "no-async-save load log-dir log-interval eval-interval eval-iters exit-duration-in-mins stall-minutes "
    "profile-steps profile-ranks report no-report "
    "exit-signal-handler strict-load verbose on-nan on-spike spike-sigmas max-failed-saves save-retry-seconds "
)


def parse(*flags):
    return build_parser().parse_args(list(map(str, flags)))


def refused(*flags) -> str:
    with pytest.raises(UserError) as error:
        parse(*flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def actions() -> dict[str, argparse.Action]:
    return {name: action for action in build_parser()._actions for name in action.option_strings}


def flags_of(cls, setting) -> set[str]:
    if not isinstance(setting.option.help, str):
        return {f"--{value}" for value in setting.choices}
    prefixes = ("", GENERATOR) if cls is EncoderShape else ("",)
    names = [prefix + name for prefix in prefixes for name in (setting.flag, *setting.option.aliases)]
    return {f"--{no}{name}" for name in names for no in (("", "no-") if setting.is_switch else ("",))}


@pytest.mark.parametrize("cls", CONFIGURATIONS)
def test_every_field_has_a_flag_or_says_why_not(cls):
    known = actions()
    for field in dataclasses.fields(cls):
        if field.name in NESTED:
            continue
        setting = settings(cls)[field.name]
        flags = flags_of(cls, setting)
        if setting.option.no_flag is None:
            assert flags <= known.keys(), f"{field.name} has no flag and does not say why"
        else:
            assert len(setting.option.no_flag.split()) > 2
            assert given(argparse.Namespace(**{setting.name: 1}), cls) == {}


def test_every_flag_has_a_field():
    expected = {flag for cls in CONFIGURATIONS for setting in settings(cls).values() for flag in flags_of(cls, setting)}
    assert actions().keys() - {"-h", "--help"} <= expected


def test_no_flag_of_before_is_gone():
    assert {f"--{name}" for name in ESTABLISHED.split()} <= actions().keys()


def shown(action: argparse.Action) -> str:
    """The default that the help text shows."""
    return re.search(r"default: (.*?)(; (at least|above|below|from) .*)?\]$", action.help)[1]


@pytest.mark.parametrize("cls", CONFIGURATIONS)
def test_help_shows_the_dataclass_default_or_that_presets_choose(cls):
    known = actions()
    presets = [find_preset(name) for name in preset_names()]
    parts = [part for each in presets for part in (each.model, each.objective, each.masking, each.training)]
    for name, setting in settings(cls).items():
        for flag in flags_of(cls, setting) & known.keys():
            if known[flag].help == argparse.SUPPRESS:
                continue
            assert re.match(r"[A-Z].{12,}\.[ ]\[", known[flag].help), f"{flag}: no sentence"
            in_presets = {getattr(part, name) for part in parts if type(part) is cls}
            if setting.option.default_text is not None:
                continue
            default = {field.name: field.default for field in dataclasses.fields(cls)}[name]
            if cls is EncoderShape or in_presets - {default}:
                assert shown(known[flag]) == "the preset's"
            elif isinstance(default, bool):
                assert shown(known[flag]) == ("on" if default else "off")
            elif isinstance(default, float | int):
                assert float(shown(known[flag])) == default
            else:
                assert shown(known[flag]).split() == (
                    [str(item) for item in default] if name == "gammas" else [default]
                )


def test_help_says_the_bounds():
    known = actions()
    for flag, bounds in (
        ("--train-iters", "at least 1"),
        ("--lr", "above 0"),
        ("--validation-fraction", "at least 0 and below 1"),
        ("--mask-probability", "from 0 to 1"),
        ("--seed", "from 0 to 4294967295"),
        ("--taus", "above 0"),
    ):
        assert known[flag].help.endswith(f"; {bounds}]")


def test_help_is_printed_in_groups(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse("--help")
    assert leaving.value.code == 0
    printed = capsys.readouterr().out
    groups = ("model", "objective", "training", "parallelism", "data", "output")
    assert [line[:-1] for line in printed.splitlines() if re.fullmatch(r"\w+:", line)][1:7] == list(groups)
    assert all(name in printed for name in preset_names())
    assert "local_rank" not in printed


def test_defaults_are_within_their_bounds():
    for cls in CONFIGURATIONS:
        for setting in settings(cls).values():
            if not setting.is_required and setting.default is not None:
                assert setting.checked(setting.default, setting.name) == setting.default


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--train-iters", "0"), "--train-iters is 0; it must be a whole number of at least 1"),
        (("--micro-batch-size", "2.5"), "--micro-batch-size is 2.5; it must be a whole number of at least 1"),
        (("--seq-length", "7"), "--seq-length is 7; it must be a whole number of at least 8"),
        (("--lr", "0"), "--lr is 0; it must be a number above 0"),
        (("--lr", "fast"), "--lr is fast; it must be a number above 0"),
        (("--weight-decay", "-0.1"), "--weight-decay is -0.1; it must be a number of at least 0"),
        (("--adam-beta1", "1"), "--adam-beta1 is 1; it must be a number of at least 0 and below 1"),
        (("--hidden-dropout", "1"), "--hidden-dropout is 1; it must be a number of at least 0 and below 1"),
        (("--seed", "4294967296"), "--seed is 4294967296; it must be a whole number from 0 to 4294967295"),
        (("--seed", "-1"), "--seed is -1; it must be a whole number from 0 to 4294967295"),
        (("--num-threads", "0"), "--num-threads is 0; it must be a whole number of at least 1"),
        (("--log-interval", "0"), "--log-interval is 0; it must be a whole number of at least 1"),
        (("--num-workers", "-1"), "--num-workers is -1; it must be a whole number of at least 0"),
        (("--validation-fraction", "1"), "--validation-fraction is 1; it must be a number of at least 0 and below 1"),
        (("--num-levels", "1", "--taus"), "--num-levels is 1; it must be a whole number of at least 2"),
        (("--taus", "1", "0"), "--taus is [1, 0]; it must be a list of numbers above 0"),
        (("--gammas", "0"), "--gammas is [0]; it must be one or more numbers above 0"),
        (("--generator-num-layers", "0"), "--generator-num-layers is 0; it must be a whole number from 1 to 1000"),
        (("--keep-last", "0"), "--keep-last is 0; it must be a whole number of at least 1"),
        (("--text-key", ""), None),
        (("--no-such-flag",), "unrecognized arguments: --no-such-flag (see --help)"),
        (("--train-iter", "5"), "unrecognized arguments: --train-iter 5 (see --help)"),
        (("--lr",), "argument --lr: expected one argument (see --help)"),
        (("--fp16", "--bf16"), "argument --bf16: not allowed with argument --fp16 (see --help)"),
    ],
)  # fmt: skip
def test_bad_flags_are_refused_with_one_line(flags, said):
    if said is None:
        parse(*flags)
    else:
        assert refused(*flags) == said


@pytest.mark.parametrize("value", ["nan", "inf", "1e999"])
def test_numbers_are_finite(value):
    is_float = {flag: action.metavar in ("X", "P", "SHARE", "LAMBDA", "EPOCHS") for flag, action in actions().items()}
    floats = [flag for flag in is_float if is_float[flag] and flag not in ("--data-path", "--tokenizer")]
    assert {"--lr", "--delta", "--mask-fraction", "--hidden-dropout", "--rtd-weight"} <= {*floats}
    for flag in (*floats, "--taus", "--gammas", "--exit-duration-in-mins"):
        assert refused(flag, value).startswith(f"{flag} is ")


def test_what_is_not_given_is_none_and_0_is_given():
    assert set(vars(parse()).values()) == {None}
    args = parse("--lr-warmup-iters", 0, "--hidden-dropout", 0, "--no-adam-bias-correction", "--taus")
    assert (args.lr_warmup_iters, args.hidden_dropout, args.adam_bias_correction, args.taus) == (0, 0.0, False, ())
    assert given(args, TrainingConfig) == {
        "lr_warmup_iters": (0, "--lr-warmup-iters"),
        "adam_bias_correction": (False, "--adam-bias-correction"),
    }


def test_given_names_the_flag():
    args = parse("--fp16", "--generator-hidden-size", 64, "--tensor-model-parallel-size", 2, "--local_rank=3")
    assert given(args, TrainingConfig) == {"precision": ("fp16", "--fp16")}
    assert given(args, EncoderShape, GENERATOR) == {"hidden_size": (64, "--generator-hidden-size")}
    assert given(args, EncoderShape) == {}
    assert given(args, RunConfig) == {"tensor_parallel": (2, "--tensor-model-parallel-size")}
    assert args.local_rank == 3


def test_the_parser_waits_for_no_library():
    """`--help` and bad flags are answered at once, and libraries are silenced before they are imported."""
    heavy = ("torch", "megatron", "deepspeed", "transformers", "numpy")
    program = f"""
import sys
from pathlib import Path
from peer_scale.pretrain import main
main(["--lr", "fast"])
print([name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
    assert done.stderr == "error: --lr is fast; it must be a number above 0\n"


@pytest.mark.parametrize("steps", ["5:2", "0:3", "7", "a:b", "1:2:3", ""])
def test_steps_to_profile_are_two_numbers(steps):
    with pytest.raises(UserError, match=rf"--profile-steps {steps}: it must be FIRST:LAST, such as 20:25"):
        OutputConfig(profile_steps=steps, log_dir=Path("logs"))
    assert OutputConfig(profile_steps="5:5", log_dir=Path("logs")).profiled_steps == (5, 5)
    with pytest.raises(UserError, match="--profile-steps 5:5 needs --log-dir DIR"):
        OutputConfig(profile_steps="5:5")
