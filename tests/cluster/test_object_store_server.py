"""A store on an S3 server: the launch on one host, its workers on the others."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
from places import CELLS, Place, Reference, Site, check_finished, finished_runs
from services import BUCKET, start_s3

pytestmark = pytest.mark.cluster

LIST = "import sys, s3fs; print(*s3fs.S3FileSystem().find(sys.argv[1]), sep='\\n')"


@pytest.fixture(scope="module")
def s3(site: Site) -> dict[str, str]:
    """The variables that users of the server need."""
    missing = [name for name in ("moto", "s3fs") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}: pip install '.[cluster-tests]'")
    return start_s3(site.services)


def report(place: Place, output: str | Path) -> list[dict[str, str]]:
    """Return the rows of `btu report`, but for times."""
    command = place.btu(place.head, "report", place.name, "--output", output, "--format", "csv")
    done = command.end()
    assert done.code == 0, done
    rows = list(csv.DictReader(command.logs[0].read_text().splitlines()))
    assert len(rows) == CELLS
    return [{name: text for name, text in row.items() if name != "seconds"} for row in rows]


def test_workers_of_other_hosts_reach_a_store_on_an_s3_server(
    place: Place, reference: Reference, site: Site, s3: dict[str, str]
) -> None:
    output = f"s3://{BUCKET}/runs"
    # The head runs no stage, and only the launch is told the endpoint and the keys.
    place.restart_ray(place.head, cpus=0)
    place.environment |= s3
    # An object store has to be named by the user, not by a file alone.
    check_finished(place.launch(place.head, f"output={output}").end())
    reference.place.environment |= s3
    assert report(place, output) == report(reference.place, reference.place.output)
    cells = finished_runs(site.postgres.uri, place.name)
    assert cells == dict.fromkeys(reference.metrics, 1)
    for folder in ("launches", "leases"):
        at = f"{BUCKET}/runs/store/{folder}"
        listed = place.head.run(sys.executable, "-c", LIST, at, more=place.environment)
        assert (listed.code, listed.out) == (0, ""), listed
    assert [name for host in place.hosts for name in host.scratch()] == []
