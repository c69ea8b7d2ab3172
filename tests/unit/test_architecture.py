"""What docs/ says of the code is so: the picture of the imports, the files and names it mentions."""

import ast
import re
from pathlib import Path

import pytest

import draw_imports

PROJECT = Path(__file__).resolve().parents[2]
PACKAGE = PROJECT / "peer_scale"
PAGES = sorted(
    [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *PROJECT.glob("docs/*.md"), *PROJECT.glob("*/README.md")]
)
TO_BE_WRITTEN = {"peer_scale/objectives/smoothed_rtd.py"}  # by who follows docs/adding_an_objective.md


def test_the_drawing_is_current():
    text = draw_imports.DOCUMENT.read_text(encoding="utf-8")
    assert draw_imports.redrawn(text, PACKAGE) == text, "run python tools/draw_imports.py"


@pytest.fixture
def package(tmp_path) -> Path:
    """Three packages over each other, a shortcut from the top to the bottom, an entry and a helper."""
    sources = {
        "__init__.py": "",
        "helper.py": '"""Helps."""',
        "entry.py": "def main():\n    importlib.import_module('pkg.top.run')",
        "top/__init__.py": '"""Top."""',
        "top/run.py": "import pkg.helper\nfrom pkg.middle.one import x\nfrom pkg.bottom import base",
        "middle/__init__.py": "",
        "middle/one.py": "from pkg.bottom.base import y",
        "bottom/__init__.py": "",
        "bottom/base.py": "import os\nfrom pkg.bottom import other",
        "bottom/other.py": "",
    }
    for name, source in sources.items():
        file = tmp_path / "pkg" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return tmp_path / "pkg"


def test_imports_are_read_wherever_they_stand(package):
    modules = draw_imports.module_imports(package)
    assert modules["pkg.entry"] == {"pkg.top.run"}
    assert modules["pkg.top.run"] == {"pkg.helper", "pkg.middle.one", "pkg.bottom.base"}
    assert modules["pkg.bottom.base"] == {"pkg.bottom.other"}
    units = draw_imports.unit_imports(modules)
    assert units["top"] == {"helper", "middle", "bottom"}
    assert units["bottom"] == frozenset()


def test_the_drawing_has_no_arrow_that_others_imply(package):
    assert draw_imports.block(package).splitlines()[1:-1] == [
        "```mermaid",
        "flowchart TD",
        "    entry([entry.py])",
        "    top[top/]",
        "    middle[middle/]",
        "    bottom[bottom/]",
        "    entry --> top",
        "    middle --> bottom",
        "    top --> middle",
        "```",
        "",
        "| layer | | |",
        "|---|---|---|",
        "| 4 | `entry.py` |  |",
        "| 3 | `top/` | Top |",
        "| 2 | `middle/` |  |",
        "| 1 | `bottom/` |  |",
        "|  | `helper.py` | Helps |",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_what_a_page_mentions_is_there(page):
    text = page.read_text(encoding="utf-8")
    missing = [link for link in _links(text) if not (page.parent / link).exists()]
    missing += [path for path in _paths(text) if not (PROJECT / path).exists() and path not in TO_BE_WRITTEN]
    missing += [f"{file}::{name}" for file, name in _names(text) if name not in _defined(PACKAGE / file)]
    assert missing == []


def _links(text: str) -> list[str]:
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("#")]


def _paths(text: str) -> list[str]:
    """Paths from the project's root, in commands and in words."""
    return re.findall(
        r"(?<![\w./-])(?:peer_scale|tools|ds_configs|slurm|tests|examples)/[\w/]*\w+\.(?:py|json|sh|yaml|md)\b", text
    )


def _names(text: str) -> list[tuple[str, str]]:
    return re.findall(r"`([\w/]+\.py)::([\w.]+)`", text)


def _defined(file: Path) -> set[str]:
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names
