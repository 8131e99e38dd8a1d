"""What a sweep file may do by itself, and what the user has to name as well.

A sweep file may come from anyone. By itself it sends no credentials to a host that it names, and
lets no victim run code. The user allows either on the command line, in the environment, or in the
user's own config: ``$BTU_CONFIG``, else ``$XDG_CONFIG_HOME/btu/config.yaml``, else
``~/.config/btu/config.yaml``. Nothing here opens a connection.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from btu.errors import UserError, unknown
from btu.redaction import shown_url
from btu.victims import VictimSpec
from orchestrator.sweep.search import possible_points
from orchestrator.sweep.tree import ABSENT, lookup

if TYPE_CHECKING:
    from orchestrator.sweep.modes.base import SearchMode
    from orchestrator.sweep.sweep import Sweep

# The MLflow server of a sweep that names none.
TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"
CONFIG_VARIABLE = "BTU_CONFIG"
# The environment's counterpart of each key of the user's config: values, separated by commas.
VARIABLES = {
    "trusted_hosts": "BTU_TRUSTED_HOSTS",
    "trust_remote_code": "BTU_TRUST_REMOTE_CODE",
    "allow_pickle": "BTU_ALLOW_PICKLE",
}
# What lets a victim run code, by its key in `VictimSpec`.
FLAGS = {
    "trust_remote_code": "runs Python code that comes with the model",
    "allow_pickle": "reads pickles, which only weights_only=True keeps from running code",
}
# fsspec's protocols without a host, and its wrappers of another one.
_LOCAL = {"file", "local", "memory", "simplecache", "filecache", "blockcache", "zip", "tar"}
# Protocols whose URLs name a host. Those of others name a bucket, which is no host of that name.
_HOSTS = {
    *("http", "https", "sftp", "ssh", "ftp", "smb", "hdfs", "webhdfs"),
    *("postgresql", "mysql", "mariadb", "mssql", "oracle"),
}
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:\d+)?")
# What MLflow would send to a tracking server.
_CREDENTIALS = tuple(
    f"MLFLOW_TRACKING_{name}"
    for name in ("USERNAME", "PASSWORD", "TOKEN", "AUTH", "AWS_SIGV4", "CLIENT_CERT_PATH")
)


@dataclass(frozen=True)
class Trust:
    """What the user allows sweep files.

    trusted_hosts: hosts (``mlflow.lab.example``, ``host:5000``) and buckets (``s3://bucket``) that
        may get the user's credentials.
    trust_remote_code: victims, by name or folder, whose own code may run.
    allow_pickle: victims whose pickled weights may be loaded.
    """

    trusted_hosts: tuple[str, ...] = ()
    trust_remote_code: tuple[str, ...] = ()
    allow_pickle: tuple[str, ...] = ()


class Place(NamedTuple):
    """Where a URL leads. host: with its port, or a bucket; empty where it cannot be told."""

    protocol: str
    host: str

    @property
    def entry(self) -> str:
        """How `Trust.trusted_hosts` names it."""
        return self.host if self.protocol in _HOSTS else f"{self.protocol}://{self.host}"


def user_config() -> Path:
    """Return where the user's own config is, or would be."""
    if named := os.environ.get(CONFIG_VARIABLE):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME", "")
    # As the XDG specification has it: a relative path is ignored.
    folder = Path(base) if os.path.isabs(base) else Path("~/.config").expanduser()
    return folder / "btu" / "config.yaml"


def user_trust() -> Trust:
    """Return what the user's config and environment allow.

    Raises:
        UserError: the config has an unknown key ("did you mean"), or cannot be read.
    """
    allowed = _read(user_config())
    for key, variable in VARIABLES.items():
        given = [part.strip() for part in os.environ.get(variable, "").split(",")]
        allowed[key] = [*allowed.get(key, []), *filter(None, given)]
    return Trust(**{key: tuple(values) for key, values in allowed.items()})


def _read(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        if os.environ.get(CONFIG_VARIABLE):
            raise UserError(
                f"{CONFIG_VARIABLE} names {path}, which is no file; correct it, or unset it."
            )
        return {}
    facts = path.stat()
    if facts.st_uid not in (os.getuid(), 0) or facts.st_mode & stat.S_IWOTH:
        raise UserError(
            f"your config {path} belongs to another user or can be written by everyone, so that "
            f"it is not yours alone; take it over, or run chmod o-w {shlex.quote(str(path))}."
        )
    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"your config {path} cannot be read: {error}; correct it.") from error
    if written is None:
        return {}
    if not isinstance(written, dict):
        raise UserError(f"your config {path} must map keys to lists, got {written!r}.")
    known = [field.name for field in fields(Trust)]
    for key, values in written.items():
        if key not in known:
            raise unknown(f"key of your config {path}", str(key), known)
        if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
            raise UserError(f"{key} in your config {path} must be a list of names, got {values!r}.")
    return written


# Victims ------------------------------------------------------------------------------------------


def refuse_code(
    config: Mapping[str, Any], modes: Sequence[SearchMode], given: Collection[str]
) -> None:
    """Check that a victim runs code only where the user says so.

    config: the settings of all cells.
    modes: the searches of the sweep.
    given: the keys that the command line has set, as axes too.

    Raises:
        UserError: the sweep file alone lets a victim run code.
    """
    asked = [flag for flag in FLAGS if f"victim.{flag}" not in given]
    trust: Trust | None = None
    for point in possible_points(modes, ["victim.name", *(f"victim.{flag}" for flag in asked)]):
        name = point.get("victim.name", lookup(config, "victim.name"))
        name = VictimSpec().name if name is ABSENT else str(name)
        for flag in asked:
            if not _is_on(point.get(f"victim.{flag}", lookup(config, f"victim.{flag}"))):
                continue
            trust = trust or user_trust()
            if not any(_is_victim(entry, name) for entry in getattr(trust, flag)):
                raise UserError(
                    f"victim.{flag}: true stands in the sweep file alone, for victim '{name}': it "
                    f"{FLAGS[flag]}, so you have to allow it yourself, if you trust that model: "
                    f"victim.{flag}=true on the command line, {VARIABLES[flag]}={name} in the "
                    f"environment, or {flag}: ['{name}'] in {user_config()}."
                )


def _is_on(value: Any) -> bool:
    """Return whether a flag may be true; what is no truth value is refused later."""
    if value is ABSENT or value is None:
        return False
    return str(value).strip().lower() not in ("false", "no", "off", "n", "0", "")


def _is_victim(entry: str, name: str) -> bool:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return entry == name
    # Not by name: a folder of a stranger may be called as a model of the hub is.
    by_path = entry.startswith(("/", "~", "./", "../"))
    return by_path and Path(entry).expanduser().resolve() == folder.resolve()


# Hosts --------------------------------------------------------------------------------------------


def check_hosts(sweep: Sweep) -> None:
    """Check that the output and the tracking server of a sweep may get the user's credentials.

    Raises:
        UserError: the sweep file alone names one of them.
    """
    for reason in (output_refusal(sweep), tracking_refusal(sweep)):
        if reason is not None:
            raise UserError(reason)


def output_refusal(sweep: Sweep) -> str | None:
    """Return why the output of a sweep may not be opened; None if it may."""
    if "output" in sweep.given:
        return None
    return _refusal("output", sweep.output, list(_places(sweep.output)), user_trust())


def tracking_refusal(sweep: Sweep) -> str | None:
    """Return why the tracking server of a sweep may not be asked; None if it may."""
    if sweep.tracking.uri is None or "tracking.uri" in sweep.given:
        return None
    return server_refusal("tracking.uri", sweep.tracking.uri)


def server_refusal(key: str, uri: str) -> str | None:
    """Return why a tracking server that a file names may not be asked; None if it may.

    A server gets no credentials where the user has none for MLflow: then it may be asked.

    key: what errors call the place of the URI.
    """
    place = _tracking_place(uri)
    if place is None:
        return None
    if place.protocol in ("http", "https") and not _mlflow_credentials():
        return None
    trust = user_trust()
    named = _tracking_place(os.environ.get(TRACKING_VARIABLE, ""))
    hosts = trust.trusted_hosts if named is None else (*trust.trusted_hosts, _url_of(named))
    return _refusal(key, uri, [place], Trust(hosts))


def _refusal(key: str, url: str, places: Sequence[Place], trust: Trust) -> str | None:
    for place in places:
        if any(_is_place(entry, place) for entry in trust.trusted_hosts):
            continue
        joint = " " if key.startswith("-") else "="
        override = f"{key}{joint}{shown_url(url)} on the command line"
        listed = (
            f", {VARIABLES['trusted_hosts']}={place.entry} in the environment, or trusted_hosts: "
            f"['{place.entry}'] in {user_config()}"
            if place.host
            else ""
        )
        what = f"the host {place.entry}" if place.host else "a host"
        return (
            f"{key} {shown_url(url)}: {what} is named by a file alone, and your credentials would "
            f"be used there. If you trust it, name it yourself: {override}{listed}."
        )
    return None


def _mlflow_credentials() -> bool:
    """Return whether MLflow has credentials of the user."""
    stored = Path("~/.mlflow/credentials").expanduser()
    return any(os.environ.get(name) for name in _CREDENTIALS) or stored.is_file()


def _places(location: str) -> Iterator[Place]:
    """Yield the places that a location leads to; none for a path or a local protocol."""
    parts = location.split("::")
    for part in parts:
        # Within a chain fsspec takes a plain word for a protocol.
        if "://" in part or (len(parts) > 1 and re.fullmatch(r"[a-z0-9]+", part)):
            place = _place(part)
            if place.protocol not in _LOCAL:
                yield place


def _place(url: str) -> Place:
    scheme, _, rest = url.partition("://")
    protocol = scheme.lower().partition("+")[0]
    authority, mark, _ = re.split(r"([/?#\\]|$)", rest, maxsplit=1)
    host = authority.rpartition("@")[2]
    # A query may name another host, e.g. to a client of PostgreSQL.
    if mark == "\\" or "\\" in rest or "?" in rest or not _HOST.fullmatch(host):
        return Place(protocol, "")
    return Place(protocol, host.lower() if protocol in _HOSTS else host)


def _tracking_place(uri: str) -> Place | None:
    """Return where a tracking URI leads; None for a file or an empty text."""
    # urllib removes these before it reads the scheme, and so MLflow does.
    if re.search(r"^[\0-\x20]|[\t\r\n]", uri):
        return Place("", "")
    scheme = re.match(r"([A-Za-z][\w+.-]*):|databricks$", uri)
    if scheme is None:
        return None
    place = _place(uri) if "://" in uri else Place(uri.partition(":")[0].lower(), "")
    return None if place.protocol in ("sqlite", "file") else place


def _url_of(place: Place) -> str:
    return f"{place.protocol}://{place.host}"


def _is_place(entry: str, place: Place) -> bool:
    """Return whether an entry of `Trust.trusted_hosts` names a place."""
    if not place.host:
        return False
    if "://" in entry:
        named = _place(entry)
    elif place.protocol in _HOSTS:
        named = Place(place.protocol, entry.strip("/").lower())
    else:
        return False
    without_port = re.sub(r":\d+$", "", place.host)
    return named.protocol == place.protocol and named.host in (place.host, without_port)
