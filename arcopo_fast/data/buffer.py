"""The replay buffer on disk: groups of reference rollouts, made by any number of processes and read by any number of ranks.

    buffer/  buffer.json  entries/000000.safetensors ...  claims/000000 ...

An entry is one group, a safetensors file named by its index: complete or absent, read through a memory map, checked against its SHA-256
when it is first read. buffer.json says which policy and recipe made it. What the tensors mean is the caller's business.

A process that makes an entry holds the lock on its file in claims/. So nothing is made twice at once and nothing stays claimed by the dead,
on the file systems that `storage.locks` names. Over NFS a process may learn late of an entry that another machine made, and make it again;
either file is whole, and the later one takes the name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from arcopo_fast.errors import UserError
from arcopo_fast.storage.atomic import atomic_path, atomic_write, settle
from arcopo_fast.storage.identity import require_same, values_digest
from arcopo_fast.storage.locks import lock

FORMAT = 2
READABLE = (1, 2)
"""Formats that are read: of 1, entries have whole prefixes under one prompt and do not say so."""
FILE = "buffer.json"
COLLECT = "python -m arcopo_fast.collect"

# An entry's file begins with 8 bytes of length and the header, and that with our one metadata item, so its checksum has a fixed place.
_HEAD = b'{"__metadata__":{"entry":"{\\"sha256\\":\\"'
_NO_CHECKSUM = b"0" * 64
_CHECKSUM = slice(8 + len(_HEAD), 8 + len(_HEAD) + len(_NO_CHECKSUM))


class BrokenEntry(UserError):
    """An entry that cannot be used. The message names its file and the problem."""


@dataclass(frozen=True)
class Entry:
    """One group of a buffer.

    Attributes:
        index: number of the entry.
        tensors: by name; each is read from the disk when it is used. Change a copy: all who ask for one get the same memory.
        metadata: as it was written.
    """

    index: int
    tensors: Mapping[str, Tensor]
    metadata: dict[str, Any]


class Buffer:
    """A replay buffer: `create` it to collect, `open` it to train.

    Attributes:
        path: the directory.
        policy, recipe: the values that the entries were made from, as they were given (JSON makes lists of tuples).
        groups: number of entries that were asked for; None if nobody did. There may be fewer or more.
    """

    def __init__(self, path: Path, document: Mapping[str, Any]) -> None:
        self.path = path
        self.policy: dict[str, Any] = document["policy"]["values"]
        self.recipe: dict[str, Any] = document["recipe"]["values"]
        self.groups: int | None = document["groups"]
        self._fingerprint = document["policy"]["fingerprint"]
        self._checked: set[int] = set()
        self._broken: set[int] = set()
        self._claimed: set[int] = set()

    @classmethod
    def create(cls, path: str | Path, policy: Mapping[str, Any], recipe: Mapping[str, Any], *, groups: int | None = None) -> Buffer:
        """Return the buffer to collect into: a new one, or the existing one if the same policy and recipe made it.

        Of processes that create it at once, one does and the others check against what it wrote.

        Args:
            policy: everything that decides what the generator draws from a noise: plain values that JSON can say, possibly nested.
            recipe: everything else that an entry depends on.
            groups: how many entries are wanted in all; kept for readers, the largest that was ever asked for.

        Raises:
            UserError: the directory holds something else, or a buffer of another policy or recipe.
        """
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = "a file is in the way" if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
            raise UserError(f"cannot make the replay buffer {path}: {problem}; give another directory") from None
        names = {name for name in os.listdir(path) if not name.startswith(".")}
        if strangers := sorted(names - {"entries", "claims"}) if FILE not in names else []:
            raise UserError(f"{path} is no replay buffer: it holds {strangers[0]} and no {FILE}; give a new or an empty directory")
        for name in ("entries", "claims"):
            (path / name).mkdir(exist_ok=True)
        with lock(path / "claims" / "buffer", "buffer", wait=True):
            settle(path, "buffer", owned=True)
            if not (path / FILE).exists():
                _write_document(path, {"format": FORMAT, "groups": groups, "policy": _signed(policy), "recipe": _signed(recipe)})
            document = _read_document(path)
            _check(path, document, policy=policy, recipe=recipe)
            if groups is not None and groups > (document["groups"] or 0):
                document["groups"] = groups
                _write_document(path, document)
        return cls(path, document)

    @classmethod
    def open(cls, path: str | Path, policy: Mapping[str, Any]) -> Buffer:
        """Return the buffer to train on; write nothing. An entry whose header or length is wrong is left out, with a warning.

        Raises:
            UserError: no buffer, one of another policy, an empty one, or one without a usable entry.
        """
        path = Path(path)
        document = _read_document(path)
        _check(path, document, policy=policy)
        buffer = cls(path, document)
        indices = buffer.indices
        for index in indices:
            try:
                buffer._open(index)
            except BrokenEntry as error:
                buffer._leave_out(index, error)
        if not indices:
            raise UserError(f"the replay buffer {path} is empty; fill it with {COLLECT}")
        buffer._check_any(indices)
        return buffer

    # Reading

    @property
    def indices(self) -> list[int]:
        """Numbers of the entries on the disk at this moment, in order, without those found broken.

        Draw from a list taken once, at the start: processes may add entries and find others broken at any time.
        """
        matches = (re.fullmatch(r"(\d{6,})\.safetensors", name) for name in os.listdir(self.path / "entries"))
        return sorted(index for match in matches if match and (index := int(match[1])) not in self._broken)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Entry:
        """Return one entry. The first time in this process its whole file is read and compared with its checksum.

        Raises:
            BrokenEntry: missing, cut short, changed, or not an entry of this buffer.
        """
        file, header = self._open(index)
        if index not in self._checked:
            self._compare(index)
            self._checked.add(index)
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}  # views of its memory map
        return Entry(index, tensors, header["metadata"])

    def entries(self, order: Iterable[int] | None = None) -> Iterator[Entry]:
        """Yield the entries of `order` (all, if None), leaving out broken ones with one warning for each.

        `next(buffer.entries(permutation))` draws one entry and reads no other, unless it has to be replaced.

        Raises:
            UserError: all of them are broken.
        """
        order = self.indices if order is None else list(order)
        for index in order:
            if index not in self._broken:
                try:
                    entry = self.read(index)
                except BrokenEntry as error:
                    self._leave_out(index, error)
                else:
                    yield entry
        self._check_any(order)

    # Writing

    def missing(self, groups: int, waiting: Callable[[list[int]], object] | None = None) -> Iterator[int]:
        """Claim, one after the other, the entries below `groups` that are missing or broken; `write` each before asking for the next.

            for index in buffer.missing(100):
                buffer.write(index, *make(index))

        Entries that other processes have claimed are skipped, and waited for at the end: by then an entry exists or, if its process died,
        is claimed here. When the iteration ends, every entry exists and is intact. A broken one is moved aside, to NNNNNN.broken: it may be
        a file that somebody put there, and on a failing disk it keeps the bad block from being used again.

        Args:
            waiting: called once with the entries of other processes, if there are any to wait for.
        """
        elsewhere: list[int] = []
        for wait, indices in ((False, range(groups)), (True, elsewhere)):
            if wait and elsewhere and waiting:
                waiting(list(elsewhere))
            for index in indices:
                with self._claim(index, wait=wait) as claimed:
                    if not claimed:
                        elsewhere.append(index)
                    elif not self._have(index):
                        yield index
                        if not self._path(index).exists():
                            raise RuntimeError(f"entry {index} was claimed and not written")

    def write(self, index: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Store the entry that `missing` has just claimed: complete or, if this fails, absent.

        Args:
            tensors: of any dtype that safetensors has, on any device; views are fine.
            metadata: what JSON can say.
        """
        path = self._path(index)
        if index not in self._claimed or path.exists():
            raise ValueError(f"entry {index} is not claimed or is there already; write each index that missing() gives, once")
        header = {"sha256": _NO_CHECKSUM.decode(), "index": index, "policy": self._fingerprint, "metadata": dict(metadata)}
        # safetensors takes neither views of each other nor strides.
        copies = {name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        content = bytearray(save(copies, {"entry": json.dumps(header, separators=(",", ":"), allow_nan=False)}))
        if not content.startswith(_HEAD, 8):
            raise RuntimeError("this version of safetensors does not begin its header with the metadata")
        content[_CHECKSUM] = _checksum(content)
        with atomic_path(path) as partial:
            partial.write_bytes(content)
        self._broken.discard(index)

    # One entry

    def _path(self, index: int) -> Path:
        return self.path / "entries" / f"{index:06d}.safetensors"

    def _open(self, index: int) -> tuple[Any, dict[str, Any]]:
        """Return an entry's file, memory-mapped, and its header; the file is as long as its header says."""
        path = self._path(index)
        try:
            path.open("rb").close()  # if it may not be opened, this says so; safe_open takes everything for a missing file
            file = safe_open(path, "pt")
            header = json.loads(file.metadata()["entry"])
            held, policy = header["index"], header["policy"]
        except FileNotFoundError:
            raise BrokenEntry(f"{path} is missing") from None
        except SafetensorError as error:
            raise BrokenEntry(f"{path} is broken: {error}") from None
        except (ValueError, KeyError, TypeError, RecursionError):  # whatever stands in the place of our header
            raise BrokenEntry(f"{path} is broken: it is not an entry of a replay buffer") from None
        if (held, policy) != (index, self._fingerprint):
            raise BrokenEntry(
                f"{path} belongs to another buffer: it says entry {held} of policy {policy}, not {index} of {self._fingerprint}"
            )
        return file, header

    def _compare(self, index: int) -> None:
        """Read an entry's whole file; raise `BrokenEntry` if it is not what was written."""
        path = self._path(index)
        try:
            content = path.read_bytes()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise BrokenEntry(f"{path} is broken: the disk cannot read it ({error.strerror})") from None
        written, actual = content[_CHECKSUM], _checksum(content)
        if written != actual:
            raise BrokenEntry(f"{path} is broken: its SHA-256 is {actual.decode()}, it was written with {written.decode(errors='replace')}")

    def _leave_out(self, index: int, error: BrokenEntry) -> None:
        self._broken.add(index)
        warnings.warn(f"{error}; continuing without it", stacklevel=3)

    def _check_any(self, indices: Sequence[int]) -> None:
        if self._broken.issuperset(indices):
            raise UserError(f"none of {len(indices)} entries of the replay buffer {self.path} can be used; make them again with {COLLECT}")

    # Claims

    @contextmanager
    def _claim(self, index: int, *, wait: bool) -> Iterator[bool]:
        """Hold an entry's claim; False if another process does and `wait` is off."""
        with lock(self.path / "claims" / f"{index:06d}", "buffer", wait=wait) as locked:
            if locked:
                settle(self.path / "entries", f"{index:06d}", owned=True)
                self._claimed.add(index)
            try:
                yield locked
            finally:
                self._claimed.discard(index)

    def _have(self, index: int) -> bool:
        """Return whether an entry exists and is intact. A broken one is moved aside, so its claim must be held."""
        path = self._path(index)
        if not path.exists():
            return False
        try:
            self.read(index)
        except BrokenEntry as error:
            aside = path.with_suffix(".broken")
            path.replace(aside)
            warnings.warn(f"{error}; it is now {aside.name}, and is made again", stacklevel=3)
            return False
        return True


def all_metadata(path: str | Path) -> list[dict[str, Any]]:
    """Return the metadata of every entry of a buffer, unchecked: to know what a buffer is about before it is opened."""
    metadata = []
    for file in sorted((Path(path) / "entries").glob("*.safetensors")):
        with suppress(OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError), safe_open(file, "pt") as opened:
            metadata.append(dict(json.loads(opened.metadata()["entry"])["metadata"]))
    return metadata


def _checksum(content: bytes | bytearray) -> bytes:
    """Return the SHA-256 of an entry's file with zeros in the place of the checksum itself, as 64 hexadecimal digits."""
    view = memoryview(content)
    digest = hashlib.sha256(view[: _CHECKSUM.start])
    digest.update(_NO_CHECKSUM)
    digest.update(view[_CHECKSUM.stop :])
    return digest.hexdigest().encode()


# buffer.json -----------------------------------------------------------------------------------------------------------------------


def _signed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"fingerprint": values_digest(values), "values": values}


