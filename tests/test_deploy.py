"""The recipes of deploy/: as far as a machine without a cluster can check them.

Every check is a function from a recipe's text to what is wrong with it. Each is also given broken
copies, which it has to find.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.scripts.scripts as ray_commands
import typer
import typer.main
import yaml
from click import ClickException, Command
from ray import autoscaler
from ray.autoscaler._private.util import prepare_config, validate_config
from sqlalchemy import make_url

from btu.errors import UserError
from orchestrator.cli.main import app
from orchestrator.sweep.load import load_sweep

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILE, IGNORED = DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.dockerignore"
RAYJOB, CLUSTER = DEPLOY / "kuberay/rayjob.yaml", DEPLOY / "ray/cluster.yaml"
SBATCH, COMPOSE = DEPLOY / "slurm/sweep.sbatch", DEPLOY / "mlflow/compose.yaml"
RECIPES = [DOCKERFILE, RAYJOB, CLUSTER, SBATCH, COMPOSE]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS, re.MULTILINE))
PYTHON = re.findall(r"Made with Python (\d\.\d+)", CONSTRAINTS)[0]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FIELDS = json.loads((Path(__file__).parent / "deploy/kuberay_fields.json").read_text())["types"]
# Typer has a Click of its own.
USAGE_ERROR = typer.BadParameter.__base__ or typer.BadParameter
BTU = typer.main.get_command(app)


TOLD = re.compile(r"\bRun: .{20}.*\bNot run: .{20}")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def broken(path: Path, old: str, new: str) -> str:
    """Return a recipe's text with one part replaced, which has to be there."""
    text = path.read_text()
    assert old in text
    return text.replace(old, new)


def uncommented(text: str) -> str:
    """Return a recipe with its comments as text, and continued lines as one."""
    bare = re.sub(r"^[ \t]*#+ ?", "", text, flags=re.MULTILINE)
    return re.sub(r"\s*\\\n\s*", " ", bare)


def head(text: str) -> str:
    """Return the comment that a recipe begins with, as one line of text."""
    lines = text.splitlines()[text.startswith("#!") :]
    comment = lines[: next(at for at, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.lstrip("# ") for line in comment)


# All recipes ------------------------------------------------------------------------------------


def test_every_file_of_deploy_is_a_recipe_that_is_checked() -> None:
    files = {path for path in DEPLOY.rglob("*") if path.is_file()}
    assert files == {*RECIPES, IGNORED}


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_recipe_tells_what_was_run_and_what_was_not(path: Path) -> None:
    assert TOLD.search(head(path.read_text()))


@pytest.mark.parametrize(
    ("old", "new"), [("# Run: ", "# Tested: "), ("# Not run: ", "# "), ("# A Ray", "\n# A Ray")]
)
def test_a_recipe_that_does_not_tell_is_found(old: str, new: str) -> None:
    assert not TOLD.search(head(broken(CLUSTER, old, new)))


def prose(text: str) -> list[str]:
    """Return the words of a page that people read: without code blocks and targets of links."""
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\]\([^)]*\)|[|`*>-]+", " ", plain).split()


def test_the_page_on_clusters_is_read_in_five_minutes() -> None:
    page = (ROOT / "docs/cluster.md").read_text()
    assert len(prose(page)) <= 5 * 260
    assert [named(path) for path in RECIPES if f"../{named(path)}" not in page] == []


def wrong_versions(text: str) -> list[str]:
    """Return the versions of Python and Ray that are not those of constraints.txt, or missing."""
    plain = uncommented(text)
    wrong = [each for each in (f"Python {PYTHON}", f"ray=={PINS['ray']}") if each not in plain]
    patterns = {
        PYTHON: (r"\bPython (3\.\d+)", r"\bpython:(3\.\d+)"),
        PYTHON.replace(".", ""): (r"-py(\d+)-",),
        PINS["ray"]: (r"\bray==([\d.]+\d)", r"\bray:([\d.]+)-", r'rayVersion: "([\d.]+)"'),
        PINS["mlflow"]: (r"\bmlflow==([\d.]+\d)",),
        str(tuple(map(int, PYTHON.split("."))))[1:-1]: (r"v == \((\d, \d+),",),
        PROJECT_VERSION: (r"\bbtu:([\d.]+)-",),
    }
    for expected, forms in patterns.items():
        wrong += [hit for form in forms for hit in re.findall(form, text) if hit != expected]
    return wrong


PROJECT_VERSION = importlib.import_module("btu").__version__


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_recipe_names_the_pinned_python_and_ray(path: Path) -> None:
    assert wrong_versions(path.read_text()) == []


@pytest.mark.parametrize(
    ("path", "old", "new", "wrong"),
    [
        (DOCKERFILE, "python:3.11-", "python:3.12-", ["3.12"]),
        (DOCKERFILE, "-py311-", "-py312-", ["312"]),
        (RAYJOB, 'rayVersion: "2.60.0"', 'rayVersion: "2.59.0"', ["2.59.0"]),
        (RAYJOB, "btu:0.1.0-", "btu:0.2.0-", ["0.2.0"]),
        (CLUSTER, "v == (3, 11,", "v == (3, 12,", ["3, 12"]),
        (SBATCH, "ray==2.60.0", "ray", ["ray==2.60.0"]),
        (COMPOSE, "mlflow==3.17.2", "mlflow==3.17.1", ["3.17.1"]),
    ],
)
def test_another_version_is_found(path: Path, old: str, new: str, wrong: list[str]) -> None:
    assert wrong_versions(broken(path, old, new)) == wrong


def calls(text: str) -> Iterator[list[str]]:
    """Yield the words of every call of `btu` in a recipe; "$@" as the words given to sbatch."""
    plain = uncommented(text)
    given = re.search(r"sbatch deploy/\S+ (.+)", plain)
    for call in re.findall(r"\bbtu ((?:launch|plan|report|status|store) [^\n'`&|;]+)", plain):
        yield shlex.split(call.replace('"$@"', given[1] if given else ""))


