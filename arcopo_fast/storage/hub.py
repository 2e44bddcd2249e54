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

from arcopo_fast.config.schema import expanded
from arcopo_fast.errors import UserError, first_line
from arcopo_fast.storage.atomic import atomic_write
from arcopo_fast.storage.identity import file_digest

HUGGING_FACE, GITHUB = "hf://", "github://"
VARIABLE = "ARCOPO_MODELS"


class Published(NamedTuple):
    """size: in bytes. sha256: of the file; where it is empty, the size is about right only."""

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
    """A repository, and a file or directory in it; inside: "" for all of it. repository: owner/name."""

    scheme: str
    kind: str
    repository: str
    revision: str | None
    inside: str

    @classmethod
    def parse(cls, source: str) -> Source:
        """
        Raises:
            UserError: it names nothing.
        """
        match = re.fullmatch(rf"(hf://|github://)(datasets/)?([\w.-]+/[\w.-]+)(?:@({_REFERENCE}|[^/]+))?(?:/(.*))?", source)
        scheme, dataset, repository, revision, inside = match.groups() if match else ("",) * 5
        inside, revision = (inside or "").strip("/"), revision and unquote(revision)
        parts = "/".join(filter(None, (repository, revision, inside))).split("/")
        # Every part becomes a part of a path in the cache: none may lead out of it.
        strange = any(part in ("", ".", "..") or not part.isprintable() or "\\" in part for part in parts)
        if not scheme or strange or revision == "refs" or (scheme == GITHUB and (dataset or not inside)):
            forms = "hf://owner/name, hf://owner/name@revision/path/of/file or github://owner/name/path/of/file"
            raise UserError(f"{source[:200]!r} names nothing that is published; expected {forms}; a slash in a revision is written %2F")
        return cls(scheme, "dataset" if dataset else "model", repository, revision, inside)

    def __str__(self) -> str:
        written = self.revision and (self.revision if re.fullmatch(_REFERENCE, self.revision) else quote(self.revision, safe=""))
        revision = f"@{written}" if written else ""
        return "/".join(part for part in (self.address + revision, self.inside) if part)

    @property
    def address(self) -> str:
        """Of the repository."""
        return f"{self.scheme}{'datasets/' if self.kind == 'dataset' else ''}{self.repository}"

    @property
    def url(self) -> str:
        """Of a file on GitHub."""
        return f"https://raw.githubusercontent.com/{self.repository}/{quote(self.revision or 'HEAD')}/{quote(self.inside)}"

    def advice(self, files: Sequence[str]) -> str:
        """How to get it by hand."""
        if self.scheme == GITHUB:
            return f"get {self.url}, and put it at ${VARIABLE}/{self.repository}/{self.inside}"
        wanted = [self.inside] if self.inside and not files else [str(Path(self.inside, file)) for file in files]
        patterns = any(letter in file for file in wanted for letter in "*?[")  # the program takes names or patterns, not both
        options = [f"--include {file!r}" for file in wanted] if patterns else wanted
        options += ["--repo-type dataset"] * (self.kind == "dataset") + [f"--revision {self.revision}"] * bool(self.revision)
        return f"where there is a network: {' '.join(['hf download', self.repository, *options])}"


def is_published(source: str | Path) -> bool:
    """It names a published file, not a path."""
    return str(source).startswith((HUGGING_FACE, GITHUB))


def find(source: str | Path, files: Sequence[str] = ()) -> Path:
    """The local path of a published file or directory; what is not there is downloaded.

    Args:
        source: a path, or one of the forms above.
        files: of a directory, names or patterns ("text_encoder/*.safetensors") relative to it that must be there; the others are not
            downloaded. Empty: the source is a file, or a directory that is taken as it is.

    Raises:
        UserError: missing, and not to be had; or a file that is not whole.
    """
    if not is_published(source):
        path = Path(expanded(str(source)))
        if not path.exists():
            raise UserError(f"there is nothing at {path}; give the path of what you have, or hf://owner/name/path/of/file")
        _check(path, files)
        return path
    wanted = Source.parse(str(source))
    found = _local(wanted, files)
    if wanted.scheme == GITHUB:
        found = found or _fetch(wanted, files)
    elif found is None or (found.is_dir() and not files and found == _cached(wanted, files)):  # of all of it the cache may hold a part
        found = _download(wanted, files)
    _check_sizes(wanted, found, files)
    return found


def local(source: str | Path, files: Sequence[str] = ()) -> Path | None:
    """As `find`, without a download: None for what is not on this machine."""
    if is_published(source):
        return _local(Source.parse(str(source)), files)
    path = Path(expanded(str(source)))
    return path if path.exists() and not _missing(path, files) else None


def describe(source: str | Path, files: Sequence[str] = ()) -> str:
    """What is needed, with its size where that is known, and how to get it."""
    if not is_published(source):
        return f"{source}{': ' + ', '.join(files) if files else ''}, a path on this machine"
    wanted = Source.parse(str(source))
    return f"{_what(wanted, files)}; {wanted.advice(files)}"


def _local(wanted: Source, files: Sequence[str]) -> Path | None:
    return next((path for path in _places(wanted, files) if path.exists() and not _missing(path, files)), None)


