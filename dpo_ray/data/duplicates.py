"""Pairs that say the same twice, or the opposite: exactly, but for how they are written, and nearly.

Equal pairs are found by a dictionary, so that none is missed. Near ones are found by MinHash and banding (Broder 1997;
Leskovec et al., "Mining of Massive Datasets", ch. 3) on pieces of five characters, which also tell short texts apart,
and every find is then measured exactly. Linear in the number of texts; the same on every machine. Pure: numpy.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpo_ray.shingles import normalised

PIECE = 5
"""Characters of a piece."""

NUM_HASHES, BANDS = 64, 32
"""Two texts of Jaccard index s agree in a given hash with probability s, in some band of two with 1 - (1 - s^2)^32."""

THRESHOLD = 0.7
"""Least Jaccard index of near-duplicates: a changed word of six letters in a text of some 70 characters."""

MOST_COMPARED = 24
"""In a band, each text is compared with so many before it: a crowd of texts alike is a chain, not all its pairs."""

_SLACK = 0.2
"""An index estimated from 64 hashes is off by more in about one of 3,000 cases."""

_CHARACTERS_AT_ONCE = 2**18

Hashes = NDArray[np.uint32]
Progress = Callable[[int, int], None]


class TextPair(NamedTuple):
    """The texts of a preference pair."""

    prompt: str
    chosen: str
    rejected: str

    @property
    def normalised(self) -> "TextPair":
        return TextPair(*map(normalised, self))


class Link(NamedTuple):
    """Two pairs that are alike; `first` is the earlier one in the list."""

    first: int
    second: int
    kind: Literal["same", "near"]
    """`same`: equal but for case, white space and compatibility forms."""
    is_opposite: bool
    """The second prefers what the first rejects: their labels contradict each other."""
    similarity: float
    """The least Jaccard index of prompt and both responses; 1 for `same`."""


class Near(NamedTuple):
    """Two texts that are nearly the same."""

    first: int
    second: int
    similarity: float


def links(
    pairs: Sequence[TextPair], threshold: float = THRESHOLD, on_progress: Progress = lambda done, total: None
) -> list[Link]:
    """Duplicates and contradictions among pairs, by place.

    A group of k pairs alike, in whatever order of responses, has k - 1 links: equal ones to the first of their kind,
    and those first ones, where they are near, to one another. A pair whose responses are the same contradicts nothing.

    Args:
        threshold: Least Jaccard index of a near pair, in (0, 1]: of the prompts, and of the responses either way.
    """
    plain = [pair.normalised for pair in pairs]
    found, firsts = _same(plain)
    distinct = [plain[i] for i in firsts]
    near = _near_pairs(distinct, threshold, on_progress)
    return sorted([*found, *(link._replace(first=firsts[link.first], second=firsts[link.second]) for link in near)])


def _same(plain: Sequence[TextPair]) -> tuple[list[Link], list[int]]:
    """The links between equal pairs, and the first of each kind."""
    first_of: dict[TextPair, int] = {}
    found = []
    for i, pair in enumerate(plain):
        swapped = TextPair(pair.prompt, pair.rejected, pair.chosen)
        is_opposite = pair not in first_of and swapped in first_of
        first = first_of[swapped] if is_opposite else first_of.setdefault(pair, i)
        if first != i:
            found.append(Link(first, i, "same", is_opposite, 1.0))
    return found, sorted(first_of.values())


def _near_pairs(pairs: Sequence[TextPair], threshold: float, on_progress: Progress) -> Iterator[Link]:
    """Prompts alike and responses alike: a band is a place in both, so a prompt with many answers is no crowd."""
    prompts, answers = [pair.prompt for pair in pairs], [f"{pair.chosen}\n{pair.rejected}" for pair in pairs]
    total = 2 * len(pairs)
    of_prompts = signatures(prompts, lambda done: on_progress(done, total))
    of_answers = signatures(answers, lambda done: on_progress(len(pairs) + done, total))
    pieces = lru_cache(maxsize=4096)(piece_hashes)
    groups = _Groups(len(pairs))
    for i, j in _alike(_band_keys(of_prompts, of_answers), [of_prompts, of_answers], threshold):
        if groups.are_joined(i, j):
            continue  # a crowd of m texts alike is measured m times, not m squared times
        similarity, is_opposite = _likeness(pairs[i], pairs[j], pieces)
        if similarity >= threshold:
            groups.join(i, j)
            yield Link(i, j, "near", is_opposite, similarity)


def _likeness(one: TextPair, other: TextPair, pieces: Callable[[str], Hashes]) -> tuple[float, bool]:
    """The least index of prompt and responses, paired the better way; and whether that is crosswise."""
    prompt, straight, crossed = (
        min(_jaccard(pieces(a), pieces(b)) for a, b in zip(left, right, strict=True))
        for left, right in ((one[:1], other[:1]), (one[1:], other[1:]), (one[1:], (other.rejected, other.chosen)))
    )
    return min(prompt, max(straight, crossed)), crossed > straight


class _Groups:
    """Which of N things are linked with one another (union-find)."""

    def __init__(self, num: int) -> None:
        self._above = list(range(num))

    def are_joined(self, i: int, j: int) -> bool:
        return self._root(i) == self._root(j)

    def join(self, i: int, j: int) -> None:
        self._above[self._root(j)] = self._root(i)

    def _root(self, i: int) -> int:
        while self._above[i] != i:
            self._above[i] = i = self._above[self._above[i]]
        return i


def near_texts(
    first: Sequence[str],
    second: Sequence[str],
    threshold: float = THRESHOLD,
    on_progress: Progress = lambda done, total: None,
) -> list[Near]:
    """The texts of one list that are nearly one of the other, by place.

    Texts count as `normalised` leaves them. Within one list nothing is compared, so no crowd of one hides another.
    """
    total = len(first) + len(second)
    plain = [[normalised(text) for text in texts] for texts in (first, second)]
    ours = signatures(plain[0], lambda done: on_progress(done, total))
    theirs = signatures(plain[1], lambda done: on_progress(len(first) + done, total))
    pieces = lru_cache(maxsize=4096)(piece_hashes)
    found = []
    for i, j in _across(_band_keys(ours), _band_keys(theirs), ours, theirs, threshold):
        similarity = _jaccard(pieces(plain[0][i]), pieces(plain[1][j]))
        if similarity >= threshold:
            found.append(Near(i, j, similarity))
    return sorted(found)


def jaccard(one: str, other: str) -> float:
    """Share of common pieces of two texts, as `normalised` leaves them."""
    return _jaccard(piece_hashes(normalised(one)), piece_hashes(normalised(other)))


def piece_hashes(text: str) -> Hashes:
    """[P], sorted: hashes of a text's pieces, each once. A text of fewer than five characters is one piece."""
    return np.unique(_hashed([text])[0])


