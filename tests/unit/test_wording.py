"""Texts that are made to fit a line."""

import pytest

from swap_hpc.recipe.wording import bit_rate, first_few, shortened, without_middle


@pytest.mark.parametrize("limit", range(12, 60))
def test_a_text_is_cut_at_the_end_of_a_word(limit: int) -> None:
    text = "the quick\n brown fox   jumps over\tthe lazy dog"
    short = shortened(text, limit)
    words = " ".join(text.split())
    assert len(short) <= limit
    assert short == words or (
        words.startswith(short.removesuffix(" ...") + " ") and short.endswith(" ...")
    )


@pytest.mark.parametrize("limit", range(10, 40))
def test_a_long_word_keeps_its_beginning_and_its_end(limit: int) -> None:
    word = "abcdefghijklmnopqrstuvwxyz0123456789"
    for cut in (shortened(word, limit), without_middle(word, limit)):
        begin, _, end = cut.partition(" ... ")
        assert len(cut) <= limit
        assert cut == word or (word.startswith(begin) and word.endswith(end) and begin and end)


def test_a_list_tells_how_many_more_there_are() -> None:
    assert first_few(["a", "b", "c"]) == "a, b, c"
    assert first_few(list("abcde")) == "a, b, c and 2 more"
    assert first_few([]) == ""


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (8e4, "0.08 Mbit/s"),
        (35e6, "35 Mbit/s"),
        (123.4e6, "123 Mbit/s"),
        (10e9, "10 Gbit/s"),
        (1.2345e9, "1.23 Gbit/s"),
        (2e12, "2,000 Gbit/s"),
    ],
)
def test_rates_of_a_network_have_three_digits(rate: float, text: str) -> None:
    assert bit_rate(rate) == text
