"""Published files: where they are looked for, what is said of missing ones, and what of damaged ones."""

from __future__ import annotations

import email.message
import hashlib
import http.server
import io
import json
import threading
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from arcopo_fast.errors import UserError
from arcopo_fast.storage import hub
from arcopo_fast.storage.hub import FILES, Published, Source, find, local

REPOSITORY = "some-one/some.model"


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, and a cache of its own, which is returned."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv(hub.VARIABLE, raising=False)
    return tmp_path / "cache"


def write(path: Path, text: str = "weights") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def cached(cache: Path, name: str, revision: str = "main", kind: str = "models") -> Path:
    """A file in the cache as huggingface_hub leaves it: content by its hash, a link to it by its commit, the commit by the branch."""
    root = cache / f"{kind}--{REPOSITORY.replace('/', '--')}"
    blob = write(root / "blobs" / hashlib.sha256(b"weights").hexdigest())
    write(root / "refs" / revision, "c0ffee")
    file = root / "snapshots" / "c0ffee" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to(blob)
    return file


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://a/b", ("hf://", "model", "a/b", None, "")),
        ("hf://a/b-2.1/", ("hf://", "model", "a/b-2.1", None, "")),
        ("hf://a/b@v1/c++/d.pt", ("hf://", "model", "a/b", "v1", "c++/d.pt")),
        ("hf://datasets/a/b/c", ("hf://", "dataset", "a/b", None, "c")),
        ("github://a/b@v1/c/d.txt", ("github://", "model", "a/b", "v1", "c/d.txt")),
        ("hf://a/b@refs/pr/3", ("hf://", "model", "a/b", "refs/pr/3", "")),
        ("hf://a/b@refs/pr/3/c/d.pt", ("hf://", "model", "a/b", "refs/pr/3", "c/d.pt")),
        ("hf://datasets/a/b@refs/convert/parquet/c", ("hf://", "dataset", "a/b", "refs/convert/parquet", "c")),
        ("hf://a/b@feature%2Fx/c.pt", ("hf://", "model", "a/b", "feature/x", "c.pt")),
        ("github://a/b@release%2F1.0/c.txt", ("github://", "model", "a/b", "release/1.0", "c.txt")),
    ],
)
def test_sources(text: str, parts: tuple[str, str, str, str | None, str]) -> None:
    source = Source.parse(text)
    assert tuple(source) == parts and str(source) == text.rstrip("/")


@pytest.mark.parametrize(
    "text",
    ["hf://", "hf://a", "hf://a/b/../../c", "hf:///a/b", "hf://a b/c", "github://a/b", "github://datasets/a/b/c"]
    # a revision that is cut at its slash, or nothing
    + ["hf://a/b@refs/heads/main/c", "hf://a/b@refs/pr", "hf://a/b@refs/pr/x/c", "hf://a/b@refs/c.pt", "hf://a/b@/c", "hf://a/b@%2F/c"]
    # ways out of the cache, or into another repository's part of it
    + ["hf://../..", "hf://a/..", "github://../../etc/passwd", "github://./b/c", "github://a/b@../c", "github://a/b@..%2F..%2Fx/c"]
    + [
        "github://a/b@%2e%2e/c",
        "github://a/b@v1%2F/c",
        "github://a/b/c/../../../../d",
        "github://a/b/./c",
        "github://a/b//c/..",
        "github://a/b/c//d",
    ]
    + ["github://a/b/c\0d", "github://a/b/..\\\\c", "github://a/b/c\n", "hf://a/b@v1\x1b/c"],
)
def test_no_sources(text: str) -> None:
    with pytest.raises(UserError, match="expected hf://owner/name"):
        find(text)


