"""The GGUF reader: blocks of every type against numbers computed by hand, and files that are damaged."""

import numpy as np
import pytest

import gguf_files
from dsee_jax.ckpt import gguf
from dsee_jax.errors import InputError


def half(value: float) -> bytes:
    return np.float16(value).tobytes()


def filled(length: int, changes: dict[int, int], fill: int = 0) -> bytes:
    content = bytearray([fill] * length)
    for place, value in changes.items():
        content[place] = value
    return bytes(content)


# Name -> (code, bytes of one block or of three numbers, {position: value}), by the formulas of ggml.
BLOCKS = {
    "F32": (0, np.array([1.5, -2, 0.1], np.float32).tobytes(), {0: 1.5, 1: -2, 2: np.float32(0.1)}),
    "F16": (1, np.array([1.5, -2, 0.1], np.float16).tobytes(), {0: 1.5, 1: -2, 2: np.float16(0.1)}),
    "BF16": (30, bytes([0xC0, 0x3F, 0, 0xC0, 0x80, 0x42]), {0: 1.5, 1: -2, 2: 64}),
    # 0.5 * (q - 8): the low halves of the bytes are the first 16 numbers.
    "Q4_0": (2, half(0.5) + filled(16, {0: 0x1F}, 0x88), {0: 3.5, 16: -3.5, 1: 0, 31: 0}),
    # 0.5 * q - 1
    "Q4_1": (3, half(0.5) + half(-1) + filled(16, {0: 0xA3}), {0: 0.5, 16: 4, 1: -1, 31: -1}),
    # 0.5 * (q - 16): the fifth bits of the 32 numbers come first.
    "Q5_0": (6, half(0.5) + bytes([0x01, 0, 0x01, 0]) + filled(16, {0: 0x21}), {0: 0.5, 16: 1, 1: -8, 31: -8}),
    # 0.5 * q - 1
    "Q5_1": (7, half(0.5) + half(-1) + bytes([0, 0, 0, 0x80]) + filled(16, {0: 3, 15: 0x40}), {0: 0.5, 31: 9, 1: -1}),
    # 0.25 * q
    "Q8_0": (8, half(0.25) + filled(32, {0: 0x80, 1: 0x7F, 31: 0xFF}), {0: -32, 1: 31.75, 2: 0, 31: -0.25}),
    # 2 * scale * q - 0.5 * minimum; part 0 has scale 5 and minimum 3, part 5 scale 42 and minimum 27 = 0b1_1011.
    "Q4_K": (
        12,
        half(2)
        + half(0.5)
        + filled(12, {0: 5, 4: 3, 9: 11 << 4 | 10, 1: 2 << 6, 5: 1 << 6})
        + filled(128, {0: 7, 64: 9 << 4}),
        {0: 68.5, 1: -1.5, 32: 0, 160: 742.5, 161: -13.5, 255: 0},
    ),
    # The same, with a fifth bit of the numbers of part p in bit p of 32 bytes.
    "Q5_K": (
        13,
        half(2)
        + half(0.5)
        + filled(12, {0: 5, 4: 3, 9: 11 << 4 | 10, 1: 2 << 6, 5: 1 << 6})
        + filled(32, {0: 1 << 5, 1: 1})
        + filled(128, {0: 7, 64: 9 << 4}),
        {0: 68.5, 1: 158.5, 32: 0, 160: 2086.5, 161: -13.5, 255: 0},
    ),
    # 0.5 * scale * (q - 32); parts 0, 6 and 10 have the scales 3, -2 and 4.
    "Q6_K": (
        14,
        filled(128, {0: 9, 33: 12 << 4, 104: 5})
        + filled(64, {0: 1, 1: 3 << 6, 40: 2 << 2})
        + filled(16, {0: 3, 6: 0xFE, 10: 4})
        + half(0.5),
        {0: -10.5, 2: -48, 97: -28, 168: 10, 255: 0},
    ),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_block_has_the_numbers_of_its_formula(kind, tmp_path):
    code, block, expected = BLOCKS[kind]
    assert gguf.KINDS[code].name == kind
    entries = len(block) // gguf.KINDS[code].nbytes * gguf.KINDS[code].entries
    # Two rows: the second is read behind the first, and the tensor begins behind another.
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_files.content({}, {"x": np.zeros(5, np.float32), "y": (code, (2, entries), 2 * block)}))
    array = gguf.read(gguf.read_header(path), "y").astype(np.float32)
    assert array.shape == (2, entries)
    for place, value in expected.items():
        np.testing.assert_array_equal(array[:, place], np.float32(value))


