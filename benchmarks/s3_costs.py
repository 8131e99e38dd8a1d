"""An object store in memory that counts requests and delays each, as S3 does behind s3fs.

What a call of s3fs 2026.9 costs, by its source and on a server (moto 5.2). `python
benchmarks/s3_costs.py` asks the server again and exits with 1 if a count differs; it needs `pip
install "moto[server]" s3fs`.

    info, exists, isfile    HEAD; of no file LIST as well
    isdir                   LIST
    ls                      LIST per 1,000 names; of no folder one more, of its parent
    find                    LIST per 1,000 names; of no folder HEAD as well, of no file LIST too;
                            with prefix= LIST alone
    cat_file                HEAD and GET, of no file HEAD and LIST; with max_concurrency=1 GET alone
    get_file                GET, also of a missing file
    pipe_file, put_file     PUT, also where ``mode="create"`` is refused
    cp_file                 HEAD and COPY
    rm_file                 DELETE, also of a missing file
    rm                      of a list: DELETE per 1,000; of a folder LIST before it
    makedirs                HEAD of the bucket
    open                    HEAD, and GET for what is read

Large files take several PUTs and GETs; no file here is one. Calls from several threads are delayed
side by side, as requests on several connections are.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem

PAGE = 1000  # names in a listing, and in a request that deletes


class FakeS3(AbstractFileSystem):
    """The objects of this process. Paths are ``bucket/key``."""

    protocol = ("s3", "s3a")
    cachable = False
    objects: ClassVar[dict[str, tuple[bytes, float]]] = {}
    requests: ClassVar[Counter[str]] = Counter()
    latency = 0.0  # seconds
    _lock = threading.Lock()

    @classmethod
    def use(cls) -> None:
        """Open ``s3://`` with this class, in this process."""
        fsspec.register_implementation("s3", cls, clobber=True)

    @classmethod
    def forget(cls) -> None:
        """Start with no object and no request."""
        cls.objects.clear()
        cls.requests.clear()

    def _ask(self, kind: str, times: int = 1) -> None:
        for _ in range(times):
            with self._lock:
                self.requests[kind] += 1
            if self.latency:
                time.sleep(self.latency)

    def _facts(self, path: str) -> dict[str, Any]:
        data, modified = self.objects[path]
        return {
            "name": path,
            "size": len(data),
            "type": "file",
            "LastModified": modified,
            "ETag": f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"',
        }

    def _below(self, path: str) -> list[str]:
        with self._lock:
            return sorted(name for name in self.objects if name.startswith(f"{path}/"))

    def _get(self, path: str) -> bytes:
        self._ask("GET")
        found = self.objects.get(self._strip_protocol(path))
        if found is None:
            raise FileNotFoundError(path)
        return found[0]

    def _put(self, path: str, data: bytes, *, create: bool = False) -> None:
        path = self._strip_protocol(path)
        self._ask("PUT")
        with self._lock:
            if create and path in self.objects:
                raise FileExistsError(path)
            self.objects[path] = (data, time.time())

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        self._ask("HEAD")
        if path in self.objects:
            return self._facts(path)
        self._ask("LIST")
        if self._below(path):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def exists(self, path: str, **_: Any) -> bool:
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def isfile(self, path: str) -> bool:
        try:
            return bool(self.info(path)["type"] == "file")
        except FileNotFoundError:
            return False

    def isdir(self, path: str) -> bool:
        self._ask("LIST")
        return bool(self._below(self._strip_protocol(path)))

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path).rstrip("/")
        found: dict[str, dict[str, Any]] = {}
        for name in self._below(path):
            head, more, _rest = name[len(path) + 1 :].partition("/")
            at = f"{path}/{head}"
            found[at] = {"name": at, "size": 0, "type": "directory"} if more else self._facts(at)
        self._ask("LIST", max(1, -(-len(found) // PAGE)))
        if not found:
            self._ask("LIST")
            if path not in self.objects:
                raise FileNotFoundError(path)
            found[path] = self._facts(path)
        return list(found.values()) if detail else sorted(found)

    def find(
        self, path: str, maxdepth: Any = None, withdirs: bool = False, detail: bool = False,
        prefix: str = "", **_: Any,
    ) -> Any:  # fmt: skip
        path = self._strip_protocol(path).rstrip("/")
        names = [name for name in self._below(path) if name.startswith(f"{path}/{prefix}")]
        self._ask("LIST", max(1, -(-len(names) // PAGE)))
        if not names and not prefix:
            self._ask("HEAD")
            if path in self.objects:
                names = [path]
            else:
                self._ask("LIST")
        return {name: self._facts(name) for name in names} if detail else names

    def cat_file(
        self, path: str, start: Any = None, end: Any = None, max_concurrency: int = 10, **_: Any
    ) -> bytes:
        if max_concurrency > 1:
            self.info(path)  # how many parts to get at once
        return self._get(path)[start:end]

    def get_file(self, rpath: str, lpath: str, *_: Any, **__: Any) -> None:
        Path(lpath).write_bytes(self._get(rpath))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self._put(path, value, create=mode == "create")

    def put_file(self, lpath: str, rpath: str, *_: Any, **__: Any) -> None:
        self._put(rpath, Path(lpath).read_bytes())

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        self.info(path1)
        self._ask("COPY")
        self.objects[self._strip_protocol(path2)] = self.objects[self._strip_protocol(path1)]

    def rm_file(self, path: str) -> None:
        self._ask("DELETE")
        self.objects.pop(self._strip_protocol(path), None)

    def rm(self, path: str | Iterable[str], recursive: bool = False, **_: Any) -> None:
        names = [path] if isinstance(path, str) else list(path)
        if isinstance(path, str) and recursive:
            names = self.find(path)
        self._ask("DELETE", -(-len(names) // PAGE))
        for name in names:
            self.objects.pop(self._strip_protocol(name), None)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._ask("HEAD")

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        import io

        self.info(path)
        return io.BytesIO(self._get(path))


def scenario(fs: Any, root: str, work: Path) -> dict[str, Callable[[], object]]:
    """Return calls by what they do, to be made in this order. root: an empty ``bucket/folder``."""
    file = work / "file"
    file.write_bytes(b"content")

    def refused(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            try:
                call()
            except (FileNotFoundError, FileExistsError):
                return
            raise AssertionError("it was not refused")

        return run

    return {
        "exists, missing": lambda: fs.exists(f"{root}/a/x"),
        "cat_file, missing": refused(lambda: fs.cat_file(f"{root}/a/x")),
        "ls, missing": refused(lambda: fs.ls(f"{root}/none", refresh=True)),
        "find, missing": lambda: fs.find(f"{root}/none"),
        "pipe_file": lambda: fs.pipe_file(f"{root}/a/x", b"1"),
        "pipe_file, created": lambda: fs.pipe_file(f"{root}/a/y", b"1", mode="create"),
        "pipe_file, refused": refused(lambda: fs.pipe_file(f"{root}/a/y", b"2", mode="create")),
        "put_file": lambda: fs.put_file(str(file), f"{root}/b/c/z"),
        "exists": lambda: fs.exists(f"{root}/a/x"),
        "exists, folder": lambda: fs.exists(f"{root}/a"),
        "isfile": lambda: fs.isfile(f"{root}/a/x"),
        "isdir": lambda: fs.isdir(f"{root}/a"),
        "info": lambda: fs.info(f"{root}/a/x"),
        "ls": lambda: fs.ls(f"{root}/a", detail=False, refresh=True),
        "find": lambda: fs.find(root, detail=True),
        "find, prefix": lambda: fs.find(root, detail=True, prefix="a/"),
        "find, prefix, missing": lambda: fs.find(root, detail=True, prefix="none/"),
        "find, file": lambda: fs.find(f"{root}/a/x"),
        "cat_file": lambda: fs.cat_file(f"{root}/a/x"),
        "cat_file, at once": lambda: fs.cat_file(f"{root}/a/x", max_concurrency=1),
        "cat_file, at once, missing": refused(
            lambda: fs.cat_file(f"{root}/a/none", max_concurrency=1)
        ),
        "get_file, missing": refused(lambda: fs.get_file(f"{root}/a/none", str(work / "none"))),
        "cat": lambda: fs.cat([f"{root}/a/x", f"{root}/a/y"]),
        "get_file": lambda: fs.get_file(f"{root}/a/x", str(work / "got")),
        "cp_file": lambda: fs.cp_file(f"{root}/a/x", f"{root}/d/x"),
        "open": lambda: fs.open(f"{root}/a/x", "rb").read(),
        "makedirs": lambda: fs.makedirs(f"{root}/e/f", exist_ok=True),
        "rm_file": lambda: fs.rm_file(f"{root}/d/x"),
        "rm_file, missing": lambda: fs.rm_file(f"{root}/d/x"),
        "rm, list": lambda: fs.rm([f"{root}/a/x", f"{root}/a/y"]),
        "rm, folder": lambda: fs.rm(f"{root}/b", recursive=True),
    }


def counted(fs: Any, root: str, requests: Counter[str], work: Path) -> dict[str, dict[str, int]]:
    """Return the requests of each call of `scenario`. requests: where they are counted."""
    found = {}
    for name, call in scenario(fs, root, work).items():
        requests.clear()
        call()
        found[name] = dict(sorted(requests.items()))
    return found


def on_a_server(work: Path) -> dict[str, dict[str, int]]:
    """Return what the calls cost s3fs on moto's server, by the requests that arrive there."""
    import boto3
    import s3fs
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication
    from moto.server import ThreadedMotoServer

    requests: Counter[str] = Counter()
    serve = DomainDispatcherApplication.__call__

    def count(self: Any, environ: dict[str, Any], start: Any) -> Any:
        requests[_kind(environ)] += 1
        return serve(self, environ, start)

    DomainDispatcherApplication.__call__ = count
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    known = {"endpoint_url": f"http://{host}:{port}"}
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    boto3.client("s3", **known, **keys).create_bucket(Bucket="bucket")
    fs = s3fs.S3FileSystem(key="a", secret="b", client_kwargs={**known, "region_name": "us-east-1"},
                           use_listings_cache=False, skip_instance_cache=True)  # fmt: skip
    fs.ls("bucket")  # its first request asks for more
    try:
        return counted(fs, "bucket/root", requests, work)
    finally:
        server.stop()
        DomainDispatcherApplication.__call__ = serve


def _kind(environ: dict[str, Any]) -> str:
    method, query = environ["REQUEST_METHOD"], environ.get("QUERY_STRING", "")
    if method == "GET" and "list-type=2" in query:
        return "LIST"
    if method == "POST" and "delete" in query:
        return "DELETE"
    return "COPY" if environ.get("HTTP_X_AMZ_COPY_SOURCE") else str(method)


def main() -> None:
    import tempfile

    work = Path(tempfile.mkdtemp())
    try:
        real = on_a_server(work)
        FakeS3.forget()
        fake = counted(FakeS3(), "bucket/root", FakeS3.requests, work)
    finally:
        shutil.rmtree(work)
    for name, requests in real.items():
        same = requests == fake[name]
        print(f"{name:26} {requests}{'' if same else f', here {fake[name]}'}")
    sys.exit(real != fake)


if __name__ == "__main__":
    main()
