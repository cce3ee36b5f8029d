"""The seed of every sample."""

import hashlib


def request_seed(seed: int, step: int, prompt: int, sample: int) -> int:
    """A 63-bit seed that depends on nothing else, so that a resumed run samples the same tokens."""
    digest = hashlib.blake2b(f"{seed}/{step}/{prompt}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
