#!/usr/bin/env python
"""Looks into checkpoints of the trainer, checks them, cuts them anew, converts them to other formats."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

from peer_scale.errors import USER_ERROR_EXIT_CODE, UserError
from peer_scale.quiet import silence_libraries

_TO_HF_EXAMPLE = """\
example:
  deepspeed peer_scale/pretrain.py --deepspeed_config ds_configs/zero2.json --save runs/tiny
  python tools/convert_checkpoint.py to-hf --load runs/tiny --output hub/peer-tiny
  python -c "
  from transformers import AutoTokenizer, ElectraForPreTraining
  model = ElectraForPreTraining.from_pretrained('hub/peer-tiny').eval()
  tokenizer = AutoTokenizer.from_pretrained('hub/peer-tiny')
  print(model(**tokenizer('The chef ate the meal.', return_tensors='pt')).logits > 0)  # True: replaced
  "

The checkpoint may be of any layout; its fp32 master weights are taken.
"""
_INSPECT_EXAMPLE = """\
example:
  python tools/convert_checkpoint.py inspect --load runs/small/step_00001000 | less -S
"""
_VERIFY_EXAMPLE = """\
example:
  for step in runs/small/step_*; do python tools/convert_checkpoint.py verify --load $step || break; done
"""
_RESHAPE_EXAMPLE = """\
example, for 64 ranks of which neighbours share the tensors in fours:
  python tools/convert_checkpoint.py reshape --load runs/base --output runs/base-64 \\
      --tensor-model-parallel-size 4 --num-files 64
  torchrun ... peer_scale/pretrain.py --load runs/base-64 --tensor-model-parallel-size 4 ...

Any layout loads any checkpoint as it is: this saves the ranks from all opening each other's files. File number n is
what rank n of a ZeRO-3 run without pipeline stages needs, but for what tensor-parallel ranks have in common (small
parameters such as LayerNorms), which is in the file of the first of them. Other ZeRO stages read a few files more.
"""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_to_hf(commands)
    text = "the manifest as a table"
    _add(
        commands,
        "inspect",
        inspect,
        text,
        f"Prints {text}: each tensor's shape, how it is cut, ties.",
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
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--load",
        required=True,
        type=Path,
        metavar="DIR",
        help="the trainer's --save folder (its newest step) or a step in it",
    )
    return parser


def _add_to_hf(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _add(
        commands,
        "to-hf",
        to_hf,
        "a folder that Hugging Face transformers opens",
        "Writes one network of a checkpoint as a folder that transformers opens.",
        _TO_HF_EXAMPLE,
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="new or empty folder (default: hf_NETWORK_STEP beside the step's folder)",
    )
    parser.add_argument(
        "--network",
        choices=("ranker", "generator"),
        help="ranker: an ElectraForPreTraining; generator: an ElectraForMaskedLM (of BERT, which has nothing else, a "
        "BertForMaskedLM); default: the ranker where there is one",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare the written folder's logits with our own model's"
    )


def _add_reshape(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _add(
        commands,
        "reshape",
        reshape,
        "files cut anew for another layout",
        "Writes a checkpoint once more, in files as the ranks of another layout want them.",
        _RESHAPE_EXAMPLE,
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="new or empty folder")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="T", help="default: 1")
    parser.add_argument("--num-files", type=int, metavar="N", help="ranks in all, a multiple of T (default: T)")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the result with the original")


def inspect(args: argparse.Namespace) -> None:
    """Runs the subcommand `inspect`."""
    from peer_scale.checkpoints.folder import require_found
    from peer_scale.checkpoints.listing import listing

    print(listing(*require_found(args.load)))


def verify(args: argparse.Namespace) -> None:
    """Runs the subcommand `verify`."""
    from peer_scale.checkpoints.folder import require_found
    from peer_scale.checkpoints.pieces import check_file

    folder, manifest = require_found(args.load)
    for name, entry in manifest.files.items():
        check_file(folder / name, entry)
    size = sum(entry.bytes for entry in manifest.files.values())
    print(f"{folder}: {len(manifest.files)} files, {size:,} bytes, all checksums as saved")


def reshape(args: argparse.Namespace) -> None:
    """Runs the subcommand `reshape`."""
    from peer_scale.checkpoints.folder import require_found
    from peer_scale.checkpoints.reshape import Cut
    from peer_scale.checkpoints.reshape import reshape as write_reshaped

    size = args.tensor_model_parallel_size
    cut = Cut(size, args.num_files or size)
    folder, manifest = require_found(args.load)
    write_reshaped(folder, manifest, args.output, cut, verify=not args.no_verify)
    verified = "not verified" if args.no_verify else "all tensors bit for bit as before"
    print(f"{args.output}: {folder} in {cut.num_files} files for {size} tensor-parallel ranks, {verified}")


def to_hf(args: argparse.Namespace) -> None:
    """Runs the subcommand `to-hf`."""
    import torch.distributed as dist
    from transformers.utils.logging import disable_progress_bar

    from peer_scale.conversion.checkpoint_reader import read_checkpoint
    from peer_scale.conversion.to_hugging_face import TOLERANCE, to_hugging_face

    disable_progress_bar()
    checkpoint = read_checkpoint(args.load)
    network = args.network or ("generator" if checkpoint.model.ranker is None else "ranker")
    output = args.output or checkpoint.folder.with_name(f"hf_{network}_{checkpoint.progress.step:08d}")
    try:
        export = to_hugging_face(checkpoint, output, network=network, verify=not args.no_verify)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    verified = "not verified" if args.no_verify else f"logits equal to our model's within {TOLERANCE:g}"
    print(f"{output}: the {network} of {checkpoint.folder} as {export.architecture}, {verified}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the subcommand; the exit code is 0, or 2 after bad input with one line on stderr."""
    args = build_parser().parse_args(argv)
    silence_libraries()
    try:
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
