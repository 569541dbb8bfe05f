"""Instructions whose form a program can check, after IFEval (Zhou et al. 2023): for grpo.py.

    {"prompt": "Name three reasons why people join clubs\\n\\nAnswer in 5 to 20 words.",
     "constraints": [{"kind": "words", "at_least": 5, "at_most": 20}], "held_out": false}

Real instructions (Stanford Alpaca's, without input), each with a random request behind it in one of
several wordings. All ask for a number of words, so that a word alone is wrong and answers are
short. An instruction that asks for a form or a length itself is left out.

    python -m data.instructions                                # download two files, 2 MB
    python -m data.instructions --source=DIR                   # harmless_*.json or alpaca_*.json
    python grpo.py --data=out/data/instructions.jsonl --init=... --max_new_tokens=64

SmolLM2-135M-Instruct is right in about 21% (temperature 1, 64 tokens, 64 prompts a kind, 96 of
items): sentences 48%, exclude 39, words 38, ends 16, items 10, include 9, lower_case 5, begins 3.

A tenth is held out, by the hash of the instruction without the request: with whatever request, it
is on the side where it is in Alpaca's own file, of which a model may have learnt the answers.
Licence of the data: CC BY-NC 4.0, non-commercial (Alpaca); the files: Apache-2.0
(github.com/andyrdt/refusal_direction).
"""

import random
import re
from collections import Counter
from dataclasses import dataclass

import cli
from cli import NotNegative, Positive
from data.download import check_out, convert_all, locate, text_field, write
from data.files import json_rows
from data.records import Sides, split_key

COMMIT = "9d852fae1a9121c78b29142de733cb1340770cc3"
URL = f"https://raw.githubusercontent.com/andyrdt/refusal_direction/{COMMIT}/dataset/splits/"
FILES = {name: (URL + name, sha256) for name, sha256 in (
    ("harmless_val.json", "772010758e7d771ef4c7e5e4acdfd7598dcece1a6f383f20d382f640913a2a4d"),
    ("harmless_test.json", "1b5930ce5e855ada758b3116ce7c4aaea9b9d05f8cdd77b385511d4c84173b19"))}
PATTERNS = ("harmless_*.json", "alpaca_*.json")
MOST = 20  # words of an instruction: long ones ask for long answers

# what would contradict a request: a number of something, a form, a language, a long text
OWN_FORM = re.compile(
    r"\d|\"|:|\n|\b(two|three|four|five|six|seven|eight|nine|ten|words?|sentences?|paragraphs?|lines?|"
    r"lists?|bullets?|tables?|essays?|stor(y|ies)|poems?|haikus?|songs?|lyrics|letters?|e-?mails?|"
    r"articles?|blogs?|posts?|dialogues?|conversations?|scripts?|code|programs?|functions?|"
    r"algorithms?|quer(y|ies)|html|sql|python|java\w*|translate|rewrite|edit|rephrase|tweets?|"
    r"recipes?|report|outline|quiz|steps?|brief(ly)?|detail(s|ed)?|short|long)\b", re.IGNORECASE)

