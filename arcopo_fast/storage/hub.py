"""Published files by name: a path, or the place where they were published.

    hf://owner/name[@revision][/path]            a model repository on Hugging Face
    hf://datasets/owner/name[@revision][/path]   a dataset there
    github://owner/name[@revision]/path          one file of a repository on GitHub

A revision with a slash is written with %2F, but for Hugging Face's own refs/pr/N and refs/convert/NAME.

All are looked for as `$ARCOPO_MODELS/owner/name`, then as `$ARCOPO_MODELS/name`, then in the cache (Hugging Face's own; for GitHub
~/.cache/arcopo_fast/github), and then downloaded into it. From Hugging Face, a lost connection is taken up again where it broke, a file
that is whole is not fetched twice, and what came is checked against its SHA-256. With HF_HUB_OFFLINE=1 nothing is downloaded. What is still
missing is said with its size and where to get it.
"""

from __future__ import annotations

import os
import re
import urllib.request
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from tqdm import tqdm

from arcopo_fast.config.sections import expanded
from arcopo_fast.errors import UserError, first_line
from arcopo_fast.storage.atomic import atomic_write
from arcopo_fast.storage.identity import file_digest

HUGGING_FACE, GITHUB = "hf://", "github://"
VARIABLE = "ARCOPO_MODELS"


class Published(NamedTuple):
    """A published file.

    Attributes:
        size: in bytes.
        sha256: of the file; empty where it is not known, and then the size is only about right.
    """

    size: int
    sha256: str = ""


FILES = {
    "KlingTeam/VideoReward/checkpoint-11352/model.pth": Published(
        5_031_072_529, "48375908e6112de9f0248402db156a23b480709a6960b091c598c6f4c88d21b9"
    ),
    "MizzenAI/HPSv3/HPSv3.safetensors": Published(16_500_000_000),
}
"""Large files by owner/name/path, as published: the rewards', to which `model.families` adds the generators'. Where the SHA-256 is known, a
copy of another size is not whole."""


_REFERENCE = r"refs/(?:pr/[0-9]+|convert/[\w.-]+)"  # revisions of Hugging Face that are written with their slashes


class Source(NamedTuple):
    """A repository, and a file or directory in it.

    Attributes:
        scheme: ``hf://`` or ``github://``.
        kind: ``model`` or ``dataset``.
        repository: owner/name.
        revision: a branch, tag or commit; None: the newest.
        inside: path in the repository; empty: all of it.
    """

    scheme: str
    kind: str
    repository: str
    revision: str | None
    inside: str

    @classmethod
    def parse(cls, source: str) -> Source:
        """Return the source that a text names.

        Raises:
            UserError: the text is no source.
        """
        match = re.fullmatch(rf"(hf://|github://)(datasets/)?([\w.-]+/[\w.-]+)(?:@({_REFERENCE}|[^/]+))?(?:/(.*))?", source)
        scheme, dataset, repository, revision, inside = match.groups() if match else ("",) * 5
        inside, revision = (inside or "").strip("/"), revision and unquote(revision)
        parts = "/".join(filter(None, (repository, revision, inside))).split("/")
        # Every part becomes a part of a path in the cache: none may lead out of it.
        escapes = any(part in ("", ".", "..") or not part.isprintable() or "\\" in part for part in parts)
        if not scheme or escapes or revision == "refs" or (scheme == GITHUB and (dataset or not inside)):
            forms = "hf://owner/name, hf://owner/name@revision/path/of/file or github://owner/name/path/of/file"
            raise UserError(f"{source[:200]!r} names nothing that is published; expected {forms}; a slash in a revision is written %2F")
        return cls(scheme, "dataset" if dataset else "model", repository, revision, inside)

    def __str__(self) -> str:
        written = self.revision and (self.revision if re.fullmatch(_REFERENCE, self.revision) else quote(self.revision, safe=""))
        revision = f"@{written}" if written else ""
        return "/".join(part for part in (self.address + revision, self.inside) if part)

    @property
    def address(self) -> str:
        """Address of the repository, as a source."""
        return f"{self.scheme}{'datasets/' if self.kind == 'dataset' else ''}{self.repository}"

    @property
    def url(self) -> str:
        """Address of a file on GitHub."""
        return f"https://raw.githubusercontent.com/{self.repository}/{quote(self.revision or 'HEAD')}/{quote(self.inside)}"

    def advice(self, files: Sequence[str]) -> str:
        """Return how to get `files` of the source by hand."""
        if self.scheme == GITHUB:
            return f"get {self.url}, and put it at ${VARIABLE}/{self.repository}/{self.inside}"
        names = [self.inside] if self.inside and not files else [str(Path(self.inside, file)) for file in files]
        patterns = any(letter in file for file in names for letter in "*?[")  # the program takes names or patterns, not both
        options = [f"--include {file!r}" for file in names] if patterns else names
        options += ["--repo-type dataset"] * (self.kind == "dataset") + [f"--revision {self.revision}"] * bool(self.revision)
        return f"where there is a network: {' '.join(['hf download', self.repository, *options])}"


