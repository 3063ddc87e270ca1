"""A server of S3's interface on this machine, by moto."""

from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest
from moto.server import ThreadedMotoServer


@contextmanager
def s3_server(port: int = 0, bucket: str = "bucket") -> Iterator[str]:
    """Serves a bucket, which s3:// finds meanwhile; gives the endpoint.

    What is in it outlives the server, as long as this process.
    """
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        for name, value in {
            "ACCESS_KEY_ID": "test",
            "SECRET_ACCESS_KEY": "test",
            "DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(f"AWS_{name}", value)
        storage = fsspec.filesystem("s3", skip_instance_cache=True)
        storage.clear_instance_cache()  # of another endpoint
        storage.makedirs(bucket, exist_ok=True)
        try:
            yield endpoint
        finally:
            storage.clear_instance_cache()
            server.stop()
