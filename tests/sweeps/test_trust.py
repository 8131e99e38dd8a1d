"""What a sweep file cannot do by itself: reach a host with credentials, run code, fill memory."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import yaml

from btu.errors import UserError
from orchestrator.sweep import trust
from orchestrator.sweep.load import load_sweep
from orchestrator.sweep.sweep import Sweep
from orchestrator.sweep.trust import output_refusal, tracking_refusal

if TYPE_CHECKING:
    from conftest import Ran

SMALL = {"data": {"name": "demo", "max_train_rows": 40, "max_clean_rows": 20, "max_eval_rows": 20}}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the test's own, and an environment that names and allows nothing."""
    names = [*trust.VARIABLES.values(), trust.CONFIG_VARIABLE, trust.TRACKING_VARIABLE]
    for name in (*names, "XDG_CONFIG_HOME", *trust._CREDENTIALS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Sweep]:
    """A function from a config and overrides to a sweep."""

    def build(config: dict[str, Any], *overrides: str) -> Sweep:
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(config))
        return load_sweep(path, overrides)

    return build


@pytest.fixture
def write_config(home: Path) -> Callable[[dict[str, Any]], Path]:
    """A function that writes the user's own config."""

    def write(config: dict[str, Any]) -> Path:
        path = home / ".config" / "btu" / "config.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config))
        return path

    return write


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Fail at every look-up and connection; the list has their addresses."""
    tried: list[object] = []

    def refuse(*arguments: object, **_: object) -> NoReturn:
        tried.append(arguments[-1])
        raise AssertionError(f"a connection was opened: {arguments}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    yield tried
    assert tried == []


# Planning opens no connection ---------------------------------------------------------------------

URLS = [
    "http://127.0.0.1:9/runs",
    "https://example.org/runs",
    "sftp://me:pw@127.0.0.1/runs",
    "s3://bucket/runs",
    "gs://bucket/runs",
    "simplecache::http://127.0.0.1:9/runs",
    "ftp://127.0.0.1/runs",
]


@pytest.mark.parametrize("command", [["plan"], ["launch", "--dry-run"]], ids=["plan", "dry run"])
@pytest.mark.parametrize("url", URLS)
def test_planning_asks_no_output_that_the_file_alone_names(
    run_cli: Callable[..., Ran],
    tmp_path: Path,
    no_network: list[object],
    url: str,
    command: list[str],
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "output": url, "tracking": {"uri": "http://h:9"}}))
    done = run_cli(*command, path)
    assert done.code == 0, done.err
    assert "3 cells, 2 of them controls: 0 done, 3 to run" in done.out
    assert "the output was not asked: output" in done.err
    assert "pw" not in done.out + done.err


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"tracking": {"uri": "http://127.0.0.1:9"}},
        {"tracking": {"uri": "postgresql://127.0.0.1/db"}},
        {"victim": {"name": "bert-base-uncased"}},
        {"victim": {"name": "nobody/no-model", "revision": "x"}},
        {"output": "memory://planned"},
        {"optuna": {"trials": 3, "space": {"seed": [0, 1]}}, "output": "http://127.0.0.1:9/x"},
    ],
    ids=["local", "server", "database", "victim", "hub id", "memory", "suggested"],
)
def test_planning_opens_no_connection(
    run_cli: Callable[..., Ran], tmp_path: Path, no_network: list[object], sections: dict[str, Any]
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **sections}))
    assert run_cli("plan", path).code == 0


@pytest.mark.parametrize("name", ["sst2", "nobody/no-data"])
def test_planning_downloads_no_data_set(
    run_cli: Callable[..., Ran],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_network: list[object],
    name: str,
) -> None:
    import datasets.config
    import huggingface_hub.constants

    # As in a process that may reach the hub, which the tests' own may not.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({"data": {"name": name}}))
    done = run_cli("plan", path)
    assert done.code == 2
    assert f"data set '{name}' has not been downloaded from the hub" in done.err
    assert "btu plan --download" in done.err
    # It is back as it was, for a launch in the same process.
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_a_folder_is_no_data_set_of_the_hub(
    run_cli: Callable[..., Ran],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_network: list[object],
) -> None:
    # `load_dataset` fetches what the README of a folder names, also offline.
    card = {"configs": [{"config_name": "x", "data_files": "http://127.0.0.1:9/train.csv"}]}
    (tmp_path / "own" / "data").mkdir(parents=True)
    (tmp_path / "own" / "data" / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(yaml.safe_dump({"data": {"name": "own/data"}}))
    done = run_cli("plan", "x.yaml")
    assert done.code == 2
    assert "'own/data' is also a folder here" in done.err
    assert "data.path=own/data" in done.err
    assert no_network == []


def test_an_unknown_data_set_is_still_that(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("data: {name: sts2}")
    assert "unknown dataset 'sts2'; did you mean 'sst2'?" in run_cli("plan", path).err


def test_an_output_that_the_user_names_is_asked(
    run_cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    opened: list[str] = []

    def open_storage(location: object) -> NoReturn:
        opened.append(str(location))
        raise UserError("opened")

    monkeypatch.setattr("orchestrator.store.store.open_storage", open_storage)
    assert "opened" in run_cli("plan", path, "output=s3://bucket/runs").err
    monkeypatch.setenv("BTU_TRUSTED_HOSTS", "s3://bucket")
    path.write_text(yaml.safe_dump({**SMALL, "output": "s3://bucket/runs"}))
    assert "opened" in run_cli("plan", path).err
    assert opened == ["s3://bucket/runs/store"] * 2


# Hosts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", URLS)
def test_a_launch_refuses_an_output_that_the_file_alone_names(
    run_cli: Callable[..., Ran], tmp_path: Path, no_network: list[object], url: str
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "output": url, "tracking": {"uri": "http://h:9"}}))
    done = run_cli("launch", path)
    assert done.code == 2
    assert "is named by a file alone, and your credentials would be used there" in done.err
    assert "on the command line, BTU_TRUSTED_HOSTS=" in done.err
    assert "config.yaml" in done.err
    assert "pw" not in done.err


@pytest.mark.parametrize(
    "url",
    ["runs", "/x/runs", "file:///x/runs", "memory://x", "local:///x", "simplecache::memory://x"],
)
def test_local_outputs_need_no_trust(load: Callable[..., Sweep], url: str) -> None:
    assert output_refusal(load({"output": url})) is None


@pytest.mark.parametrize(
    ("url", "entry", "trusted"),
    [
        ("sftp://host/x", "host", True),
        ("sftp://me:pw@HOST:22/x", "host", True),
        ("sftp://host:22/x", "host:22", True),
        ("sftp://host:23/x", "host:22", False),
        ("sftp://host/x", "sftp://host", True),
        ("sftp://host/x", "http://host", False),
        ("http://host.evil.example/x", "host", False),
        ("http://evil-host/x", "host", False),
        ("s3://bucket/x", "s3://bucket", True),
        ("s3://bucket2/x", "s3://bucket", False),
        # A bucket may have the name of a host.
        ("s3://mlflow.lab.example/x", "mlflow.lab.example", False),
        ("simplecache::s3://bucket/x", "s3://bucket", True),
        # Every part of a chain counts.
        ("zip://a::http://host/x::http://evil/y", "host", False),
        ("filecache::sftp::memory://x", "sftp://", False),
        # What clients read in different ways is never a host of the list.
        ("http://evil\\@host/x", "host", False),
        ("http://evil/@host", "host", False),
        ("http://evil#@host", "host", False),
        ("http://evil?@host", "host", False),
        ("http://host@evil/x", "host", False),
        ("http:///x", "", False),
    ],
)
def test_an_entry_trusts_the_host_that_it_names(
    load: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch, url: str, entry: str, trusted: bool
) -> None:
    monkeypatch.setenv("BTU_TRUSTED_HOSTS", f"other.example, {entry}")
    reason = output_refusal(load({"output": url}))
    assert (reason is None) is trusted
    assert output_refusal(load({"output": "runs"}, f"output={url!r}")) is None


def test_the_users_config_trusts_a_host(
    load: Callable[..., Sweep], write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = load({"output": "s3://bucket/x"})
    reason = output_refusal(sweep)
    assert reason is not None
    assert reason.startswith("output s3://bucket/x: the host s3://bucket is named by a file alone")
    assert "output=s3://bucket/x on the command line" in reason
    assert "BTU_TRUSTED_HOSTS=s3://bucket in the environment" in reason
    path = write_config({"trusted_hosts": ["s3://bucket"]})
    assert f"trusted_hosts: ['s3://bucket'] in {path}" in reason
    assert output_refusal(sweep) is None
    monkeypatch.setenv("BTU_CONFIG", str(path.rename(path.parent / "other.yaml")))
    assert output_refusal(sweep) is None
    monkeypatch.delenv("BTU_CONFIG")
    assert output_refusal(sweep) is not None
    folder = path.parents[2] / "xdg" / "btu"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("trusted_hosts: ['s3://bucket']")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder.parent))
    assert output_refusal(sweep) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"trusted_host": ["x"]}, "unknown key of your config .* did you mean 'trusted_hosts'?"),
        (
            {"trusted_hosts": "x"},
            "trusted_hosts in your config .* must be a list of names, got 'x'",
        ),
        ({"allow_pickle": [1]}, "allow_pickle in your config .* must be a list of names"),
        (["x"], "must map keys to lists"),
    ],
)
def test_a_bad_config_of_the_user_is_refused(
    write_config: Callable[..., Path], config: Any, message: str
) -> None:
    write_config(config)
    with pytest.raises(UserError, match=message):
        trust.user_trust()


def test_a_config_that_others_can_write_is_not_the_users_own(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config({"trusted_hosts": ["host"]})
    assert trust.user_trust().trusted_hosts == ("host",)
    path.chmod(0o666)
    with pytest.raises(UserError, match=r"can be written by everyone.*chmod o-w"):
        trust.user_trust()
    path.chmod(0o644)
    owner = path.stat().st_uid
    monkeypatch.setattr("os.getuid", lambda: owner + 1)
    if owner == 0:  # a config of root is taken
        assert trust.user_trust().trusted_hosts == ("host",)
    else:
        with pytest.raises(UserError, match="belongs to another user"):
            trust.user_trust()


def test_a_config_that_is_named_and_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BTU_CONFIG", "gone.yaml")
    with pytest.raises(UserError, match=r"BTU_CONFIG names gone\.yaml, which is no file"):
        trust.user_trust()


@pytest.mark.parametrize("variable", trust._CREDENTIALS)
def test_a_server_of_the_file_gets_no_credentials(
    load: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    sweep = load({"tracking": {"uri": "http://u:p@server.example:5000"}})
    # The user has none: the URL's own are the file's.
    assert tracking_refusal(sweep) is None
    monkeypatch.setenv(variable, "secret")
    reason = tracking_refusal(sweep)
    assert reason is not None
    assert reason.startswith(
        "tracking.uri http://server.example:5000: the host server.example:5000"
    )
    assert "secret" not in reason
    named = load({}, "tracking.uri=http://server.example:5000")
    assert tracking_refusal(named) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server.example:5000/")
    assert tracking_refusal(sweep) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other.example:5000/")
    assert tracking_refusal(sweep) is not None


def test_mlflows_own_file_has_credentials_too(load: Callable[..., Sweep], home: Path) -> None:
    sweep = load({"tracking": {"uri": "http://server.example:5000"}})
    (home / ".mlflow").mkdir(parents=True)
    (home / ".mlflow" / "credentials").write_text("[mlflow]")
    assert tracking_refusal(sweep) is not None


@pytest.mark.parametrize(
    ("uri", "refused"),
    [
        ("sqlite:////x/mlflow.db", False),
        ("a folder/runs", False),
        ("sqlite:///mlflow.db", False),
        ("file:///x", False),
        ("mlruns", False),
        ("./ml/runs", False),
        ("postgresql://host/db", True),
        ("postgresql+psycopg2://host/db?host=evil", True),
        ("databricks", True),
        ("databricks://profile", True),
        ("uc:http://host", True),
        # Python's urllib ignores blanks before a scheme, and line breaks and tabs anywhere.
        (" http://host", True),
        ("\x01http://host", True),
        ("ht\ttp://host", True),
        ("\npostgresql://host/db", True),
    ],
)
def test_databases_of_hosts_need_trust(load: Callable[..., Sweep], uri: str, refused: bool) -> None:
    assert (tracking_refusal(load({"tracking": {"uri": uri}})) is not None) is refused


# Code of victims ----------------------------------------------------------------------------------

PLACES: dict[str, Callable[[str], dict[str, Any]]] = {
    "base": lambda flag: {"victim": {flag: True}},
    "as text": lambda flag: {"victim": {flag: "yes"}},
    "a number": lambda flag: {"victim": {flag: 1}},
    "grid": lambda flag: {"grid": {f"victim.{flag}": [False, True]}},
    "zip": lambda flag: {"zip": {f"victim.{flag}": [False, True], "seed": [0, 1]}},
    "list": lambda flag: {"list": [{"seed": 0}, {f"victim.{flag}": True, "seed": 1}]},
    "random": lambda flag: {"random": {"samples": 2, "space": {f"victim.{flag}": [False, True]}}},
    "optuna": lambda flag: {"optuna": {"trials": 2, "space": {f"victim.{flag}": [True]}}},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("flag", trust.FLAGS)
def test_a_file_alone_lets_no_victim_run_code(
    load: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch, flag: str, place: str
) -> None:
    config = PLACES[place](flag)
    with pytest.raises(UserError) as refused:
        load(config)
    message = str(refused.value)
    assert message.startswith(f"victim.{flag}: true stands in the sweep file alone")
    assert f"victim.{flag}=true on the command line" in message
    assert f"{trust.VARIABLES[flag]}=offline in the environment" in message
    assert f"{flag}: ['offline'] in" in message
    what = {"trust_remote_code": "runs Python code", "allow_pickle": "reads pickles"}
    assert f"it {what[flag]}" in message
    load(config, f"victim.{flag}=true")
    load(config, f"victim.{flag}=false")
    load({}, f"grid.victim.{flag}=[true]")
    monkeypatch.setenv(trust.VARIABLES[flag], "gpt2,offline")
    load(config)
    monkeypatch.setenv(trust.VARIABLES[flag], "gpt2")
    with pytest.raises(UserError, match=f"victim.{flag}"):
        load(config)


def test_false_needs_no_trust(load: Callable[..., Sweep]) -> None:
    load({"victim": {"trust_remote_code": False, "allow_pickle": "no"}})


def test_every_victim_of_a_sweep_has_to_be_named(
    load: Callable[..., Sweep], write_config: Callable[..., Path]
) -> None:
    config = {"victim": {"allow_pickle": True}, "grid": {"victim.name": ["a/b", "c/d"]}}
    write_config({"allow_pickle": ["a/b"], "trust_remote_code": ["c/d"]})
    with pytest.raises(UserError, match="for victim 'c/d'"):
        load(config)
    write_config({"allow_pickle": ["a/b", "c/d"]})
    load(config)


def test_a_folder_is_trusted_by_its_path_and_not_by_a_name(
    load: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    config = {"victim": {"name": "owner/model", "trust_remote_code": True}}
    # Meant for the model of the hub; here it is a folder.
    monkeypatch.setenv("BTU_TRUST_REMOTE_CODE", "owner/model")
    with pytest.raises(UserError, match="for victim 'owner/model'"):
        load(config)
    monkeypatch.setenv("BTU_TRUST_REMOTE_CODE", str(tmp_path / "owner" / "model"))
    load(config)


# Large sweeps -------------------------------------------------------------------------------------

TEN = list(range(10))
LARGE: dict[str, tuple[dict[str, Any], str]] = {
    # 10^7 cells
    "grid": (
        {"grid": {f"{key}": TEN for key in ("seed", "data.split_seed", "train.epochs",
         "victim.max_length", "train.batch_size", "tuning.epochs", "tuning.batch_size")}},
        "10,000,000 cells (grid of data.split_seed 10, seed 10, ",
    ),
    "random": ({"random": {"samples": 10**9, "space": {"seed": TEN}}}, "1,000,000,000 cells"),
    # 400 x 300
    "zip x list": (
        {"zip": {"seed": list(range(400))}, "list": [{"train.epochs": n} for n in range(300)]},
        "120,000 cells (list of 300; zip of seed 400)",
    ),
    "optuna": (
        {"optuna": {"trials": 20_000, "space": {"seed": TEN}}, "grid": {"train.epochs": TEN}},
        "200,000 cells (20000 suggestions; grid of train.epochs 10)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LARGE)
def test_a_large_sweep_is_counted_before_it_is_made(
    load: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    config, expected = LARGE[case]
    for mode in ("axes.GridMode", "axes.ZipMode", "random.RandomMode", "list.ListMode"):
        monkeypatch.setattr(f"orchestrator.sweep.modes.{mode}.points", None)  # made: TypeError
    with pytest.raises(UserError) as refused:
        load(config)
    assert expected in str(refused.value)
    assert "more than 100,000" in str(refused.value)
    assert "--yes" in str(refused.value)


def test_a_large_sweep_is_planned_when_asked_for(
    run_cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.sweep.search.MOST_CELLS", 3)
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "grid": {"seed": [0, 1, 2, 3]}, "controls": False}))
    refused = run_cli("plan", path)
    assert refused.code == 2
    assert "the sweep has 4 cells (grid of seed 4), more than 3" in refused.err
    assert "4 cells: 0 done" in run_cli("plan", path, "--yes").out
    assert "4 cells: 0 done" in run_cli("launch", path, "--yes", "--dry-run").out
    assert run_cli("plan", path, "grid.seed=[0,1,2]").code == 0


def test_the_count_of_a_mode_is_that_of_its_points(load: Callable[..., Sweep]) -> None:
    sweep = load(
        {
            "grid": {"seed": [0, 1], "train.epochs": [1, 2, 3]},
            "zip": {"data.split_seed": [0, 1], "train.batch_size": [2, 4]},
            "list": [{"victim.max_length": 8}, {"victim.max_length": 9}],
            "random": {"samples": 5, "space": {"tuning.epochs": [1, 2]}},
        }
    )
    assert [mode.count() for mode in sweep.planned] == [len(m.points()) for m in sweep.planned]
    assert sweep.count == len(list(sweep.cells())) == 5 * 2 * 2 * 6
