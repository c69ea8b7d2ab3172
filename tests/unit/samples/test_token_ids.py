"""A token id that the vocabulary does not have: found wherever it is, and said alike on every layout."""

import numpy as np
import pytest

from peer_scale.corpus.store import TokenStore
from peer_scale.corpus.wordpiece import train_wordpiece
from peer_scale.errors import UserError
from peer_scale.parallel.coordination import RankCoordinator
from peer_scale.samples.examples import ExampleBuilder
from peer_scale.samples.loader import ExampleDataset, micro_batches
from peer_scale.samples.masking import MaskingConfig
from peer_scale.samples.shares import BatchPlan
from peer_scale.samples.split import Part, split_text
from peer_scale.samples.windows import Windows
from runs import pretrain, torchrun, train_in_pool
from token_files import write_index, write_pair

pytestmark = pytest.mark.heavy

NUM_DOCUMENTS, LENGTH = 300, 90
BAD_IDS = [(np.uint16, 30_522), (np.uint16, 65_535), (np.int32, -1), (np.int32, -5), (np.int32, 2**31 - 1)]


@pytest.fixture(scope="module")
def vocabulary():
    return train_wordpiece(["the quick brown fox jumps over the lazy dog " * 20, "pack my box"], 200)


def documents(seed=0, num_documents=NUM_DOCUMENTS):
    return list(np.random.default_rng(seed).integers(5, 60, (num_documents, LENGTH)))


def line(prefix, document, token, id_, size):
    return (
        f"{prefix}.bin: document {document}, token {token} (both counted from 0) has id {id_}, "
        f"which is outside the tokenizer's vocabulary of {size}"
    )


def faults_of(dataset, plan=None, num_workers=0):
    plan = plan or BatchPlan(8, 4)
    steps = len(dataset) // plan.global_batch + 1
    found = micro_batches(dataset, plan, first_step=0, last_step=steps, num_workers=num_workers)
    return [step.fault for step in found]


@pytest.mark.parametrize(("dtype", "id_"), BAD_IDS)
@pytest.mark.parametrize(("document", "token"), [(0, 0), (17, 44), (123, 45), (NUM_DOCUMENTS - 1, LENGTH - 1)])
def test_it_is_found_wherever_it_is(tmp_path, dtype, id_, document, token):
    texts = documents()
    texts[document][token] = id_
    store = TokenStore.open([write_pair(tmp_path / "own", texts, dtype)])
    windows = Windows(store, Part(0, NUM_DOCUMENTS), width=45)
    bad = 2 * document + token // 45
    for window in {0, bad - 1, bad + 1, len(windows) - 1} & set(range(len(windows))) - {bad}:
        windows.tokens(window, 30_522)
    with pytest.raises(UserError) as error:
        windows.tokens(bad, 30_522)
    assert str(error.value) == line(tmp_path / "own", document, token, id_, 30_522)


def test_the_vocabularys_last_id_is_one_of_it(tmp_path):
    store = TokenStore.open([write_pair(tmp_path / "own", [np.array([0, 30_521])], np.uint16)])
    assert Windows(store, Part(0, 1), width=45).tokens(0, 30_522).tolist() == [0, 30_521]


