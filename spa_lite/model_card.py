"""The README.md of an adapter that is shared, and its recipe without the places of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from spa_lite import guards
from spa_lite.axes import PIECES, WHERE, one_line
from spa_lite.files import read_json, write
from spa_lite.losses import USES
from spa_lite.markdown import literal
from spa_lite.recipe import Recipe, settings_of

TAGS = ["spa-lite", "preference-optimization", "lora"]
SPA = "spread-preference-annotation"
UNKNOWN = "unknown: see the base model"
OWN_LICENCE = "apache-2.0"
"""Of the built-in lesson model: this project's."""
PAPER = re.compile(r"[A-Z][\w.-]*(?: [\w.-]+)* \(\d{4}\.\d{5}\)")
"""A paper in a piece's source: `SimPO (2405.14734)`."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,40}")
"""What the hub takes as the name of a licence."""

PLACES = {
    "inputs": ("model", "seed_pairs", "prompts", "held_out", "gold", "adapter_path", "init_adapter", "init_model"),
    "model": ("template",),
    "prompts": ("personas", "keywords", "template"),
    "judge": ("model", "prompt", "adapter"),
}
"""Settings that may be paths, by their group."""
SHOWN = ("lora.rank", "lora.alpha", "loss.beta", "seed_dpo.learning_rate", "sft.learning_rate", "train.learning_rate")
REFINED = ("refine.K", "refine.lambda")
COLUMNS = {"win_rate": "win rate vs init %", "pair_accuracy": "held-out pairs %", "label_accuracy": "labels right %"}


def write_card(
    folder: Path, recipe: Recipe, run: Path | None, stage: str | None, model: Path, record: Mapping[str, Any]
) -> None:
    """Write README.md and, of a run, recipe.yaml. `model` is the base's folder, `record` what export.json will hold."""
    import yaml

    shared = shareable(recipe)
    if run:
        text = yaml.safe_dump(shared, sort_keys=False, allow_unicode=True)
        write(folder / "recipe.yaml", text.encode())
    write(folder / "README.md", card(shared, recipe, run, stage, model, record).encode())


def card(
    shared: Mapping[str, Any],
    recipe: Recipe,
    run: Path | None,
    stage: str | None,
    model: Path,
    record: Mapping[str, Any],
) -> str:
    """The text of README.md: what is known of base, data, measures, settings, versions and check."""
    from jinja2 import Environment, StrictUndefined

    summary = summary_of(run)
    rows = rows_until(summary.get("rows", []), stage)
    licence = licence_of(recipe, model)
    columns = [name for name in COLUMNS if any(_interval(row, name) for row in rows)]
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"literal": lambda text: literal(str(text)), "code": _code}
    page = environment.from_string(
        resources.files("spa_lite").joinpath("templates", "card.md").read_text(encoding="utf-8")
    )
    values, start = settings_of(recipe), shared["inputs"]["init_adapter"]
    began = [("began at the adapter", start)] if start else []
    return page.render(
        front=front(record["model"], licence, tags_of(recipe) if run else TAGS),
        title=record["source"],
        base=record["model"],
        lesson=recipe.inputs.model is None,
        trained=run is not None,
        stage=stage,
        spa=is_spa(recipe),
        recipe=recipe.name,
        made_of=one_line(recipe),
        sources=sources(recipe),
        seed=recipe.seed_dpo.by,
        licence_said=f"`{licence}`" if licence else UNKNOWN,
        template=shared["model"]["template"],
        system=shared["model"]["system"],
        data=list(counts(run, rows)),
        measured=_measured(rows),
        columns=[COLUMNS[name] for name in columns],
        rows=[(row["stage"], [_percent(_interval(row, name)) for name in columns]) for row in rows],
        warnings=[w for w in summary.get("warnings", []) if _is_about(w, rows)],
        settings=[
            ("recipe", recipe.name),
            ("made of", one_line(recipe)),
            *began,
            *((path, values[path]) for path in shown(recipe)),
        ]
        if run
        else [],
        versions=list(summary.get("versions", {}).items()) or list(_versions(record["backend"])),
        dtype=record["dtype"],
        effect=f"{record['effect']:.2g}",
        checks=record["checks"],
    )


def is_spa(recipe: Recipe) -> bool:
    """Whether a recipe is SPA in what makes it SPA, whatever its numbers are."""
    r = recipe
    return (
        (r.prompts.source, r.candidates.kinds, r.judge.by, r.loss.kind) == ("pool", ["sample"], "implicit", "dpo")
        and r.seed_dpo.by == "dpo"
        and (r.carry.start, r.carry.data) == ("prev", "fresh")
    )


def sources(recipe: Recipe) -> list[str]:
    """The papers that the pieces of a recipe are taken from, as `spa_lite.axes` names them."""
    values = settings_of(recipe)
    axes = ["seed stage"] if guards.has_seed_stage(recipe) else []
    axes += ["prompts", "candidates", "judge", "loss", "noise"] if recipe.rounds else []
    found: list[str] = []
    for axis in axes:
        value = values[WHERE[axis]]
        for name in value if isinstance(value, list) else [value]:
            found += PAPER.findall(PIECES[axis][name].source)
    return list(dict.fromkeys(found))


def tags_of(recipe: Recipe) -> list[str]:
    """Tags of an adapter that a run made."""
    loss = recipe.loss.kind if recipe.rounds else recipe.seed_dpo.by
    return [*TAGS, *([SPA] if is_spa(recipe) else []), loss]


