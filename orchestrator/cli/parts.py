"""`btu list`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.table import Table

from orchestrator.cli.shared import console


class Kind(StrEnum):
    """What `btu list` can list."""

    attacks = "attacks"
    defenses = "defenses"
    victims = "victims"
    datasets = "datasets"
    metrics = "metrics"
    rules = "rules"


def list_(kind: Annotated[Kind, typer.Argument(help="What to list.")]) -> None:
    """List the attacks, defenses, ... by the names that a sweep file uses.

    Example: `btu list attacks`
    """
    table = Table(header_style="bold")
    table.add_column(kind.value, no_wrap=True)
    if kind is Kind.metrics:
        from btu.metrics import METRICS

        table.add_column("better")
        table.add_column("meaning")
        arrows = {True: "higher", False: "lower", None: "-"}
        for name, entry in METRICS.items():
            table.add_row(name, arrows[entry.higher_is_better], entry.summary)
    elif kind is Kind.rules:
        from btu.rules.base import RULES

        for column in ("what it is", "threshold", "unit of the threshold", "rounds"):
            table.add_column(column)
        for name in RULES:
            rule = RULES.load(name)
            rounds = ", ".join(map(str, rule.rounds))
            table.add_row(name, RULES[name].summary, f"{rule.threshold:g}", rule.unit, rounds)
    elif kind is Kind.defenses:
        _list_defenses(table)
        return
    elif kind is Kind.attacks:
        _list_attacks(table)
        return
    else:
        registry = _registries()[kind]
        table.add_column("what it is")
        for name, entry in registry.items():
            table.add_row(name, entry.summary)
    console.print(table)


def _list_attacks(table: Table) -> None:
    """Print two tables, as for defenses."""
    from btu.attacks.poisoning import ATTACK_KINDS, ATTACKS

    for column in ("kind", "trigger", "needs", "what it is"):
        table.add_column(column)
    keys = _keys_table(Kind.attacks)
    loaded = {name: ATTACKS.load(name) for name in ATTACKS}
    for name in sorted(loaded, key=lambda name: list(ATTACK_KINDS).index(loaded[name].KIND)):
        attack = loaded[name]
        summary = ATTACKS[name].summary
        table.add_row(name, attack.KIND, attack.TRIGGER, attack.NEEDS or "-", summary)
        keys.add_row(name, _knobs(attack) or "-")
    console.print(table)
    console.print(keys)


def _keys_table(kind: Kind) -> Table:
    keys = Table(header_style="bold")
    keys.add_column(kind.value, no_wrap=True)
    keys.add_column("its own keys (default)")
    return keys


def _list_defenses(table: Table) -> None:
    """Print two tables, since the keys of some defenses leave no room for other columns."""
    from btu.defenses.base import DEFENSE_KINDS, DEFENSES

    for column in ("when", "needs", "what it is"):
        table.add_column(column)
    keys = _keys_table(Kind.defenses)
    loaded = {name: DEFENSES.load(name) for name in DEFENSES}
    # By when they act; within a kind, in the order of registration.
    for name in sorted(loaded, key=lambda name: list(DEFENSE_KINDS).index(loaded[name].KIND)):
        defense = loaded[name]
        table.add_row(name, defense.KIND, ", ".join(defense.NEEDS), DEFENSES[name].summary)
        keys.add_row(name, _knobs(defense) or "-")
    console.print(table)
    console.print(keys)


def _registries() -> dict[Kind, Any]:
    from btu.data.spec import DATASETS
    from btu.victims import VICTIMS

    return {Kind.victims: VICTIMS, Kind.datasets: DATASETS}


def _knobs(part: type) -> str:
    import dataclasses

    made = part()
    knobs = [f"{f.name} ({getattr(made, f.name)})" for f in dataclasses.fields(part)]
    presets = getattr(part, "PRESETS", None)
    return ", ".join(([f"preset ({' | '.join(presets)})"] if presets else []) + knobs)
