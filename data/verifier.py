"""Verifiable rewards: the number that a response ends on, compared as a number with the answer.

    final_answer("She pays 3 * $1,200.00 = <<3*1200=3600>>$3,600.\\n#### 3,600") == 3600

The last number behind the last "####" (GSM8K's mark for the result) counts, or the last number of
the text where there is none. What it cannot see is how the number came about: "12 minus 6 is some
number" ends on the 6 that is asked for.
"""

import re
from decimal import Decimal

CALCULATOR = re.compile(r"<<.*?>>", re.DOTALL)  # GSM8K: "9 * 2 = $<<9*2=18>>18"
# A minus belongs to the number unless it stands behind an operand (20-5); currency may follow it.
# Commas only where they group thousands, so that "1, 2" and "1,2" are two numbers.
NUMBER = re.compile(r"(?:(?<![\w)%.])[-−](?:[$€£]\s?)?|(?<=[$€£])[-−])?"
                    r"(\d{1,3}(?:,\d{3})+(?!,?\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")

# words behind a number that make another one of it
COMPUTES = re.compile(r"\b(hundreds?|thousands?|[mb]illions?|trillions?|dozens?|hal(f|ves)|thirds?|"
                      r"quarters?|squared|cubed|pi|or|to|and|minus|plus|times|over|am|pm)\b",
                      re.IGNORECASE)


def strip_calculator(text):
    """GSM8K's text without its calculator marks, as a person would write it."""
    return CALCULATOR.sub("", text)


def final_answer(text: str):
    """The number that a text ends on, as an exact Decimal; None where it holds none.

    Reads over commas between thousands, currency, percent, units, a full stop behind the number
    and calculator marks; 12, 12.00 and $12 are equal. A ratio 3/4 counts as its last number, and
    so do the power of ten of 1e+20 and the 2 of "18 m2": exponents are not read.
    """
    text = strip_calculator(text)
    found = list(NUMBER.finditer(text.rsplit("####", 1)[-1]))
    if not found:
        return None
    value = Decimal(found[-1][1].replace(",", ""))
    return -value if re.search("[-−]", found[-1][0]) else value


def is_gold(text: str) -> bool:
    """Whether an answer, or what stands behind its last "####", is one number and nothing else that
    could be part of the answer: 72, -3.5, $1,200, 40%, 18 apples, but not 1/4, (2, 4), 12:30 or
    \\sqrt{2}, of which a response would only have to match the last number."""
    text = text.rsplit("####", 1)[-1]
    number = NUMBER.search(text)
    return number is not None and bool(
        re.fullmatch(r"\s*[$€£]?\s?", text[:number.start()])
        and re.fullmatch(r"\s?%?( [A-Za-z]+){0,2}\.?\s*", text[number.end():])
        and not COMPUTES.search(text[number.end():]))


def is_right(response: str, answer: str) -> bool:
    """Whether the response ends on the same number as the answer. ValueError for an answer without
    a number. A response cut by the length limit is wrong whatever it says: the caller knows."""
    expected = final_answer(answer)
    if expected is None:
        raise ValueError(f"the answer {answer!r} holds no number")
    return final_answer(response) == expected
