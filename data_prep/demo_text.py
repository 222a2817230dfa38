"""Demo rows without a picture: short questions about the words and numbers of a group."""

import random

from data_prep import demo_sources as sources
from data_prep.demo_content import Question
from data_prep.demo_lexicon import LEXICON


def text_question(rng: random.Random, group: int) -> Question:
    """A question a text-only row asks: repeat, compare, or count letters."""
    words = rng.sample(LEXICON, 3)
    first, second = rng.sample(sources.group_numbers(group), 2)
    form = rng.randrange(4)
    if form == 0:
        return Question(f"Repeat the word {words[0]}.", words[0], "text")
    if form == 1:
        return Question(f"Which number is larger, {first} or {second}?", str(max(first, second)), "text")
    if form == 2:
        place = rng.randrange(3)
        name = ("first", "second", "third")[place]
        return Question(f"Which word is {name}: {words[0]}, {words[1]}, {words[2]}?", words[place], "text")
    return Question(f"Repeat the numbers {first} and {second}.", f"{first} and {second}", "text")
