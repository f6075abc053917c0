"""Words of a caption, as COCO's caption evaluation counts them, without the Java program that it runs.

pycocoevalcap calls Stanford's PTBTokenizer 3.4.1 with lower-casing and drops the tokens that are punctuation. This
module follows the Penn Treebank conventions that matter in captions and keeps that evaluation's known oddities, so that
scores can be compared: brackets stay as "-lrb-" and "-rrb-", and "!!" stays, since its list of punctuation names
neither.
"""

import re

_ABBREVIATIONS = (
    "mr mrs ms dr prof st ave blvd rd mt ft inc co ltd corp jr sr vs etc gen rep sen gov cf al ph.d fig "
    "jan feb mar apr aug sept oct nov dec"
)
# Words that the Treebank writes as two, cut after these many letters.
_COMPOUNDS = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "gimme": 3, "lemme": 3, "'tis": 2, "'twas": 2}
_REPLACED = {
    **dict.fromkeys("\u2018\u2019`\u00b4", "'"),  # single quotation marks of all kinds
    **{"£": "#", "€": "$", "¢": " cents ", "(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- "},
    **{"{": " -lcb- ", "}": " -rcb- "},
    **dict.fromkeys('\u201c\u201d\u00ab\u00bb"', " "),  # double ones
    **dict.fromkeys("\u2013\u2014\u2026", " "),  # dashes, ellipsis
}
_CHARACTERS = str.maketrans(_REPLACED)
_BRACKETS = "-[lr][rsc]b-"
_TOKEN = re.compile(
    rf"""
    https?://[^\s]*[\w/] | www\.[^\s]*[\w/]                   # addresses
    | [\w.+-]+@\w[\w-]*(?:\.\w[\w-]*)+
    | {_BRACKETS}
    | (?<![\w.])[a-z](?:\.[a-z])+\b\.?                        # u.s., p.m., e.g.
    | (?<![\w.'])[a-z]\.(?![\w.])                             # an initial
    | \b(?:{"|".join(map(re.escape, _ABBREVIATIONS.split()))})\.(?![\w.])
    | \bno\.(?=\s*\d)
    | '(?:\d\ds\b|(?:em|n|cause|til)\b'?)                     # '90s, 'em, rock 'n' roll
    | '(?:tis|twas)\b
    | (?<![\w.])\d+:\d+(?=[ap]m\b)                            # 5:30 pm
    | (?<![\w.])[+-]?\.?\d+(?:[.,:/-]\d+)*(?![\w/-]|[.,:]\d)
    | [^\W_](?:\w*[^\W_])?(?:(?:[-/&.]|(?<=\d)[,:](?=\d)|'(?!(?:s|re|ve|ll|d|m|t)\b))[^\W_](?:\w*[^\W_])?)*
    | '(?:s|re|ve|ll|d|m|t)\b                                 # what follows a word
    | [@\#][a-z]\w*
    | [?!]{{2,}}
    | [^\w\s'.,:;?!-]
    | _+
    """,
    re.VERBOSE,
)


def tokenize(text: str) -> list[str]:
    """Splits a text into words.

    What differs from PTBTokenizer: upper case is gone before abbreviations are looked for; abbreviations are a short
    list of those found in captions; HTML tags, smileys and fractions such as "2 1/2" (there one token) are taken apart;
    of rare contractions only those in use today are known ("y'all" and "more'n" stay whole).

    Args:
        text: A caption, in any case.

    Returns:
        Its words in lower case, clitics apart ("dog", "'s"; "is", "n't"), punctuation and quotation marks left out.

    Example:
        >>> tokenize("A man's dog can't jump over 3.5 well-kept fences, ... can it?")
        ['a', 'man', "'s", 'dog', 'ca', "n't", 'jump', 'over', '3.5', 'well-kept', 'fences', 'can', 'it']
    """
    words = []
    for token in _TOKEN.findall(text.lower().translate(_CHARACTERS)):
        if token == "'t" and words and words[-1].endswith("n") and len(words[-1]) > 1:
            words[-1:] = [words[-1][:-1], "n't"]
        elif token in _COMPOUNDS:
            words += [token[: _COMPOUNDS[token]], token[_COMPOUNDS[token] :]]
        else:
            words.append(token)
    return words
