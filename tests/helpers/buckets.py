"""Object stores that run on this machine for as long as a test session: Google's by an emulator, Amazon's by moto."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS = 60
"""After which a server counts as not starting."""

BUCKET = "bucket"


@contextlib.contextmanager
def opened(scheme: str, log: Path) -> Iterator[dict[str, str]]:
    """Start a store; yield the environment by which gcsfs, s3fs and TensorStore find it. It has one, empty bucket."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    url = f"http://localhost:{port}"
    command = {
        "gs": [__file__, str(port)],
        "s3": ["-m", "moto.server", "--port", str(port), "--host", "localhost"],
    }
    found = {
        "gs": {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            # Else it asks Google what kind of bucket this is.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        },
        "s3": {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        },
    }
    with log.open("w") as said:
        server = subprocess.Popen([sys.executable, *command[scheme]], stdout=said, stderr=said)
    try:
        _wait(server, port, log)
        yield found[scheme]
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

    The emulator lacks generations of objects, by which TensorStore tells what it has read and writes only what it knows:
    they are told with what is read, and asked for (``ifGenerationMatch``) where something is written or removed.
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
