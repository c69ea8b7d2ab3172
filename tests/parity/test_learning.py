"""The objective learns what it claims: minutes of training on real text, then a look at ranks and labels."""

import numpy as np
import pytest
import torch

from peer_scale.checkpoints.reader import our_weights, read_checkpoint
from peer_scale.corpus.prepare import open_corpus
from peer_scale.objectives.task import PretrainingTask
from peer_scale.objectives.tqr import corrupted_ids
from peer_scale.objectives.works import GlobalCounts, StepInfo, WorkContext
from peer_scale.parallel.topology import single_process_topology
from peer_scale.samples.examples import NUM_SPECIAL_TOKENS, ExampleBuilder, collate
from peer_scale.samples.loader import ExampleDataset
from peer_scale.samples.masking import MaskingConfig
from peer_scale.samples.split import Part
from peer_scale.samples.windows import Windows
from runs import pretrain, read_metrics

VOCAB_SIZE, SEQ_LENGTH, STEPS = 1000, 64, 2500


def scores_and_labels(save, cache, text_file, num_samples=3072):
    """Score and rank label at each selected position of freshly masked samples."""
    checkpoint = read_checkpoint(save)
    store, tokenizer = open_corpus(
        [str(text_file)], None, vocab_size=VOCAB_SIZE, text_key="text", cache_dir=cache, workers=1
    )
    assert tokenizer.digest == checkpoint.tokenizer.digest
    task = PretrainingTask(checkpoint.model, checkpoint.objective, single_process_topology().tensor_parallel).eval()
    task.model.load_state_dict({name: our_weights(checkpoint, name) for name in checkpoint.weights})
    windows = Windows(store, Part(0, store.num_documents), width=SEQ_LENGTH - NUM_SPECIAL_TOKENS)
    samples = ExampleDataset(windows, ExampleBuilder(tokenizer, MaskingConfig(), SEQ_LENGTH, seed=99))
    step = StepInfo(GlobalCounts(torch.ones(()), torch.ones(())))
    scores, labels = [], []
    for first in range(0, num_samples, 64):
        batch = collate([samples[number] for number in range(first, first + 64)]).to(torch.device("cpu"))
        with torch.no_grad():
            _, _, values = task(("generator", "mlm_head"), batch, step)
            ids = corrupted_ids(WorkContext(task.model, batch, values, warmup=False))
            hidden = task.model.encode("ranker", ids, batch.token_types, batch.sequences)
            score = task.model.head("ranking_head")(hidden)[0]
        scores.append(score[batch.positions])
        labels.append(values["labels"])
    return torch.cat(scores).numpy(), torch.cat(labels).numpy()


def share_in_order(scores, labels, low, high):
    """Share of pairs of one token of each label of which the better has the greater score; 0.5 is chance."""
    worse, better = scores[labels == low], scores[labels == high]
    assert min(len(worse), len(better)) > 50
    return float((better[:, None] > worse[None, :]).mean())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ranks_are_learned_and_unknown_labels_get_fewer(tmp_path, text_file):
    config = tmp_path / "small.yaml"
    config.write_text("model:\n  init_std: 0.05\n")  # a narrow model starts faster from larger weights
    done = pretrain(
        *("--config", config, "--data-path", text_file, "--cache-dir", tmp_path / "cache", "--vocab-size", VOCAB_SIZE),
        *("--seq-length", SEQ_LENGTH),
        *("--train-iters", STEPS, "--warmup-epochs", 2, "--lr", 1e-3, "--lr-warmup-iters", 100, "--num-workers", 0),
        *("--log-dir", tmp_path / "log", "--save", tmp_path / "save"),
        timeout=1400,
    )
    assert done.returncode == 0, done.stderr
    metrics = read_metrics(tmp_path / "log")
    unknown = [line["rank_label_fractions"]["-1"] for line in metrics]
    tenths = [float(np.mean(unknown[start : start + STEPS // 10])) for start in range(0, STEPS, STEPS // 10)]
    print("share of label -1, tenth by tenth:", [round(share, 3) for share in tenths])
    assert tenths[-1] < tenths[4] < tenths[1] < tenths[0]
    assert tenths[-1] < tenths[0] - 0.03

    scores, labels = scores_and_labels(tmp_path / "save", tmp_path / "cache", text_file)
    in_order = share_in_order(scores, labels, low=1, high=2)
    print(f"labels 1 and K-1 in order: {in_order:.3f} of the pairs")
    assert in_order > 0.65
