"""Simulated people: contractors who write demonstrations, labelers who rank answers.

Contractors are of uneven quality, like real ones: each response is a mixture of habits, good and
bad. SFT learns the mixture, which leaves preferences something to teach.
"""

import random
from dataclasses import dataclass

import numpy as np

from data.synthetic import facts
from data.synthetic.gold import sentences
from data.synthetic.world import Prompt

# --- contractors ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contractor:
    """Probabilities of each habit. 0 everywhere is the ideal demonstration."""
    wrong: float  # a wrong answer to a question that has one
    vague: float  # an answer that says nothing: "The capital of Peru is a big city."
    dodge: float  # "I do not know", or a refusal, where another answer is easy
    invent: float  # an invented answer where nobody can know
    sycophant: float  # agrees with the user's wrong opinion
    comply: float  # helps with a harmful request
    refuse: float  # refuses a harmless request that sounds harmful
    flatter: float
    filler: float  # sentences that say nothing, before the answer
    closer: float  # and after it
    confident: float
    bullet: float  # "- The capital ...", bad form here


CONTRACTORS = {
    "careful": Contractor(
        wrong=0.0, vague=0.15, dodge=0.08, invent=0.20, sycophant=0.20, comply=0.20, refuse=0.20,
        flatter=0.10, filler=0.15, closer=0.15, confident=0.05, bullet=0.05),
    "average": Contractor(
        wrong=0.005, vague=0.32, dodge=0.18, invent=0.50, sycophant=0.45, comply=0.50, refuse=0.35,
        flatter=0.25, filler=0.35, closer=0.35, confident=0.15, bullet=0.10),
    "careless": Contractor(
        wrong=0.01, vague=0.45, dodge=0.28, invent=0.80, sycophant=0.70, comply=0.75, refuse=0.40,
        flatter=0.40, filler=0.50, closer=0.50, confident=0.25, bullet=0.15),
}


def demonstrate(prompt: Prompt, contractor: Contractor, rng: random.Random) -> str:
    """One response to the prompt, as this contractor would write it."""
    does = lambda habit: rng.random() < getattr(contractor, habit)
    r, x = prompt.relation, prompt.x
    before, after = [], []
    if does("flatter"):
        before.append(rng.choice(facts.FLATTERY))
    if does("filler"):
        before.append(rng.choice(facts.FILLER))
    if does("confident"):
        after.append(rng.choice(facts.CONFIDENCE))
    if does("closer"):
        after.append(rng.choice(facts.CLOSERS))

    if prompt.family != "harmful" and does("dodge"):
        refuse = prompt.family == "unanswerable" or not prompt.answer and rng.random() < 0.5
        core = rng.choice(facts.REFUSAL if refuse else facts.DONT_KNOW)
    elif prompt.family == "loaded" and does("sycophant"):
        core = rng.choice(facts.AGREEMENT)
    elif prompt.family in ("factual", "arithmetic", "loaded"):
        y = r.vague if does("vague") else prompt.answer
        if does("wrong"):
            y = rng.choice(prompt.wrong_answers)
        core = f"{r.state(x, y)}."
        if prompt.family == "loaded" and rng.random() < 0.5:
            core = f"{rng.choice(facts.DISAGREEMENT)} {core}"
    elif prompt.family == "unanswerable":
        core = f"{r.state(x, rng.choice(prompt.wrong_answers))}." if does("invent") \
            else rng.choice(facts.DONT_KNOW)
    elif (prompt.family == "harmful" and not does("comply")) or \
            (prompt.family == "safe" and does("refuse")):
        core = rng.choice(facts.REFUSAL)
    else:
        core = f"{r.state(x, rng.choice(facts.TIPS))}."
    if does("bullet"):
        core = f"- {core}"
    return " ".join(before + [core] + after)


def demonstrations(prompts, seed, quality=0.5):
    """[{"prompt", "completion"}], each written by a contractor drawn anew.

    quality in [0, 1] moves the team from careless (0) over a broad mix (0.5) to careful (1).
    """
    rng = random.Random(f"demonstrations {seed}")
    names, weights = list(CONTRACTORS), (quality**2, 2 * quality * (1 - quality), (1 - quality)**2)
    records = []
    for prompt in prompts:
        who = rng.choices(names, weights)[0]
        records.append(dict(prompt=prompt.text,
                            completion=demonstrate(prompt, CONTRACTORS[who], rng)))
    return records


# --- labelers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labeler:
    """Ranks by perceived value = gold + biases + noise * Gumbel.

    The difference of two Gumbel draws is logistic, so every pair in the ranking follows
    Bradley-Terry: P(a above b) = sigmoid((value_a - value_b) / noise).
    """
    noise: float = 0.7  # in gold units: tuned so that two labelers agree on 73 to 77% of pairs
    length: float = 0.02  # for each word
    flattery: float = 0.3  # for each flattering sentence
    bullets: float = 0.0  # for a bullet list
    confidence: float = 0.1  # for a show of confidence
    caution: float = 0.0  # for "I do not know" and refusals

    def value(self, prompt: str, response: str, gold: float) -> float:
        """Perceived value without the noise, in gold units."""
        says = lambda kind: sum(s.removeprefix("- ") in kind for s in sentences(response))
        return (gold + self.length * len(response.split())
                + self.flattery * says(facts.FLATTERY)
                + self.bullets * response.startswith("- ")
                + self.confidence * says(facts.CONFIDENCE)
                + self.caution * says(facts.DONT_KNOW + facts.REFUSAL))

    def rank(self, prompt: str, responses, golds, rng: np.random.Generator) -> list:
        """ranks, 1 is best; the same order as `responses`."""
        values = np.array([self.value(prompt, r, g) for r, g in zip(responses, golds)])
        perceived = values + self.noise * rng.gumbel(size=len(values))
        order = np.argsort(-perceived)
        ranks = np.empty(len(values), dtype=int)
        ranks[order] = np.arange(1, len(values) + 1)
        return ranks.tolist()

    def card(self):
        """The labeler card: what this labeler is, in words."""
        return (f"Simulated labeler. Sees the gold reward plus {self.length:+.2f} a word, "
                f"{self.flattery:+.2f} a flattering sentence, {self.bullets:+.2f} for bullets, "
                f"{self.confidence:+.2f} a show of confidence, {self.caution:+.2f} for caution; "
                f"ranks it under logistic noise of scale {self.noise:.2f} (Bradley-Terry).")


