"""The ds_configs that come with the package, found from any folder and in an installed wheel as well."""

from pathlib import Path

from peer_scale.errors import UserError

_FOLDER = Path(__file__).resolve().parent.parent / "ds_configs"


def find_ds_config(path: Path) -> Path:
    """Find a ds_config: the file itself or, where there is none, the shipped one that `path` means.

    That is `zero2`, `zero2.json` or `ds_configs/zero2.json`; a folder called so, of a run's output maybe, hides none.

    Raises:
        UserError: there is neither.
    """
    if path.exists() and not path.is_dir():
        return path
    shipped = {file.stem: file for file in sorted(_FOLDER.glob("*.json"))}
    if path.parent in (Path(), Path("ds_configs")) and path.suffix in ("", ".json") and path.stem in shipped:
        return shipped[path.stem]
    if path.exists():
        return path
    raise UserError(f"--deepspeed_config {path}: no such file; shipped are {', '.join(shipped)}")