def wrong_call(words: list[str]) -> str:
    """Return why the CLI refuses a call, or the sweep file one of its overrides; empty if not."""
    command: Command = BTU.commands[words[0]]  # type: ignore[attr-defined]
    try:
        context = command.make_context(words[0], words[1:])
        overrides = context.params.get("overrides") or []
        load_sweep(ROOT / "sweeps/quickstart.yaml", overrides)
    except (USAGE_ERROR, UserError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("path", [RAYJOB, CLUSTER, SBATCH], ids=named)
def test_every_btu_command_of_a_recipe_parses(path: Path) -> None:
    found = list(calls(path.read_text()))
    assert any(words[0] == "launch" for words in found)
    for words in found:
        assert wrong_call(words) == "", words


@pytest.mark.parametrize(
    ("path", "old", "new", "reason"),
    [
        (RAYJOB, "--address auto", "--adress auto", "No such option"),
        (CLUSTER, "resources.gpu=", "resources.gpus=", "gpus"),
        (SBATCH, ' --address "$head', ' --host "$head', "No such option"),
        (SBATCH, "output=/shared/runs", "outptu=/shared/runs", "outptu"),
    ],
)
def test_a_command_that_does_not_parse_is_found(
    path: Path, old: str, new: str, reason: str
) -> None:
    reasons = [wrong_call(words) for words in calls(broken(path, old, new))]
    assert any(reason in each for each in reasons), reasons


def wrong_ray_call(words: list[str]) -> str:
    """Return why Ray's command line refuses the options of `ray start` or `ray symmetric-run`."""
    name, *given = words
    options = {opt for p in ray_commands.start.params for opt in (*p.opts, *p.secondary_opts)}
    if name == "symmetric-run":
        options |= {"--address", "--min-nodes"}
        options -= {"--head", "--node-ip-address", "--port", "--block"}
    unknown = [w for w in given if w.startswith("--") and w.partition("=")[0] not in options]
    return f"ray {name} has no {unknown[0]}" if unknown else ""


def ray_calls(text: str) -> Iterator[list[str]]:
    folded = re.sub(r"\n +(?=--)", " ", uncommented(text))
    for call in re.findall(r"\bray ((?:start|symmetric-run) --[^\n`]*?)(?= -- |\n|$)", folded):
        yield shlex.split(call)


@pytest.mark.parametrize(("path", "count"), [(CLUSTER, 2), (SBATCH, 1)])
def test_ray_knows_the_options_it_is_given(path: Path, count: int) -> None:
    found = list(ray_calls(path.read_text()))
    assert len(found) == count
    assert [reason for words in found if (reason := wrong_ray_call(words))] == []


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        (CLUSTER, "--num-cpus=0\n", "--num-cpu=0\n"),
        (SBATCH, "--disable-usage-stats", "--no-usage-stats"),
        (SBATCH, "--num-gpus", "--block --num-gpus"),
    ],
)
def test_an_option_that_ray_does_not_have_is_found(path: Path, old: str, new: str) -> None:
    assert any(wrong_ray_call(words) for words in ray_calls(broken(path, old, new)))


