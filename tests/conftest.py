import importlib
import inspect
import subprocess
from pathlib import Path

import pytest

from peer_scale.quiet import silence_libraries

silence_libraries()

# after the libraries have been told to be quiet
from corpus_files import copy_pair, write_raw_text  # noqa: E402
from peer_scale.commands import convert  # noqa: E402
from peer_scale.corpus.prepare import preprocess  # noqa: E402
from peer_scale.corpus.readers import iter_documents  # noqa: E402
from peer_scale.corpus.wordpiece import WordPiece, train_wordpiece  # noqa: E402
from rank_pool import RankPools  # noqa: E402

_DOCUMENTED = (
    "argparse logging unittest.mock typing inspect subprocess pathlib datetime decimal statistics "
    "tarfile zipfile socket threading difflib turtle email.message"
)


def pytest_collection_modifyitems(items):
    """Mark what needs ranks, so that `make fast` leaves it out."""
    for item in items:
        if "rank_pools" in item.fixturenames:
            item.add_marker(pytest.mark.heavy)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Real English: for each of some standard modules a document of its docstrings."""
    documents = []
    for name in _DOCUMENTED.split():
        module = importlib.import_module(name)
        docs = [inspect.getdoc(module) or ""]
        for _, member in sorted(vars(module).items(), key=lambda item: item[0]):
            if inspect.isclass(member) or inspect.isfunction(member):
                docs.append(inspect.getdoc(member) or "")
                if inspect.isclass(member):
                    docs += [inspect.getdoc(m) or "" for m in vars(member).values() if inspect.isfunction(m)]
        documents.append(" ".join(" ".join(docs).split()))
    path = tmp_path_factory.mktemp("text") / "documents.txt"
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def refusal(capfd, tmp_path):
    """Run the tool on what it must refuse; gives the one line. Nothing may be left behind."""

    def run(*arguments):
        assert convert.main(list(map(str, arguments))) == 2
        captured = capfd.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1, captured.err
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*")), "nothing half-written stays"
        return captured.err

    return run


@pytest.fixture
def run(capfd):
    """Run the conversion tool on what it must do; gives what it says."""

    def run(*arguments):
        code = convert.main(list(map(str, arguments)))
        captured = capfd.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run


@pytest.fixture
def mount_disk(tmp_path):
    """Mount a small disk, of a size as `mount` writes it; gives its folder. Skips where that is not allowed."""
    mounted = []

    def mount(size: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def wordpiece(text_file) -> WordPiece:
    return train_wordpiece(iter_documents([str(text_file)]), 1000)


@pytest.fixture(scope="module")
def raw(tmp_path_factory, text_file) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_raw_text(folder, text_file.read_text())
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory, raw, wordpiece) -> str:
    prefix = str(tmp_path_factory.mktemp("pair") / "corpus")
    preprocess([str(raw)], wordpiece, prefix, workers=2, part_bytes=50_000)
    return prefix


@pytest.fixture
def copy(tmp_path, pair) -> str:
    return copy_pair(pair, tmp_path)


@pytest.fixture(scope="session")
def rank_pools():
    with RankPools() as pools:
        yield pools


@pytest.fixture(autouse=True)
def young_ranks(request):
    """Start new ranks now and then, since runs leave threads behind."""
    pools = request.getfixturevalue("rank_pools") if "rank_pools" in request.fixturenames else None
    yield
    if pools is not None:
        pools.renew()


@pytest.fixture(scope="session")
def one_rank(rank_pools):
    return rank_pools.of(1)


@pytest.fixture(scope="session")
def two_ranks(rank_pools):
    return rank_pools.of(2)


@pytest.fixture(scope="session")
def four_ranks(rank_pools):
    return rank_pools.of(4)
