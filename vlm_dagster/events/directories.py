"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from vlm_dagster.errors import StorageError, VlmError

__all__ = ["alone", "building", "put_in_place"]


def _prefix(target: Path) -> str:
    return f".{target.name}.building-{socket.gethostname()}-"


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target` to build it in; `put_in_place` moves it there.

    The folder is removed at the end in any case. What killed processes of this machine left
    behind is removed first.
    """
    prefix = _prefix(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f"{glob.escape(prefix)}*"):
            if not _is_alive(left.name.removeprefix(prefix).partition("-")[0]):
                shutil.rmtree(left, ignore_errors=True)
        folder = target.parent / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
        folder.mkdir()
    except OSError as error:
        raise StorageError(str(target), "making a folder beside it", error) from error
    try:
        yield folder
    except VlmError:  # some of them are OSErrors too, and they already say what happened
        raise
    except OSError as error:
        raise StorageError(str(target), "writing files", error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def alone(target: Path) -> Iterator[None]:
    """One process of this machine at a time may look at and replace `target`. The lock is on the
    folder above it, so it leaves no file behind, and it goes with the process that held it."""
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: renaming is still whole
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


def put_in_place(folder: Path, target: Path) -> None:
    """Move a finished folder to `target`, replacing what is there."""
    for file in folder.rglob("*"):
        if file.is_file():
            _sync(file)
    _sync(folder)
    old = folder.with_name(folder.name + "-old")
    with contextlib.suppress(FileNotFoundError):
        target.rename(old)
    try:
        folder.rename(target)
    except BaseException:
        with contextlib.suppress(OSError):  # whoever came first keeps the place
            old.rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
