"""Look into checkpoints of the trainer, check them, cut them anew, convert them to other formats."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from peer_scale.commands.outcome import exit_code
from peer_scale.errors import UserError
from peer_scale.quiet import silence_libraries
from peer_scale.settings.arguments import Parser, of
from peer_scale.settings.run import Seed

if TYPE_CHECKING:
    from peer_scale.conversion.hugging_face_folder import HuggingFaceFolder
    from peer_scale.settings.presets import Preset

_TO_HF_EXAMPLE = """\
example:
  deepspeed peer_scale/pretrain.py --deepspeed_config ds_configs/zero2.json --save runs/tiny
  peer-scale convert to-hf --load runs/tiny --output hub/peer-tiny
  python -c "
  from transformers import AutoTokenizer, ElectraForPreTraining
  model = ElectraForPreTraining.from_pretrained('hub/peer-tiny').eval()
  tokenizer = AutoTokenizer.from_pretrained('hub/peer-tiny')
  print(model(**tokenizer('The chef ate the meal.', return_tensors='pt')).logits > 0)  # True: replaced
  "

The checkpoint may be of any layout; its fp32 master weights are taken.
"""
_FROM_HF_EXAMPLE = """\
example:
  peer-scale convert from-hf --model peer-base --discriminator google/electra-base-discriminator \\
      --output runs/start
  deepspeed peer_scale/pretrain.py --deepspeed_config ds_configs/zero2.json --model peer-base \\
      --config runs/start/model.yaml --tokenizer runs/start/step_00000000/tokenizer --load runs/start --data-path ...

The sizes of the ranker (and of the generator, where one is given) are those of the given models; the rest of the model
is the preset's, or the flags'. What no given model has starts as in a fresh run. The trainer's --config takes the sizes
from runs/start/model.yaml. With --bert there is a generator only, for --model bert-base and the like.
"""
_INSPECT_EXAMPLE = """\
example:
  peer-scale convert inspect --load runs/small/step_00001000 | less -S
"""
_VERIFY_EXAMPLE = """\
example:
  for step in runs/small/step_*; do peer-scale convert verify --load $step || break; done
"""
_RESHAPE_EXAMPLE = """\
example, for 64 ranks of which neighbours share the tensors in fours:
  peer-scale convert reshape --load runs/base --output runs/base-64 \\
      --tensor-model-parallel-size 4 --num-files 64
  torchrun ... peer_scale/pretrain.py --load runs/base-64 --tensor-model-parallel-size 4 ...

Any layout loads any checkpoint as it is: this saves the ranks from all opening each other's files. File number n is
what rank n of a ZeRO-3 run without pipeline stages needs, but for what tensor-parallel ranks have in common (small
parameters such as LayerNorms), which is in the file of the first of them. Other ZeRO stages read a few files more.
"""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of the command line; `prog` is what help and errors call the command."""
    parser: argparse.ArgumentParser = Parser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_to_hf(commands)
    _add_from_hf(commands)
    text = "the manifest as a table"
    _add(
        commands,
        "inspect",
        inspect,
        text,
        f"Print {text}: each tensor's shape, how it is cut, ties.",
        _INSPECT_EXAMPLE,
    )
    text = "check every checksum"
    _add(commands, "verify", verify, text, "Exit code 2 names the file that is damaged or missing.", _VERIFY_EXAMPLE)
    _add_reshape(commands)
    return parser


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], None],
    text: str,
    description: str,
    epilog: str,
    *,
    has_load: bool = True,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    if has_load:
        text = "the trainer's --save folder (its newest step) or a step in it"
        parser.add_argument("--load", required=True, type=Path, metavar="DIR", help=text)
    return parser