def test_the_place_is_that_in_the_users_own_file(tmp_path):
    """In a second pair, in a document of several sequences, after a cut, beside empty documents."""
    write_pair(tmp_path / "first", documents(num_documents=7), np.uint16)
    write_index(tmp_path / "second.idx", np.array([50, 0, 50, 100]), np.int32, bounds=np.array([0, 0, 3, 3, 4]))
    ids = np.full(200, 7, np.int32)
    ids[[93, 180]] = -1, 2000
    ids.tofile(tmp_path / "second.bin")
    store = TokenStore.open([str(tmp_path / "first"), str(tmp_path / "second")])
    assert store.document_lengths(7, 11).tolist() == [0, 100, 0, 100]
    trained, held_out = (Windows(store, part, width=30) for part in split_text(store, 0.07, "tokens"))
    assert held_out.part == Part(10, 11, skip=42)

    def lines(windows):
        found = []
        for window in range(len(windows)):
            try:
                windows.tokens(window, 1000)
            except UserError as error:
                found.append(str(error))
        return found

    assert lines(trained) == [line(tmp_path / "second", 1, 93, -1, 1000)]
    assert lines(held_out) == [line(tmp_path / "second", 3, 80, 2000, 1000)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_layout_of_the_ranks_names_the_same_sample(tmp_path, vocabulary, num_workers):
    texts = documents(num_documents=40)
    for document, token in ((3, 5), (18, 60), (33, 1)):
        texts[document][token] = 60_000 + document
    store = TokenStore.open([write_pair(tmp_path / "own", texts, np.uint16)])
    windows = Windows(store, Part(0, 40), width=61)
    dataset = ExampleDataset(windows, ExampleBuilder(vocabulary, MaskingConfig(), 64, seed=1))
    alone = faults_of(dataset, num_workers=num_workers)
    found = [fault for fault in alone if fault]
    assert {fault.message for fault in found} <= {
        line(tmp_path / "own", *at, vocabulary.vocab_size) for at in ((3, 5, 60_003), (18, 60, 60_018), (33, 1, 60_033))
    }
    for step, fault in enumerate(alone):
        bad = []
        for sample in range(8 * step, 8 * (step + 1)):
            try:
                dataset[sample]
            except UserError:
                bad.append(sample)
        assert (fault.sample if fault else None) == min(bad, default=None)
    if num_workers == 0:
        ranks = [
            faults_of(dataset, BatchPlan(8, 2, data_parallel_rank=rank, data_parallel_size=2)) for rank in range(2)
        ]
        assert [min((f for f in step if f), default=None) for step in zip(*ranks, strict=True)] == alone
        assert any((one is None) != (other is None) for one, other in zip(*ranks, strict=True)), (
            "it is on one rank alone"
        )


def test_a_stand_in_is_an_example_like_others(vocabulary):
    builder = ExampleBuilder(vocabulary, MaskingConfig(), 64, seed=1, num_extra_uniforms=2)
    example, stand_in = builder.build(np.arange(5, 30), 7), builder.stand_in(7)
    assert [field.dtype for field in stand_in] == [field.dtype for field in example]
    assert [field.shape for field in stand_in] == [(3,), (3,), (3,), (1,), (1,), (1, 2)], "it has something to predict"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, vocabulary):
    """Give the flags of runs on text of which one id in the part that is named has wrapped to a negative number."""
    folder = tmp_path_factory.mktemp("damaged")
    vocabulary.save(folder / "tokenizer")

    def flags(part, *more):
        name = folder / part
        (text,) = np.random.default_rng(0).integers(5, 60, (1, 3000))
        place = 2000 if part == "trained" else 2990  # beyond what is looked at when a run starts
        text[place] = -7
        write_pair(name, [text], np.int32)
        where = ("--data-path", name, "--tokenizer", folder / "tokenizer", "--micro-batch-size", 2)
        size = ("--model", "bert-tiny", "--num-layers", 2, "--hidden-size", 16, "--ffn-hidden-size", 32)
        found = [*where, *size, "--num-attention-heads", 2, "--fp32", "--global-batch-size", 8, *more]
        return list(map(str, found)), line(name, 0, place, -7, vocabulary.vocab_size)

    return flags


def refusal_in_pool(flags, *options):
    """Run by every rank of a pool: give the line by which a run ends, and whether all ranks are still in step."""
    try:
        train_in_pool([*flags, *options])
    except UserError as error:
        return str(error), len(set(RankCoordinator().exchange(str(error)))) == 1
    return None


LAYOUTS = {
    "one rank": (1, ()),
    "data parallel": (2, ()),
    "tensor parallel": (2, ("--tensor-model-parallel-size", "2")),
    "pipeline parallel": (2, ("--pipeline-model-parallel-size", "2")),
}


@pytest.mark.parametrize(("num_ranks", "options"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("part", ["trained", "held out"])
def test_all_ranks_end_by_the_same_line(rank_pools, damaged, tmp_path, num_ranks, options, part):
    log, save = tmp_path / "log", tmp_path / "save"
    more = ("--train-iters", 20, "--save", save, "--save-interval", 1, "--log-dir", log)
    validation = ("--eval-interval", 2, "--eval-iters", 2) if part == "held out" else ()
    flags, expected = damaged(part, *more, *validation)
    found = rank_pools.of(num_ranks).run(refusal_in_pool, flags, *options)
    assert found == [(expected, True)] * num_ranks
    steps = (log / "metrics.jsonl").read_text().count("\n")
    assert steps < 7, "an epoch has 49 samples"
    saved = sorted(int(path.name.removeprefix("step_")) for path in save.glob("step_*"))
    assert saved == list(range(1, steps + 1))[-3:], "all that was saved, and nothing learned from a stand-in"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "num_workers"), [("one rank", 0), ("data parallel", 1), ("pipeline parallel", 1)], ids=str
)
def test_a_user_sees_one_line_and_code_2(damaged, layout, num_workers):
    num_ranks, options = LAYOUTS[layout]
    flags, expected = damaged("trained", "--train-iters", 20, "--num-workers", num_workers)
    done = pretrain(*flags, *options, launcher=torchrun(num_ranks) if num_ranks > 1 else (), timeout=120)
    if num_ranks == 1:
        assert (done.returncode, done.stderr) == (2, f"error: {expected}\n")
    else:
        assert "exitcode  : 2" in done.stderr
        assert done.stderr.count(expected) == done.stderr.count("error: /") == 1
        assert done.stderr.count("Traceback (most") == 1, "the launcher's own, after each failure"
