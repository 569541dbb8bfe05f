"""Verifiable rewards: the number that a response ends on, or what an instruction asks of its form.

    final_answer("She pays 3 * $1,200.00 = <<3*1200=3600>>$3,600.\\n#### 3,600") == 3600

    fulfils("A pear is green.", [{"kind": "include", "word": "pear"}, {"kind": "words",
                                  "at_most": 5}, {"kind": "sentences", "at_most": 1}])

A number: the last one behind the last "####" (GSM8K's mark for the result) counts, or the last one
of the text where there is none. What it cannot see is how the number came about: "12 minus 6 is
some number" ends on the 6 that is asked for.
"""

import itertools
import re
import unicodedata
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


# --- constraints ---------------------------------------------------------------------------------

# Made for English. Letters and digits, apostrophes inside: "don't" is one word, "well-known" and
# "3.5" are two, so that hyphens between all words do not make them one.
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
# A mark ends a sentence where white space or the end follows, so not in 3.5, but in "Dr. No"; the
# end of a line ends one as well, so that no list is one sentence.
SENTENCE_END = re.compile(r"[.!?…]+[\"')\]*]*(?=\s|$)|\n")
QUOTES = str.maketrans("’‘“”", "''\"\"")


def words(text):
    """The words of a text, in lower case."""
    return [word.casefold() for word in WORD.findall(text)]


def n_sentences(text):
    """The parts between the ends of sentences that hold a word, what stands behind the last too."""
    return sum(bool(words(part)) for part in SENTENCE_END.split(text))


def n_items(text):
    """The lines that begin with "- " and hold a word. Others may stand between; an indented line is
    no item."""
    return sum(line.startswith("- ") and bool(words(line)) for line in text.split("\n"))


def plain(text):
    """The text as it is compared: accents joined to their letters, quotes as a keyboard has them,
    no white space around it."""
    return unicodedata.normalize("NFC", text).translate(QUOTES).strip()


# each line of a list holds a sentence, and each sentence a word: what is fewer stands first
COUNTS = dict(items=n_items, sentences=n_sentences, words=lambda text: len(words(text)))
# (?!\B\w) and (?<!\w\B): no word is found in the middle of one, "Yes" not in "Yesterday"
TEXTS = dict(include=lambda text, asked: words(asked)[0] in words(text),
             exclude=lambda text, asked: words(asked)[0] not in words(text),
             begins=lambda text, asked: re.match(re.escape(asked) + r"(?<!\w\B)", text),
             ends=lambda text, asked: re.search(r"(?!\B\w)" + re.escape(asked) + r"\Z", text))
PARAMETERS = dict.fromkeys(COUNTS, ("at_least", "at_most")) | dict(
    include=("word",), exclude=("word",), begins=("text",), ends=("text",), lower_case=())


def is_fulfilled(response, constraint):
    """Whether the response is as one constraint says. Upper and lower case are the same, but for
    lower_case: there has to be a letter, and none in upper case."""
    response, kind = plain(response), constraint["kind"]
    if kind in COUNTS:
        n = COUNTS[kind](response)  # 0 is never right
        return constraint.get("at_least", 1) <= n <= constraint.get("at_most", n)
    if kind == "lower_case":
        return response.islower()
    asked = plain(constraint[PARAMETERS[kind][0]]).casefold()
    return bool(TEXTS[kind](response.casefold(), asked))


def fulfils(response: str, constraints: list) -> bool:
    """Whether the response holds a word and is as every constraint says; of the constraints
    `broken_constraints` finds nothing to say."""
    return bool(words(response)) and all(is_fulfilled(response, c) for c in constraints)


def broken_constraints(constraints):
    """Why this is no list of constraints, or one that no response can fulfil; None if it is good.
    It does not find everything that cannot be: "ends" may contradict "sentences"."""
    if not isinstance(constraints, list) or not constraints:
        return "'constraints' must be a list of at least one"
    found, used, avoided = {}, set(), set()
    for i, constraint in enumerate(constraints):
        at = f"constraints[{i}]"
        kind = constraint.get("kind") if isinstance(constraint, dict) else None
        if not isinstance(kind, str) or kind not in PARAMETERS:
            return f"{at} needs a 'kind', one of {', '.join(PARAMETERS)}"
        names, given = PARAMETERS[kind], {k: v for k, v in constraint.items() if k != "kind"}
        if unknown := [name for name in given if name not in names]:
            return f"{at}: {kind!r} has no parameter {str(unknown[0])[:40]!r}"
        if names and not given:
            return f"{at}: {kind!r} needs {' or '.join(map(repr, names))}"
        if kind in found and kind not in ("include", "exclude"):
            return f"{at}: {kind!r} stands there twice"
        found[kind] = given
        for name, value in given.items():
            if kind in COUNTS and (type(value) is not int or value < 1):
                return f"{at}: {name!r} must be a whole number from 1"
            if kind not in COUNTS and (not isinstance(value, str) or not plain(value)):
                return f"{at}: {name!r} must be text"
            if name == "word" and words(plain(value)) != [plain(value).casefold()]:
                return f"{at}: {value[:40]!r} is not one word"
            if kind not in COUNTS:
                (avoided if kind == "exclude" else used).update(words(plain(value)))
    for few, many in itertools.combinations_with_replacement(COUNTS, 2):
        least, most = (found.get(kind, {}).get(name) for kind, name in
                       ((few, "at_least"), (many, "at_most")))
        if least and most and least > most:
            return f"'constraints' ask for at least {least} {few}, and at most {most} {many}"
    if used & avoided:
        return f"'constraints' ask to use and to avoid the word {min(used & avoided)!r}"
    return None


# --- either --------------------------------------------------------------------------------------


def is_right(response: str, answer) -> bool:
    """Whether the response ends on the same number as the answer, a text; or fulfils the answer, a
    list of constraints. ValueError for a text without a number. A response cut by the length limit
    is wrong whatever it says: the caller knows."""
    if isinstance(answer, list):
        return fulfils(response, answer)
    expected = final_answer(answer)
    if expected is None:
        raise ValueError(f"the answer {answer!r} holds no number")
    return final_answer(response) == expected