# The image --------------------------------------------------------------------------------------


def instructions(text: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile: name and the rest of the line."""
    lines = [line for line in text.splitlines() if line.strip() and line.lstrip()[0] != "#"]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined)]


def wrong_image(text: str, ignored: str) -> list[str]:
    """Return what is wrong with the Dockerfile. ignored: its .dockerignore."""
    found = instructions(text)
    wrong = []
    users = [rest for name, rest in found if name == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*", users[-1]):
        wrong.append("the last USER is no number above 0")
    if not any(name == "ARG" and rest.startswith("BASE=") for name, rest in found):
        wrong.append("the base is no argument")
    if ("FROM", "${BASE}") not in found:
        wrong.append("the image is not made FROM the argument")
    for rest in (rest for name, rest in found if name == "RUN" and "pip install" in rest):
        if "-c constraints.txt" not in rest and "grep '^torch==' constraints.txt" not in rest:
            wrong.append(f"not pinned: {rest}")
        for extra in re.findall(r"\.\[([\w,]+)\]", rest):
            unknown = set(extra.split(",")) - set(PROJECT["optional-dependencies"])
            wrong += [f"no extra {name}" for name in sorted(unknown)]
    if found.index(("USER", users[-1]) if users else found[-1]) > found.index(
        ("RUN", "btu --version") if ("RUN", "btu --version") in found else found[0]
    ):
        wrong.append("btu --version is not run by the image's user")
    let_in = {line[1:] for line in ignored.splitlines() if line.startswith("!")}
    sources = {w for name, rest in found if name == "COPY" for w in rest.split()[:-1]}
    wrong += [f"{path} does not exist" for path in sorted(sources) if not (ROOT / path).exists()]
    wrong += [f"{path} is kept from the build" for path in sorted(sources - let_in)]
    wrong += [f"{path} is let in for nothing" for path in sorted(let_in - sources)]
    return wrong


def test_the_image_is_pinned_and_not_roots() -> None:
    assert wrong_image(DOCKERFILE.read_text(), IGNORED.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("USER 1001", "USER root", "the last USER is no number above 0"),
        ("USER 1001", "USER 0", "the last USER is no number above 0"),
        ("RUN btu --version\n", "", "btu --version is not run by the image's user"),
        (" -c constraints.txt", "", "not pinned: pip install"),
        ("\"$(grep '^torch==' constraints.txt)\"", "torch", "not pinned: pip install"),
        (".[offline,postgres]", ".[offline,postgresql]", "no extra postgresql"),
        ("FROM ${BASE}", "FROM python:3.11", "the image is not made FROM the argument"),
        ("COPY sweeps sweeps", "COPY sweep sweep", "sweep does not exist"),
        ("COPY sweeps sweeps", "COPY docs docs", "docs is kept from the build"),
        ("COPY sweeps sweeps", "", "sweeps is let in for nothing"),
    ],
)
def test_a_wrong_image_is_found(old: str, new: str, wrong: str) -> None:
    found = wrong_image(broken(DOCKERFILE, old, new), IGNORED.read_text())
    assert any(each.startswith(wrong) for each in found), found


# Kubernetes -------------------------------------------------------------------------------------


def unknown_fields(value: Any, kind: str, where: str) -> Iterator[str]:
    """Yield the fields of an object that its type lacks, and those it needs and has not.

    kind: a type of kuberay_fields.json, "[TYPE]" for a list of it, or "strings".
    """
    if kind.startswith("["):
        if not isinstance(value, list):
            yield f"{where} is no list"
            return
        for at, each in enumerate(value):
            yield from unknown_fields(each, kind[1:-1], f"{where}[{at}]")
        return
    if not isinstance(value, dict):
        yield f"{where} is no object"
        return
    if kind == "strings":
        yield from (f"{where}.{k} is no text" for k, v in value.items() if not isinstance(v, str))
        return
    fields, required = FIELDS[kind]["fields"], FIELDS[kind]["required"]
    yield from (f"{where} lacks {name}" for name in required if name not in value)
    for name, inner in value.items():
        if name not in fields:
            yield f"{where} has no field {name}"
        elif fields[name] is not None:
            yield from unknown_fields(inner, fields[name], f"{where}.{name}")


def wrong_rayjob(text: str) -> list[str]:
    """Return what KubeRay would refuse, and what would not do what the recipe is for."""
    claim, job = yaml.safe_load_all(text)
    wrong = list(unknown_fields(job, "RayJob", "job"))
    if wrong:
        return wrong
    if (job["apiVersion"], job["kind"]) != ("ray.io/v1", "RayJob"):
        wrong.append("it is no RayJob of ray.io/v1")
    cluster = job["spec"]["rayClusterSpec"]
    if cluster["authOptions"]["mode"] != "token":
        wrong.append("whoever reaches the cluster may use it")
    head_pod, *workers = [
        group["template"]["spec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        wrong.append("stages run on the head")
    if not any("secretRef" in each for each in head_pod["containers"][0].get("envFrom", [])):
        wrong.append("the driver gets no secret")
    for pod in workers:
        if "nvidia.com/gpu" not in pod["containers"][0]["resources"]["limits"]:
            wrong.append("a worker has no GPU")
    (user,) = [rest for name, rest in instructions(DOCKERFILE.read_text()) if name == "USER"][-1:]
    for pod in (head_pod, *workers):
        if pod["securityContext"].get("runAsUser") != int(user):
            wrong.append("a pod does not run as the image's user")
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        shared = volumes.get("shared", {}).get("persistentVolumeClaim", {})
        if mounted != set(volumes) or shared.get("claimName") != claim["metadata"]["name"]:
            wrong.append("a pod does not have the shared volume")
    sweep = re.findall(r"btu launch (\S+)/my-sweep.yaml", job["spec"]["entrypoint"])
    mounts = {m["mountPath"]: m["name"] for m in head_pod["containers"][0]["volumeMounts"]}
    maps = [v["name"] for v in head_pod["volumes"] if "configMap" in v]
    if [mounts.get(path) for path in sweep] != maps:
        wrong.append("the driver does not have the sweep file")
    if claim["spec"]["accessModes"] != ["ReadWriteMany"]:
        wrong.append("nodes cannot share the volume")
    return wrong


def test_the_rayjob_has_kuberays_fields_and_shares_one_volume() -> None:
    assert wrong_rayjob(RAYJOB.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("backoffLimit: 3", "backOffLimit: 3", "job.spec has no field backOffLimit"),
        ("rayClusterSpec:", "rayCluster:", "job.spec has no field rayCluster"),
        (
            "        minReplicas: 2\n", "",
            "job.spec.rayClusterSpec.workerGroupSpecs[0] lacks minReplicas",
        ),
        (
            'num-cpus: "0"', "num-cpus: 0",
            "job.spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus is no text",
        ),
        ('num-cpus: "0"', 'num-cpus: "1"', "stages run on the head"),
        ("mode: token", "mode: disabled", "whoever reaches the cluster may use it"),
        ("- secretRef:", "- configMapRef:", "the driver gets no secret"),
        ("runAsUser: 1001", "runAsUser: 0", "a pod does not run as the image's user"),
        ("claimName: btu-shared", "claimName: other", "a pod does not have the shared volume"),
        ("mountPath: /sweep\n", "mountPath: /sweeps\n", "the driver does not have the sweep file"),
        ("ReadWriteMany", "ReadWriteOnce", "nodes cannot share the volume"),
        (', nvidia.com/gpu: "1"', "", "a worker has no GPU"),
    ],
)  # fmt: skip
def test_a_wrong_rayjob_is_found(old: str, new: str, wrong: str) -> None:
    assert wrong in wrong_rayjob(broken(RAYJOB, old, new))


# ray up -----------------------------------------------------------------------------------------


RAY_SCHEMA = Path(autoscaler.__file__).parent / "ray-schema.json"


def wrong_cluster(text: str) -> str:
    """Return why `ray up` refuses a cluster, by its own checks before it reaches any host."""
    try:
        jsonschema.validate(yaml.safe_load(text), json.loads(RAY_SCHEMA.read_text()))
        validate_config(prepare_config(yaml.safe_load(text)))
    except (ClickException, jsonschema.ValidationError) as error:
        return str(error)
    return ""


def test_ray_up_accepts_the_cluster() -> None:
    assert wrong_cluster(CLUSTER.read_text()) == ""


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("setup_commands:", "setup_command:", "setup_command"),
        ("head_ip: HEAD_HOST", "heads: HEAD_HOST", "Please supply a `head_ip`"),
        ("type: local", "kind: local", "type"),
        ("file_mounts:\n", "file_mounts: all\nmetadata:\n", "not of type 'object'"),
    ],
)
def test_a_cluster_that_ray_up_refuses_is_found(old: str, new: str, wrong: str) -> None:
    assert wrong in wrong_cluster(broken(CLUSTER, old, new))


# Slurm ------------------------------------------------------------------------------------------


def wrong_script(text: str) -> str:
    """Return what bash, else shellcheck, says against a script."""
    parsed = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    if parsed.returncode:
        return parsed.stderr
    linter = Path(sys.executable).parent / "shellcheck"
    return subprocess.run(
        [str(linter), "-"], input=text, capture_output=True, text=True, check=False
    ).stdout


def missing_settings(text: str) -> list[str]:
    """Return what a job of several nodes needs and this one lacks."""
    needed = {
        "it is not requeued": r"^#SBATCH --requeue$",
        "a requeue overwrites the log": r"^#SBATCH --open-mode=append$",
        "the time limit ends it": r"^#SBATCH --signal=B:USR1@\d+$",
        "the other jobs of a node lose their Ray": r"^#SBATCH --exclusive$",
        "slow nodes are not waited for": r"SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=\d{3,}",
        "a slow head is not waited for": r"RAY_NUM_REDIS_GET_RETRIES=\d{3,}",
        "workers are slowed down": r"^export RAY_worker_niceness=0$",
        "everybody may use its Ray": r"^export RAY_AUTH_MODE=token$",
        "a Ray that did not start counts as done": r"^if \[\[ ! -s \$driver \]\]; then$",
        "without a head it runs to its time limit": r"! -s \$driver .*SECONDS > \d+.* kill ",
        "srun gives a task one CPU": r'^srun .*--cpus-per-task="\$SLURM_CPUS_PER_TASK"',
    }
    joined = text.replace("\\\n", " ")
    return [what for what, form in needed.items() if not re.search(form, joined, re.MULTILINE)]


def test_the_batch_script_passes_bash_and_shellcheck_and_lacks_nothing() -> None:
    text = SBATCH.read_text()
    assert wrong_script(text) == ""
    assert missing_settings(text) == []


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ('exit "$status"', 'exit "$status', "unexpected EOF"),
        ("\ndone\n", "\n", "syntax error"),
        ('"$head:$port" &', "$head:$port &", "SC2086"),
        ("RAY_AUTH_TOKEN=$(od", "RAY_AUTH_TOKEM=$(od", "SC2034"),
    ],
)
def test_a_wrong_script_is_found(old: str, new: str, wrong: str) -> None:
    assert wrong in wrong_script(broken(SBATCH, old, new))


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("#SBATCH --requeue", "#SBATCH --no-requeue", "it is not requeued"),
        ("--open-mode=append", "--open-mode=truncate", "a requeue overwrites the log"),
        ("B:USR1@300", "USR1@120", "the time limit ends it"),
        ("#SBATCH --exclusive\n", "", "the other jobs of a node lose their Ray"),
        ("WAIT_TIMEOUT=300", "WAIT_TIMEOUT=30", "slow nodes are not waited for"),
        (" RAY_NUM_REDIS_GET_RETRIES=150", "", "a slow head is not waited for"),
        ("niceness=0", "niceness=15", "workers are slowed down"),
        ("AUTH_MODE=token", "AUTH_MODE=disabled", "everybody may use its Ray"),
        (' --cpus-per-task="$SLURM_CPUS_PER_TASK"', "", "srun gives a task one CPU"),
        (
            "if [[ ! -s $driver ]]; then\n",
            "if false; then\n",
            "a Ray that did not start counts as done",
        ),
        ("((SECONDS > 600))", "false", "without a head it runs to its time limit"),
    ],
)
def test_a_setting_that_is_missing_is_found(old: str, new: str, wrong: str) -> None:
    assert missing_settings(broken(SBATCH, old, new)) == [wrong]


# The MLflow server and its database -------------------------------------------------------------


@cache
def mlflow_server() -> Command:
    """Return the command `mlflow server`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own, while it is imported
        command = importlib.import_module("mlflow.cli").server
    assert isinstance(command, Command)
    return command


def wrong_compose(text: str) -> list[str]:
    """Return what is wrong with the services, as far as that shows without Docker."""
    services = yaml.safe_load(text)["services"]
    unchecked = [name for name, service in services.items() if "healthcheck" not in service]
    wrong = [f"{name} has no health check" for name in unchecked]
    mlflow, database = services["mlflow"], services["postgres"]
    if mlflow["depends_on"] != {"postgres": {"condition": "service_healthy"}}:
        wrong.append("the server does not wait for the database")
    built = (COMPOSE.parent / mlflow["build"]["context"] / mlflow["build"]["dockerfile"]).resolve()
    if built != DOCKERFILE:
        wrong.append("the server is not of the pinned image")
    program, command, *options = mlflow["command"]
    try:
        context = mlflow_server().make_context(command, list(options), resilient_parsing=False)
    except ClickException as error:
        return [*wrong, str(error)]
    given = context.params
    uri = make_url(given["backend_store_uri"])
    own = database["environment"]
    if (program, command) != ("mlflow", "server"):
        wrong.append("it starts no MLflow server")
    if (uri.username, uri.database) != (own["POSTGRES_USER"], own["POSTGRES_DB"]):
        wrong.append("the server's database is another one")
    if uri.password:
        wrong.append("the password stands in a command line")
    if not given["allowed_hosts"]:
        wrong.append("other machines get 'Invalid Host header'")
    kept = {mount.split(":")[1] for mount in mlflow["volumes"]}
    if given["artifacts_destination"] not in kept:
        wrong.append("artifacts go with the container")
    return wrong


def test_the_servers_services_fit_together() -> None:
    assert wrong_compose(COMPOSE.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("condition: service_healthy", "condition: service_started", "the server does not wait"),
        ("@postgres/mlflow\n", "@postgres/other\n", "the server's database is another one"),
        ("mlflow@postgres", "mlflow:secret@postgres", "the password stands in a command line"),
        ("--allowed-hosts=", "--allow-hosts=", "No such option"),
        ("artifacts-destination=/mlartifacts", "artifacts-destination=/tmp", "artifacts go with"),
        ("dockerfile: deploy/Dockerfile", "dockerfile: Dockerfile", "the server is not of"),
    ],
)
def test_wrong_services_are_found(old: str, new: str, wrong: str) -> None:
    found = wrong_compose(broken(COMPOSE, old, new))
    assert any(each.startswith(wrong) for each in found), found