def signatures(texts: Sequence[str], on_progress: Callable[[int], None] = lambda done: None) -> Hashes:
    """[N, 64], MinHash signatures: two texts agree in a column with a probability of their Jaccard index."""
    found = np.empty((len(texts), NUM_HASHES), dtype=np.uint32)
    factors = _factors()
    for start, stop in _blocks(texts):
        hashes, starts = _hashed(texts[start:stop])
        for column, factor in enumerate(factors):
            found[start:stop, column] = np.minimum.reduceat(hashes * factor, starts)
        on_progress(stop)
    return found


def _blocks(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Places of texts to be hashed at once: as many as stay in the processor's cache."""
    start = size = 0
    for i, text in enumerate(texts):
        size += len(text)
        if size >= _CHARACTERS_AT_ONCE or i == len(texts) - 1:
            yield start, i + 1
            start, size = i + 1, 0


def _factors() -> Hashes:
    """[64], odd: multiplying by one is a permutation of all 32-bit numbers."""
    return np.random.default_rng(0).integers(2**31, size=NUM_HASHES, dtype=np.uint32) * np.uint32(2) + np.uint32(1)


def _hashed(texts: Sequence[str]) -> tuple[Hashes, NDArray[np.int64]]:
    """Hashes of the pieces of all texts one after another, and where each text's begin."""
    padded = [text.ljust(PIECE, "\0") for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in padded])
    num = len(codes) - PIECE + 1
    rolled = np.zeros(num, dtype=np.uint64)
    for offset in range(PIECE):
        rolled = rolled * np.uint64(0x9E3779B97F4A7C15) + codes[offset : offset + num]
    # The last four places of a text begin pieces that run into the next one.
    ends = np.cumsum(lengths)
    is_whole = np.ones(len(codes), dtype=bool)
    for back in range(1, PIECE):
        is_whole[ends - back] = False
    starts = np.cumsum(lengths - PIECE + 1) - (lengths - PIECE + 1)
    return _mixed(rolled[is_whole[:num]]), starts


def _mixed(values: NDArray[np.uint64]) -> Hashes:
    """32 bits of each that depend on all its 64 (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (values >> np.uint64(32)).astype(np.uint32)


def _band_keys(*parts: Hashes) -> NDArray[np.uint64]:
    """[N, 32], equal where two rows agree in a band of every part."""
    keys = np.zeros((len(parts[0]), BANDS), dtype=np.uint64)
    for part in parts:
        for column in (part[:, 0::2], part[:, 1::2]):
            keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(29)
    return keys


def _alike(keys: NDArray[np.uint64], parts: Sequence[Hashes], threshold: float) -> list[tuple[int, int]]:
    """Places, smaller first, that share a band and whose estimated index is not far below the threshold."""
    found: set[int] = set()
    for band in keys.T:
        order = np.argsort(band, kind="stable")
        ordered = band[order]
        for offset in range(1, min(MOST_COMPARED + 1, len(order))):
            is_equal = ordered[offset:] == ordered[:-offset]
            if not is_equal.any():
                break
            one, other = order[:-offset][is_equal], order[offset:][is_equal]
            for part in parts:
                is_near = _agreement(part[one], part[other]) >= threshold - _SLACK
                one, other = one[is_near], other[is_near]
            found.update((one * len(keys) + other).tolist())
    return [divmod(code, len(keys)) for code in sorted(found)]


def _across(
    ours: NDArray[np.uint64], theirs: NDArray[np.uint64], first: Hashes, second: Hashes, threshold: float
) -> list[tuple[int, int]]:
    """As `_alike`, between two lists; all that share a band are compared, in steps that bound the memory."""
    found: set[int] = set()
    for mine, other in zip(ours.T, theirs.T, strict=True):
        order = np.argsort(other, kind="stable")
        begin, end = (np.searchsorted(other[order], mine, side=side) for side in ("left", "right"))
        for i in np.flatnonzero(end > begin).tolist():
            places = order[begin[i] : end[i]]
            is_near = _agreement(first[i][None, :], second[places]) >= threshold - _SLACK
            found.update((i * len(theirs) + places[is_near]).tolist())
    return [divmod(code, len(theirs)) for code in sorted(found)]


def _agreement(one: Hashes, other: Hashes) -> NDArray[Any]:
    return np.asarray((one == other).mean(axis=1))


def _jaccard(one: Hashes, other: Hashes) -> float:
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)
