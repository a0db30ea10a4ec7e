"""Stores that tests run on: a local folder, and an S3 server on loopback that the session starts for itself."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from dagster_mao.state import StateStore


@pytest.fixture(scope="session")
def s3() -> Iterator[dict[str, str]]:
    """Storage options of a running S3 server with the bucket `states`."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    client = boto3.client(
        "s3", endpoint_url=options["AWS_ENDPOINT_URL"], aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1"
    )
    client.create_bucket(Bucket="states")
    yield options
    server.stop()


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.long)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StateStore:
    """An empty store: on a local folder, and, where tests are exhaustive or stand for others (`tests.stores`), on S3 too."""
    if request.param == "local":
        return StateStore(tmp_path / "state")
    return StateStore(f"s3://states/{uuid.uuid4().hex}", request.getfixturevalue("s3"))


@pytest.fixture
def local_store(tmp_path: Path) -> StateStore:
    return StateStore(tmp_path / "state")
