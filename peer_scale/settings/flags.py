"""The trainer's command line, made of the configurations' fields; names are Megatron-LM's and DeepSpeed's.

A flag that is not given is None in the namespace, whatever its default: `resolve` puts presets, files and flags
together.
"""

import argparse
import functools
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from peer_scale.configuration import Given, Setting, settings
from peer_scale.errors import UserError
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.objectives.objective import Objective
from peer_scale.objectives.registry import OBJECTIVES
from peer_scale.samples.masking import MaskingConfig
from peer_scale.settings.arguments import Checked, Parser
from peer_scale.settings.presets import find_preset, preset_names
from peer_scale.settings.run import DataConfig, LaunchConfig, OutputConfig, RunConfig, TrainingConfig

GENERATOR = "generator-"
"""What the generator's flags begin with; those of the main network have no prefix."""

_NETWORKS = {"": "the main network (the ranker; of BERT the only one)", GENERATOR: "the generator"}
_EXAMPLE = """example:
  deepspeed peer_scale/pretrain.py --deepspeed_config ds_configs/zero2.json --model peer-small \\
      --data-path wiki.jsonl --tokenizer bert-vocab/ --save runs/small --save-interval 1000 --log-dir runs/small/logs

presets:
"""


class _Parser(Parser):
    def refuse_value(self, name: str, value: str, switches: dict[str, argparse.Action]) -> NoReturn:
        if name == "--deepspeed":
            raise UserError(f"--deepspeed {value}: the ds_config's flag is --deepspeed_config {value}")
        super().refuse_value(name, value, switches)


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of all flags, grouped as `--help` shows them."""
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [flags]",
        description="Pre-train a text encoder with PEER, ELECTRA, BERT or TEAMS objectives.",
        epilog=_EXAMPLE + "\n".join(_families()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_flags(parser.add_argument_group("model"))
    add_objective_flags(parser.add_argument_group("objective"))
    training = parser.add_argument_group("training")
    add_flags(training, LaunchConfig, ("deepspeed_config", "deepspeed"))
    add_flags(training, TrainingConfig)
    add_flags(training, RunConfig, ("seed",))
    parallel = parser.add_argument_group("parallelism")
    add_flags(parallel, RunConfig, ("tensor_parallel", "pipeline_parallel", "sequence_parallel", "num_threads"))
    add_flags(parallel, LaunchConfig, ("local_rank",))
    data = parser.add_argument_group("data")
    add_flags(data, DataConfig)
    add_flags(data, ModelConfig, ("vocab_size",))
    output = parser.add_argument_group("output")
    add_flags(output, OutputConfig)
    add_flags(output, LaunchConfig, ("verbose",))
    return parser


def add_model_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say what is trained, but for the vocabulary's size, which a tokenizer may have."""
    add_flags(group, RunConfig, ("name",))
    add_flags(group, LaunchConfig, ("config",))
    for setting in settings(EncoderShape).values():
        for prefix in _NETWORKS:
            _add_flag(group, setting, [EncoderShape], prefix)
    add_flags(group, ModelConfig, settings(ModelConfig).keys() - {"vocab_size"})


