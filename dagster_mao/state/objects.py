"""Files below the store's root: a local folder or any object store, through the same calls.

What is written here is durable when the call returns: local files and their folders are fsynced, because neither Delta nor an object
store client does that for a local disk.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import obstore
from deltalake.exceptions import DeltaError
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import LocalStore, from_url

from dagster_mao.errors import StoreError, TamperedError

_DECORATION = re.compile(r"\x1b\[[0-9;]*m|↳|\n\nDebug source:.*", re.DOTALL)  # delta-rs and obstore draw their chains of causes
_ABANDONED_SECONDS = 7 * 24 * 3600
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,79}")


def safe_name(text: str) -> str:
    """A single path component for any text: the text itself where that is harmless, else its harmless characters and a hash.

    Not reversible and need not be: the state log holds the text.
    """
    if _SAFE_NAME.fullmatch(text) and ".." not in text:
        return text
    return f"{re.sub(r'[^A-Za-z0-9=-]+', '-', text).strip('-')[:48] or 'x'}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


class Objects:
    """The files of one store. Paths are relative to the root, with `/` between their parts."""

    def __init__(self, root: str | os.PathLike[str], storage_options: Mapping[str, str] | None = None) -> None:
        text = os.fspath(root)
        if not text:
            raise StoreError("The root of the state store is empty", fix="give a folder or an object-store URI")
        self.storage_options = dict(storage_options or {})
        parts = urlsplit(text)
        self.local: Path | None = None
        if parts.scheme == "file":
            self.local = Path(unquote(parts.path)).absolute()
        elif not parts.scheme or len(parts.scheme) == 1:  # a Windows drive letter is no scheme
            self.local = Path(text).expanduser().absolute()
        if self.local is not None and self.local.exists() and not self.local.is_dir():
            raise StoreError(f"The root of the state store is a file: {self.local}", fix="give a folder")
        self._flushed: set[Path] = set()
        self.root = str(self.local) if self.local is not None else text.rstrip("/")

    @cached_property
    def _store(self) -> Any:
        if self.local is not None:
            return LocalStore(self.local, mkdir=True)
        http = {key.lower(): value for key, value in self.storage_options.items()}
        plain = str(http.pop("aws_allow_http", http.pop("allow_http", "false"))).lower() == "true"
        return from_url(self.root, client_options={"allow_http": plain}, **cast(Any, http))

    def url(self, path: str) -> str:
        """Absolute path or URI, as deltalake and polars take it."""
        return f"{self.root}/{path}"

    def exists(self, path: str) -> bool:
        return self.size(path) is not None

    def size(self, path: str) -> int | None:
        """Size in bytes; None when there is no such file."""
        if self.local is not None and not self.local.exists():
            return None
        with reaching(self.root):
            try:
                return int(obstore.head(self._store, path)["size"])
            except (FileNotFoundError, NotFoundError):
                return None

    def get(self, path: str) -> bytes:
        """The bytes of a file. Raises `TamperedError` when it is gone: nothing in a store is ever deleted."""
        with reaching(self.root):
            try:
                return bytes(obstore.get(self._store, path).bytes())
            except (FileNotFoundError, NotFoundError):
                raise _gone(path) from None

    def sha256(self, path: str) -> str:
        """sha256 of a file, streamed. Raises `TamperedError` when it is gone."""
        with reaching(self.root):
            try:
                if self.local is not None:
                    return file_digest(self.local / path)
                digest = hashlib.sha256()
                for chunk in obstore.get(self._store, path).stream(min_chunk_size=8 << 20):
                    digest.update(chunk)
                return digest.hexdigest()
            except (FileNotFoundError, NotFoundError):
                raise _gone(path) from None

    def put(self, path: str, data: bytes) -> None:
        with reaching(self.root):
            obstore.put(self._store, path, data)
            self.sync(path)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Writes the file if there is none; False when somebody else's is there already. Atomic: of several writers one wins."""
        with reaching(self.root):
            try:
                obstore.put(self._store, path, data, mode="create")
            except (AlreadyExistsError, FileExistsError):
                return False
            self.sync(path)
            return True

    def list(self, prefix: str) -> Iterator[str]:
        """Paths of all files below a folder, in no order."""
        if self.local is not None and not (self.local / prefix).exists():
            return
        with reaching(self.root):
            for batch in obstore.list(self._store, prefix=prefix):
                yield from (entry["path"] for entry in batch)

    def folders(self, prefix: str) -> Sequence[str]:
        """Names of the folders in a folder, sorted."""
        if self.local is not None and not (self.local / prefix).exists():
            return []
        with reaching(self.root):
            found = obstore.list_with_delimiter(self._store, prefix=f"{prefix}/")["common_prefixes"]
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def written(self, prefix: str) -> Iterator[tuple[str, float]]:
        """Paths of all files below a folder, and when they were written, in seconds since the epoch."""
        if self.local is not None and not (self.local / prefix).exists():
            return
        with reaching(self.root):
            for batch in obstore.list(self._store, prefix=prefix):
                yield from ((entry["path"], entry["last_modified"].timestamp()) for entry in batch)

    def remove(self, path: str) -> None:
        """Removes a file, if it is there. Only for what is not part of the state: of that, nothing is ever removed."""
        with reaching(self.root), suppress(FileNotFoundError, NotFoundError):
            obstore.delete(self._store, path)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder of its own on the disk that `adopt` takes files from most cheaply; gone at the end."""
        with reaching(self.root):
            parent = None
            if self.local is not None:
                parent = self.local / ".staging"
                parent.mkdir(parents=True, exist_ok=True)
                _sweep(parent)
            folder = Path(tempfile.mkdtemp(dir=parent, prefix="mao-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def adopt(self, file: Path, path: str) -> None:
        """Puts a finished, content-addressed local file into the store. A file that is there already is the same file."""
        if self.exists(path):
            return
        with reaching(self.root):
            if self.local is None:
                obstore.put(self._store, path, file)
                return
            target = self.local / path
            target.parent.mkdir(parents=True, exist_ok=True)
            # A link, not a move: should the version be lost to another writer, the same bytes go to the next one.
            with suppress(FileExistsError):
                _link(file, target)
            self._sync_folders(target)  # the bytes were flushed when the file was staged

    def sync_commits(self, table: str, before: int) -> range:
        """Flushes a Delta table's commits after version `before`, one's own among them, and returns their versions.

        A handle does not know the version of its own commit, and other writers' may lie between: what is there is flushed. In an object
        store there is nothing to flush, and the next version is what is returned.
        """
        last = before + 1
        if self.local is not None:
            with reaching(self.root):
                while (self.local / (path := f"{table}/_delta_log/{last:020d}.json")).exists():
                    with suppress(FileNotFoundError):  # cleaned away behind a checkpoint already
                        self.sync(path)
                    last += 1
            last = max(last - 1, before + 1)
        return range(before + 1, last + 1)

    def sync(self, path: str) -> None:
        """Flushes a local file to the disk, its folder's entry of it, and the entries of folders that this process has not flushed yet."""
        if self.local is not None:
            _fsync(self.local / path)
            self._sync_folders(self.local / path)

    def _sync_folders(self, target: Path) -> None:
        assert self.local is not None
        for folder in target.parents:
            _fsync(folder)
            if folder in self._flushed or folder == self.local.parent:
                break
            self._flushed.add(folder)


