"""Local object stores for one test session: an emulator of Google's, and moto for Amazon's."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS = 60
"""The time limit for the start of a server."""

BUCKET = "bucket"


@contextlib.contextmanager
def opened(scheme: str, log: Path) -> Iterator[dict[str, str]]:
    """Start a store with one empty bucket; yield the environment variables of gcsfs, s3fs and TensorStore."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    url = f"http://localhost:{port}"
    command = {
        "gs": [__file__, str(port)],
        "s3": ["-m", "moto.server", "--port", str(port), "--host", "localhost"],
    }
    environment = {
        "gs": {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            # Otherwise gcsfs asks Google for the type of the bucket.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        },
        "s3": {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        },
    }
    with log.open("w") as output:
        server = subprocess.Popen([sys.executable, *command[scheme]], stdout=output, stderr=output)
    try:
        _wait(server, port, log)
        yield environment[scheme]
    finally:
        server.terminate()
        server.wait()


def _wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(10 * SECONDS):
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port)):
            return
        assert server.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"the store did not start in {SECONDS} s: {log.read_text()}")


def google(port: int) -> None:
    """Serve Google's protocol until the end of the process.

    The emulator lacks the generations of objects, by which TensorStore detects that an object has changed: this wrapper
    returns the generation with each read, and checks it (``ifGenerationMatch``) before each write and delete.
    """
    import logging

    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound

    logging.disable(logging.CRITICAL)

    def checked(handler: Any, method: str) -> Any:
        def handle(request: Any, response: Any, storage: Any, *rest: Any) -> None:
            name = (request.params or {}).get("object_id") or request.query.get("name", [""])[0]
            try:
                now = storage.get_file_obj(request.params["bucket_name"], name)["generation"] if name else "0"
            except (NotFound, KeyError):
                now = "0"
            if request.query.get("ifGenerationMatch", [now])[0] != now:
                response.status = server.HTTPStatus.PRECONDITION_FAILED
            elif method == server.GET and request.query.get("ifGenerationNotMatch", [""])[0] == now:
                response.status = server.HTTPStatus.NOT_MODIFIED
            else:
                if method == server.GET and now != "0":
                    response["x-goog-generation"] = now
                handler(request, response, storage, *rest)

        return handle

    for _, handlers in server.HANDLERS:
        for method, handler in handlers.items():
            handlers[method] = checked(handler, method)
    running = server.create_server("localhost", port, in_memory=True, default_bucket=BUCKET)
    running.run()


if __name__ == "__main__":
    google(int(sys.argv[1]))
