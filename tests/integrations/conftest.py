"""A server for each test."""

from collections.abc import Iterator

import pytest

from tests.integrations.llm_server import LLMServer


@pytest.fixture
def server() -> Iterator[LLMServer]:
    with LLMServer() as running:
        yield running
