"""The arrows between packages: no circle, and none that runs back up."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "peer_scale"
# each may import what stands before it
LAYERS = (
    *(
        "errors",
        "sequences",
        "configuration",
        "seeds",
        "storage",
        "folder_lock",
        "quiet",
        "host_memory",
        "lifetime",
        "kernels",
        "corpus",
        "samples",
    ),
    *(
        "parallel",
        "models",
        "objectives",
        "flops",
        "settings",
        "reporting",
        "pipeline",
        "planning",
        "checkpoints",
        "conversion",
        "training",
        "finetuning",
        "doctor",
        "experiments",
    ),
    *("commands", "pretrain", "finetune", "cli"),
)


def modules() -> dict[str, Path]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in paths}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE.name:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE.name}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import escapes this test"
    return found & known.keys()


GRAPH = {name: imports(path, modules()) for name, path in modules().items()}


def layer(module: str) -> int:
    return LAYERS.index(module.split(".")[1])


def test_every_module_has_its_layer():
    assert {name.split(".")[1] for name in GRAPH if name.count(".")} - {"__init__"} <= set(LAYERS)


@pytest.mark.parametrize("module", [name for name in GRAPH if not name.endswith("__init__")])
def test_no_import_runs_back_up(module):
    assert [other for other in GRAPH[module] if layer(other) > layer(module)] == []


def test_no_circles():
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join((*way, module))}"
        if module not in done:
            for other in sorted(GRAPH[module]):
                visit(other, (*way, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


def test_the_arrows_are_read_at_all():
    assert GRAPH["peer_scale.models.networks"] >= {"peer_scale.models.layers", "peer_scale.parallel.sequence"}
    assert sum(map(len, GRAPH.values())) > 200


def test_losses_are_named_by_objectives_only():
    sources = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "tools").glob("*.py")]
    losses = ("mlm_loss", "tqr_loss", "rtd_loss", "mws_loss")
    naming = [path for path in sources if any(name in path.read_text(encoding="utf-8") for name in losses)]
    assert naming
    assert {path.parent.name for path in naming} == {"objectives"}