def test_large_tensor_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "_PART", 64)
    blocks = b"".join(half(scale) + bytes([1] * 32) for scale in range(1, 6))
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_files.content({}, {"x": (8, (5, 32), blocks)}))
    np.testing.assert_array_equal(gguf.read(gguf.read_header(path), "x")[:, 7], [1, 2, 3, 4, 5])


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_every_kind_is_read(version, tmp_path):
    metadata = {"a": 7, "b": -0.5, "c": True, "d": "é", "e": ["x", ""], "f": [1, -2], "general.alignment": 64}
    path = tmp_path / "a.gguf"
    content = gguf_files.content(metadata, {}, version=version)
    path.write_bytes(content)
    assert gguf.read_header(path).metadata == metadata


TWO = {"x": np.zeros((4, 8), np.float32), "y": np.ones(3, np.float32)}
WHOLE = gguf_files.content({"general.architecture": "llama"}, TWO)
BAD = {
    "empty": (b"", "is not a GGUF file"),
    "other": (b"version https://git-lfs.github.com/spec/v1", "is not a GGUF file"),
    "version 1": (
        gguf_files.content({}, TWO, version=1),
        "has version 1; expected little-endian GGUF of version 2 or 3",
    ),
    "big-endian": (WHOLE[:4] + WHOLE[4:8][::-1] + WHOLE[8:], "is in big-endian order"),
    "no tensor data": (WHOLE[:-100], r"the tensor 'x' ends at byte \d+, the file at \d+: the file is truncated"),
    "last tensor": (WHOLE[:-32], r"the tensor 'y' ends at byte"),
    "header": (WHOLE[:60], "ends inside its header: the file is truncated"),
    "entries": (WHOLE[:16] + b"\xff" * 7 + b"\0" + WHOLE[24:], r"its header claims \d+ entries"),
    "name": (WHOLE[:24] + b"\xff" * 7 + b"\0" + WHOLE[32:], "a name in its header has"),
    "value": (
        gguf_files.content({"key": 1}, {}).replace(b"key\5", b"key\77"),
        "the value of 'key' has an unknown type",
    ),
    "type": (
        gguf_files.content({}, {"w": (10, (256,), bytes(84))}),
        r"the tensor 'w' has the type Q2_K.*supported: F32",
    ),
    "newer type": (gguf_files.content({}, {"w": (99, (1,), b"")}), "the tensor 'w' has the type number 99"),
    "rows": (
        gguf_files.content({}, {"w": (8, (2, 16), bytes(34))}),
        "'w' has rows of 16 entries, Q8_0 has blocks of 32",
    ),
    "axes": (gguf_files.content({}, {"w": (0, (1,) * 5, bytes(4))}), "'w' has 5 axes"),
    "shape": (gguf_files.content({}, {"w": (0, (1 << 40, 1 << 40), b"")}), "too many entries"),
    "twice": (
        gguf_files.content({}, {"ww": TWO["y"], "wv": TWO["y"]}).replace(b"wv", b"ww"),
        "holds the tensor 'ww' twice",
    ),
    "split": (gguf_files.content({"split.count": 3}, TWO), "is one of 3 parts of a split GGUF.*--merge"),
    "alignment": (gguf_files.content({"general.alignment": 0}, TWO), "'general.alignment' is 0"),
}


@pytest.mark.parametrize("kind", BAD)
def test_damaged_file_is_named_in_one_line(kind, tmp_path):
    content, message = BAD[kind]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        gguf.read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    for length in range(0, len(WHOLE) - 20, 3):  # the last tensor is padded
        path.write_bytes(WHOLE[:length])
        with pytest.raises(InputError):
            gguf.read_header(path)


def test_joined_file_is_no_part(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_files.content({"split.count": 0}, TWO))
    assert [*gguf.read_header(path).tensors] == ["x", "y"]


@pytest.mark.parity
@pytest.mark.parametrize("code", gguf.KINDS)
def test_blocks_of_any_bits_equal_those_of_the_gguf_package(code):
    reference = pytest.importorskip("gguf.quants", reason="needs the package gguf (extra `parity`)")
    kind = gguf.KINDS[code]
    blocks = np.random.default_rng(0).integers(0, 256, (500, kind.nbytes)).astype(np.uint8)
    halves = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)}
    halves |= {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    for start in halves.get(kind.name, ()):
        blocks[:, start + 1] &= 0xBF  # the scales are finite
    with np.errstate(invalid="ignore"):
        expected = reference.dequantize(blocks, code).astype(np.float32).reshape(500, -1)
        np.testing.assert_array_equal(kind.numbers(blocks).astype(np.float32), expected)
