"""Build a model folder once, however many processes ask for it at the same time."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def default_root() -> Path:
    """The user's cache folder for this project, by the XDG rules."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "epd-serve"


def version_of(*more: Path) -> str:
    """Twelve hex digits that change with any source file of this package, or of `more`."""
    digest = hashlib.sha256()
    for source in (*sorted(Path(__file__).parent.glob("*.py")), *more):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Return `target`, a folder that `build` has filled completely.

    `build` fills a temporary folder beside `target`, which is then renamed: `target` never exists half made. When
    several processes race, each builds, one rename wins and the others take its result; a recipe has to give the
    same bytes every time for that to be right.
    """
    target = target.absolute()
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        scratch.chmod(0o755)  # mkdtemp gives 0o700, and a shared cache is read by other users
        build(scratch)
        scratch.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise the rename lost the race, and the winner's folder is as good
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
