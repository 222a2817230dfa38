"""How good an answer is: exact match, and ANLS as similarity."""

from rapidfuzz.distance import Levenshtein

ANLS_CUT = 0.5


def plain_text(text: str) -> str:
    """Return the text with single spaces for any run of white space, and none at its ends."""
    return " ".join(text.split())


def exact_match(prediction: str, answer: str) -> bool:
    """Return whether both texts are the same up to white space; case matters."""
    return plain_text(prediction) == plain_text(answer)


def similarity(prediction: str, answer: str, cut: float = ANLS_CUT) -> float:
    """Return the ANLS of one answer (Biten et al. 2019, arXiv 1905.13648), 0 to 1, ignoring case.

    1 - d, where d is the Levenshtein distance divided by the length of the longer text; 0 if d >= `cut`.
    """
    a, b = plain_text(prediction).casefold(), plain_text(answer).casefold()
    distance = Levenshtein.normalized_distance(a, b)
    return 1.0 - distance if distance < cut else 0.0