# kind: (share of the records, wordings of the request, its {x}, constraints but "words"); {m} and
# {n} are the least and the most words. Shares, examples and {x} are such that a small chat model is
# right sometimes: where it never is, a group is wrong as a whole, and nothing is to be learnt.
KINDS = dict(
    words=(1, ("Answer in {m} to {n} words.", "Use at least {m} and at most {n} words.",
               "Your answer must have between {m} and {n} words."), [""], lambda x: []),
    sentences=(1, ("Answer in one sentence of {m} to {n} words.",
                   "Write a single sentence, with at least {m} and at most {n} words.",
                   "One sentence only, between {m} and {n} words."), [""],
               lambda x: [dict(kind="sentences", at_most=1)]),
    items=(1, ("Answer in {m} to {n} words, with a list like this:{x}",
               "Use {m} to {n} words, in a list like this one:{x}",
               "Your answer must have {m} to {n} words and look like this list:{x}"),
           ["\n- apples are red\n- pears are green"], lambda x: [dict(kind="items", at_least=2)]),
    include=(1, ('Use the word "{x}", and {m} to {n} words in all.',
                 'Answer in {m} to {n} words, one of which is "{x}".',
                 'Your answer must contain the word "{x}" and have {m} to {n} words.'),
             ["can", "people", "time", "help", "life", "world", "good", "more"],
             lambda x: [dict(kind="include", word=x)]),
    exclude=(1, ('Do not use the word "{x}". Use {m} to {n} words.',
                 'Answer in {m} to {n} words, none of which is "{x}".',
                 'Avoid the word "{x}", and write {m} to {n} words.'),
             ["the", "a", "is", "and"], lambda x: [dict(kind="exclude", word=x)]),
    lower_case=(1, ("answer in {m} to {n} words without capital letters, for example:{x}",
                    "use no capital letters, and between {m} and {n} words, as in:{x}",
                    "write {m} to {n} words, all in lower case, like this:{x}"),
                [" a pear is green and sweet.", " trees need water to grow."],
                lambda x: [dict(kind="lower_case")]),
    begins=(1, ('Begin your answer with the word "{x}" and use {m} to {n} words.',
                'Answer in {m} to {n} words, of which the first is "{x}".',
                'Your answer must start with "{x}" and have {m} to {n} words.'),
            ["The", "A", "In", "To", "You"], lambda x: [dict(kind="begins", text=x)]),
    ends=(1, ('End with "{x[0]}" and use {m} to {n} words, for example: {x[1]}',
              'Answer in {m} to {n} words with "{x[0]}" at the end, like this: {x[1]}',
              '{m} to {n} words, and "{x[0]}" behind the last, as in: {x[1]}'),
          [("!", "Pears are great!"), ("!", "I love trees!"), ("?", "Do you like pears?")],
          lambda x: [dict(kind="ends", text=x[0])]))
LEAST_WORDS, MOST_WORDS = 5, (20, 25, 30, 35)  # 35 words: some 50 tokens


@dataclass
class Config:
    source: str = ""  # folder with harmless_*.json or alpaca_*.json; "" downloads the former
    out: str = "out/data/instructions.jsonl"  # the file to write
    records: Positive[int] = 4000  # at most so many, each of another instruction
    seed: NotNegative[int] = 1  # of the choice of instructions and requests
    overwrite: bool = False  # replace it if it exists


def convert(row, where="row"):
    """({"prompt"}, None), or (None, reason to drop it). UserError for a field that is wrong."""
    instruction = text_field(row, "instruction", where)
    if not instruction:
        return None, "without an instruction"
    if row.get("input"):
        return None, "with an input"
    if len(instruction.split()) > MOST:
        return None, f"of more than {MOST} words"
    if OWN_FORM.search(instruction):
        return None, "that ask for a form or a length themselves"
    return dict(prompt=instruction), None


def records(path):
    """(prompts, {reason: rows dropped}) of one file. UserError names file and row."""
    return convert_all(json_rows(path), convert)


def request(rng):
    """(text, constraints): a random request."""
    kind = rng.choices([*KINDS], [share for share, *_ in KINDS.values()])[0]
    _, wordings, values, constraints = KINDS[kind]
    x, n = rng.choice(values), rng.choice(MOST_WORDS)
    return (rng.choice(wordings).format(x=x, m=LEAST_WORDS, n=n),
            [*constraints(x), dict(kind="words", at_least=LEAST_WORDS, at_most=n)])


def choose(prompts, dropped, config):
    """At most config.records of {"prompt", "constraints", "held_out"}, each of another instruction,
    in random order. The others are added to `dropped`."""
    rng, sides = random.Random(config.seed), Sides()
    different = list({split_key(p): p for p in prompts}.values())
    for prompt in different:
        sides.add(prompt)  # without the request, so that the same hash decides as in other files
    asked = list(zip(different, sides.held_out().tolist()))
    chosen = rng.sample(asked, min(len(asked), config.records))
    dropped["that stand there again"] += len(prompts) - len(different)
    dropped[f"beyond --records={config.records}"] += len(asked) - len(chosen)
    kept = []
    for prompt, held_out in chosen:
        text, constraints = request(rng)
        kept.append(dict(prompt=f"{prompt['prompt']}\n\n{text}", constraints=constraints,
                         held_out=held_out))
    return kept, +dropped  # +: without those that are 0


def main(config):
    check_out(config)
    prompts, dropped = [], Counter()
    for path in locate("instructions", config.source, FILES, PATTERNS):
        part, reasons = records(path)
        prompts, dropped = prompts + part, dropped + reasons
    write("instructions", config, *choose(prompts, dropped, config))


if __name__ == "__main__":
    cli.run_main(main, cli.parse(Config))