def _sweep(staging: Path) -> None:
    """Removes what killed steps left behind; a step that still works on a batch after a week is not expected."""
    for folder in staging.iterdir():
        with suppress(FileNotFoundError):  # swept by somebody else
            if folder.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def file_digest(file: Path) -> str:
    """sha256 of a local file, eight megabytes at a time."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with file.open("rb") as handle:
        while chunk := handle.read(8 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        copy = target.with_name(f".{uuid.uuid4().hex}")
        shutil.copyfile(file, copy)
        copy.replace(target)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _gone(path: str) -> TamperedError:
    return TamperedError(
        f"A file of the state store is gone: {path}", fix="restore it from a backup; `dagster-mao verify` lists all damage"
    )


@contextmanager
def reaching(root: str) -> Iterator[None]:
    """Turns what the storage libraries raise into a `StoreError` that names the root and the likely fix."""
    try:
        yield
    except (OSError, BaseError, DeltaError) as error:
        text = " ".join(_DECORATION.sub(" ", str(error)).split())[:400] or type(error).__name__
        raise StoreError(f"The state store at {root} failed: {text}", fix=_fix(error, text)) from error


def _fix(error: BaseException, text: str) -> str:
    lowered = text.lower()
    if "os error 28" in lowered or "no space" in lowered:
        return "free disk space and run again: nothing was sealed"
    if isinstance(error, PermissionError) or "permission" in lowered or "read-only" in lowered:
        return "make the root writable for this user, or choose another root"
    return "check that the root is reachable with these storage options, then run again"
