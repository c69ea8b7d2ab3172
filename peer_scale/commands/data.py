"""Tokenise raw text into a Megatron `.bin/.idx` pair, or verify one."""

import argparse
import os
import sys
from collections.abc import Sequence

from pydantic import PositiveFloat, PositiveInt

from peer_scale.commands.outcome import exit_code
from peer_scale.corpus.manifest import PairManifest
from peer_scale.corpus.prepare import PART_BYTES, preprocess, train_on_inputs
from peer_scale.corpus.store import verify
from peer_scale.corpus.wordpiece import WordPiece, load_wordpiece
from peer_scale.errors import UserError
from peer_scale.settings.arguments import Parser, of

_EXAMPLE = """\
example:
  peer-scale data --input wiki/ books.jsonl --tokenizer vocab.txt \\
      --output-prefix data/corpus --workers 16
  peer-scale data --verify data/corpus
  deepspeed peer_scale/pretrain.py --deepspeed_config ds_configs/zero2.json --data-path data/corpus

Without --tokenizer, a WordPiece of --vocab-size is trained on the input's first 200 million characters.
It may be interrupted: the same command goes on where it was. The result does not depend on --workers.
"""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of the command line; `prog` is what help and errors call the command."""
    parser = Parser(
        prog=prog, description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        nargs="+",
        metavar="P",
        help=".txt (blank lines between documents), .jsonl, .ndjson, .json or .parquet files, text and JSON also with "
        ".gz, .bz2, .xz or .zst behind it, folders of them, a Hugging Face data set id (owner/name or "
        "owner/name:configuration), or builtin",
    )
    parser.add_argument("--tokenizer", metavar="P", help="WordPiece folder, tokenizer.json, vocab.txt or hub id")
    parser.add_argument("--vocab-size", **of(PositiveInt), metavar="N", help="train a tokenizer of this size instead")
    parser.add_argument("--output-prefix", metavar="PREFIX", help="writes PREFIX.bin, .idx, .json, .tokenizer.json")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    parser.add_argument(
        "--workers",
        **of(PositiveInt),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: one per core, here %(default)s)",
    )
    parser.add_argument(
        "--part-megabytes",
        **of(PositiveFloat),
        default=PART_BYTES / 1e6,
        metavar="N",
        help="text a worker takes at a time at most, and so what an interruption can lose (default: %(default).0f)",
    )
    parser.add_argument("--verify", metavar="PREFIX", help="check the sha256 of a pair against its manifest; no more")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command; give its exit code."""
    return exit_code(
        lambda: _run(build_parser(prog).parse_args(argv)), interrupted="interrupted; the same command goes on from here"
    )


def _run(args: argparse.Namespace) -> None:
    if args.verify:
        verify(args.verify)
        print(f"{args.verify}: as its manifest says")
        return
    for flag in ("input", "output_prefix"):
        if not getattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')} is missing; --help shows an example")
    if (args.tokenizer is None) == (args.vocab_size is None):
        raise UserError("either --tokenizer or, to train one, --vocab-size is needed")
    if args.tokenizer:
        tokenizer = load_wordpiece(args.tokenizer)
    else:
        tokenizer = train_on_inputs(args.input, args.vocab_size, args.text_key, show_progress=True)
    preprocess(
        args.input,
        tokenizer,
        args.output_prefix,
        text_key=args.text_key,
        workers=args.workers,
        show_progress=True,
        part_bytes=max(1, round(args.part_megabytes * 1e6)),
    )
    _tell(args.output_prefix, tokenizer)


def _tell(prefix: str, tokenizer: WordPiece) -> None:
    lines = [f"notice: {text}" for text in tokenizer.notices]
    manifest = PairManifest.read(prefix)
    if manifest and manifest.unknown:
        lines.append(manifest.unknown.describe(manifest.num_tokens))
        notice = manifest.unknown.notice(manifest.num_tokens, tokenizer.word_chars)
        lines += [f"notice: {notice}"] if notice else []
    for line in lines:
        print(line, file=sys.stderr)
