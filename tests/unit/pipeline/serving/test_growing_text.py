"""Text of tokens up to a stop text, against the stop text searched in the whole text."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.serving.growing_text import GrowingText
from vico.inference.sampling import Token


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode(errors="replace")


LETTERS = st.text("abé€", max_size=12)


@given(text=LETTERS, stop=st.lists(st.text("abé€", min_size=1, max_size=4), max_size=3), scored=st.booleans())
def test_the_text_is_cut_at_the_first_stop_text_and_given_once(text, stop, scored):
    growing = GrowingText(Bytes(), stop)
    given_text, entries = "", []
    for byte in text.encode():
        given_text += growing.add(Token(byte, -1.0 if scored else None), is_end=False)
        entries += growing.logprobs()
        assert not any(mark in given_text for mark in stop), "no part of a stop text is ever taken back"
        if growing.is_stopped:
            break
    given_text += growing.rest()
    entries += growing.logprobs()
    ends = [text.find(mark) + len(mark) for mark in stop if mark in text]
    if ends:  # the stop text that is complete first; of several that end there, the longest
        end = min(ends)
        cuts = [text.find(mark) for mark in stop if mark in text[:end]]
        assert given_text == text[: min(cuts)] and growing.is_stopped
    else:
        assert given_text == text and not growing.is_stopped
    if not scored:
        assert entries == []
    elif not growing.is_stopped:
        assert len(entries) == len(text.encode())


def test_an_incomplete_character_is_no_stop_text_until_the_answer_ends_with_it():
    growing = GrowingText(Bytes(), ["\ufffd"])
    text = "".join(growing.add(Token(byte), is_end=False) for byte in "a€é".encode())
    assert (text, growing.rest(), growing.is_stopped) == ("a€é", "", False)
    growing = GrowingText(Bytes(), ["\ufffd"])
    text = "".join(growing.add(Token(byte), is_end=False) for byte in "a€é".encode()[:-1])
    assert (text + growing.rest(), growing.is_stopped) == ("a€", True)