def add_objective_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say what is learned: the fields of all objectives, and the masking."""
    add_flags(group, MaskingConfig)
    added: set[str] = set()
    for objective in OBJECTIVES.values():
        for setting in settings(objective).values():
            if setting.flag not in added:
                _add_flag(group, setting, _objectives_with(setting.name))
                added.add(setting.flag)


def given(args: argparse.Namespace, cls: type, prefix: str = "") -> dict[str, Given]:
    """Find the values of a configuration's fields that were given by flags, by the fields' names."""
    found = {}
    for name, setting in settings(cls).items():
        value = getattr(args, _destination(setting, prefix), None)
        if value is not None and setting.option.no_flag is None:
            flag = value if setting.choices and not isinstance(setting.option.help, str) else prefix + setting.flag
            found[name] = Given(value, f"--{flag}")
    return found


def given_to_objective(args: argparse.Namespace, objective: Objective, model: str) -> dict[str, Given]:
    """Find the hyper-parameters of `objective` that were given by flags; `model` is the preset's name.

    Raises:
        UserError: a flag belongs to other objectives.
    """
    for other in OBJECTIVES.values():
        for name, value in given(args, other).items():
            if name not in settings(type(objective)):
                owners = " and ".join(each.kind for each in _objectives_with(name))
                raise UserError(
                    f"{value.source} belongs to the objective {owners}, but {model} is trained with {objective.kind}"
                )
    return given(args, type(objective))


def add_flags(group: argparse._ActionsContainer, cls: type, names: Collection[str] | None = None) -> None:
    """Add the flags of a configuration's fields, or of those in `names`."""
    for name, setting in settings(cls).items():
        if names is None or name in names:
            _add_flag(group, setting, [cls])


def _add_flag(group: argparse._ActionsContainer, setting: Setting, classes: Sequence[type], prefix: str = "") -> None:
    """Add the flag of a field that `classes` have."""
    told = setting.option
    if told.no_flag is not None:
        return
    if not isinstance(told.help, str):
        choices = group.add_mutually_exclusive_group()
        for value, sentence in told.help.items():
            text = _help(sentence, setting, classes)
            choices.add_argument(f"--{value}", dest=_destination(setting), action="store_const", const=value, help=text)
        return
    names = [f"--{prefix}{name}" for name in (setting.flag, *told.aliases)]
    sentence = told.help.replace("{network}", _NETWORKS[prefix])
    text = _help(sentence, setting, classes) if sentence else argparse.SUPPRESS
    destination = _destination(setting, prefix)
    if setting.is_switch:
        group.add_argument(*names, dest=destination, action=argparse.BooleanOptionalAction, help=text)
        return
    nargs = {"array": "+" if setting.schema.get("minItems") else "*"}.get(setting.schema["type"])
    group.add_argument(
        *names, dest=destination, action=Checked, setting=setting, nargs=nargs, metavar=told.metavar, help=text
    )


def _destination(setting: Setting, prefix: str = "") -> str:
    return f"{prefix}{setting.flag}".replace("-", "_")


def _help(sentence: str, setting: Setting, classes: Sequence[type]) -> str:
    """Complete a sentence by the objectives that have the setting, the default and the bounds."""
    kinds = [cls.kind for cls in classes if issubclass(cls, Objective)]
    bounds = [setting.bounds] if setting.bounds else []
    notes = [*kinds, f"default: {default_text(setting, classes)}", *bounds]
    return f"{sentence} [{'; '.join(notes)}]".replace("%", "%%")


def default_text(setting: Setting, classes: Sequence[type]) -> str:
    """Say what holds where the flag is not given: the default of `classes`, unless a preset has another value."""
    if setting.option.default_text is not None:
        return setting.option.default_text
    defaults = [settings(cls)[setting.name].default for cls in classes]
    of_presets = [getattr(part, setting.name) for part in _parts_of_presets() if type(part) in classes]
    if setting.is_required or any(value != setting.default for value in (*defaults, *of_presets)):
        return "the preset's"
    if setting.is_switch:
        return "on" if setting.default else "off"
    parts = setting.default if isinstance(setting.default, tuple) else (setting.default,)
    return " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)


def _objectives_with(name: str) -> list[type[Objective]]:
    return [objective for objective in OBJECTIVES.values() if name in settings(objective)]


@functools.cache
def _parts_of_presets() -> tuple[Any, ...]:
    presets = map(find_preset, preset_names())
    return tuple(
        part for preset in presets for part in (preset.model, preset.objective, preset.masking, preset.training)
    )


def _families() -> list[str]:
    """List the presets, a line per family."""
    families: dict[str, list[str]] = {}
    for name in preset_names():
        families.setdefault(name.split("-")[0], []).append(name)
    return [f"  {', '.join(names)}" for names in families.values()]