def is_published(source: str | Path) -> bool:
    """Return whether a source names a published file, not a path."""
    return str(source).startswith((HUGGING_FACE, GITHUB))


def find(source: str | Path, files: Sequence[str] = ()) -> Path:
    """Return the local path of a published file or directory; download it if it is not there.

    Args:
        source: a path, or one of the forms above.
        files: of a directory, names or patterns ("text_encoder/*.safetensors") relative to it that must be there; the others are not
            downloaded. Empty: the source is a file, or a directory that is taken as it is.

    Raises:
        UserError: the source is missing and cannot be downloaded; or a file is not complete.
    """
    if not is_published(source):
        path = Path(expanded(str(source)))
        if not path.exists():
            raise UserError(f"there is nothing at {path}; give an existing path, or hf://owner/name/path/of/file")
        _check(path, files)
        return path
    parsed = Source.parse(str(source))
    located = _local(parsed, files)
    if parsed.scheme == GITHUB:
        located = located or _fetch(parsed, files)
    elif located is None or (located.is_dir() and not files and located == _cached(parsed, files)):  # the cache may hold a part
        located = _download(parsed, files)
    _check_sizes(parsed, located, files)
    return located


def local(source: str | Path, files: Sequence[str] = ()) -> Path | None:
    """Return the path of a source as `find` does, but without a download: None if it is not on this machine."""
    if is_published(source):
        return _local(Source.parse(str(source)), files)
    path = Path(expanded(str(source)))
    return path if path.exists() and not _missing(path, files) else None


def describe(source: str | Path, files: Sequence[str] = ()) -> str:
    """Return what is needed, with its size where that is known, and how to get it."""
    if not is_published(source):
        return f"{source}{': ' + ', '.join(files) if files else ''}, a path on this machine"
    parsed = Source.parse(str(source))
    return f"{_what(parsed, files)}; {parsed.advice(files)}"


def _local(source: Source, files: Sequence[str]) -> Path | None:
    return next((path for path in _places(source, files) if path.exists() and not _missing(path, files)), None)


def _places(source: Source, files: Sequence[str] = ()) -> Iterator[Path]:
    """Yield where a copy could lie: own ones first, then the cache."""
    root = os.environ.get(VARIABLE)
    if root:
        for directory in (source.repository, source.repository.partition("/")[2]):
            yield Path(expanded(root)) / directory / source.inside
    cached = _github_cache(source) if source.scheme == GITHUB else _cached(source, files)
    if cached:
        yield cached


