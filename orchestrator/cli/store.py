"""`btu store`: list, check, sign and shrink the store of an output folder."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from btu.errors import UserError
from orchestrator.cli.shared import Output, console, errors, warn
from orchestrator.store import gc as housekeeping
from orchestrator.store import places
from orchestrator.store.lease import TTL_S, Holder
from orchestrator.store.marker import SIGNING_KEY, signing_key
from orchestrator.store.owners import foreign_entries
from orchestrator.store.store import Store
from orchestrator.sweep.output import DEFAULT_OUTPUT, output_location, store_location

EXIT_DAMAGED = 1
PLURALS = {housekeeping.LAUNCH: "registered launches"}
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    help="List, check, sign and shrink the results that all sweeps of an output folder share.\n\n"
    "    btu store ls                          # the newest results\n\n"
    "    btu store du                          # disk usage, by stage\n\n"
    "    btu store verify                      # read every file, set damaged results aside\n\n"
    "    btu store sign                        # what is not signed; --yes signs it\n\n"
    "    btu store gc --older-than 30d         # what would be removed; --yes removes it",
)


@app.command()
def ls(
    output: Output = DEFAULT_OUTPUT,
    limit: Annotated[
        int, typer.Option(min=0, help="How many of the newest to show; 0 shows all.")
    ] = 40,
) -> None:
    """List results, newest first: committed, dropped, failed, or leased by a running launch.

    A dropped result still has its record; its model was removed, since no stage waits for it.

    Example: `btu store ls --output /scratch/runs --limit 0`
    """
    store = _open(output)
    now = time.time()
    leases, failed = store.leases.held(now), store.failed()
    changed: dict[str, float] = {}
    shown = (places.MARKERS, None), (places.FAILED, failed), (places.LEASES, leases.keys())
    for folder, keys in shown:
        for found in store.storage.walk(folder):
            key, _, ending = found.path.rpartition("/")[2].partition(".")
            known = places.is_key(key) and (keys is None or key in keys)
            if known and ending in ("json", "dropped.json"):
                changed[key] = max(found.modified or 0.0, changed.get(key, 0.0))
    unsigned = store.unsigned()
    newest = sorted(changed, key=lambda key: (-changed[key], key))
    table = Table("key", "stage", "size", "age", "state", header_style="bold")
    for key in newest[: limit or None]:
        marker = store.marker(key, dropped=True)
        states = [] if marker is None else ["dropped" if marker.dropped else "committed"]
        states += [unsigned[key]] if key in unsigned else []
        stage, size = "-", "-"
        if marker is not None:
            stage, size = marker.name, decimal(marker.bytes)
        if key in failed:
            states.append("[red]failed[/red]")
            failure = store.failure(key) or {}
            stage = str(failure.get("stage", stage))
        if key in leases:
            lease = leases[key]
            states.append(escape(f"leased by {lease.get('owner')} on {lease.get('host')}"))
        since = changed[key] if marker is None else marker.committed
        table.add_row(key, escape(stage), size, _age(now - since), ", ".join(states))
    console.print(table)
    some = f", the newest {table.row_count} shown" if table.row_count < len(newest) else ""
    console.print(f"{_count(len(newest), 'result')}{some}.", highlight=False)


@app.command()
def du(output: Output = DEFAULT_OUTPUT) -> None:
    """Show the disk usage, by stage.

    Unfinished files belong to stages that run now or were killed; `btu store gc` removes those of
    killed stages.

    Example: `btu store du --output s3://bucket/runs`
    """
    usage = housekeeping.usage(_open(output))
    table = Table("stage", header_style="bold")
    table.add_column("results", justify="right")
    table.add_column("size", justify="right")
    for stage, used in sorted(usage.items(), key=lambda item: -item[1].bytes):
        table.add_row(escape(stage), str(used.count), decimal(used.bytes))
    table.add_section()
    counts = sum(used.count for used in usage.values())
    table.add_row("all", str(counts), decimal(sum(used.bytes for used in usage.values())))
    console.print(table)


@app.command()
def verify(
    output: Output = DEFAULT_OUTPUT,
    owner: Annotated[
        bool, typer.Option("--owner", help="Name results with files of another Unix user too.")
    ] = False,
) -> None:
    """Read every file and compare it with its SHA-256; set damaged results aside.

    A result that is set aside counts as missing: the next launch that needs it computes it again.
    This finds accidents: a bad disk, a copy cut short. Who may write to the store can write hashes
    that fit; with BTU_STORE_SIGNING_KEY set, results without its signature are named too. They
    count as missing and stay where they are. Exit code 1 if there was any of these.

    Examples:

        btu store verify --output /scratch/runs

        btu store verify --owner                            # whose results are these?
    """
    store = _open(output)
    if owner and not store.storage.local:
        raise UserError(
            f"--owner names Unix users, which {store.location} does not have; leave it out, or ask "
            "the object store who wrote its objects."
        )
    damaged = _verify(store)
    unsigned = store.unsigned()
    foreign = foreign_entries(store) if owner else {}
    for key, state in unsigned.items():
        console.print(f"{key} is {state}.", highlight=False)
    for key, names in foreign.items():
        console.print(f"{key} has files of {escape(', '.join(names))}.", highlight=False)
    if damaged:
        _say(
            f"Set aside: {_count(len(damaged), 'damaged result')}. Launch the sweeps again that "
            "need them."
        )
    if unsigned:
        _say(
            f"Not signed with {SIGNING_KEY}: {_count(len(unsigned), 'result')}. They count as "
            "missing and stay where they are; `btu store sign` signs those that you trust."
        )
    if foreign:
        _say(f"Of other users: {_count(len(foreign), 'result')}.")
    if damaged or unsigned or foreign:
        raise typer.Exit(EXIT_DAMAGED)
    console.print("All results are intact.", highlight=False)


def _verify(store: Store) -> list[tuple[str, str]]:
    with Progress(console=errors, transient=True) as bar:
        task = bar.add_task("results", total=None)
        try:
            return store.verify(lambda done, of: bar.update(task, completed=done, total=of))
        except UserError:
            raise
        except OSError as error:
            raise UserError(
                f"{store.location} cannot be read to its end ({error}), so the rest was not "
                "checked; repair the disk or the connection and verify again."
            ) from error


@app.command()
def sign(
    output: Output = DEFAULT_OUTPUT,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Sign. Default: list only.")] = False,
) -> None:
    """Sign results with BTU_STORE_SIGNING_KEY that have no signature of it, as before it was set.

    Every file is read and compared with its SHA-256 first. Sign only what you trust: from then on
    it counts as yours.

    Example: `btu store sign --output /scratch/runs --yes`
    """
    if signing_key() is None:
        raise UserError(
            f"{SIGNING_KEY} is not set, so there is nothing to sign with; set it to a secret such "
            "as `openssl rand -hex 32` prints."
        )
    store = _open(output)
    unsigned = store.unsigned()
    if not unsigned:
        console.print("All results are signed.", highlight=False)
        return
    refused: dict[str, str] = {}
    for key, state in unsigned.items():
        problem = store.sign(key) if yes else None
        console.print(f"{key} is {state}{f': {problem}' if problem else ''}.", highlight=False)
        refused |= {key: problem} if problem else {}
    if not yes:
        _say(f"{_count(len(unsigned), 'result')}. Nothing was signed; --yes signs them.")
        return
    _say(f"Signed: {_count(len(unsigned) - len(refused), 'result')}.")
    if refused:
        _say(f"Not signed: {_count(len(refused), 'damaged result')}; see `btu store verify`.")
        raise typer.Exit(EXIT_DAMAGED)


@app.command()
def gc(
    output: Output = DEFAULT_OUTPUT,
    older_than: Annotated[
        str | None,
        typer.Option(help="Remove results older than this, e.g. 30d or 12h.", metavar="AGE"),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            help="Remove the oldest results until the rest takes less, e.g. 500MB or 20GB.",
            metavar="SIZE",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Keep all results that this sweep needs; repeatable. Without an age or a size all "
            "others are removed.",
            metavar="SWEEP",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove. Default: list only.")] = False,
) -> None:
    """Make room: list what would be removed, and remove it with --yes.

    Files of killed stages and damaged results are always included, once they are an hour old; so
    are leases and registrations of launches that are gone, and their folders for temporary files on
    this machine. If one of another machine has been silent for 30 s, gc watches it for as long.
    What a running launch needs is never removed. A removed result is computed again when it is
    needed.

    Examples:

        btu store gc --keep sst2_main --keep agnews_main    # all that neither sweep needs

        btu store gc --older-than 30d --max-size 20GB --yes # old results, then the oldest
    """
    from orchestrator.results.reachable import reachable
    from orchestrator.run.local import dead_folders, remove_dead_folder

    age, size = parse_age(older_than), parse_size(max_size)
    store = _open(output)
    needed = None if not keep else reachable(output, keep)
    candidates = housekeeping.gc_candidates(
        store, keep=needed, older_than=age, max_bytes=size, watch=_watch
    )
    folders = {folder: _folder_bytes(folder) for folder in dead_folders()}
    for line in _in_words(candidates):
        _say(line)
    for folder, taken in folders.items():
        _say(f"temporary folder ({decimal(taken)}): {folder}, of a launch that is gone")
    if not candidates and not folders:
        console.print("Nothing to remove.", highlight=False)
    elif yes:
        freed = housekeeping.gc(store, candidates)
        for folder, taken in folders.items():
            remove_dead_folder(folder)
            if folder.exists():
                _say(f"{folder} could not be removed; remove it by hand.")
            else:
                freed += taken
        console.print(f"Freed {decimal(freed)}.", highlight=False)
    else:
        total = sum(candidate.bytes for candidate in candidates) + sum(folders.values())
        console.print(
            f"This would free {decimal(total)}. Nothing was removed; --yes removes it.",
            highlight=False,
        )


def _watch(suspects: list[Holder]) -> None:
    """Wait until the heartbeats of living holders have changed."""
    _say(
        f"{_count(len(suspects), 'lease or launch', 'leases and launches')} of other machines "
        f"last changed over {TTL_S:.0f} s ago; watching for {TTL_S:.0f} s whether they live."
    )
    time.sleep(TTL_S)


def _folder_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def parse_age(text: str | None) -> float | None:
    """Return an age such as ``30d`` or ``12h`` in seconds.

    Raises:
        UserError: `text` is not an age.
    """
    return _parse(text, _SECONDS, "--older-than", "an age such as 30d or 12h (m, h, d or w)")


def parse_size(text: str | None) -> int | None:
    """Return a size such as ``500MB`` or ``20GB`` in bytes; a kilobyte has 1000.

    Raises:
        UserError: `text` is not a size.
    """
    size = _parse(text, _BYTES, "--max-size", "a size such as 500MB or 20GB (B to TB)")
    return None if size is None else int(size)


def _parse(text: str | None, units: dict[str, int], option: str, rule: str) -> float | None:
    if text is None:
        return None
    names = "|".join(units)
    found = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({names})", text.strip(), re.IGNORECASE)
    if found is None:
        raise UserError(f"{option} {text!r} is not {rule}; write a number and a unit.")
    unit = next(unit for unit in units if unit.lower() == found[2].lower())
    return float(found[1]) * units[unit]


def _in_words(candidates: list[housekeeping.Candidate]) -> list[str]:
    groups: dict[tuple[str, str], list[int]] = {}
    for candidate in candidates:
        groups.setdefault((candidate.kind, candidate.why), []).append(candidate.bytes)
    lines = []
    for (kind, why), sizes in groups.items():
        plural = PLURALS.get(kind, "")
        lines.append(f"{_count(len(sizes), kind, plural)} ({decimal(sum(sizes))}): {why}")
    return lines


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {plural or f'{noun}s'}"


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _age(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds // unit:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"


def _open(output: str) -> Store:
    store = Store(store_location(output_location(output)), warn=warn)
    if not store.exists():
        raise UserError(
            f"{store.location} does not exist: no sweep has run with this output folder "
            f"({shlex.quote(output)}). Launch one, or name another folder with --output."
        )
    return store
