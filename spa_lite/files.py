"""Files that survive a crash: whole or not there, on the disk before anybody relies on them.

All bytes of a run pass through `write`, `sync` and `move`: a test stops the program inside each of them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from spa_lite.errors import RunError


def write(path: Path, content: bytes, at: int = 0, durable: bool = True) -> None:
    """Write bytes from position `at` on, cut what lies behind them, and (if `durable`) wait until the disk has them."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.ftruncate(descriptor, at)
        os.lseek(descriptor, at, os.SEEK_SET)
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Give a file or folder its final name; a file or folder of that name is replaced."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    if target.exists() and source.samefile(target):  # two names of one file: the system would leave both
        source.unlink()
    else:
        source.replace(target)
    sync(target.parent)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a whole file or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary, content)
    move(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, whole or not at all."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises RunError naming the file if it is not whole."""
    try:
        return msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged ({error}); delete it and run the same command again") from None


def sync_tree(folder: Path) -> None:
    """Wait until everything below a folder is on the disk: for files that a library wrote."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def digest_file(path: Path) -> str:
    """Checksum of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_bytes(content: bytes) -> str:
    """The same for bytes in memory."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


WHOLE = 64 * 2**20
"""Files of weights up to this size are digested whole."""


def feed(hasher: Any, path: Path) -> None:
    """Digest a file of weights: whole, or, if it is large, its header and 64 blocks spread over it."""
    size = path.stat().st_size
    hasher.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        if size <= WHOLE:
            hasher.update(file.read())
            return
        header = int.from_bytes(file.read(8), "little")
        hasher.update(file.read(min(header, WHOLE)))
        for block in range(64):
            file.seek(block * (size - 65536) // 63)
            hasher.update(file.read(65536))


def digest_of_weights(path: Path) -> str:
    """Digest of a model that is one file, whatever its name."""
    hasher = hashlib.blake2b(digest_size=16)
    feed(hasher, path)
    return hasher.hexdigest()


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Checksum of every file among `names`, those in folders included, by its path inside `folder`."""
    files = [path for name in names for path in _files(folder / name)]
    return {path.relative_to(folder).as_posix(): digest_file(path) for path in files}


def share(source: Path, target: Path) -> None:
    """The same file under a second name, without a second copy where the file system can do that."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(file.stat().st_size for file in _files(path))


def _files(path: Path) -> Sequence[Path]:
    if path.is_dir() and not path.is_symlink():
        return sorted(p for p in path.rglob("*") if p.is_file())
    return [path] if path.exists() else []


def lines_of(path: Path) -> list[bytes]:
    """The lines of a JSON-lines file; nothing if there is no file."""
    return path.read_bytes().splitlines() if path.exists() else []
