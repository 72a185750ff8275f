"""Print the GPU on which a library computes, nothing for the CPU: ``python -m benchmarks.peers.devices LIBRARY``."""

import sys


def card(library: str) -> str:
    """Return the name of the GPU on which ``torch`` or ``jax`` computes, "" for the CPU."""
    if library == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    import jax

    device = jax.devices()[0]
    return device.device_kind if device.platform == "gpu" else ""


if __name__ == "__main__":
    print(card(sys.argv[1]))
