"""On which stores a test runs: by default on a local folder, and on S3 where tests are exhaustive (`long`)."""

import pytest

on_every_store = pytest.mark.parametrize("store", ["local", "s3"], indirect=True)
"""For those that stand for the others: on both, always. What a store does differently shows in them first."""
