"""A run launcher of a deployment that launches nothing: which runs it was asked to terminate is all that it does."""

from __future__ import annotations

from typing import Any

from dagster._core.launcher import LaunchRunContext, RunLauncher
from dagster._serdes import ConfigurableClass, ConfigurableClassData


class NotingLauncher(RunLauncher, ConfigurableClass):
    """Ends a run at once when it is asked to, unless it is told to be down."""

    is_down = False

    def __init__(self, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__()
        self._inst_data = inst_data

    @property
    def inst_data(self) -> ConfigurableClassData | None:
        return self._inst_data

    @classmethod
    def config_type(cls) -> Any:
        return {}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Any) -> NotingLauncher:
        return cls(inst_data=inst_data, **config_value)

    def launch_run(self, context: LaunchRunContext) -> None:
        raise NotImplementedError

    def terminate(self, run_id: str) -> bool:
        if self.is_down:
            raise ConnectionError("secret-4711")
        run = self._instance.get_run_by_id(run_id)
        assert run is not None
        self._instance.report_run_canceling(run)
        self._instance.report_run_canceled(run)
        return True
