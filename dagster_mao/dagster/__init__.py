"""The Dagster side: agents as assets, boundaries as asset checks, state as resource and IO manager. The only room that imports dagster."""

from dagster_mao.dagster.assets import boundary_check_specs, build_asset, build_assets
from dagster_mao.dagster.breakers import BreakerAlert, build_breaker_sensor
from dagster_mao.dagster.checks import build_chain_checks
from dagster_mao.dagster.definitions import build_definitions, build_job, build_schedule
from dagster_mao.dagster.io_manager import StateIOManager
from dagster_mao.dagster.policies import PolicyOverrides
from dagster_mao.dagster.reconciling import build_compensation_sensor
from dagster_mao.dagster.resources import StateStoreResource
from dagster_mao.dagster.saga import build_compensation_job, build_request_hook
from dagster_mao.dagster.translator import AgentTranslator

__all__ = [
    "AgentTranslator",
    "BreakerAlert",
    "PolicyOverrides",
    "StateIOManager",
    "StateStoreResource",
    "boundary_check_specs",
    "build_asset",
    "build_assets",
    "build_breaker_sensor",
    "build_chain_checks",
    "build_compensation_job",
    "build_compensation_sensor",
    "build_definitions",
    "build_job",
    "build_request_hook",
    "build_schedule",
]
