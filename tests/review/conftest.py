"""A PostgreSQL, as the tests of the gateway start it."""

from tests.gateway.conftest import postgres, postgres_url

__all__ = ["postgres", "postgres_url"]
