#!/usr/bin/env python
"""Converts checkpoints of the trainer to other formats."""

import argparse
import sys
from collections.abc import Sequence
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

The checkpoint may be of any ZeRO stage and number of ranks; its fp32 master weights are taken. Checkpoints are pickles:
convert only those whose origin you trust.
"""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_to_hf(commands)
    return parser


def _add_to_hf(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "to-hf",
        help="a folder that Hugging Face transformers opens",
        description="Writes one network of a checkpoint as a folder that transformers opens.",
        epilog=_TO_HF_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=to_hf)
    parser.add_argument(
        "--load",
        required=True,
        type=Path,
        metavar="DIR",
        help="the trainer's --save folder (its newest step) or a step in it",
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
