"""How good an answer is: exact match, and ANLS as similarity."""

from rapidfuzz.distance import Levenshtein

ANLS_CUT = 0.5


def plain_text(text: str) -> str:
    """The text without white space at its ends, and with single spaces for any run of it."""
    return " ".join(text.split())


def exact_match(prediction: str, answer: str) -> bool:
    """Whether both are the same text up to white space; upper and lower case differ."""
    return plain_text(prediction) == plain_text(answer)


def similarity(prediction: str, answer: str, cut: float = ANLS_CUT) -> float:
    """ANLS of one answer (Biten et al. 2019, arXiv 1905.13648), 0 to 1, upper and lower case taken as equal.

    1 - d, with d the Levenshtein distance over the length of the longer text; 0 where d >= cut.
    """
    a, b = plain_text(prediction).casefold(), plain_text(answer).casefold()
    distance = Levenshtein.normalized_distance(a, b)
    return 1.0 - distance if distance < cut else 0.0
