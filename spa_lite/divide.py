"""Taking a share of records by their own text: the same record always falls the same way, wherever it stands."""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec

from spa_lite.convert import own
from spa_lite.convert import prompts as prompts_of
from spa_lite.data import conversation_key
from spa_lite.errors import DataError, RecipeError
from spa_lite.files import move, sync
from spa_lite.keys import digest
from spa_lite.reading import Item


def lot(seed: int, *parts: object) -> int:
    """A number that a record draws: it depends on the seed and on the record's text alone."""
    return int.from_bytes(digest("lot", seed, *parts))


def drawn(items: Iterable[Item], n: int, seed: int) -> list[Item]:
    """The n items with the lowest lots, in the order in which they came. A larger n keeps what a smaller one drew.

    Memory: n items.
    """
    heap: list[tuple[int, int, Item]] = []
    for place, item in enumerate(items):
        entry = (-lot(seed, conversation_key(item.messages), *item.answers), -place, item)
        if len(heap) < n:
            heapq.heappush(heap, entry)
        elif entry[:2] > heap[0][:2]:
            heapq.heapreplace(heap, entry)
    return [item for _, _, item in sorted(heap, key=lambda entry: -entry[1])]


@dataclass(frozen=True)
class Division:
    """Which part each prompt belongs to, by its conversation's key; prompts of no part are left over."""

    parts: dict[bytes, str]
    sizes: dict[str, int]
    left_over: int

    def part(self, item: Item) -> str | None:
        """The part that a record falls into with all others of its prompt."""
        return self.parts.get(conversation_key(item.messages))


def divide(
    prompts: Mapping[bytes, bool],
    held_out: str,
    labelled: str,
    rounds: int,
    round_sizes: Sequence[int] | None,
    seed: int,
) -> Division:
    """Divide different prompts into `held-out`, `seed`, and `prompts` or `round-1`, `round-2`, ...: no prompt in two.

    `prompts` says of each prompt's key whether it has a labelled pair. `held_out` and `labelled` are numbers of prompts
    ("50") or shares ("0.1", "10%") of those that have; of all prompts, and nothing for `seed`, if none has. Without
    `round_sizes` the rounds are as even as can be; no rounds (0) means one part `prompts` with all that is left. The
    order of `prompts` does not matter. Raises RecipeError for sizes that make no sense, DataError if there are too few.
    """
    if round_sizes is not None and (len(round_sizes) != rounds or min(round_sizes, default=1) < 1):
        raise RecipeError(f"--rounds {rounds} with {len(round_sizes)} --round-sizes; give one of at least 1 per round")
    order = sorted(prompts, key=lambda key: lot(seed, key))
    pairs = [key for key in order if prompts[key]]
    of = len(pairs) or len(order)
    sizes = {"held-out": _size("--held-out", held_out, of), "seed": _size("--labelled", labelled, of) if pairs else 0}
    if sum(sizes.values()) > of:
        what = "labelled prompts" if pairs else "prompts"
        raise DataError(
            f"--held-out and --labelled ask for {sum(sizes.values())} {what} and there are {of}; ask for fewer"
        )
    first = (pairs or order)[: sum(sizes.values())]
    taken = set(first)
    rest = [key for key in order if key not in taken]
    if rounds and round_sizes is None:
        share, over = divmod(len(rest), rounds)
        round_sizes = [share + (index < over) for index in range(rounds)]
    named = {f"round-{index}": size for index, size in enumerate(round_sizes or (), 1)} or {"prompts": len(rest)}
    wanted = max(sum(named.values()), rounds)
    if wanted > len(rest):
        raise DataError(f"the rounds ask for {wanted} prompts and {len(rest)} are left; ask for fewer, or add prompts")
    parts: dict[bytes, str] = {}
    queue = iter([*first, *rest])
    for name, size in (sizes | named).items():
        parts |= dict.fromkeys(islice(queue, size), name)
    return Division(parts, sizes | named, len(order) - len(parts))


def write_parts(items: Iterable[Item], division: Division, folder: Path) -> dict[str, int]:
    """Write each part into its file: records with their answers for `held-out` and `seed`, prompts for the rounds.

    Returns the number of records in each. The files get their names when all are whole. Raises DataError if one of
    them is there already, or cannot be written.
    """
    names = [name for name, size in division.sizes.items() if size]
    there = next((name for name in names if (folder / f"{name}.jsonl").exists()), None)
    if there:
        raise DataError(f"{folder / there}.jsonl is there already; name another --out, or remove it")
    counts = dict.fromkeys(names, 0)
    seen: set[bytes] = set()
    encoder = msgspec.json.Encoder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".split-") as place, ExitStack() as stack:
            streams = {name: stack.enter_context((Path(place) / name).open("wb")) for name in names}
            for item in items:
                name, key = division.part(item), conversation_key(item.messages)
                labelled = name in ("held-out", "seed")
                if name is None or (not labelled and key in seen):
                    continue
                seen.add(key)
                streams[name].write(encoder.encode(own(item) if labelled else prompts_of(item)) + b"\n")
                counts[name] += 1
            stack.close()
            for name in names:
                sync(Path(place) / name)
            for name in names:
                move(Path(place) / name, folder / f"{name}.jsonl")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); check the path and its free space") from error
    return counts


def _size(option: str, text: str, total: int) -> int:
    """A number, or a share of the total, rounded; of a share that is not 0 at least one."""
    try:
        if text.isascii() and text.isdigit():
            return int(text)
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise RecipeError(f"{option} is {text!r}; give a number of prompts like 50, or a share like 0.1 or 10%")
    return max(round(share * total), 1) if share else 0
