"""State: versions, snapshots, seals, digests. Delta and files; knows nothing of Dagster, of agents or of contracts."""

from dagster_mao.state.attempt import Attempt, Provenance, effective, is_completed, is_replaced, require_one_entry
from dagster_mao.state.calls import CALLS_SCHEMA, CALLS_SUFFIX, CallSummary
from dagster_mao.state.disclosure import DISCLOSURE_SCHEMA
from dagster_mao.state.kept import KeptFile, KeptFrames
from dagster_mao.state.moments import When, is_moment, moment, passed, there
from dagster_mao.state.objects import reaching
from dagster_mao.state.quarantine import DEFERRED_SCHEMA, DISPOSITION_SCHEMA, QUARANTINE_SCHEMA
from dagster_mao.state.registry import refuse_reader
from dagster_mao.state.rehearsal import Beside, Rehearsed
from dagster_mao.state.seal import DEFERRED_SUFFIX, QUARANTINE_SUFFIX, VERDICTS_SUFFIX, Parent, Seal
from dagster_mao.state.snapshots import Staged, staged
from dagster_mao.state.store import StateStore
from dagster_mao.state.verdicts import VERDICTS_SCHEMA

__all__ = [
    "CALLS_SCHEMA",
    "CALLS_SUFFIX",
    "DEFERRED_SCHEMA",
    "DEFERRED_SUFFIX",
    "DISCLOSURE_SCHEMA",
    "DISPOSITION_SCHEMA",
    "QUARANTINE_SCHEMA",
    "QUARANTINE_SUFFIX",
    "VERDICTS_SCHEMA",
    "VERDICTS_SUFFIX",
    "Attempt",
    "Beside",
    "CallSummary",
    "KeptFile",
    "KeptFrames",
    "Parent",
    "Provenance",
    "Rehearsed",
    "Seal",
    "Staged",
    "StateStore",
    "When",
    "effective",
    "is_completed",
    "is_moment",
    "is_replaced",
    "moment",
    "passed",
    "reaching",
    "refuse_reader",
    "require_one_entry",
    "staged",
    "there",
]
