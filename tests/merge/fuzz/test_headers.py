"""Random safetensors files: the tensors that the library `safetensors` reads, or one line."""

import json
import random
import struct

import numpy as np
import pytest
from safetensors import safe_open

import fuzz
from dsee_jax.ckpt import tensors

pytestmark = pytest.mark.exhaustive

SEEDS, EACH = 20, 100

DTYPES = (*tensors.DTYPES, "F8_E4M3", "F8_E5M2", "F4", "C64", "U16", "U32", "U64", "f32", "", None, 5, [])
PARTS = (
    *(
        b"[" * 3000,
        b'{"a":' * 3000,
        b"\xff",
        b"\x00",
        b",",
        b'"',
        b"NaN",
        b"Infinity",
        b"1e999",
        b"-1",
        b"\\ud800",
        b"\xef\xbb\xbf",
    ),
    *(
        b'"__metadata__":{"a":1},',
        b'"__metadata__":[],',
        b'"shape":[2],',
        b'"dtype":"F64",',
        b'"a":{},',
        b"9" * 5000,
        b" " * 3000,
    ),
)
LENGTHS = (0, 1, 7, 8, 2**31, 2**32, 2**60, 2**63, 2**64 - 1)


def valid(generator):
    """Return a header, and the bytes of its tensors."""
    header, end = {"__metadata__": {"format": "pt"}} if generator.randrange(2) else {}, 0
    for number in range(generator.randrange(1, 6)):
        dtype = generator.choice(list(tensors.DTYPES))
        shape = [generator.randrange(4) for _ in range(generator.randrange(4))]
        begin, end = end, end + int(np.prod(shape, dtype=int)) * np.dtype(tensors.DTYPES[dtype]).itemsize
        name = generator.choice(
            (f"t{number}", f"model.layers.{number}.w", f"é{number}", f"[/x]{number}", f"a\nb{number}")
        )
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return header, bytes(number % 2 for number in range(end))


def changed(generator, header, size):
    """Return a header with changed offsets, shapes, types or names."""

    def value(random):
        near = [size, size - 4, size + 4, size * 2, 4, 8, -8, 2**62, 2**64]
        return random.choice((fuzz.value(random), random.choice(near), [0, random.choice(near)], random.choice(DTYPES)))

    return fuzz.changed(generator, header, values=value, keys=(*header, "dtype", "shape", "data_offsets", *fuzz.TEXTS))


def encoded(generator, header, data):
    text = json.dumps(header, ensure_ascii=generator.randrange(2) == 0).encode("utf-8", "surrogatepass")
    length = len(text)
    kind = generator.randrange(6)
    if kind == 0:
        text = fuzz.scrambled(generator, text, PARTS)
        length = generator.choice((length, len(text)))
    elif kind == 1:
        length = generator.choice((*LENGTHS, length + 1, length - 1))
    content = struct.pack("<Q", max(length, 0)) + text + data
    return fuzz.scrambled(generator, content, PARTS) if kind == 2 else content


@pytest.mark.parametrize("seed", range(SEEDS))
def test_any_file_is_read_as_the_library_reads_it_or_refused(tmp_path, seed):
    generator, file = random.Random(seed), tmp_path / "model.safetensors"
    accepted = 0
    for number in range(EACH):
        header, data = valid(generator)
        if number:
            header = changed(generator, header, len(data))
        file.write_bytes(
            encoded(generator, header, data)
            if number
            else struct.pack("<Q", len(text := json.dumps(header).encode())) + text + data
        )
        where = f"seed {seed}, input {number}: {file.read_bytes()[:3000]!r}"
        if fuzz.refusal(lambda: compare(tmp_path, file), where) is None:
            accepted += 1
    assert accepted


def compare(folder, file):
    """Read every tensor, and compare it with the tensor that the library reads."""
    ours = {name: read(stored) for name, stored in tensors.index(folder).items()}
    with safe_open(file, framework="numpy") as opened:
        theirs = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            assert list(array.shape) == theirs[name].get_shape()
            assert array.tobytes() == opened.get_tensor(name).tobytes()


def read(stored):
    """Return a tensor by a plain read; the memory map has the same bytes."""
    whole = tensors.read(stored)
    assert tensors.mapped(stored, 0, whole.size).tobytes() == whole.tobytes()
    return whole
