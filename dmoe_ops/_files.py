"""Files that others wrote, and files that a command leaves behind: what is wrong with one is a ValueError of one line."""

from __future__ import annotations

import json
from pathlib import Path


def is_file(path: Path) -> bool:
    """False also for what no file system takes as a name."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def short(name) -> str:
    """A name for a message of one line, cut in the middle where it is long."""
    text = str(name)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"


def read_json(path: Path):
    """Raises ValueError, naming the file, when it can't be read or holds no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{short(path)}: {error.strerror}") from None
    except RecursionError:
        raise ValueError(f"{short(path)} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{short(path)} is not valid JSON: {error}") from None


def check_writable(path: Path) -> None:
    """Raises ValueError, naming the file, unless it can be written. Leaves what is there as it is."""
    try:
        there = path.exists()
        with open(path, "ab"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{short(path)} can't be written: {error.strerror}") from None