def _write_document(path: Path, document: Mapping[str, Any]) -> None:
    atomic_write(path / FILE, json.dumps(document, indent=2) + "\n")


def _read_document(path: Path) -> dict[str, Any]:
    """Return the content of buffer.json, checked, its own fingerprints included."""
    file = path / FILE
    version = FORMAT
    try:
        document = json.loads(file.read_bytes())
        version = document["format"]
        signed = all(document[kind]["fingerprint"] == values_digest(document[kind]["values"]) for kind in ("policy", "recipe"))
        groups = document["groups"]
        intact = signed and (groups is None or (type(groups) is int and groups > 0))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is no replay buffer: it has no {FILE}; make one with {COLLECT}") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if version not in READABLE:
        raise UserError(
            f"{file} has format {version!r}, and this version reads {' and '.join(map(str, READABLE))}; collect again with {COLLECT}"
        )
    if not intact:
        raise UserError(f"{file} is damaged, so what made the buffer is unknown; restore the file, or collect into another directory")
    return document


def _check(path: Path, document: Mapping[str, Any], **expected: Mapping[str, Any]) -> None:
    """Refuse a buffer that was made from other values than those given for "policy" and "recipe"."""
    for kind, values in expected.items():
        stamps = f"{values_digest(values)} here, {document[kind]['fingerprint']} in the buffer"
        problem = f"the replay buffer {path} was collected with another {kind} ({stamps})"
        advice = "use the settings that it was collected with, or another directory"
        require_same(problem, document[kind]["values"], values, advice, places=("here", "in the buffer"))
