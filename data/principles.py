"""AI feedback (Bai et al. 2022): a model chooses between two answers, by principles in words.

The judge reads the conversation, a principle and both answers as (A) and (B), in its own chat
template. Its belief in A is the softmax over the log-probabilities of answering "(A)" or "(B)".
Models like what they read first, or the letter A, whatever it says: so each pair is shown in both
orders, and P(a better) is the mean of the two. Then the principles are averaged, and from the pairs
of K answers comes a ranking by the mean probability to win (Borda).
"""

from itertools import combinations
from pathlib import Path

import numpy as np

from cli import UserError
from data.choices import beliefs, choice_logprobs, longest_choice
from data.files import text_lines

FILE = Path(__file__).with_name("principles.txt")
NAMES = dict(system="System", user="User", assistant="Assistant")
QUESTION = """Here is a conversation, and two replies of the assistant to its last turn.

{conversation}

(A) {a}

(B) {b}

{principle} Answer with (A) or (B)."""


def read_principles(path):
    """The lines of a text file that are neither blank nor begin with "#"."""
    lines = [text.strip() for _, text in text_lines(path)]
    found = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not found:
        raise UserError(f"--principles={path}: holds no principle; write one a line")
    return found


def question(prompt, principle, a, b):
    """The record that asks for a choice, as data/choices.py scores it."""
    turns = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    conversation = "\n\n".join(f"{NAMES[t['role']]}: {t['content']}" for t in turns)
    # put together, not formatted twice: braces in a text are text
    return dict(prompt=QUESTION.format(conversation=conversation, a=a, b=b, principle=principle),
                choices=["(A)", "(B)"])


def ask(model, tokenizer, prompt, completions, principles):
    """(better, {"first", "differ"}), or None where a question does not fit the model's context.

    better: {(i, j): P(answer i is better than j)}, i < j. first: the mean probability of the answer
    that is shown first, 0.5 without position bias. differ: the share of pairs and principles whose
    choice changes with the order.
    """
    pairs = list(combinations(range(len(completions)), 2))
    asked = [question(prompt, principle, completions[first], completions[then])
             for i, j in pairs for principle in principles for first, then in ((i, j), (j, i))]
    if longest_choice(tokenizer, asked).max() > model.config.block_size:
        return None
    logprobs = choice_logprobs(model, tokenizer, asked)
    first = np.array([p[0] for p in beliefs(logprobs)]).reshape(len(pairs), len(principles), 2)
    shown_first, shown_last = first[..., 0], 1 - first[..., 1]  # P(i better), by where i stands
    better = (shown_first + shown_last).mean(1) / 2
    return dict(zip(pairs, better.tolist())), dict(
        first=float(first.mean()),
        differ=float(((shown_first > 0.5) != (shown_last > 0.5)).mean()))


def mean_wins(better):
    """The mean probability of each answer to beat another one. better: as `ask` gives it."""
    n = max(j for _, j in better) + 1
    return [float(np.mean([better[i, j] if i < j else 1 - better[j, i]
                           for j in range(n) if j != i])) for i in range(n)]


def ranks_of(scores, tie=1e-9):
    """Ranks, 1 is best; scores that differ by no more than `tie` are equal, a rank for both."""
    return [1 + sum(other > mine + tie for other in scores) for mine in scores]
