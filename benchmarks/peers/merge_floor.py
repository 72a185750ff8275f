"""Side: the floor of a merge: its inputs are read and hashed (SHA-256), and the bytes of its output are written and synced.

Reads are of the page cache, by a thread for each core, while another thread writes: nothing is computed. A method that reads
the base has one more input.
"""

import concurrent.futures
import hashlib
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.peers import child

BLOCK = 1 << 24


def prepare(case: dict[str, Any]) -> child.Side:
    folder, written = Path(case["checkpoints"]), Path(case["scratch"]) / f"floor-{os.getpid()}"
    models = ["model_a", "model_b"] if case["method"] in ("linear", "slerp") else ["base", "model_a", "model_b"]
    inputs = [file for model in models for file in sorted((folder / model).glob("*.safetensors"))]
    output = sum(file.stat().st_size for file in (folder / "model_a").glob("*.safetensors"))
    for file in inputs:
        child.read_through(file)
    os.sync()
    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(1 + int(os.environ["PEERS_THREADS"])) as pool:
        writing = pool.submit(_write, written, output)
        list(pool.map(_hash, inputs))
        writing.result()
    seconds = time.perf_counter() - begin
    written.unlink()
    facts = {
        "floor": f"{len(models)} models read and hashed, one written and synced",
        "read_bytes": sum(file.stat().st_size for file in inputs),
        "written_bytes": output,
        "threads": os.environ["PEERS_THREADS"],
        "versions": child.versions(),
    }
    return child.Side(child.once({"seconds": seconds}), facts, {})


def _hash(file: Path) -> str:
    digest, block = hashlib.sha256(), bytearray(BLOCK)
    with file.open("rb", buffering=0) as opened:
        while size := opened.readinto(block):
            digest.update(memoryview(block)[:size])
    return digest.hexdigest()


def _write(path: Path, size: int) -> None:
    block = os.urandom(BLOCK)
    with path.open("wb", buffering=0) as opened:
        while size > 0:
            size -= opened.write(block[: min(size, BLOCK)])
        os.fdatasync(opened.fileno())


if __name__ == "__main__":
    child.serve(prepare)