def compose_program() -> list[str]:
    """Return Docker Compose's command; none if it is not installed."""
    plugin = ["docker", "compose"]
    if shutil.which("docker"):
        asked = subprocess.run([*plugin, "version"], capture_output=True, check=False)
        if asked.returncode == 0:
            return plugin
    return ["docker-compose"] if shutil.which("docker-compose") else []


def read_by_compose(file: Path) -> subprocess.CompletedProcess[str]:
    """Let Docker Compose read a file, with the variables that it asks for."""
    program = compose_program()
    if not program:
        pytest.skip("Docker Compose is not installed")
    variables = {"POSTGRES_PASSWORD": "made-up", "MLFLOW_HOSTS": "mlflow.example:5000"}
    return subprocess.run(
        [*program, "--file", str(file), "config"],
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", **variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_compose_reads_the_services(tmp_path: Path) -> None:
    read = read_by_compose(COMPOSE)
    assert read.returncode == 0, read.stderr
    assert set(yaml.safe_load(read.stdout)["services"]) == {"mlflow", "postgres"}
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(broken(COMPOSE, "healthcheck:", "healthchecks:"))
    assert read_by_compose(wrong).returncode != 0


def wrong_driver(extras: dict[str, list[str]], pins: dict[str, str]) -> list[str]:
    """Return what is wrong with the extra for the driver that SQLAlchemy takes by default."""
    driver = make_url("postgresql://host/mlflow").get_dialect().driver
    extra = {re.split(r"[\[<>=]", each)[0] for each in extras.get("postgres", [])}
    pinned = {name.lower() for name in pins}
    wrong = [] if driver in extra else [f"the extra lacks {driver}"]
    return wrong + [f"{name} is not pinned" for name in sorted(extra - pinned)]


def test_the_extra_is_the_driver_that_sqlalchemy_takes() -> None:
    extras = PROJECT["optional-dependencies"]
    assert wrong_driver(extras, PINS) == []
    assert make_url("postgresql://host/mlflow").get_dialect().import_dbapi().__name__ == "psycopg"
    assert wrong_driver({**extras, "postgres": ["psycopg2-binary>=2.9"]}, PINS) == [
        "the extra lacks psycopg",
        "psycopg2-binary is not pinned",
    ]
    without = {name: pin for name, pin in PINS.items() if name != "psycopg"}
    assert wrong_driver(extras, without) == ["psycopg is not pinned"]
    assert PINS["psycopg"] == PINS["psycopg-binary"]
