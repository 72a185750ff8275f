"""Peak memory of loading a checkpoint of the size of BERT-base, relative to the size of its weights.

``python -m benchmarks.load_memory`` writes and prints ``benchmarks/results/load_memory.json``. The weights are random. One
process writes the checkpoint and another loads the checkpoint, because ``ru_maxrss`` is the peak of a process, which child
processes inherit on Linux.
"""

import argparse
import json
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile

RESULT = pathlib.Path(__file__).parent / "results" / "load_memory.json"


def make(folder: str) -> None:
    import jax
    import jax.numpy as jnp

    from dsee_jax.ckpt import hf_save
    from dsee_jax.models import bert

    model = bert.Bert(bert.Config(30522, 768, 12, 12, 3072))
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])
    hf_save.save_pretrained(folder, model, init(jax.random.key(0)))


def peak() -> int:
    """Return the peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(folder: str) -> None:
    import jax
    import jax.numpy as jnp

    from dsee_jax.ckpt import hf

    jax.block_until_ready(jnp.arange(8) + 1)
    before = peak()
    _, params = hf.load_pretrained(folder)
    jax.block_until_ready(params)
    raised, weights = peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    figures = {"weights_bytes": weights, "before_bytes": before, "raised_bytes": raised, "ratio": raised / weights}
    print(json.dumps(figures | {"jax": jax.__version__, "python": platform.python_version()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--make", metavar="DIR", help="only write the checkpoint")
    parser.add_argument("--measure", metavar="DIR", help="only load the checkpoint and print the figures")
    parser.add_argument("--out", default=str(RESULT), help="output file (default: %(default)s)")
    options = parser.parse_args()
    if options.make:
        return make(options.make)
    if options.measure:
        return measure(options.measure)
    with tempfile.TemporaryDirectory() as folder:
        this, checkpoint = [sys.executable, "-m", "benchmarks.load_memory"], f"{folder}/bert-base"
        subprocess.run([*this, "--make", checkpoint], check=True)
        done = subprocess.run([*this, "--measure", checkpoint], check=True, stdout=subprocess.PIPE, text=True).stdout
    figures = json.loads(done.splitlines()[-1])
    out = pathlib.Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    from dsee_jax.runtime import files

    files.write(out, figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
