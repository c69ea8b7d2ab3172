"""What the README's first command trains learns: minutes on the built-in text, then a look at its ranks and labels."""

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
from runs import read_metrics, run_trainer

SEQ_LENGTH, SHOWN = 64, 0.15


def scores_and_labels(checkpoint, store, tokenizer, num_samples=3072):
    """Score and rank label at each selected position of freshly masked samples."""
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


def unigram_entropy(store, num_documents=2000):
    """In nats per token, of the store's own frequencies."""
    lengths = store.document_lengths(0, min(num_documents, store.num_documents))
    tokens = np.concatenate([store.read(number, 0, int(length)) for number, length in enumerate(lengths)])
    shares = np.bincount(tokens) / len(tokens)
    return float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_run_learns(tmp_path):
    """No flag but where things go: words from their neighbours, replaced from original tokens, and their ranks."""
    cache = tmp_path / "cache"
    flags = ("--cache-dir", cache, "--log-dir", tmp_path / "log", "--save", tmp_path / "save")
    done = run_trainer(*flags, timeout=800)
    assert done.returncode == 0, done.stderr
    metrics = read_metrics(tmp_path / "log")
    checkpoint = read_checkpoint(tmp_path / "save")
    store, tokenizer = open_corpus(
        ["builtin"], None, vocab_size=checkpoint.model.vocab_size, text_key="text", cache_dir=cache, workers=1
    )
    assert tokenizer.digest == checkpoint.tokenizer.digest

    last = metrics[-200:]
    # what is shown costs something too: the loss of the masked tokens alone is at most this
    masked = float(np.mean([line["mlm_loss"] for line in last])) / (1 - SHOWN)
    auc = float(np.mean([line["rtd_auc"] for line in last]))
    entropy = unigram_entropy(store)
    print(f"masked tokens: {masked:.2f} nats at most, word frequencies: {entropy:.2f}; RTD AUC {auc:.3f}")
    assert masked < entropy - 0.5
    assert auc > 0.70

    unknown = [line["rank_label_fractions"]["-1"] for line in metrics]
    tenths = [float(np.mean(part)) for part in np.array_split(unknown, 10)]
    print("share of label -1, tenth by tenth:", [round(share, 3) for share in tenths])
    assert tenths[-1] < tenths[4] < tenths[1] < tenths[0]

    scores, labels = scores_and_labels(checkpoint, store, tokenizer)
    in_order = share_in_order(scores, labels, low=1, high=2)
    print(f"labels 1 and K-1 in order: {in_order:.3f} of the pairs")
    assert in_order > 0.6