def test_a_name_that_no_repository_can_have() -> None:
    assert local("hf://some--one/model/weights.pt") is None
    with pytest.raises(UserError, match="weights.pt is neither in"):
        find("hf://some--one/model/weights.pt")


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    file = write(tmp_path / "model" / "weights.pt")
    assert find(file) == local(file) == file
    assert find(tmp_path / "model", ["*.pt"]) == tmp_path / "model"
    with pytest.raises(UserError, match=r"lacks config\.json"):
        find(tmp_path / "model", ["config.json", "weights.pt"])
    assert local(tmp_path / "model", ["config.json"]) is None
    with pytest.raises(UserError, match="there is nothing at .*elsewhere"):
        find(tmp_path / "elsewhere")


def test_the_order_of_places(tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = f"hf://{REPOSITORY}/sub/weights.pt"
    assert local(source) is None
    in_cache = cached(offline, "sub/weights.pt")
    assert find(source) == in_cache
    monkeypatch.setenv(hub.VARIABLE, str(tmp_path / "models"))
    assert find(source) == in_cache
    by_name = write(tmp_path / "models" / "some.model" / "sub" / "weights.pt")
    assert find(source) == by_name
    in_full = write(tmp_path / "models" / REPOSITORY / "sub" / "weights.pt")
    assert find(source) == in_full
    # A place that lacks a file that is needed is no place.
    assert find(f"hf://{REPOSITORY}/sub", ["weights.pt"]) == in_full.parent
    write(by_name.with_name("config.json"))
    assert find(f"hf://{REPOSITORY}/sub", ["weights.pt", "config.json"]) == by_name.parent


@pytest.mark.parametrize("inside", ["c.txt", "/etc/passwd", "//c", "%2e%2e/%2e%2e/c", "~/c", "c/%2Fetc"])
@pytest.mark.parametrize("revision", ["", "@v1", "@feature%2Fx", "@%252e%252e"])
def test_a_copy_stays_in_its_own_part_of_the_cache(inside: str, revision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(hub.VARIABLE, str(tmp_path / "models"))
    for scheme in ("github", "hf"):
        try:
            wanted = Source.parse(f"{scheme}://{REPOSITORY}{revision}/{inside}")
        except UserError:
            continue
        for place in hub._places(wanted):
            assert ".." not in place.parts
            name = REPOSITORY.replace("/", "--")
            parts = {Path(REPOSITORY), Path(REPOSITORY.partition("/")[2]), Path(f"models--{name}")}
            assert any(str(part) in str(place.relative_to(tmp_path)) for part in parts)


def test_revisions_with_a_slash_are_found_and_asked_for(offline: Path) -> None:
    file = cached(offline, "weights.pt", revision="refs/pr/3")
    assert find(f"hf://{REPOSITORY}@refs/pr/3/weights.pt") == file
    file = cached(offline, "others.pt", revision="feature/x")
    assert find(f"hf://{REPOSITORY}@feature%2Fx/others.pt") == file
    with pytest.raises(UserError, match="--revision refs/pr/4$"):
        find(f"hf://{REPOSITORY}@refs/pr/4/weights.pt")
    assert Source.parse("github://a/b@release%2F1/c d.txt").url == "https://raw.githubusercontent.com/a/b/release/1/c%20d.txt"


def test_a_revision(offline: Path) -> None:
    file = cached(offline, "weights.pt", revision="v2")
    assert find(f"hf://{REPOSITORY}@v2/weights.pt") == find(f"hf://{REPOSITORY}@c0ffee/weights.pt") == file
    assert local(f"hf://{REPOSITORY}/weights.pt") is None


def test_what_is_missing_is_said_with_its_size_and_where_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILES, f"{REPOSITORY}/sub/weights.pt", Published(5_031_072_529))
    with pytest.raises(UserError) as caught:
        find(f"hf://{REPOSITORY}/sub", ["weights.pt", "config.json"])
    said = str(caught.value)
    assert "\n" not in said
    command = f"hf download {REPOSITORY} sub/weights.pt sub/config.json"
    assert all(part in said for part in ("sub/weights.pt (5.0 GB)", "sub/config.json", "$ARCOPO_MODELS (not set)", command))
    with pytest.raises(UserError, match=f"hf download {REPOSITORY} --include 'a' --include '\\*.json' --revision v1$"):
        find(f"hf://{REPOSITORY}@v1", ["a", "*.json"])


def test_a_snapshot_that_lacks_a_file(offline: Path) -> None:
    cached(offline, "weights.pt")
    with pytest.raises(UserError, match="config.json is neither in"):
        find(f"hf://{REPOSITORY}", ["weights.pt", "config.json"])


def test_a_copy_that_was_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hub.VARIABLE, str(tmp_path))
    file = write(tmp_path / REPOSITORY / "weights.pt", "weig")
    monkeypatch.setitem(FILES, f"{REPOSITORY}/weights.pt", Published(7))
    assert find(f"hf://{REPOSITORY}/weights.pt") == file  # a size that is only about right says nothing
    monkeypatch.setitem(FILES, f"{REPOSITORY}/weights.pt", Published(7, hashlib.sha256(b"weights").hexdigest()))
    for source, files in ((f"hf://{REPOSITORY}/weights.pt", []), (f"hf://{REPOSITORY}", ["weights.pt"])):
        with pytest.raises(UserError, match="has 4 bytes, the published file 7"):
            find(source, files)
    write(file, "weights")
    assert find(f"hf://{REPOSITORY}", ["weights.pt"]) == file.parent


