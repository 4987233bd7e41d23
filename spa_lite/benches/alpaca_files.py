"""AlpacaEval's files: model outputs, the 805 official prompts with their references, and the data of length control.

Prompts are known by a hash of their text, never by their place in a file. The benchmark's own data is not shipped: it
comes from files the user has, or from its hub, and is recognised by the lengths of the 805 reference answers.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spa_lite import files, keys, sources
from spa_lite.errors import DataError
from spa_lite.length_control import Rows
from spa_lite.records import Message, Prompt, Record

Source = str | Path

HUB = "hub"
"""In place of a file: fetch the benchmark's own from its hub."""
HUB_NAME = "tatsu-lab/alpaca_eval"
REFERENCES = "alpaca_eval_gpt4_baseline.json"
LENGTH_DATA = "df_gamed.csv"
OPTIONS = {REFERENCES: "--reference-outputs", LENGTH_DATA: "--lc-data"}

PROMPTS = 805
REFERENCE_LENGTHS = "eb58f1e0c66beb54e25cf34a49a36ed0997f19ed35d5a1468e991d636b2328ff"
"""SHA-256 of the lengths in characters of the 805 references by gpt4_1106_preview, in order, joined by commas."""
ROW_WEIGHT = 0.1
"""Weight of each row of the two models that were told to be short and to be long."""
LENGTH_COLUMNS = ("preference", "index", "std_delta_len", "instruction_difficulty")


class Output(Record, frozen=True, kw_only=True):
    """One answer, as in `model_outputs.json`."""

    instruction: str
    output: str
    generator: str = ""
    dataset: str | None = None


@dataclass(frozen=True)
class Official:
    """The 805 prompts: of each, by its key, the place in the official order and the length of its reference."""

    places: dict[str, int]
    lengths: dict[str, int]
    instructions: dict[str, str]


@dataclass(frozen=True)
class LengthData:
    """What AlpacaEval's length control takes from elsewhere: difficulty by official place, and rows of other models."""

    difficulty: list[float]
    rows: Rows
    sha256: str


def key_of(instruction: str) -> str:
    """What a prompt is known by: the same for the same text."""
    return keys.digest("instruction", instruction.encode(errors="surrogatepass")).hex()


def read_records(path: Source) -> list[dict[str, Any]]:
    """The objects of a .json list, a .jsonl file, or either with .gz. NaN, as Python writes it, is read as it is meant.

    Raises DataError naming the file and the line or record.
    """
    name, whole = str(path), _bytes(Path(path))
    try:
        if Path(name.lower().removesuffix(".gz")).suffix == ".jsonl":
            found = [json.loads(line) for line in whole.splitlines() if line.strip()]
        else:
            found = json.loads(whole)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name}: not valid JSON ({error}); write it again, or name it .jsonl if it holds lines"
        ) from None
    if not isinstance(found, list):
        raise DataError(f"{name}: not a list of records; write [{{...}}, ...]")
    for number, record in enumerate(found, 1):
        if not isinstance(record, dict):
            raise DataError(f'{name}, record {number}: not an object; write {{"instruction": ..., ...}}')
    return found


def read_outputs(source: Source) -> list[Output]:
    """Model outputs from a file, or the references from the hub (`"hub"`). Raises DataError for one without a text."""
    path = fetch(REFERENCES) if source == HUB else source
    return [_output(record, f"{path}, record {number}") for number, record in enumerate(read_records(path), 1)]


def write_outputs(path: Path, outputs: Iterable[Output]) -> None:
    """Write `model_outputs.json` as AlpacaEval reads it, whole or not at all."""
    write_records(path, [{k: v for k, v in _plain(output).items() if v is not None} for output in outputs])


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write a JSON list, whole or not at all."""
    files.write_atomic(path, json.dumps(records, indent=2).encode() + b"\n")


def read_prompts(source: Source) -> list[Prompt]:
    """The prompts of a file of AlpacaEval's, answers or none, or of the hub's references (`"hub"`)."""
    path = fetch(REFERENCES) if source == HUB else source
    records = [{"output": "", **record} for record in read_records(path)]
    return prompts_of(_output(record, f"{path}, record {number}") for number, record in enumerate(records, 1))


def prompts_of(outputs: Iterable[Output]) -> list[Prompt]:
    """The prompts of a list of outputs, to be answered by another model; `extra` keeps their data set's name."""
    return [
        Prompt(
            id=key_of(o.instruction),
            messages=(Message(role="user", content=o.instruction),),
            extra={} if o.dataset is None else {"dataset": o.dataset},
        )
        for o in outputs
    ]


