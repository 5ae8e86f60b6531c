"""Lengths that an FFT is fast for, and those that it is too much for."""

from __future__ import annotations

from ..ops.backend import exporting

SHORT = 256  # tokens, up to which a product with the entries is as fast as transforms, and its memory a few times x


def short(length: int) -> bool:
    """Whether to multiply by the entries. Not in a program that is to run at other lengths."""
    return not exporting() and length <= SHORT


def fast_length(n: int) -> int:
    """The smallest 2^a 3^b 5^c that is at least n: other lengths can cost a transform several times more."""
    best = 1 << (n - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            two = three << max(-(-n // three) - 1, 0).bit_length()
            best = min(best, two)
            three *= 3
        five *= 5
    return best
