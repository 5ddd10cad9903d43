"""Texts as sets of overlapping pieces, and when two texts are the same but for how they are written. Pure.

Words in a row tell what a text says; characters in a row (`data.duplicates`) also tell short texts apart.
"""

import unicodedata


def normalised(text: str) -> str:
    """The text in compatibility form (NFKC), without case, every run of white space one blank."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def word_shingles(text: str, size: int) -> set[str]:
    """Each `size` words in a row, whatever their case and spacing; a shorter text is one piece."""
    words = str(text).casefold().split()
    return {" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}
