"""What a text is written in, by its letters and a few stop words: a heuristic to see a mix, no language detector.

A script is told by the letters; of the Latin one, seven languages by words that are frequent in one of them. A text too
short for such words is `latin`.
"""

import re

import numpy as np

SCRIPTS = {
    "latin": ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x1E00, 0x1EFF)),
    "greek": ((0x370, 0x3FF),),
    "cyrillic": ((0x400, 0x52F),),
    "hebrew": ((0x590, 0x5FF),),
    "arabic": ((0x600, 0x6FF), (0x750, 0x77F)),
    "devanagari": ((0x900, 0x97F),),
    "bengali": ((0x980, 0x9FF),),
    "tamil": ((0xB80, 0xBFF),),
    "thai": ((0xE00, 0xE7F),),
    "kana": ((0x3040, 0x30FF),),
    "han": ((0x3400, 0x4DBF), (0x4E00, 0x9FFF)),
    "hangul": ((0x1100, 0x11FF), (0xAC00, 0xD7AF)),
}
"""Ranges of code points of their letters, first and last."""

STOP_WORDS = {
    "en": "the and of to is that it for was with you this are have not what from they his which",
    "de": "der die und das ist nicht ein eine ich sie mit den von auf zu dem auch wie wird sind",
    "fr": "le les et des est une que qui dans pour pas vous sur avec du ne ce au il elle",
    "es": "el los y que es una las por con para del se como pero su lo al muy fue cuando",
    "it": "il di che per una sono non con gli della nel anche cui questo ma si le lo dei sua",
    "pt": "os que uma para da em por mais como mas ao foi dos das pelo pela isso",
    "nl": "de het een van en is dat niet op te voor met zijn aan ook maar als naar wordt deze",
}
"""Frequent words of each language, without accents; some are shared."""

MOST_CHARACTERS = 2000
LEAST_WORDS = 2
"""Stop words that a language must have."""

KANA_SHARE = 0.1
"""Japanese mixes kana with more han."""

_STARTS, _ENDS, _NAMES = zip(
    *sorted((first, last, name) for name, r in SCRIPTS.items() for first, last in r), strict=True
)
_WORDS = {language: frozenset(words.split()) for language, words in STOP_WORDS.items()}


def language_of(text: str) -> str:
    """`latin/en`, `latin`, `cyrillic`, `han`, ...: of the beginning of a text; `none` where there is no letter."""
    beginning = text[:MOST_CHARACTERS]
    counts = _letters(beginning)
    if not counts:
        return "none"
    script = max(counts, key=lambda name: (counts[name], name))
    if script == "han" and counts.get("kana", 0) >= KANA_SHARE * counts["han"]:
        return "kana"
    if script != "latin":
        return script
    words = re.findall(r"\w+", beginning.casefold())
    hits = {language: sum(word in known for word in words) for language, known in _WORDS.items()}
    best = max(hits, key=lambda language: hits[language])
    return f"latin/{best}" if hits[best] >= LEAST_WORDS else "latin"


def _letters(text: str) -> dict[str, int]:
    """Letters of each script."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    place = np.searchsorted(_STARTS, codes, side="right") - 1
    is_letter = (place >= 0) & (codes <= np.asarray(_ENDS)[place])
    counts: dict[str, int] = {}
    for number, count in enumerate(np.bincount(place[is_letter], minlength=len(_STARTS)).tolist()):
        if count:
            counts[_NAMES[number]] = counts.get(_NAMES[number], 0) + count
    return counts
