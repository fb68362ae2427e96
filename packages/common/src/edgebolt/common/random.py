"""Counter-based random streams that depend on names, never on the order of execution.

A draw of a federated run belongs to something: a client, a round, a purpose. ``stream`` turns these names into a
generator of its own, so that the draw is the same whatever was drawn before it, in whichever process it runs, and
a resumed run needs no saved generator state.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

__all__ = ["derive", "stream"]


def _plain(key: object) -> int | str:
    if isinstance(key, (int, np.integer)):
        return int(key)  # bool and numpy integers name the same stream as the Python int of their value
    if isinstance(key, str):
        return str(key)
    raise TypeError(f"a stream is keyed by int and str, got {key!r}; write other things as a str")


def _digest(seed: int, purpose: str, keys: tuple[int | str, ...], size: int, tag: bytes) -> int:
    plain_seed, plain_purpose = _plain(seed), _plain(purpose)
    if isinstance(plain_seed, str) or isinstance(plain_purpose, int):
        raise TypeError(
            f"a stream wants an int seed and a str purpose such as 'failure', got {seed!r} and {purpose!r}"
        )
    # The repr of a tuple of ints and strs is unambiguous: (1, "23") and (12, "3") and ("1", 23) all differ.
    text = repr((plain_seed, plain_purpose, *[_plain(key) for key in keys]))
    return int.from_bytes(
        blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size, person=tag).digest(), "little"
    )


def stream(seed: int, purpose: str, *keys: int | str) -> np.random.Generator:
    """Open the random stream that belongs to ``(seed, purpose, *keys)``.

    The generator is Philox (Salmon et al., 2011), keyed by the 128-bit blake2b hash of the arguments: the same
    arguments give the same numbers in every process; different arguments give independent streams. The global
    generators of Python, numpy and torch are neither read nor changed. A call costs some ten microseconds.

    numpy keeps the bits of Philox stable for ever, and the methods of ``Generator`` stable within a release: results
    that must agree across machines want one numpy version.

    Args:
        seed: The seed of the run; any int, negative ones too.
        purpose: What is drawn, e.g. ``"failure"``; keeps the draws of two parts of a program apart.
        *keys: What it is drawn for, e.g. the round and the client. ``1`` and ``"1"`` are different keys.

    Returns:
        A fresh generator at the beginning of its stream.

    Raises:
        TypeError: If the seed or a key is neither int nor str, or the purpose is no str.

    Example::

        >>> from edgebolt.common.random import stream
        >>> first = stream(0, "failure", 3, 17).random(2)
        >>> _ = stream(0, "mode", 3).random(1000)
        >>> bool((stream(0, "failure", 3, 17).random(2) == first).all())
        True
        >>> bool((stream(0, "failure", 17, 3).random(2) == first).any())
        False
    """
    return np.random.Generator(np.random.Philox(key=_digest(seed, purpose, keys, 16, b"stream")))


def derive(seed: int, purpose: str, *keys: int | str) -> int:
    """Make a seed for a library that wants an int, e.g. ``torch.Generator().manual_seed``.

    Args:
        seed: The seed of the run.
        purpose: What the seed is for.
        *keys: What it belongs to, as in :func:`stream`.

    Returns:
        An int in ``[0, 2**63)``, the same for the same arguments.

    Raises:
        TypeError: If the seed or a key is neither int nor str, or the purpose is no str.

    Example::

        >>> from edgebolt.common.random import derive
        >>> derive(0, "shuffle", 1) == derive(0, "shuffle", 1)
        True
        >>> derive(0, "shuffle", 1) == derive(0, "shuffle", 2)
        False
    """
    return _digest(seed, purpose, keys, 8, b"derive") >> 1
