"""The audit job: a dossier, made from the UI. It lies below Dagster's home, and the assets that it is about lead to it."""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from dagster_mao.dagster.evidence import evidence
from dagster_mao.dagster.resources import STATE_STORE
from dagster_mao.errors import MaoError
from dagster_mao.pipeline import Pipeline
from dagster_mao.review.dossier import Dossier, dossier, finding_text, with_urls
from dagster_mao.review.masking import MASK
from dagster_mao.review.page import as_html
from dagster_mao.state import StateStore

_FOLDER = "dossiers"
_SHOWN = 20  # fields of a decision in the UI's summary


class AuditConfig(dg.Config):
    """What the dossier is to be about."""

    workflow: str = Field(description="The workflow's id: <pipeline>/<key>.")
    record: str | None = Field(default=None, description="The key of one record; without it, the dossier is of all.")
    url: str = Field(default="http://127.0.0.1:3000", description="Address of this UI, for the page's links to runs.")


def build_audit_job(pipeline: Pipeline) -> dg.JobDefinition:
    """The job `<pipeline>_audit`: writes the dossier of a workflow, or of a record, and fails when something is not as it was sealed.

    Personal fields are masked: who is to see them asks on the command line, by name and with a reason.
    """

    @dg.op(name=f"{pipeline.name}__audit", required_resource_keys={STATE_STORE})
    def audit(context: dg.OpExecutionContext, config: AuditConfig) -> None:
        store: StateStore = getattr(context.resources, STATE_STORE).store()
        if not config.workflow.startswith(f"{pipeline.name}/"):
            raise dg.Failure(f"{config.workflow!r} is no workflow of {pipeline.name}: it is called {pipeline.name}/…", allow_retries=False)
        try:
            known = with_urls(evidence(context.instance, store, config.workflow, "Dagster's event log"), config.url)
            told = dossier(store, config.workflow, record=config.record, evidence=known)
        except MaoError as error:
            raise dg.Failure(str(error), allow_retries=False) from error
        metadata = _metadata(told, _write(told, context.instance))
        context.add_output_metadata(metadata)
        for version in told.decided:
            if version.seal.agent in pipeline.order:
                key = dg.AssetKey([pipeline.name, version.seal.agent])
                about = f"Audited: {told.workflow_id}" + (f", record {told.record}" if told.record else "")
                context.log_event(dg.AssetObservation(key, about, partition=_partition(pipeline, told.workflow_id), metadata=metadata))
        if not told.is_intact:
            raise dg.Failure(f"{told.workflow_id} is not what was sealed", metadata=metadata, allow_retries=False)

    @dg.job(name=f"{pipeline.name}_audit", description="Writes the dossier of a workflow, or of one record of it.")
    def job() -> None:
        audit()

    return job


def _partition(pipeline: Pipeline, workflow_id: str) -> str | None:
    return workflow_id.removeprefix(f"{pipeline.name}/") if pipeline.partitions_def is not None else None


def _write(told: Dossier, instance: dg.DagsterInstance) -> Path:
    try:
        home = Path(instance.root_directory)
    except Exception:  # an instance that keeps nothing on disk has no folder, and says so in its own ways
        home = Path(tempfile.gettempdir())
    folder = home / _FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    about = told.workflow_id if told.record in (None, MASK) else f"{told.workflow_id}-{told.record}"
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", about).strip("-.")
    file = folder / f"{name}-{told.made_at:%Y%m%dT%H%M%SZ}.html"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as page:
        page.write(as_html(told))
    return file


def _metadata(told: Dossier, file: Path) -> dict[str, Any]:
    return {
        "mao/dossier": dg.MetadataValue.path(str(file)),
        "mao/dossier_summary": dg.MetadataValue.md(_summary(told)),
        "mao/workflow": dg.MetadataValue.text(told.workflow_id),
        "mao/intact": told.is_intact,
        "mao/findings": len(told.verification.findings),
    }


def _summary(told: Dossier) -> str:
    lines = ["Everything is as it was sealed." if told.is_intact else "**This is not what was sealed.**", ""]
    lines += [f"- {_plain(finding_text(finding))}" for finding in told.verification.findings]
    for version in told.decided:
        made_from = ", ".join(f"{parent.agent}@{parent.version}" for parent in version.seal.parents) or "the entry"
        lines += [
            "",
            f"**{_plain(version.seal.agent)}** @{version.seal.version}, from {_plain(made_from)}: {version.seal.row_count:,} records",
        ]
        if told.record is not None:
            for row in version.said[:1]:
                lines += ["", "| field | value |", "|---|---|"]
                lines += [f"| {_plain(name)} | {_plain(value)} |" for name, value in list(row.items())[:_SHOWN]]
    return "\n".join(lines)


def _plain(value: object) -> str:
    """Text in which nothing is markup."""
    flat = " ".join(str(value).split())
    return "".join(f"\\{char}" if char in "\\`*_|[]<>#" else char for char in flat)
