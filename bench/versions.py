"""Says which software was measured: packages and the commit of the checkout. Needs none of those packages."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import fastconv

CHECKOUT = Path(__file__).resolve().parent.parent


def read_versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of fastconv and of those packages that are installed."""
    found = {"fastconv": fastconv.__version__}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_commit() -> tuple[str, bool]:
    """The commit of the checkout, and whether files differ from it."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit, bool(_git("status", "--porcelain", "--", ".", ":(exclude)bench/results"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(CHECKOUT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
