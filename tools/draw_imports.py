#!/usr/bin/env python
"""Draw into docs/architecture.md which package imports which, or check that the drawing is current."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from graphlib import TopologicalSorter
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
DOCUMENT = PROJECT / "docs" / "architecture.md"
BEGIN, END = "<!-- begin: python tools/draw_imports.py -->", "<!-- end -->"

Imports = Mapping[str, frozenset[str]]
"""What each name imports: of modules, or of the packages and single files that modules lie in."""


def module_imports(package: Path) -> dict[str, frozenset[str]]:
    """Read which modules of a package import which others of it, wherever in the file the import stands."""
    files = {_module_name(file, package.parent): file for file in sorted(package.rglob("*.py"))}
    return {name: frozenset(_imported(file, files)) - {name} for name, file in files.items()}


def unit_imports(modules: Imports) -> dict[str, frozenset[str]]:
    """Join modules into what stands directly in the package: its subpackages and its single files."""
    joined: dict[str, set[str]] = {}
    for name, imported in modules.items():
        if "." in name:
            joined.setdefault(_unit(name), set()).update(_unit(other) for other in imported if "." in other)
    return {unit: frozenset(others - {unit}) for unit, others in joined.items()}


def layers(imports: Imports) -> list[list[str]]:
    """Sort names so that each imports from layers below its own only, the lowest first; CycleError for circles."""
    sorter, found = TopologicalSorter(imports), list[list[str]]()
    sorter.prepare()
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        found.append(ready)
        sorter.done(*ready)
    return found


def direct_arrows(imports: Imports) -> list[tuple[str, str]]:
    """List the imports that no chain of other imports implies: few enough to be drawn."""
    below: dict[str, set[str]] = {}
    for name in TopologicalSorter(imports).static_order():
        below[name] = set(imports[name]).union(*(below[other] for other in imports[name]))
    return [
        (name, other)
        for name in sorted(imports)
        for other in sorted(imports[name])
        if not any(other in below[between] for between in imports[name])
    ]


def helpers(imports: Imports, packages: frozenset[str]) -> list[str]:
    """List the single files that import no package: everybody may use them, so they are not drawn."""
    return sorted(name for name, imported in imports.items() if name not in packages and not imported & packages)


def block(package: Path) -> str:
    """Write the picture and the tables of docs/architecture.md."""
    imports = unit_imports(module_imports(package))
    packages = frozenset(name for name in imports if (package / name).is_dir())
    undrawn = helpers(imports, packages)
    drawn = {name: others.difference(undrawn) for name, others in imports.items() if name not in undrawn}
    levels = layers(drawn)
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"    {_label(name, packages)}" for level in reversed(levels) for name in level]
    lines += [f"    {name} --> {other}" for name, other in direct_arrows(drawn)]
    lines += ["```", "", "| layer | | |", "|---|---|---|"]
    for number in range(len(levels), 0, -1):
        lines += [_row(str(number), name, package, packages) for name in levels[number - 1]]
    lines += [_row("", name, package, packages) for name in undrawn]
    return "\n".join([BEGIN, *lines, END])


def redrawn(text: str, package: Path) -> str:
    """Put the block in the place of the one that a document has."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{block(package)}{after}"


def _label(name: str, packages: frozenset[str]) -> str:
    return f"{name}[{name}/]" if name in packages else f"{name}([{name}.py])"


def _row(layer: str, name: str, package: Path, packages: frozenset[str]) -> str:
    file = package / name / "__init__.py" if name in packages else package / f"{name}.py"
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    shown = f"{name}/" if name in packages else f"{name}.py"
    return f"| {layer} | `{shown}` | {docstring.partition(chr(10))[0].removesuffix('.')} |"


def _module_name(file: Path, root: Path) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _unit(module: str) -> str:
    return module.split(".")[1]


def _imported(file: Path, files: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # what is imported from a package may be a module of it
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and node.value in files:
            names = [str(node.value)]  # a module's whole name, to be imported by that
        else:
            continue
        for name in names:
            if name in files:
                yield name
            elif name.rpartition(".")[0] in files:
                yield name.rpartition(".")[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, or with --check compare; the exit code is 1 where the drawing is not current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the drawing is outdated")
    args = parser.parse_args(argv)
    current = DOCUMENT.read_text(encoding="utf-8")
    wanted = redrawn(current, PROJECT / "peer_scale")
    if not args.check:
        DOCUMENT.write_text(wanted, encoding="utf-8")
    elif wanted != current:
        print("error: docs/architecture.md is outdated; run python tools/draw_imports.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
