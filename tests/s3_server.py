"""An S3 server on this machine (moto's), with one bucket, for tests that read from s3://."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import pytest


BUCKET = "bucket"


@contextmanager
def run_s3_server() -> Iterator:
    """Yields the bucket's file system. The AWS variables of this process lead to the server."""
    s3fs = pytest.importorskip("s3fs", reason='needs pip install "vicmae-hf[s3]"')
    server_module = pytest.importorskip("moto.server", reason='needs pip install "vicmae-hf[test]"')
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "right")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # else it is asked for credentials
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # it would copy nothing from anywhere
        s3fs.S3FileSystem.clear_instance_cache()  # which keeps what the variables said
        file_system = s3fs.S3FileSystem()
        file_system.mkdir(BUCKET)
        try:
            yield file_system
        finally:
            server.stop()
            s3fs.S3FileSystem.clear_instance_cache()
