"""Which layers an adapter is put on, by their names: the same words mean the same layers in every framework."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from spa_lite.errors import ModelError

ALL = "all-linear"


def choose_layers(linear: Collection[str], head: str | None, targets: Iterable[str]) -> list[str]:
    """Names of linear layers that end with a target, in order; "all-linear": all but the output `head`.

    Raises ModelError for a target that no layer has, such as the head of a model whose head is its embedding.
    """
    wanted = set(targets)
    for target in sorted(wanted - {ALL}):
        if not any(is_named(name, target) for name in linear):
            kinds = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ModelError(f"no linear layer of this model is named {target!r}: it has {kinds}")
    return [
        name for name in linear if (ALL in wanted and name != head) or any(is_named(name, target) for target in wanted)
    ]


def short_names(names: Iterable[str], chosen: Collection[str]) -> list[str]:
    """Last parts of the chosen names if among all `names` those pick exactly the chosen ones, else the full names."""
    endings = sorted({name.rpartition(".")[2] for name in chosen})
    picked = {name for name in names if any(is_named(name, ending) for ending in endings)}
    return endings if picked == set(chosen) else sorted(chosen)


def is_named(name: str, target: str) -> bool:
    """Whether a layer's dotted name is the target or ends with it."""
    return name == target or name.endswith("." + target)