def _cached(source: Source, files: Sequence[str]) -> Path | None:
    """Return the file or directory in Hugging Face's cache; None if it is not there, or lacks some of what it is known to have."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, kind, revision = source.repository, source.kind, source.revision
    try:
        file = try_to_load_from_cache(name, source.inside, repo_type=kind, revision=revision) if source.inside else None
        if isinstance(file, str):
            return Path(file)
        patterns = _patterns(source, files)
        snapshot = snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):  # not there, or a name that no repository can have
        return None
    return Path(snapshot) / source.inside


def _patterns(source: Source, files: Sequence[str]) -> list[str] | None:
    """Return what is needed of a repository as huggingface_hub takes it; None: all of it."""
    if not source.inside:
        return list(files) or None
    return [str(Path(source.inside, file)) for file in files] or [source.inside, f"{source.inside}/*"]


def _missing(path: Path, files: Sequence[str]) -> list[str]:
    """Return the files that a directory lacks. A file needs none."""
    return [file for file in files if not any(path.glob(file))] if path.is_dir() or files else []


def _check(path: Path, files: Sequence[str]) -> None:
    if missing := _missing(path, files):
        raise UserError(f"{path} lacks {', '.join(missing)}; expected a directory with {', '.join(files)}")


def _download(source: Source, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    patterns = _patterns(source, files)
    try:
        snapshot = Path(snapshot_download(source.repository, repo_type=source.kind, revision=source.revision, allow_patterns=patterns))
    except Exception as error:  # offline, no such repository, a full disk: they have no common base
        raise UserError(_absent(source, files, f"{type(error).__name__}: {first_line(error)}")) from None
    path = snapshot / source.inside
    if not path.exists() or _missing(path, files):
        raise UserError(_absent(source, files, "the repository has none, or this machine is offline"))
    for file in _chosen(snapshot, patterns):
        _verify(file)
    return path


def _github_cache(source: Source) -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    cache = Path(root) if root else Path.home() / ".cache"
    return cache / "arcopo_fast" / "github" / source.repository / (source.revision or "HEAD") / source.inside


def _fetch(source: Source, files: Sequence[str]) -> Path:
    """Download one file of a repository on GitHub."""
    from huggingface_hub import constants

    path = _github_cache(source)
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("offline: HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(source.url, timeout=60) as answer:
            content = answer.read()
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)
    except (OSError, HTTPException) as error:  # urllib's own are OSErrors
        raise UserError(_absent(source, files, f"{type(error).__name__}: {first_line(error)}")) from None
    return path


def _chosen(snapshot: Path, patterns: Sequence[str] | None) -> list[Path]:
    files = [file for file in snapshot.rglob("*") if file.is_file()]
    return [file for file in files if not patterns or any(fnmatchcase(str(file.relative_to(snapshot)), pattern) for pattern in patterns)]


def _verify(file: Path) -> None:
    """Remove a large file that came damaged: its name in the cache is its SHA-256 (its ETag)."""
    blob = file.resolve()
    if not re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return
    digest = sha256(blob)
    if digest != blob.name:
        blob.unlink()
        file.unlink(missing_ok=True)
        raise UserError(f"{file} was damaged in the download: its SHA-256 is {digest}, not {blob.name}; it was removed, so start again")


def _check_sizes(source: Source, path: Path, files: Sequence[str]) -> None:
    """Raise `UserError` for a copy that was cut short, which would fail much later, and less clearly."""
    for file, published in known_files(source, path, files):
        if (size := file.stat().st_size) != published.size:
            raise UserError(f"{file} has {size} bytes, the published file {published.size}: the copy is not whole; get it again")


def known_files(source: Source, path: Path, files: Sequence[str]) -> Iterator[tuple[Path, Published]]:
    """Yield the files of a source, found at `path`, whose size and SHA-256 are known."""
    for file in [path / name for name in files] if path.is_dir() else [path]:
        published = FILES.get(f"{source.repository}/{Path(source.inside, *file.relative_to(path).parts)}")
        if published and published.sha256:
            yield file, published


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file of any size, with a bar where there is a terminal."""
    with tqdm(total=file.stat().st_size, desc=file.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        return file_digest(file, bar.update)


def _absent(source: Source, files: Sequence[str], reason: str) -> str:
    where = f"${VARIABLE}" if os.environ.get(VARIABLE) else f"${VARIABLE} (not set)"
    nowhere = f"is neither in {where} nor in the cache, and cannot be downloaded ({reason})"
    return f"{_what(source, files)} {nowhere}; {source.advice(files)}"


def _what(source: Source, files: Sequence[str]) -> str:
    names = [str(Path(source.inside, file)) for file in files] or ([source.inside] if source.inside else [])
    sizes = {name: FILES[key].size for name in names if (key := f"{source.repository}/{name}") in FILES}
    listing = ", ".join(f"{name} ({_gigabytes(sizes[name])})" if name in sizes else name for name in names)
    return f"{source.address}{': ' + listing if listing else ''}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
