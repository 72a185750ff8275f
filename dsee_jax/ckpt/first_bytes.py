"""The first bytes of files that stand where JSON or weights are expected."""

_SIGNATURES = (
    (b"version https://git-lfs", "a pointer of Git LFS: run git lfs pull in its folder"),
    (b"PK\x03\x04", "an archive, or a pickle of PyTorch under another name: give the weights as safetensors"),
    (b"\x80", "a pickle under another name, which can run code when opened: give the weights as safetensors"),
    (b"GGUF", "a GGUF file under another name: name it NAME.gguf and give its path"),
    (b"\x89HDF", "a file of HDF5 under another name: give the weights as safetensors"),
    (b"<", "a web page: the download failed, as of a page that needs a login; download the file again"),
)
"""(first bytes, the format and the fix)."""

LENGTH = 64
"""The bytes that tell."""


def describe(begin: bytes) -> str:
    """Return the format of a file that begins with these bytes, and the fix; empty: they tell none."""
    return next((kind for first, kind in _SIGNATURES if begin.lstrip().startswith(first)), "")
