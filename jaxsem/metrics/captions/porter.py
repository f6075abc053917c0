"""Stems of English words by Porter's second algorithm, "Porter2", which METEOR uses.

Two regions decide what may be cut off: R1 is what follows the first consonant after a vowel, R2 the same within R1. A
suffix counts as inside a region if it begins in it.

Source: M. F. Porter, the English stemmer of Snowball (2002), in its form of 2006 to 2018.
"""

import re

_WHOLE = {
    **{"skis": "ski", "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "idly": "idl"},
    **{"gently": "gentl", "ugly": "ugli", "early": "earli", "only": "onli", "singly": "singl"},
    **{word: word for word in ("sky", "news", "howe", "atlas", "cosmos", "bias", "andes")},
}
_KEPT = {"inning", "outing", "canning", "herring", "earring", "proceed", "exceed", "succeed"}

_REGION = re.compile("[aeiouy][^aeiouy]")
_R1_PREFIX = re.compile("gener|commun|arsen")
_SHORT_END = re.compile("(?:[^aeiouy][aeiouy][^aeiouywxY]|^[aeiouy][^aeiouy])$")
_DOUBLES = ("bb", "dd", "ff", "gg", "mm", "nn", "pp", "rr", "tt")

_STEP_2 = {
    **{"tional": "tion", "enci": "ence", "anci": "ance", "abli": "able", "entli": "ent", "izer": "ize"},
    **{"ization": "ize", "ational": "ate", "ation": "ate", "ator": "ate", "alism": "al", "aliti": "al", "alli": "al"},
    **{"fulness": "ful", "ousli": "ous", "ousness": "ous", "iveness": "ive", "iviti": "ive", "biliti": "ble"},
    **{"bli": "ble", "ogi": "og", "fulli": "ful", "lessli": "less", "li": ""},
}
_STEP_3 = {
    **{"tional": "tion", "ational": "ate", "alize": "al", "icate": "ic", "iciti": "ic", "ical": "ic"},
    **{"ful": "", "ness": "", "ative": ""},
}
_CUT = "al ance ence er ic able ible ant ement ment ent ism ate iti ous ive ize ion"
_STEP_4 = dict.fromkeys(_CUT.split(), "")


def stem(word: str) -> str:
    """What is common to the forms of a word: "consistent", "consistency" and "consists" are all "consist".

    Args:
        word: In lower case.

    Returns:
        The stem, which need not be a word; words of one or two letters are left as they are.

    Example:
        >>> [stem(word) for word in ("running", "runs", "ponies", "generously")]
        ['run', 'run', 'poni', 'generous']
    """
    if len(word) <= 2:
        return word
    if word in _WHOLE:
        return _WHOLE[word]
    word = word.removeprefix("'")
    word = _mark_y(word)
    first = _R1_PREFIX.match(word) or _REGION.search(word)
    r1 = first.end() if first else len(word)
    second = _REGION.search(word, r1)
    r2 = second.end() if second else len(word)
    word = _plural(word)
    if word in _KEPT:
        return word
    word = _past(word, r1)
    if len(word) > 2 and word[-1] in "yY" and word[-2] not in "aeiouy":
        word = f"{word[:-1]}i"
    word = _suffix(word, _STEP_2, r1, r2)
    word = _suffix(word, _STEP_3, r1, r2)
    word = _suffix(word, _STEP_4, r2, r2)
    return _last(word, r1, r2).replace("Y", "y")


def _mark_y(word: str) -> str:
    marked = ""
    for letter in word:
        marked += "Y" if letter == "y" and (not marked or marked[-1] in "aeiouy") else letter
    return marked


def _plural(word: str) -> str:
    """Steps 0 and 1a: apostrophes and the s of plurals and verbs."""
    word = re.sub("('s'|'s|')$", "", word)
    if word.endswith("sses"):
        return word[:-2]
    if word.endswith(("ied", "ies")):
        return word[:-2] if len(word) > 4 else word[:-1]
    if word.endswith(("us", "ss")):
        return word
    return word[:-1] if re.search("[aeiouy].+s$", word) else word


def _past(word: str, r1: int) -> str:
    """Step 1b: -ed and -ing."""
    match = re.search("(eedly|ingly|edly|eed|ing|ed)$", word)
    if not match:
        return word
    base = word[: match.start()]
    if match[1].startswith("eed"):
        return f"{base}ee" if match.start() >= r1 else word
    if not re.search("[aeiouy]", base):
        return word
    if base.endswith(("at", "bl", "iz")):
        return f"{base}e"
    if base.endswith(_DOUBLES):
        return base[:-1]
    return f"{base}e" if r1 >= len(base) and _SHORT_END.search(base) else base


def _suffix(word: str, rules: dict[str, str], region: int, r2: int) -> str:
    """Replaces the longest suffix of a step, where it lies in the region and what stands before it allows so."""
    found = max((suffix for suffix in rules if word.endswith(suffix)), key=len, default=None)
    if found is None or len(word) - len(found) < region:
        return word
    base = word[: -len(found)]
    allowed = {
        "ogi": base.endswith("l"),
        "li": base.endswith(tuple("cdeghkmnrt")),
        "ative": len(base) >= r2,
        "ion": base.endswith(("s", "t")),
    }
    return base + rules[found] if allowed.get(found, True) else word


def _last(word: str, r1: int, r2: int) -> str:
    """Step 5: a last e or l."""
    base = word[:-1]
    if word.endswith("e"):
        return base if len(base) >= r2 or (len(base) >= r1 and not _SHORT_END.search(base)) else word
    return base if word.endswith("ll") and len(base) >= r2 else word
