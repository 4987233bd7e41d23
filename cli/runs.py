"""`spa-lite runs`: which runs there are, how far they are, what they share; removing them, and what nobody needs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spa_lite.cli.main import app
from spa_lite.cli.run import HOME

if TYPE_CHECKING:
    from rich.table import Table

    from spa_lite.cleanup import Rubbish
    from spa_lite.inventory import Overview, Part, Place, Reading

runs = typer.Typer(no_args_is_help=False)
app.add_typer(runs, name="runs")

MEASURES = {"win_rate": "win rate", "pair_accuracy": "held-out pairs"}

Root = Annotated[Path | None, typer.Option(metavar="FOLDER", help="The folder of runs (default: runs)")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]


@runs.callback(invoke_without_command=True)
def list_(
    context: typer.Context,
    root: Root = None,
    all_: Annotated[bool, typer.Option("--all", help="List every cell of a study, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """List runs: state, result, size, and what they share. `show`, `rm` and `gc` look closer and clean up.

    `own` is what removing a run would free; the rest is in use by other runs, too.
    """
    context.obj = root
    if context.invoked_subcommand is None:
        from spa_lite.inventory import places

        listed = places(_root(context, root))
        if all_:
            listed = [place for top in listed for place in (top.runs or (top,))]
        _list(listed, _root(context, root), as_json)


def _list(listed: Sequence[Place], root: Path, as_json: bool) -> None:
    """A line per run or study."""
    from spa_lite.cli.render import note, out, safe, show
    from spa_lite.inventory import overview, size_of

    lines = overview(listed)
    if as_json:
        _print([_plain(line) for line in lines])
        return
    if not lines:
        note(f"there are no runs below {root} (spa-lite run makes one; --root names another folder)")
        return
    show(_table(lines, f"{size(size_of([line.folder for line in listed]).total)} in all; own: what removing it frees"))
    for line in lines:
        if line.shares:
            out.print(safe(f"{line.name} shares {_sharing(line.shares)}"))
    for line in lines:
        for problem in line.problems:
            note(f"{line.name}: {problem}")


@runs.command("show")
def show_(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="A path, a name, or the beginning of one.")],
    check: Annotated[bool, typer.Option("--check", help="Compare every result with its checksum.")] = False,
    as_json: AsJson = False,
    root: Root = None,
) -> None:
    """Show one run: settings that differ, every stage, what is unfinished. Of a study: its cells.

    With --check the exit code is 1 if a file is damaged.
    """
    from spa_lite.cli.render import note
    from spa_lite.inventory import damaged, places, read, resolve, runs_of

    top = _root(context, root)
    place = resolve(run, top)
    readings = [read(one) for one in place.runs]
    wrong = [f"{r.place.name}: {line}" for r in readings for line in (damaged(r) if check else r.problems)]
    if place.kind == "study":
        _list(place.cells, place.folder, as_json)
    else:
        others = [read(one) for one in runs_of(places(top))]
        _show_run(readings[0], others, wrong, as_json)
    for line in wrong:
        note(line)
    if check and not wrong:
        count = sum(len(book.done["checksums"]) for reading in readings for book in reading.books.values())
        note(f"all {count} files are what they were")
    if check and wrong:
        raise typer.Exit(1)


@runs.command("rm")
def rm(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="Paths, names, or the beginnings of names.")],
    yes: Yes = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be freed.")] = False,
    root: Root = None,
) -> None:
    """Remove runs or whole studies. What other runs share with them stays there."""
    from spa_lite.cleanup import belongings, remove
    from spa_lite.cli.render import note
    from spa_lite.errors import RunError
    from spa_lite.inventory import resolve, size_of, user_of

    top = _root(context, root)
    chosen = {place.folder.resolve(): place for place in (resolve(name, top) for name in names)}
    for place in chosen.values():
        who = user_of(place)
        if who:
            raise RunError(f"{place.name} is in use by {who}; stop that first")
        mine = size_of(belongings(place))
        cells = f" (a study of {_count(len(place.cells), 'cell')})" if place.kind == "study" else ""
        note(f"{place.name}{cells}: {size(mine.total)}, of which {size(mine.own)} would be freed")
    freed = size_of([path for place in chosen.values() for path in belongings(place)]).own
    if dry_run:
        note(f"nothing is removed (--dry-run); {size(freed)} would be freed")
        return
    if not yes and not _agreed(f"remove {_count(len(chosen), 'folder')} and free {size(freed)}?"):
        note("nothing was removed")
        return
    for place in chosen.values():
        left = remove(place)
        if left:
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            note(f"{place.name}: kept {', '.join(left[:5])}{more}, which spa-lite cannot make again")
    note(f"removed {', '.join(place.name for place in chosen.values())}: {size(freed)} freed")


@runs.command("gc")
def gc(context: typer.Context, yes: Yes = False, as_json: AsJson = False, root: Root = None) -> None:
    """List what nobody needs: unfinished work on finished stages, damaged files set aside, copies of one result.

    Nothing changes without --yes. Copies become one file with several names. Runs in use are left alone.
    """
    from spa_lite.cleanup import clean, rubbish
    from spa_lite.cli.render import note, show

    top = _root(context, root)
    found = rubbish(top)
    freed, failed = clean(found) if yes else (0, [])
    if as_json:
        _print(_plain_rubbish(found, top) | {"freed": freed, "failed": failed})
    elif found.leftovers or found.duplicates:
        show(_rubbish_table(found, top))
    for name, why in found.skipped:
        note(f"{name} {why}, so it was left alone")
    for line in failed:
        note(line)
    if yes:
        note(f"{size(freed)} freed")
    elif found.leftovers or found.duplicates:
        note(f"nothing was changed; spa-lite runs gc --yes frees {size(found.bytes)}")
    else:
        note(f"there is nothing to clean up below {top}")


def _root(context: typer.Context, root: Path | None) -> Path:
    """--root, wherever it was given. Raises RunError if there is no such folder."""
    from spa_lite.errors import RunError

    given = root or context.obj
    if given and not given.is_dir():
        raise RunError(f"there is no folder {given}; check --root")
    return given or HOME


def _agreed(question: str) -> bool:
    """Ask. Exits with 2 where nobody can answer."""
    from spa_lite.cli.render import fail

    if not sys.stdin.isatty():
        fail("nobody can be asked here, so nothing was removed; --yes does it without asking")
        raise typer.Exit(2)
    return typer.confirm(question, err=True)


# What is shown


def size(count: float) -> str:
    """Bytes for people: `1.2 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or (count < 999.95 and unit != "B"):
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _sharing(shares: Mapping[str, int]) -> str:
    """`11 stages with spa-1a2b3c4d; 5 with killed and 12 more`."""
    groups: dict[int, list[str]] = {}
    for name, count in shares.items():
        groups.setdefault(count, []).append(name)
    parts = [
        f"{count} with {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        for count, names in groups.items()
    ]
    first = next(iter(groups))
    return "; ".join([parts[0].replace(str(first), _count(first, "stage"), 1), *parts[1:]])


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


def _model(line: Overview) -> str:
    from spa_lite.cli.export_source import base_name

    return base_name(line.model) if line.model else "built-in" if line.recipe else "-"


def _far(part: Part) -> str:
    """How far unfinished work is: `rounds/2 train, step 40 of 120`."""
    of = f" of {part.of}" if part.of else ""
    if part.step is not None:
        return f"{part.title}, step {part.step}{of}"
    lines = [f"{name.removesuffix('.jsonl')} {count}{of}" for name, count in part.lines.items()]
    return ", ".join([part.title, *(lines or ["nothing kept yet"])])


def _state(line: Overview) -> str:
    where = line.where if isinstance(line.where, str) or line.where is None else _far(line.where)
    if line.state == "stopped" and isinstance(line.where, str):
        return f"stopped before {where}"
    said = f"{line.state} in {where}" if where else line.state
    return f"{said} (by {line.by})" if line.by else said


def _result(line: Overview, whole: bool = False) -> str:
    """`61.2 win rate`, `71.0 held-out pairs`; as a whole with its interval."""
    from spa_lite.cli.render import number, percent

    if not line.headline:
        return "-"
    name, interval = line.headline
    value = percent(interval) if whole else number(100 * interval["value"], 1)
    return f"{value} {MEASURES[name]}"


def _table(lines: Sequence[Overview], caption: str) -> Table:
    from rich.table import Table

    from spa_lite.cli.render import safe

    table = Table(caption=caption, caption_justify="left")
    narrowest = {"run": 12, "recipe": 6, "model": 5, "state": 8, "result %": 8, "last touched": 10}
    for name in ("run", "recipe", "model", "state", "stages", "result %", "size", "own", "last touched"):
        right = name in {"stages", "size", "own"}
        table.add_column(
            name, justify="right" if right else "left", no_wrap=right, overflow="fold", min_width=narrowest.get(name)
        )
    for line in lines:
        cells = f" (study, {_count(line.cells, 'cell')})" if line.kind == "study" else ""
        table.add_row(
            safe(line.name) + cells,
            safe(f"{line.recipe} {line.scale}".strip() or "-"),
            safe(_model(line)),
            safe(_state(line)),
            f"{line.stages}/{line.of}" if line.of else "-",
            _result(line),
            size(line.size.total),
            size(line.size.own),
            _when(line.size.touched),
        )
    return table


def _show_run(reading: Reading, others: Sequence[Reading], wrong: Sequence[str], as_json: bool) -> None:
    """One run: what it is, a line per stage, what is unfinished, where things are."""
    from spa_lite.cli.render import note, out, safe, show
    from spa_lite.inventory import differences, overview

    (line,) = overview([reading.place])
    stages, paths = _stages(reading, others), _paths(reading)
    if as_json:
        differing = {path: {"value": mine, "default": theirs} for path, (mine, theirs) in differences(reading).items()}
        parts = [_plain_part(part) for part in reading.parts.values()]
        found = {"differences": differing, "made_by": _makers(reading), "finished": stages, "unfinished": parts}
        _print(_plain(line) | found | {"shares": _counted(stages), "paths": paths, "damaged": list(wrong)})
    elif reading.version or reading.headless:
        note(reading.version or f"{line.name} cannot be read, because its run.json is damaged; the rest may be whole")
    else:
        show(_facts(reading, line))
        show(_stage_table(reading, stages))
        for path in paths:
            out.print(safe(path))


def _stages(reading: Reading, others: Sequence[Reading]) -> list[dict[str, Any]]:
    """What is said of each finished stage."""
    from spa_lite.inventory import sharing, size_of, spent

    shared = sharing(reading, others)
    return [
        {
            "stage": title,
            "key": book.done["key"],
            **{name: spent(book).get(name) for name in ("seconds", "cpu")},
            "bytes": size_of([book.folder / name for name in book.done["checksums"]]).total,
            "shared": shared[title],
        }
        for title, book in reading.books.items()
    ]


def _counted(stages: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    names = [name for stage in stages for name in stage["shared"]]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def _paths(reading: Reading) -> list[str]:
    """The files a person wants: the adapter, the summary, and of each stage all but its own adapter."""
    top = [reading.place.folder / name for name in ("adapter", "summary.json", "recipe.yaml")]
    files = [
        book.folder / name for book in reading.books.values() for name in book.done["checksums"] if "/" not in name
    ]
    return [str(path) for path in [*top, *files] if path.exists()]


def _makers(reading: Reading) -> list[str]:
    from spa_lite.library import numerics

    return sorted({numerics(book.done["made_by"]) for book in reading.books.values()})


def _facts(reading: Reading, line: Overview) -> Table:
    """What a run is, and the settings that are not as its recipe and scale have them."""
    from rich.table import Table

    from spa_lite.axes import one_line
    from spa_lite.cli.render import safe
    from spa_lite.inventory import differences

    facts = {
        "run": str(reading.place.folder),
        "recipe": f"{line.recipe} {line.scale}".strip() or "-",
        "made of": one_line(reading.recipe) if reading.recipe else "-",
        "model": _model(line),
        "computed on": ", ".join(_makers(reading)) or "-",
        "state": _state(line),
        "result %": _result(line, whole=True),
        "size": f"{size(line.size.total)}, of which removing it frees {size(line.size.own)}",
    }
    changed = {path: f"{mine} (default: {theirs})" for path, (mine, theirs) in differences(reading).items()}
    table = Table(show_header=False, box=None)
    for name, value in (facts | changed).items():
        table.add_row(name, safe(value))
    return table


def _stage_table(reading: Reading, stages: Sequence[Mapping[str, Any]]) -> Table:
    """A line per stage, those included that are not done."""
    from rich.table import Table

    from spa_lite.cli.render import number, safe
    from spa_lite.inventory import size_of

    table = Table(caption="no seconds: taken from a run that had computed the same", caption_justify="left")
    for name in ("stage", "state", "key", "seconds", "CPU seconds", "size", "also in"):
        table.add_column(name, justify="right" if "seconds" in name or name == "size" else "left", overflow="fold")
    for stage in stages:
        times = [number(stage[name], 1) for name in ("seconds", "cpu")]
        others = ", ".join(stage["shared"]) or "-"
        table.add_row(safe(stage["stage"]), "done", safe(stage["key"][:8]), *times, size(stage["bytes"]), safe(others))
    for title in dict.fromkeys([*reading.expected, *reading.parts]):
        part = reading.parts.get(title)
        if part:
            far = _far(part).removeprefix(f"{title}, ") + (" (left over)" if title in reading.books else "")
            table.add_row(safe(title), safe(far), "", "", "", size(size_of([part.folder]).total), "")
        elif title not in reading.books:
            table.add_row(title, "not begun")
    return table


def _plain(line: Overview) -> dict[str, Any]:
    """A line of the list for programs: bytes, and seconds since 1970."""
    result = {"measure": line.headline[0], **line.headline[1]} if line.headline else None
    where = None if line.where is None else line.where if isinstance(line.where, str) else line.where.title
    names = ("name", "kind", "recipe", "scale", "model", "state", "by", "stages", "of", "shares", "cells", "problems")
    sizes = {"bytes": line.size.total, "own_bytes": line.size.own, "touched": line.size.touched}
    return {name: getattr(line, name) for name in names} | {"stage": where, "result": result} | sizes


def _plain_part(part: Part) -> dict[str, Any]:
    return {"stage": part.title, "lines": part.lines, "step": part.step, "of": part.of, "path": str(part.folder)}


def _plain_rubbish(found: Rubbish, root: Path) -> dict[str, Any]:
    return {
        "leftovers": [{"path": str(item.path), "why": item.why, "bytes": item.bytes} for item in found.leftovers],
        "duplicates": [
            {"run": item.run.name, "stage": item.title, "like": item.like, "bytes": item.bytes,
             "files": [str(copy.path) for _, copy in item.links]}
            for item in found.duplicates
        ],
        "skipped": [{"run": name, "why": why} for name, why in found.skipped],
        "bytes": found.bytes,
    }  # fmt: skip


def _rubbish_table(found: Rubbish, root: Path) -> Table:
    from rich.table import Table

    from spa_lite.cli.render import safe

    table = Table(caption=f"{size(found.bytes)} in all", caption_justify="left")
    table.add_column("what", overflow="fold")
    table.add_column("why", overflow="fold")
    table.add_column("frees", justify="right", no_wrap=True)
    for item in found.leftovers:
        table.add_row(safe(str(item.path.relative_to(root))), safe(item.why), size(item.bytes))
    for twin in found.duplicates:
        where = "the run itself" if twin.like == twin.run.name else twin.like
        table.add_row(safe(f"{twin.run.name} {twin.title}"), safe(f"a copy of the same in {where}"), size(twin.bytes))
    return table


def _print(value: Any) -> None:
    import msgspec

    print(msgspec.json.encode(value).decode())
