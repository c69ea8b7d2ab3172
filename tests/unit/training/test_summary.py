"""What a run says of itself when it starts."""

import json
from dataclasses import replace

import pytest

from peer_scale.corpus.manifest import PairManifest
from peer_scale.corpus.wordpiece import SPECIAL_TOKENS
from peer_scale.parallel.topology import single_process_topology
from peer_scale.settings.run import DataConfig
from peer_scale.training.data import cut_into_samples, open_text
from peer_scale.training.summary import startup_summary
from small_runs import small_run


@pytest.mark.parametrize("counted", [True, False])
def test_what_is_lost_as_unknown_is_told_where_it_was_counted(tmp_path, counted):
    vocab = [*SPECIAL_TOKENS, *"abcdefgh", *(f"##{char}" for char in "abcdefgh"), *"ABCD"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    (tmp_path / "text.txt").write_text("abc de fgh 中 " * 500)
    tokenizer, cache = str(tmp_path / "vocab.txt"), tmp_path / "cache"
    given = DataConfig(data_path=(str(tmp_path / "text.txt"),), tokenizer=tokenizer, cache_dir=cache)
    run = replace(small_run(), data=replace(given, validation_fraction=0))
    corpus = cut_into_samples(run, *open_text(run, show_progress=False), "tokens")
    if not counted:
        (prefix,) = corpus.store.prefixes
        manifest = PairManifest.read(prefix)
        assert manifest is not None
        replace(manifest, unknown=None).write(prefix)
    lines = startup_summary(run, single_process_topology(), corpus, 1, None).splitlines()
    told = [line for line in lines if line.startswith(("unknown ", "notice: "))]
    case = (
        f"notice: {tokenizer}: 20% of its tokens are never used, because capitals or accents are taken from the text "
        'first (such as "C"); do_lower_case and strip_accents in the tokenizer_config.json beside it say so'
    )
    unknown = "[UNK] is 11.1 % of the tokens; in it 25 % of the words and 11.1 % of the characters are lost"
    lost = (
        "notice: 11.1 % of the characters and 25 % of the words are lost as [UNK], because the vocabulary lacks "
        "characters of theirs; a vocabulary trained on this text, or a larger --vocab-size, keeps more"
    )
    if counted:
        assert [" ".join(line.split()) for line in told] == [f"unknown {unknown}", case, lost]
    else:
        assert told == [case]
