"""Great Expectations itself: the one module that imports it, and only inside functions."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import polars as pl

SAMPLES = 5
_EXACT_IN_FLOATS = 2**53
_FEW = 10  # rows per different value from which on a text column goes by codes


class EngineError(Exception):
    """GX raised. The text is the type of what it raised, whose own text quotes values."""


def built(entry: Mapping[str, Any], number: int) -> Any:
    """The expectation that an entry describes, carrying its number. Raises what GX raises: wrong arguments, an unknown type."""
    import great_expectations as gx
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    del gx  # registers the expectations
    configuration = ExpectationConfiguration(
        type=entry["type"],
        kwargs=dict(entry["kwargs"]),
        meta={"number": number},  # results come in an order of their own
        severity=entry.get("severity", "critical"),
    )
    return configuration.to_domain_obj()


def evaluated(expression: str, parameters: Mapping[str, Any]) -> Any:
    """What a parameter's expression comes to. Raises `EngineError`."""
    from great_expectations.core.suite_parameters import parse_suite_parameter
    from great_expectations.exceptions.exceptions import SuiteParameterError

    try:
        return parse_suite_parameter(expression, dict(parameters))
    except SuiteParameterError as error:
        raise EngineError(type(error.__cause__ or error).__name__) from None


def judged(frame: Any, expectations: Sequence[Any], parameters: Mapping[str, Any]) -> dict[int, Any]:
    """GX's results over a pandas frame, by number.

    In a context of its own that has no files, asks no network and draws no progress bars; a context that the process already has stays
    the current one. Nothing is logged: GX's messages quote values. Raises `EngineError` where GX finds no result at all.
    """
    import great_expectations as gx

    with _quietly(), _context() as context:
        asset = context.data_sources.add_pandas("batch").add_dataframe_asset("batch")
        batch = asset.add_batch_definition_whole_dataframe("batch").get_batch({"dataframe": frame})
        suite = gx.ExpectationSuite("batch", expectations=list(expectations))
        try:
            result = batch.validate(
                suite,
                expectation_parameters=dict(parameters),
                result_format={"result_format": "BASIC", "partial_unexpected_count": SAMPLES},
            )
        except Exception as error:
            raise EngineError(type(error).__name__) from None
    return {one.expectation_config.meta["number"]: one for one in result.results}


@contextmanager
def _context() -> Iterator[Any]:
    import great_expectations as gx
    from great_expectations.data_context.data_context.context_factory import project_manager
    from great_expectations.data_context.types.base import DataContextConfig, InMemoryStoreBackendDefaults, ProgressBarsConfig
    from great_expectations.exceptions.exceptions import DataContextRequiredError

    try:
        before = project_manager.get_current_project()
    except DataContextRequiredError:
        before = None
    try:
        in_memory = InMemoryStoreBackendDefaults(init_temp_docs_sites=False)
        config = DataContextConfig(
            store_backend_defaults=in_memory, analytics_enabled=False, progress_bars=ProgressBarsConfig(globally=False)
        )
        yield gx.get_context(mode="ephemeral", project_config=config)
    finally:
        project_manager.set_project(before)


@contextmanager
def _quietly() -> Iterator[None]:
    logger = logging.getLogger("great_expectations")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def as_pandas(batch: pl.DataFrame, by_codes: set[str]) -> Any:
    """The columns as pandas holds them best, without pyarrow; text of few values goes by codes where the expectations allow it.

    Decimals become floats, and so do whole numbers with nulls, unless a float could not hold them exactly.
    """
    import pandas as pd  # type: ignore[import-untyped,unused-ignore]

    return pd.DataFrame({column.name: _column(column, column.name in by_codes) for column in batch}, copy=False)


def _column(column: pl.Series, by_codes: bool) -> Any:
    import pandas as pd  # type: ignore[import-untyped,unused-ignore]

    dtype = column.dtype
    if isinstance(dtype, (pl.Categorical, pl.Enum)):
        column, dtype = column.cast(pl.String), pl.String()
    if dtype == pl.String:
        return _text(column, by_codes)
    if isinstance(dtype, pl.Datetime) and dtype.time_zone:
        return pd.Series(column.dt.convert_time_zone("UTC").dt.replace_time_zone(None).to_numpy()).dt.tz_localize("UTC")
    if isinstance(dtype, pl.Decimal) or (dtype == pl.Boolean and column.null_count()):
        return column.cast(pl.Float64).to_numpy()
    if dtype.is_integer() and column.null_count():
        exact = bool(column.is_between(-_EXACT_IN_FLOATS, _EXACT_IN_FLOATS).all())
        return column.cast(pl.Float64).to_numpy() if exact else pd.Series(column.to_list(), dtype=object)
    if dtype.is_numeric() or dtype == pl.Boolean or isinstance(dtype, (pl.Datetime, pl.Date, pl.Duration)):
        return column.to_numpy()
    return pd.Series(column.to_list(), dtype=object)


def _text(column: pl.Series, by_codes: bool) -> Any:
    import pandas as pd  # type: ignore[import-untyped,unused-ignore]

    if by_codes and (values := column.drop_nulls().unique().sort()).len() * _FEW <= column.len():
        codes = column.cast(pl.Enum(values)).to_physical().cast(pl.Int32).fill_null(-1).to_numpy()
        return pd.Categorical.from_codes(codes, pd.Index(values.to_numpy(), dtype=object))
    return pd.Series(column.to_numpy(), dtype=object)
