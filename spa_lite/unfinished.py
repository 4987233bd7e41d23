"""Work on one file that may be interrupted: it lies in `FILE.part/`, and the file appears when all of it is there.

What the work is made from is written down when it is begun. Going on with something else is refused by name.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from spa_lite import files
from spa_lite.errors import RunError
from spa_lite.lock import locked

BEGUN = "begun.json"
EARLY = {BEGUN, f".{BEGUN}.tmp", ".lock"}
"""What may lie in a folder of unfinished work before it says what it is made from."""


def part_of(output: Path) -> Path:
    """Where unfinished work on a file lies."""
    return output.with_name(f"{output.name}.part")


@contextmanager
def unfinished(
    output: Path, identity: Callable[[Path], dict[str, Any]], fresh: bool = False, early: Collection[str] = ()
) -> Iterator[Path]:
    """The folder of work on a file, new or as an interrupted call left it; nobody else works in it meanwhile.

    `identity` tells all that the work depends on, by name; it may put files named `early` into the folder before.
    Raises RunError if the file cannot be written, or if what lies there was made from something else, unless `fresh`.
    """
    if output.is_dir():
        raise RunError(f"cannot write {output}: it is a folder; name a file with -o")
    part = part_of(output)
    try:
        if fresh and (part / BEGUN).exists():
            with locked(part):
                shutil.rmtree(part)
        part.mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write {output}: {error.strerror}; check the path given with -o") from error
    with locked(part):
        made = sorted(path.name for path in part.iterdir() if path.name not in {*EARLY, *early})
        if not (part / BEGUN).exists() and made:
            raise RunError(f"{part} is no unfinished work of this program ({made[0]} lies in it); choose another -o")
        _begin(part, identity(part), anew=not any((part / name).stat().st_size for name in made))
        yield part


def finish(part: Path, name: str, output: Path) -> None:
    """A file of the folder becomes the output, and the folder goes."""
    temporary = output.with_name(f".{output.name}.tmp")
    files.share(part / name, temporary)
    files.move(temporary, output)
    shutil.rmtree(part)


def _begin(part: Path, identity: dict[str, Any], anew: bool) -> None:
    """Write down what the work is made from, if nothing is made yet; else hold it against what was written down."""
    note = part / BEGUN
    if anew:
        files.write_json(note, identity)
        return
    before, now = files.read_json(note), msgspec.json.decode(msgspec.json.encode(identity))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        said = ", ".join(_difference(name, before.get(name), now.get(name)) for name in changed)
        raise RunError(
            f"{part} holds unfinished work, and since then {said}; go back to that, choose another -o, "
            "or begin anew with --fresh"
        )


def _difference(name: str, before: Any, now: Any) -> str:
    """A change in words; of what is known by its digest alone, that there is one."""
    if name.startswith("the ") or name.endswith(("adapter", "adapter-path")):
        return f"{name} has changed"
    return f"{name} was {before!r} and is now {now!r}"