def _places(wanted: Source, files: Sequence[str] = ()) -> Iterator[Path]:
    """Yield where a copy could lie: own ones first, then the cache."""
    root = os.environ.get(VARIABLE)
    if root:
        for directory in (wanted.repository, wanted.repository.partition("/")[2]):
            yield Path(expanded(root)) / directory / wanted.inside
    cached = _github_cache(wanted) if wanted.scheme == GITHUB else _cached(wanted, files)
    if cached:
        yield cached


def _cached(wanted: Source, files: Sequence[str]) -> Path | None:
    """Return the file or directory in Hugging Face's cache; None if it is not there, or lacks some of what it is known to have."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, kind, revision = wanted.repository, wanted.kind, wanted.revision
    try:
        file = try_to_load_from_cache(name, wanted.inside, repo_type=kind, revision=revision) if wanted.inside else None
        if isinstance(file, str):
            return Path(file)
        patterns = _patterns(wanted, files)
        snapshot = snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):  # not there, or a name that no repository can have
        return None
    return Path(snapshot) / wanted.inside


def _patterns(wanted: Source, files: Sequence[str]) -> list[str] | None:
    """Return what is needed of a repository as huggingface_hub takes it; None: all of it."""
    if not wanted.inside:
        return list(files) or None
    return [str(Path(wanted.inside, file)) for file in files] or [wanted.inside, f"{wanted.inside}/*"]


def _missing(path: Path, files: Sequence[str]) -> list[str]:
    """The files that a directory lacks. A file needs none."""
    return [file for file in files if not any(path.glob(file))] if path.is_dir() or files else []


def _check(path: Path, files: Sequence[str]) -> None:
    if absent := _missing(path, files):
        raise UserError(f"{path} lacks {', '.join(absent)}; expected a directory with {', '.join(files)}")


def _download(wanted: Source, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    patterns = _patterns(wanted, files)
    try:
        snapshot = Path(snapshot_download(wanted.repository, repo_type=wanted.kind, revision=wanted.revision, allow_patterns=patterns))
    except Exception as error:  # offline, no such repository, a full disk: they have no common base
        raise UserError(_absent(wanted, files, f"{type(error).__name__}: {first_line(error)}")) from None
    path = snapshot / wanted.inside
    if not path.exists() or _missing(path, files):
        raise UserError(_absent(wanted, files, "the repository has none, or this machine is offline"))
    for file in _chosen(snapshot, patterns):
        _verify(file)
    return path


def _github_cache(wanted: Source) -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    cache = Path(root) if root else Path.home() / ".cache"
    return cache / "arcopo_fast" / "github" / wanted.repository / (wanted.revision or "HEAD") / wanted.inside


def _fetch(wanted: Source, files: Sequence[str]) -> Path:
    """One file of a repository on GitHub."""
    from huggingface_hub import constants

    path = _github_cache(wanted)
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("offline: HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(wanted.url, timeout=60) as answer:
            content = answer.read()
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)
    except (OSError, HTTPException) as error:  # urllib's own are OSErrors
        raise UserError(_absent(wanted, files, f"{type(error).__name__}: {first_line(error)}")) from None
    return path


def _chosen(snapshot: Path, patterns: Sequence[str] | None) -> list[Path]:
    files = [file for file in snapshot.rglob("*") if file.is_file()]
    return [file for file in files if not patterns or any(fnmatchcase(str(file.relative_to(snapshot)), one) for one in patterns)]


def _verify(file: Path) -> None:
    """A large file's name in the cache is its SHA-256 (its ETag): one that differs came damaged, and is removed."""
    blob = file.resolve()
    if not re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return
    found = sha256(blob)
    if found != blob.name:
        blob.unlink()
        file.unlink(missing_ok=True)
        raise UserError(f"{file} came damaged: its SHA-256 is {found}, not {blob.name}; it was removed, so start again")


def _check_sizes(wanted: Source, path: Path, files: Sequence[str]) -> None:
    """A copy that was cut short would fail much later, and less clearly."""
    for file, known in known_files(wanted, path, files):
        if (found := file.stat().st_size) != known.size:
            raise UserError(f"{file} has {found} bytes, the published file {known.size}: the copy is not whole; get it again")


def known_files(wanted: Source, path: Path, files: Sequence[str]) -> Iterator[tuple[Path, Published]]:
    """Those of a source that was found at `path` whose size and SHA-256 are known."""
    for file in [path / name for name in files] if path.is_dir() else [path]:
        known = FILES.get(f"{wanted.repository}/{Path(wanted.inside, *file.relative_to(path).parts)}")
        if known and known.sha256:
            yield file, known


def sha256(file: Path) -> str:
    """Of a file of any size, with a bar where there is a terminal."""
    with tqdm(total=file.stat().st_size, desc=file.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        return file_digest(file, bar.update)


def _absent(wanted: Source, files: Sequence[str], reason: str) -> str:
    where = f"${VARIABLE}" if os.environ.get(VARIABLE) else f"${VARIABLE} (not set)"
    nowhere = f"is neither in {where} nor in the cache, and cannot be downloaded ({reason})"
    return f"{_what(wanted, files)} {nowhere}; {wanted.advice(files)}"


def _what(wanted: Source, files: Sequence[str]) -> str:
    names = [str(Path(wanted.inside, file)) for file in files] or ([wanted.inside] if wanted.inside else [])
    sizes = {name: FILES[key].size for name in names if (key := f"{wanted.repository}/{name}") in FILES}
    said = ", ".join(f"{name} ({_gigabytes(sizes[name])})" if name in sizes else name for name in names)
    return f"{wanted.address}{': ' + said if said else ''}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