# Downloads, from a server that speaks as much of the protocol as is needed ----------------------------------------------------------


class Hub(http.server.ThreadingHTTPServer):
    """One repository with one large file; `sent` is what it sends, `content` what it promises. cut: the first answer ends after so many."""

    content = b"the weights, whole"
    sent = content
    cut: int | None = None
    requests: list[tuple[str, str, str | None]]

    def __init__(self) -> None:
        self.requests = []
        super().__init__(("127.0.0.1", 0), Answer)


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        start = self.headers.get("Range")
        self.server.requests.append((self.command, self.path, start))
        commit, etag = "a" * 40, hashlib.sha256(self.server.content).hexdigest()
        headers = {}
        if self.path.startswith("/api/models/") and "/tree/" in self.path:
            lfs = {"oid": etag, "size": len(self.server.content), "pointerSize": 1}
            body = json.dumps([{"type": "file", "path": "big.bin", "size": len(self.server.content), "oid": "b" * 40, "lfs": lfs}]).encode()
            headers["Content-Type"] = "application/json"
        elif self.path.startswith("/api/models/"):
            body = json.dumps({"id": REPOSITORY, "sha": commit, "siblings": [{"rfilename": "big.bin"}]}).encode()
            headers["Content-Type"] = "application/json"
        else:
            body = self.server.sent
            headers |= {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(body))}
        first = int(start.removeprefix("bytes=").rstrip("-")) if start else 0
        self.send_response(206 if first else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        if self.command == "GET":
            if body is self.server.sent and self.server.cut and not first:
                body, self.server.cut = body[: self.server.cut], None
                self.close_connection = True
            self.wfile.write(body[first:])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub_server:
        thread = threading.Thread(target=hub_server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{hub_server.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # The endpoint and the cache are defaults that huggingface_hub took when it was imported.
        download = huggingface_hub.snapshot_download
        monkeypatch.setattr(
            huggingface_hub,
            "snapshot_download",
            lambda *given, **named: download(*given, **named, endpoint=address, cache_dir=constants.HF_HUB_CACHE, token=False),
        )
        yield hub_server
        hub_server.shutdown()
        thread.join()


def test_a_download(server: Hub) -> None:
    file = find(f"hf://{REPOSITORY}/big.bin")
    assert file.read_bytes() == server.content
    asked = len(server.requests)
    assert find(f"hf://{REPOSITORY}/big.bin") == file and len(server.requests) == asked  # it is there now


def test_a_download_whose_connection_is_lost_is_gone_on_with(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before it tries again
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 5)  # what is kept is whole chunks
    server.cut = 5
    assert find(f"hf://{REPOSITORY}/big.bin").read_bytes() == server.content
    assert [start for method, _, start in server.requests if method == "GET" and start] == ["bytes=5-"]


def test_what_is_missing_of_a_whole_repository_is_fetched(server: Hub, offline: Path) -> None:
    """The cache has a part of it, for the sake of one file."""
    there = cached(offline, "weights.pt")
    (offline / there.parents[2].name / "refs" / "main").write_text("a" * 40)
    (there.parents[1] / ("a" * 40)).mkdir()
    whole = find(f"hf://{REPOSITORY}")
    assert (whole / "big.bin").read_bytes() == server.content
    asked = len(server.requests)
    find(f"hf://{REPOSITORY}", ["big.bin"])
    assert len(server.requests) == asked


def test_a_snapshot_that_is_known_to_be_cut_short_is_not_taken(server: Hub, offline: Path) -> None:
    """Patterns say only that something is there; what huggingface_hub has listed of the repository says what."""
    file = find(f"hf://{REPOSITORY}/big.bin")
    (offline / file.parents[2].name / "trees").mkdir(exist_ok=True)
    assert local(f"hf://{REPOSITORY}", ["*.bin"]) == file.parent
    write(file.with_name("other.bin"))
    file.unlink()
    if any((offline / file.parents[2].name / "trees").iterdir()):  # versions of huggingface_hub that keep the list
        assert local(f"hf://{REPOSITORY}", ["*.bin"]) is None
        assert (find(f"hf://{REPOSITORY}", ["*.bin"]) / "big.bin").read_bytes() == server.content


def test_a_download_that_came_damaged(server: Hub) -> None:
    server.sent = bytes(byte ^ 1 for byte in server.content)
    with pytest.raises(UserError, match="was damaged in the download: its SHA-256 is"):
        find(f"hf://{REPOSITORY}/big.bin")
    assert local(f"hf://{REPOSITORY}/big.bin") is None  # so that the next attempt fetches it again
    server.sent = server.content
    assert find(f"hf://{REPOSITORY}/big.bin").read_bytes() == server.content


def test_a_file_that_the_repository_lacks(server: Hub) -> None:
    with pytest.raises(UserError, match="small.bin is neither in"):
        find(f"hf://{REPOSITORY}/small.bin")


# GitHub ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def github(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Addresses that were asked for; each answers with itself, those with "nowhere" in them not at all."""
    asked: list[str] = []

    def answer(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        if "nowhere" in url:
            raise urllib.error.HTTPError(url, 404, "Not Found", email.message.Message(), None)
        return io.BytesIO(url.encode())

    monkeypatch.setattr("urllib.request.urlopen", answer)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return asked


def test_a_file_of_github(github: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "github://some-one/some.model@v1/a dir/text.py"
    assert local(source) is None
    file = find(source)
    assert github == ["https://raw.githubusercontent.com/some-one/some.model/v1/a%20dir/text.py"] and file.read_text() == github[0]
    assert find(source) == file and len(github) == 1
    assert find("github://some-one/some.model/a dir/text.py") != file and "/HEAD/" in github[1]
    monkeypatch.setenv(hub.VARIABLE, str(tmp_path / "models"))
    own = write(tmp_path / "models" / REPOSITORY / "a dir" / "text.py")
    assert find(source) == own


def test_a_file_that_github_lacks(github: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"HTTP Error 404.*put it at \$ARCOPO_MODELS/some-one/some.model/nowhere.py$"):
        find(f"github://{REPOSITORY}/nowhere.py")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        find(f"github://{REPOSITORY}/text.py")
    assert len(github) == 1


def test_a_dataset(offline: Path) -> None:
    with pytest.raises(UserError, match="hf download some-one/some.model prompts.txt --repo-type dataset"):
        find(f"hf://datasets/{REPOSITORY}/prompts.txt")
    file = cached(offline, "prompts.txt", kind="datasets")
    assert find(f"hf://datasets/{REPOSITORY}/prompts.txt") == file and local(f"hf://{REPOSITORY}/prompts.txt") is None
