"""Frozen answers: what a model replied, kept in files that a review can read, by the hash of what it was sent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dagster_mao.errors import AnswerNotFrozenError, StoreError
from dagster_mao.integrations._conversation import Reply, parsed, written


def digest_of(body: Mapping[str, Any]) -> str:
    """sha256 (hex) of what is sent: model, messages, schema, temperature, all of it, whatever the order of its parts."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class FrozenAnswers:
    """A folder with one file per answer, named `<Contract>-<16 digits of the hash>.json`. The same answers are the same bytes."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def find(self, contract: str, digest: str) -> Reply | None:
        """The reply that was frozen; None when there is none. Raises `AnswerNotFrozenError` for a file that holds none."""
        path = self._path(contract, digest)
        try:
            answer = json.loads(path.read_text(encoding="utf-8"))["answer"]
            text = answer["text"] if "text" in answer else written(answer["json"])
            return Reply(text, answer.get("model"), cut=bool(answer.get("cut")), refused=bool(answer.get("refused")))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AnswerNotFrozenError(
                f"{path} holds no frozen answer ({type(error).__name__})", fix="remove the file, and record it again with record=True"
            ) from None

    def missing(self, contract: str, digest: str) -> AnswerNotFrozenError:
        """The error that says which answer is missing, and how to get it."""
        name, there = self._path(contract, digest).name, sum(1 for _ in self.folder.glob("*.json"))
        return AnswerNotFrozenError(
            f"No frozen answer for this {contract} in {self.folder}: {name} is missing; others there: {there}",
            fix="record it once from the endpoint, with mao.LLM(…, frozen=…, record=True). If others were recorded before: prompt, record, "
            "contract, model or a parameter is not what it was then",
        )

    def prepare(self) -> None:
        """Makes the folder: before an answer is paid for. Raises `StoreError` when it cannot be made."""
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)

    def keep(self, contract: str, digest: str, body: Mapping[str, Any], reply: Reply) -> None:
        """Freezes a reply. Raises `StoreError` when the file cannot be written."""
        answer: dict[str, Any] = {"model": reply.model}
        answer |= {word: True for word in ("cut", "refused") if getattr(reply, word)}
        found = parsed(reply.text)
        # As JSON, a change shows in a review line by line.
        answer |= {"text": reply.text} if found is None else {"json": found}
        text = json.dumps({"asked": body, "answer": answer}, ensure_ascii=False, indent=2) + "\n"
        with self._writing():
            handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
            try:
                with os.fdopen(handle, "w", encoding="utf-8", errors="replace", newline="\n") as file:
                    file.write(text)
                os.chmod(name, 0o644)
                os.replace(name, self._path(contract, digest))
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise

    def digest(self) -> str:
        """sha256 (hex) over all that is frozen here."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.glob("*.json")):
            for part in (path.name.encode(), path.read_bytes()):
                digest.update(len(part).to_bytes(8, "big") + part)
        return digest.hexdigest()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"Answers cannot be frozen in {self.folder} ({type(error).__name__})"
            raise StoreError(what, fix="name a folder that can be written") from error

    def _path(self, contract: str, digest: str) -> Path:
        return self.folder / f"{contract}-{digest[:16]}.json"
