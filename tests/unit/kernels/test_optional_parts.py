"""Optional packages are known by what they offer: stand-ins of every kind on the path."""

import sys

import pytest
import torch

from peer_scale.kernels.optional_parts import PARTS, describe_part, offered, optional_parts

CUDA = torch.device("cuda")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts a package with one module of this text, and a version, where imports find it."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(part, text):
        *parents, last = part.module.split(".")
        folder = tmp_path
        for name in parents:
            folder /= name
            folder.mkdir()
            (folder / "__init__.py").write_text("")
        (folder / f"{last}.py").write_text(text)
        info = tmp_path / f"{part.distribution.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {part.distribution}\nVersion: 1.5\n")

    yield install
    for name in [name for name in sys.modules if name.split(".")[0] in {part.module.split(".")[0] for part in PARTS}]:
        del sys.modules[name]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.distribution)
def test_what_is_there_is_known_by_its_offer(part, installed):
    installed(part, f"{part.offer} = 7")
    assert offered(part) == 7
    state = describe_part(part, CUDA)
    assert state.startswith(f"{part.name} 1.5 is ")
    assert ("is used" in state) == (part.name == "flash-attn")
    assert "is used" not in describe_part(part, torch.device("cpu"))


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.distribution)
@pytest.mark.parametrize(
    "text", ["", "raise OSError('libcudart.so:\\n no such file')", "import no_such_module_of_ours"]
)
def test_another_package_of_that_name_or_a_broken_one(part, text, installed):
    installed(part, text)
    with pytest.raises(ImportError):
        offered(part)
    state = describe_part(part, CUDA)
    assert state.startswith(f"{part.distribution} 1.5 is not {part.name}, or broken: no {part.offer} (")
    assert "\n" not in state


def test_what_is_not_there():
    said = optional_parts(CUDA).split("; ")
    assert len(said) == len(PARTS)
    assert all(state.startswith((part.name, part.distribution)) for part, state in zip(PARTS, said, strict=True))
