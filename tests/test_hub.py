"""Hub ids: from a prepared cache while offline, and from a small hub on loopback. Nothing else is contacted."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from dora_tools.containers import BASE_FILES, open_checkpoint

from . import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run(*arguments: str, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE"))}
    clean |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "*"} | env
    return subprocess.run(
        [sys.executable, "-m", "dora_tools", *arguments], capture_output=True, text=True, env=clean, timeout=120
    )


def cache(home: Path, name: str, source: Path) -> Path:
    """What a download leaves: blobs, and snapshots of links to them."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    blobs.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        (blobs / digest).write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / digest, link.parent))
    return snapshot


def check_merged(out: Path) -> None:
    wanted = tiny.expected(tiny.base_arrays(), tiny.adapter_arrays())
    assert all(np.allclose(a, wanted[n], atol=1e-5) for n, a in tiny.read_model(out).items())


def test_from_the_cache_while_offline(tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    cache(home, "org/tiny", tiny.write_base(tmp_path / "b", shards=2))
    cache(home, "me/adapter", tiny.write_adapter(tmp_path / "a"))
    done = run("merge", "me/adapter@main", "-o", str(out), home=home, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    check_merged(out)
    assert not (out / "model-00001-of-00002.safetensors").is_symlink()
    for spec in ("me/absent", "org/tiny@absent"):
        done = run("inspect", spec, home=home, HF_HUB_OFFLINE="1")
        assert done.returncode == 6
        assert spec in done.stderr
        assert "HF_HUB_OFFLINE" in done.stderr


def test_cached_shards_may_be_links_into_blobs(tmp_path: Path) -> None:
    snapshot = cache(tmp_path, "org/tiny", tiny.write_base(tmp_path / "b", shards=2))
    assert len(open_checkpoint(snapshot, BASE_FILES).tensors) == len(tiny.base_arrays())


class _Hub(BaseHTTPRequestHandler):
    repositories: dict[str, Path]
    asked: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        if name == "org/gated":
            return self._refuse(403, "GatedRepo")
        if name not in self.repositories:
            return self._refuse(404, "RepoNotFound")
        if len(rest) > 1 and rest[1] not in {"main", COMMIT}:
            return self._refuse(404, "RevisionNotFound")
        folder = self.repositories[name]
        if api:
            files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
            body = json.dumps({"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}).encode()
            if rest[:1] == ["tree"]:
                tree = [
                    {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0" * 40} for f in files
                ]
                body = json.dumps(tree).encode()
        else:
            path = folder / "/".join(rest[2:])
            if not path.is_file():
                return self._refuse(404, "EntryNotFound")
            body = path.read_bytes()
            if self.command == "GET":
                self.asked.append(path.name)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    base = tiny.write_base(tmp_path / "hub" / "base", shards=2)
    (base / "onnx").mkdir()
    for name in ("onnx/model.onnx", "pytorch_model.bin", "tf_model.h5", "model.gguf"):
        (base / name).write_bytes(b"foreign weights")
    _Hub.repositories = {"org/tiny": base, "me/adapter": tiny.write_adapter(tmp_path / "hub" / "adapter")}
    _Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_from_a_hub(hub: str, tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    done = run("merge", "me/adapter", "-o", str(out), home=home, HF_ENDPOINT=hub)
    assert done.returncode == 0, done.stderr
    check_merged(out)
    assert set(_Hub.asked) == {
        "adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json",
        "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip
    before = len(_Hub.asked)
    assert run("inspect", "me/adapter", home=home, HF_ENDPOINT=hub).returncode == 0
    assert len(_Hub.asked) == before, "the cache was not used"


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ("org/gated", 3, "gated"),
        ("org/absent", 3, "neither a path here nor a repository"),
        ("me/adapter@v9", 3, "no revision 'v9'"),
    ],
)
def test_what_the_hub_refuses(hub: str, tmp_path: Path, spec: str, code: int, words: str) -> None:
    done = run("inspect", spec, home=tmp_path / "home", HF_ENDPOINT=hub)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_hub_that_does_not_answer(tmp_path: Path) -> None:
    done = run("inspect", "org/tiny", home=tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_ETAG_TIMEOUT="2")
    assert done.returncode == 6, done.stderr
    assert "cannot be asked" in done.stderr