def official(references: Sequence[tuple[str, str]]) -> Official | None:
    """The 805 prompts, from (instruction, reference) in official order; None if these are not they."""
    lengths = ",".join(str(len(reference)) for _, reference in references)
    if hashlib.sha256(lengths.encode()).hexdigest() != REFERENCE_LENGTHS:
        return None
    names = [key_of(instruction) for instruction, _ in references]
    if len(set(names)) != PROMPTS:
        return None
    return Official(
        places={name: place for place, name in enumerate(names)},
        lengths={name: len(reference) for name, (_, reference) in zip(names, references, strict=True)},
        instructions={name: instruction for name, (instruction, _) in zip(names, references, strict=True)},
    )


def read_length_data(source: Source) -> LengthData:
    """`df_gamed.csv`, from a file or the hub (`"hub"`). Raises DataError if it is not what AlpacaEval uses."""
    path = Path(fetch(LENGTH_DATA)) if source == HUB else Path(source)
    whole = _bytes(path)
    table = csv.DictReader(whole.decode("utf-8-sig", "replace").splitlines())
    table.fieldnames = ["index" if name == "idx" else name for name in table.fieldnames or []]
    rows = list(table)
    if missing := [c for c in LENGTH_COLUMNS if not rows or c not in rows[0]]:
        raise DataError(f"{path}: no column {', '.join(missing)}; give AlpacaEval's {LENGTH_DATA}")
    try:
        y, index, length, hard = np.array([[float(row[c] or "nan") for c in LENGTH_COLUMNS] for row in rows]).T
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: a cell is no number ({error}); give AlpacaEval's {LENGTH_DATA}") from None
    difficulty = dict(zip(index[::-1], hard[::-1], strict=True))  # the first row of a prompt counts
    if sorted(difficulty) != list(range(PROMPTS)) or not np.isfinite(list(difficulty.values())).all():
        raise DataError(f"{path}: not one difficulty for each of {PROMPTS} prompts; give AlpacaEval's {LENGTH_DATA}")
    y, length, hard = np.array([y, length, hard])[:, np.isfinite(y) & np.isfinite(length) & np.isfinite(hard)]
    # There the length is the reference's minus the answer's.
    tied = Rows(wins=y, length=-length, difficulty=hard, weight=ROW_WEIGHT)
    return LengthData([difficulty[i] for i in range(PROMPTS)], tied, hashlib.sha256(whole).hexdigest())


def fetch(name: str) -> str:
    """Path of a file of the benchmark's hub repository, downloaded if need be. Raises DataError if it cannot be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    mend = f"connect to the network, or give the file {name} itself as {OPTIONS[name]}"
    if not HF_HUB_OFFLINE and not sources.reachable():
        raise DataError(f"{HUB_NAME}: the hub cannot be reached; {mend}")
    try:
        return str(hf_hub_download(HUB_NAME, name, repo_type="dataset"))
    except Exception as error:  # its own kinds are many
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{HUB_NAME}: {name} cannot be fetched ({reason}); {mend}") from None


def _bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.name.lower().endswith(".gz") else raw
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}: the compressed file is damaged ({error}); copy it again") from None


def _output(record: dict[str, Any], place: str) -> Output:
    for name in ("instruction", "output"):
        if not isinstance(record.get(name), str):
            raise DataError(f'{place}: "{name}" is missing or no text; write {{"instruction": ..., "output": ...}}')
    dataset = record.get("dataset")
    return Output(
        instruction=record["instruction"],
        output=record["output"],
        generator=str(record.get("generator") or ""),
        dataset=None if dataset is None else str(dataset),
    )


def _plain(output: Output) -> dict[str, Any]:
    return {name: getattr(output, name) for name in output.__struct_fields__}
