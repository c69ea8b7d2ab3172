import importlib
import inspect
from pathlib import Path

import pytest

from peer_scale.quiet import silence_libraries

silence_libraries()

from rank_pool import RankPool  # noqa: E402  (after the libraries have been told to be quiet)

_DOCUMENTED = (
    "argparse",
    "logging",
    "unittest.mock",
    "typing",
    "inspect",
    "subprocess",
    "pathlib",
    "datetime",
    "decimal",
)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Real English: a document of docstrings for each of some standard modules, again and again in slices."""
    documents = []
    for name in (
        *_DOCUMENTED,
        "statistics",
        "tarfile",
        "zipfile",
        "socket",
        "threading",
        "difflib",
        "turtle",
        "email.message",
    ):
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


@pytest.fixture(scope="session")
def one_rank():
    with RankPool(1) as pool:
        yield pool


@pytest.fixture(scope="session")
def two_ranks():
    with RankPool(2) as pool:
        yield pool
