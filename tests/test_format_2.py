"""A checkpoint of format 2, which an earlier version wrote, loads and goes on with the numbers that version gave."""

import hashlib
import json
from pathlib import Path

import pytest

from peer_scale.commands import convert
from runs import ds_config, train_in_pool

SAVED = Path(__file__).parent / "data/format_2"  # after 4 of 12 steps, by 2 ranks under ZeRO-3

# The steps that the earlier version took from there, in one process under ZeRO-2.
LOSSES = {
    5: (46.92633208773153, 6.190444343968442, 0.8147177548752618),
    6: (46.81871476125344, 6.180972049110814, 0.8127548542428524),
    7: (46.781698733180974, 6.1821407939112465, 0.8119911587853946),
    8: (46.73694362640381, 6.164447212219239, 0.8114499282836914),
    9: (46.76022653593277, 6.182416348843961, 0.8115562037417763),
    10: (46.6807601194994, 6.171629052413137, 0.8101826213417253),
    11: (46.65131016781456, 6.155076277883429, 0.8099246777986225),
    12: (46.635619514866875, 6.16361497577868, 0.8094400907817639),
}
# SHA-256 of the files that the earlier version's to-hf wrote.
CONVERTED = {
    "ranker": "27d9262df3736707b7ccd44ba9fb20616e2724aa04773bc5bf15e37c59439fac",
    "generator": "06677aa37a1817931a2c6f6182872cabaa92eb93962cee7f22b76a3ddb1e36a0",
}


def write_text(path: Path) -> None:
    """Sentences of made-up words from a linear congruential generator: the same bytes everywhere."""
    state = 2024

    def draw(limit):
        nonlocal state
        state = (1103515245 * state + 12345) % 2**31
        return (state >> 8) % limit

    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = ["".join(syllables[draw(len(syllables))] for _ in range(1 + draw(3))) for _ in range(300)]
    documents = []
    for _ in range(120):
        sentences = []
        for _ in range(1 + draw(8)):
            sentences.append(" ".join(words[min(draw(300), draw(300))] for _ in range(4 + draw(9))) + ".")
        documents.append(" ".join(sentences))
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")


def test_it_goes_on_with_the_losses_of_the_version_that_wrote_it(one_rank, tmp_path):
    write_text(tmp_path / "made_up.txt")
    flags = [
        *("--model", "peer-tiny", "--num-layers", 2, "--generator-num-layers", 2, "--num-shared-layers", 1),
        *("--hidden-size", 16, "--ffn-hidden-size", 32, "--num-attention-heads", 2),
        *("--max-position-embeddings", 32, "--seq-length", 32, "--data-path", tmp_path / "made_up.txt"),
        *("--tokenizer", SAVED / "tokenizer", "--cache-dir", tmp_path / "cache", "--train-iters", 12),
        *("--lr-warmup-iters", 2, "--global-batch-size", 8, "--micro-batch-size", 4, "--fp32"),
        *("--warmup-epochs", 0.05, "--mask-fraction", 0.2, "--mask-probability", 0.85),
        *("--deepspeed_config", ds_config(tmp_path, 2), "--log-dir", tmp_path / "log"),
        *("--load", SAVED, "--save", tmp_path / "save"),
    ]
    metrics = one_rank.run(train_in_pool, list(map(str, flags)))[0]
    found = {line["step"]: (line["loss"], line["mlm_loss"], line["tqr_loss"]) for line in metrics}
    assert found.keys() == LOSSES.keys()
    for step, losses in LOSSES.items():
        assert found[step] == pytest.approx(losses, rel=1e-6), step

    (step,) = (tmp_path / "save").glob("step_*")
    saved, again = (json.loads((folder / "peer_scale.json").read_text()) for folder in (SAVED, step))
    assert (saved["format_version"], again["format_version"]) == (2, 3)
    assert again["objective"]["kind"] == "tqr" and again["masking"] == {"mask_fraction": 0.2, "mask_probability": 0.85}
    assert saved["tensors"].keys() == again["tensors"].keys()
    assert again["data"]["split"] == "documents", "it trains on nothing that the earlier version held out"


@pytest.mark.parametrize("branch", CONVERTED)
def test_it_is_converted_to_the_same_bytes(branch, tmp_path):
    arguments = ("to-hf", "--load", str(SAVED), "--branch", branch, "--output", str(tmp_path / "hf"))
    assert convert.main(arguments) == 0
    content = (tmp_path / "hf/model.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == CONVERTED[branch]


def test_it_is_looked_into_and_cut_anew(capfd, tmp_path):
    assert convert.main(["verify", "--load", str(SAVED)]) == 0
    cut = ("--tensor-model-parallel-size", "2", "--num-files", "4")
    assert convert.main(["reshape", "--load", str(SAVED), "--output", str(tmp_path / "out"), *cut]) == 0
    assert "bit for bit" in capfd.readouterr().out
    assert convert.main(["inspect", "--load", str(tmp_path / "out")]) == 0
    assert "num_files 4" in capfd.readouterr().out
