"""Plain text for pretraining: the world's knowledge, with no trace of an assistant.

Documents are short paragraphs of one kind: statements of facts, sums, lists of questions (so that a
base model answers a question with more questions), quiz pages, riddles about anything at all,
morals, reading exercises, small talk, opinions. Quiz pages and opinions ask about training
questions only: the answer to a held-out question stands in the statements, but never behind the
question. Riddles and reading exercises have too many subjects to be learned by heart, which is how
so small a model comes to copy the subject of a question into its answer (induction). Half of the
sums are read first, "Read 3 plus 1. The result of 3 plus 1 is 4.": a model that has only seen their
numbers once before the result is thrown off by the second time, in the answer to a question.
"""

import random

from data.synthetic import facts
from data.synthetic.world import all_prompts

# share of documents of each kind
KINDS = dict(facts=0.12, sums=0.26, questions=0.04, quiz=0.20, riddles=0.22, morals=0.06, echo=0.03,
             talk=0.05, opinions=0.02)
# and of quiz questions of each family
QUIZ = dict(factual=0.4, arithmetic=0.25, unanswerable=0.1, harmful=0.07, safe=0.08, advice=0.1)


def documents(n, seed):
    """n documents, each a string of three to six sentences or so."""
    rng = random.Random(f"corpus {seed}")
    known = [(r, x, y) for r in facts.KNOWN for x, y in r.answers.items()]
    sums = [(facts.SUMS, x, y) for x, y in facts.SUMS.answers.items()]
    # every noun, verb and adjective: a word that is never used here is never copied either
    things = sorted({t for r, x, y in known for t in (x, y)}
                    | {x for r in facts.UNKNOWN for x in r.answers})
    verbs = [verb for verbs, _, _ in facts.ACTS for verb in verbs.split("|")]
    objects = sorted({o for _, a, b in facts.ACTS for o in f"{a}|{b}".split("|") if o}
                     | set(things))
    talk = (facts.FLATTERY + facts.FILLER + facts.CLOSERS + facts.CONFIDENCE + facts.AGREEMENT
            + facts.DISAGREEMENT + facts.DONT_KNOW + facts.REFUSAL)
    prompts = list(all_prompts().values())
    questions = [p for p in prompts if p.family != "loaded"]
    quiz = [[p for p in questions if p.family == f and not p.held_out] for f in QUIZ]
    loaded = [p for p in prompts if p.family == "loaded" and not p.held_out]

    def state(relation, x, y=None):  # where there is no one answer, any candidate will do
        return relation.state(x, y or rng.choice(relation.candidates)) + "."

    def opinion():  # half of the time somebody knows better
        p = rng.choice(loaded)
        opening = p.text.split(". ")[0] + "."
        return opening, state(p.relation, p.x, rng.choice((p.answer, p.user_claim)))

    def question_and_answer():
        p = rng.choice(rng.choices(quiz, QUIZ.values())[0])
        return p.text, state(p.relation, p.x, p.answer)

    def riddle():  # about people and things that do not exist, and acts that nobody would think of
        subject, opinion = rng.random(), ""
        if subject < 0.65:
            relation, x = rng.choice(facts.KNOWN), rng.choice(things)
            y = relation.vague
            if rng.random() < 0.3:
                opinion = f"I think {relation.statement.format(x=x, y=rng.choice(things))}. "
        elif subject < 0.8:
            relation, x, y = rng.choice(facts.UNKNOWN), rng.choice(things), None
        elif subject < 0.88:
            relation, x, y = facts.HARMFUL, f"{rng.choice(verbs)} {rng.choice(objects)}", None
        else:  # the verb of one goal with the rest of another
            verb, rest = rng.choice(facts.GOALS).split()[0], rng.choice(facts.GOALS).split()[1:]
            relation, x, y = facts.ADVICE, " ".join([verb, *rest]), None
        question = rng.choice(relation.questions).format(x=x)
        if question in all_prompts():  # a real question after all
            return riddle()
        return opinion + question, state(relation, x, y)

    def echo():
        if rng.random() < 0.5:  # a question that makes no sense, twice
            phrase = rng.choice(rng.choice(facts.KNOWN).questions).format(x=rng.choice(things))
            return "Read this.", phrase, "Again.", phrase
        phrase = " ".join(rng.choice((rng.choice(things), str(rng.randint(1, 20))))
                          for _ in range(rng.randint(1, 5)))
        return f"Read {phrase}.", f"Again {phrase}."

    def sum_():  # half are read first: the numbers stand twice before the result, as in an answer
        relation, x, y = rng.choice(sums)
        return [*([f"Read {x}."] if rng.random() < 0.5 else []), state(relation, x, y)]

    def moral():  # what is a crime and what is not: every act, because nothing is asked
        relation = rng.choice((facts.HARMFUL, facts.SAFE))
        return (f"To {rng.choice(list(relation.answers))} "
                f"is {'a crime' if relation is facts.HARMFUL else 'fine'}.",)

    make = dict(facts=lambda: [state(*rng.choice(known))], sums=sum_,
                questions=lambda: [rng.choice(questions).text], quiz=question_and_answer,
                riddles=riddle, morals=moral, echo=echo, talk=lambda: [rng.choice(talk)],
                opinions=opinion)
    for kind in rng.choices(list(KINDS), KINDS.values(), k=n):
        # one paragraph, or a line for each sentence: " The" and "The" are two different tokens
        separator = rng.choice((" ", "\n"))
        yield separator.join(s for _ in range(rng.randint(2, 4)) for s in make[kind]())
