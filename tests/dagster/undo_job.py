"""A job as a compensation is one: steps that are found at run time, in an order that means something, of which one fails."""

import dagster as dg

AGENTS = ["zeta", "alpha", "mid", "beta"]
executed: list[str] = []


@dg.op(out=dg.DynamicOut(str))
def fence():
    for name in AGENTS:
        yield dg.DynamicOutput(name, mapping_key=name)


@dg.op
def undo(agent: str):
    executed.append(agent)
    yield dg.Output(agent)
    if agent == "alpha":
        raise dg.Failure("it cannot be undone", allow_retries=False)


@dg.op
def conclude(agents: list[str]) -> None:
    executed.append(f"conclude {' '.join(agents)}")


def _job(executor: dg.ExecutorDefinition) -> dg.JobDefinition:
    @dg.job(executor_def=executor)
    def undo_all():
        conclude(fence().map(undo).collect())

    return undo_all


def undo_job() -> dg.JobDefinition:
    """As Dagster has it by default."""
    return _job(dg.in_process_executor)


def concluding_job() -> dg.JobDefinition:
    """Steps start when what they read is there, whatever became of the step that made it."""
    return _job(dg.in_process_executor.configured({"step_dependency_config": {"require_upstream_step_success": False}}))
