"""Independent streams of random numbers out of one seed."""

import hashlib


def stream_seed(seed: int, *names: object) -> int:
    """Give a 63-bit seed of its own for each (seed, names...)."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