def _add_to_hf(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _add(
        commands,
        "to-hf",
        to_hf,
        "a folder that Hugging Face transformers opens",
        "Write one network of a checkpoint as a folder that transformers opens.",
        _TO_HF_EXAMPLE,
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="new or empty folder (default: hf_BRANCH_STEP beside the step's folder)",
    )
    parser.add_argument(
        "--branch",
        "--network",
        metavar="NAME",
        help="which network, with the head on top of it: ranker (of TEAMS: rtd), an ElectraForPreTraining; mws (of "
        "TEAMS), an ElectraModel; generator, an ElectraForMaskedLM (of BERT, which has nothing else, a "
        "BertForMaskedLM), or ModernBERT's classes of them; default: the first of these that the model has",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare the written folder's logits with our own model's"
    )


def _add_from_hf(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from peer_scale.settings.flags import add_model_flags, add_objective_flags

    text = "Write a checkpoint of step 0 with ELECTRA's, BERT's or ModernBERT's weights, from which the trainer starts."
    parser = _add(
        commands, "from-hf", from_hf, "start from Hugging Face weights", text, _FROM_HF_EXAMPLE, has_load=False
    )
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--discriminator", metavar="P", help="becomes the ranker: folder or Hugging Face id")
    network.add_argument("--bert", metavar="P", help="becomes all of a BERT model: folder or Hugging Face id")
    parser.add_argument(
        "--generator", dest="generator_source", metavar="P", help="beside --discriminator: becomes the generator"
    )
    parser.add_argument("--tokenizer", metavar="P", help="default: the one in the (first) model's folder")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="new or empty folder, for --load")
    parser.add_argument("--seed", **of(Seed), default=1234, help="of the weights that start afresh")
    parser.add_argument("--no-verify", action="store_true", help="do not compare our logits with transformers'")
    add_model_flags(parser.add_argument_group("model"))
    add_objective_flags(parser.add_argument_group("objective"))


def _add_reshape(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _add(
        commands,
        "reshape",
        reshape,
        "files cut anew for another layout",
        "Write a checkpoint once more, in files as the ranks of another layout want them.",
        _RESHAPE_EXAMPLE,
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="new or empty folder")
    parser.add_argument("--tensor-model-parallel-size", **of(PositiveInt), default=1, metavar="T", help="default: 1")
    parser.add_argument(
        "--num-files", **of(PositiveInt), metavar="N", help="ranks in all, a multiple of T (default: T)"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare the result with the original")


def inspect(args: argparse.Namespace) -> None:
    """Run the subcommand `inspect`."""
    from peer_scale.checkpoints.folder import require_found
    from peer_scale.checkpoints.listing import listing

    print(listing(*require_found(args.load)))


def verify(args: argparse.Namespace) -> None:
    """Run the subcommand `verify`."""
    from peer_scale.checkpoints.folder import require_found
    from peer_scale.checkpoints.pieces import check_file

    folder, manifest = require_found(args.load)
    for name, entry in manifest.files.items():
        check_file(folder / name, entry)
    size = sum(entry.bytes for entry in manifest.files.values())
    print(f"{folder}: {len(manifest.files)} files, {size:,} bytes, all checksums as saved")


def reshape(args: argparse.Namespace) -> None:
    """Run the subcommand `reshape`."""
    from peer_scale.checkpoints.folder import require_found
    from peer_scale.checkpoints.reshape import Cut
    from peer_scale.checkpoints.reshape import reshape as write_reshaped

    size = args.tensor_model_parallel_size
    cut = Cut(size, size if args.num_files is None else args.num_files)
    folder, manifest = require_found(args.load)
    write_reshaped(folder, manifest, args.output, cut, verify=not args.no_verify)
    verified = "not verified" if args.no_verify else "all tensors bit for bit as before"
    print(f"{args.output}: {folder} in {cut.num_files} files for {size} tensor-parallel ranks, {verified}")


def to_hf(args: argparse.Namespace) -> None:
    """Run the subcommand `to-hf`."""
    import torch.distributed as dist
    from transformers.utils.logging import disable_progress_bar

    from peer_scale.checkpoints.reader import read_checkpoint
    from peer_scale.conversion.architecture import TOLERANCE
    from peer_scale.conversion.to_hugging_face import choose_export, to_hugging_face

    disable_progress_bar()
    checkpoint = read_checkpoint(args.load)
    export = choose_export(checkpoint, args.branch)
    step = checkpoint.sections.progress.step
    output = args.output or checkpoint.folder.with_name(f"hf_{export.branch}_{step:08d}")
    try:
        to_hugging_face(checkpoint, export, output, verify=not args.no_verify)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    verified = "not verified" if args.no_verify else f"logits equal to our model's within {TOLERANCE:g}"
    print(f"{output}: the {export.branch} of {checkpoint.folder} as {export.class_name}, {verified}")
    if export.left_out:
        print(f"left out: {', '.join(sorted({_module(name) for name in export.left_out}))}")


def from_hf(args: argparse.Namespace) -> None:
    """Run the subcommand `from-hf`."""
    import torch.distributed as dist

    from peer_scale.conversion.architecture import TOLERANCE
    from peer_scale.conversion.from_hugging_face import MODEL_FILE, Source, check_class, from_hugging_face, model_of
    from peer_scale.conversion.hugging_face_folder import open_folder
    from peer_scale.corpus.wordpiece import load_wordpiece

    if args.bert is not None and args.generator_source is not None:
        raise UserError("--generator goes with --discriminator; --bert is a generator already")
    given = (("--discriminator", args.discriminator), ("--bert", args.bert), ("--generator", args.generator_source))
    folders = {flag: open_folder(path, flag) for flag, path in given if path is not None}
    for flag, folder in folders.items():
        check_class(folder, flag)
    branches = {"--discriminator": None, "--bert": None, "--generator": "generator"}
    args.model = args.model or ("bert-base" if args.bert else "electra-base" if args.generator_source else "peer-base")
    preset = _preset_of_sizes(args, {branches[flag]: folder for flag, folder in folders.items()})
    first = next(iter(folders.values()))
    tokenizer = load_wordpiece(args.tokenizer or str(first.path))
    preset = model_of(preset, list(folders.values()), tokenizer.vocab_size)
    sources = [Source.of(branches[flag], folder, preset) for flag, folder in folders.items()]
    try:
        done = from_hugging_face(
            sources, args.model, preset, tokenizer, args.output, seed=args.seed, verify=not args.no_verify
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    verified = "not verified" if args.no_verify else f"logits equal to transformers' within {TOLERANCE:g}"
    print(f"{done.step_folder}: {args.model} from {', '.join(folder.name for folder in folders.values())}, {verified}")
    if done.has_other_embeddings:
        print(f"embeddings: those of {first.name}; {args.generator_source} has others")
    for what, names in (("left out", done.left_out), ("start afresh", done.fresh)):
        if names:
            print(f"{what}: {', '.join(sorted({_module(name) for name in names}))}")
    print(
        f"train with: --model {args.model} --config {args.output / MODEL_FILE} "
        f"--tokenizer {done.step_folder / 'tokenizer'} --load {args.output}"
    )


def _module(name: str) -> str:
    """Name what a parameter belongs to: a layer or what lies beside the layers."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ".".join(parts[:-1])


def _preset_of_sizes(args: argparse.Namespace, folders: "dict[str | None, HuggingFaceFolder]") -> "Preset":
    """Give the preset that the flags ask for the folders' sizes; raise UserError where a flag says otherwise.

    Folders are given by the branch that they become, the first one by None.
    """
    from peer_scale.settings.presets import find_preset
    from peer_scale.settings.resolve import resolve_model, with_yaml

    preset = with_yaml(find_preset(args.model), args.config)
    has_one_network = len(preset.model.networks) == 1
    if has_one_network != (args.bert is not None):
        raise UserError(f"--model {args.model} starts from {'--bert' if has_one_network else '--discriminator'}")
    for branch, folder in folders.items():
        for size, value in dataclasses.asdict(folder.shape).items():
            name = size if branch is None else f"{branch}_{size}"
            given = getattr(args, name)
            if given not in (None, value):
                raise UserError(f"--{name.replace('_', '-')} {given}, but {folder.name} has {value}")
            setattr(args, name, value)
    return resolve_model(args)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the subcommand; give its exit code."""
    silence_libraries()
    return exit_code(lambda: _run(argv, prog))


def _run(argv: Sequence[str] | None, prog: str | None) -> None:
    args = build_parser(prog).parse_args(argv)
    args.run(args)