def shown(recipe: Recipe) -> list[str]:
    """The settings that the card shows: those that anything of the run depends on."""
    r, by = recipe, recipe.seed_dpo.by if guards.has_seed_stage(recipe) else "none"
    taught = by == "sft" or (r.rounds and (r.prompts.generator or "improve" in r.candidates.kinds))
    used = {
        "loss.beta": by == "dpo" or not r.rounds,
        "seed_dpo.learning_rate": by == "dpo",
        "sft.learning_rate": taught,
        "train.learning_rate": r.rounds and not r.train.round_rates,
    }
    found = [path for path in SHOWN if used.get(path, True)]
    if r.rounds:
        found += [path for path in USES[r.loss.kind] if settings_of(r)[path] and path not in found]
        found = [path for path in found if path != "loss.beta" or not r.loss.round_betas]
        found += ["train.round_rates"] if r.train.round_rates else []
        found += REFINED if r.noise.by == "quantile" and r.refine.alpha else ()
    return found


def front(base: str, licence: str | None, tags: Sequence[str] = TAGS) -> str:
    """The YAML at the head, which the hub reads. A base that is no name on the hub is left out: it would refuse it."""
    import yaml

    named = {"base_model": base} if HUB_NAME.fullmatch(base) else {}
    fields = {**named, "library_name": "peft", "license": licence or "unknown", "pipeline_tag": "text-generation"}
    return str(yaml.safe_dump({**fields, "tags": list(tags)}, sort_keys=False, allow_unicode=True))


def licence_of(recipe: Recipe, model: Path) -> str | None:
    """The licence that the base's card or config names; None if neither does."""
    import yaml

    if recipe.inputs.model is None:
        return OWN_LICENCE
    found: dict[str, Any] = {}
    card = model / "README.md"
    if card.is_file() and (head := FRONT.match(card.read_text(encoding="utf-8", errors="replace"))):
        try:
            read = yaml.safe_load(head[1])
        except yaml.YAMLError:
            read = None
        found = read if isinstance(read, dict) else {}
    config = read_json(model / "config.json") if (model / "config.json").is_file() else {}
    said = found.get("license") or (config.get("license") if isinstance(config, dict) else None)
    return said if isinstance(said, str) and LICENCE.fullmatch(said) else None


# What is known of the run


def summary_of(run: Path | None) -> dict[str, Any]:
    """summary.json of a finished run; nothing of another."""
    path = run / "summary.json" if run else None
    found = read_json(path) if path and path.is_file() else {}
    return found if isinstance(found, dict) else {}


def rows_until(rows: Sequence[dict[str, Any]], stage: str | None) -> list[dict[str, Any]]:
    """The rows up to a stage: later ones say nothing of its adapter."""
    names = [row.get("stage") for row in rows]
    return list(rows[: names.index(stage) + 1]) if stage in names else list(rows)


def counts(run: Path | None, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
    """How many records there were of each kind."""
    markers = [run / f"rounds/0/{kind}.done.json" for kind in ("seed", "generator")] if run else []
    marker = next((path for path in markers if path.is_file()), None)
    if marker and isinstance(size := read_json(marker).get("size"), int):
        yield "labelled pairs", size
    for row in rows:
        if prompts := (row.get("sampled") or {}).get("prompts"):
            yield f"prompts of {row['stage']}", prompts
    last = rows[-1] if rows else {}
    for name, what in (("pair_accuracy", "held-out pairs"), ("win_rate", "held-out prompts")):
        if found := _interval(last, name):
            yield what, int(found["n"])


def _interval(row: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """An interval of a row; of the labels, that of the gold score."""
    found = row.get(name)
    return (found or {}).get("score") if name == "label_accuracy" else found


def _percent(interval: Mapping[str, Any] | None) -> str:
    if not interval:
        return "-"
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * interval[part] for part in ("value", "low", "high")))


def _measured(rows: Sequence[Mapping[str, Any]]) -> str:
    said = ["Square brackets are 95 % intervals."]
    if any(_interval(row, "pair_accuracy") for row in rows):
        said.append("Held-out pairs: how often the implicit reward prefers the answer that the person preferred.")
    if any(_interval(row, "win_rate") for row in rows):
        said.append("Win rate: by the gold rule of the built-in lesson, a toy; it says nothing of other tasks.")
    return " ".join(said)


def _is_about(warning: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(warning.startswith(f"{row.get('stage')}:") for row in rows)


def _versions(backend: str) -> Iterator[tuple[str, str]]:
    from spa_lite.summary import versions

    yield from versions(backend).items()


# What may be shared


def shareable(recipe: Recipe) -> dict[str, Any]:
    """A recipe's settings with file names in place of paths, and no servers."""
    found = recipe.to_dict()
    for group, names in PLACES.items():
        found[group] |= {name: _without_place(found[group][name]) for name in names}
    found["judge"]["url"] = None
    return found


def _without_place(value: str | None) -> str | None:
    """A hub name as it is; of a path the last part; of an address nothing."""
    if value is None or value == "-" or value.startswith("hub:"):
        return value
    if urlsplit(value).scheme in ("http", "https", "file"):
        return None
    path = Path(value).expanduser()
    return value if HUB_NAME.fullmatch(value) and not path.exists() and not path.suffix else path.resolve().name


def _code(text: str) -> str:
    """Text inside single backquotes, on one line."""
    return " ".join(str(text).split()).replace("`", "'")
