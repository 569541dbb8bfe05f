"""Stage 2a, labels: sample K answers to each prompt, and have a labeler rank them.

    y_1 .. y_K ~ pi(. | x),   ranks by a simulated labeler: perceived value = gold + biases + noise
                              by a reward model: its score; by principles: the share of pairs won

Answers are drawn at temperature 0.7, distinct and complete (ended with EOS); a prompt with fewer
than two is skipped. They go to answers.jsonl, a chunk at a time; then the labeler ranks them, and
the result is rankings.jsonl. What the labeler is like stands in card.json. docs/labels.md has more.

    python label.py                      # 5,500 training prompts and 500 held-out ones, K = 6
    python label.py --length=0.1         # a labeler with a strong taste for long answers
    python label.py --labeler=page --prompts=200 --held_out=20 --k=3 --out=out/mine        # you
    python label.py --labeler=model --init=out/dpo --out=out/label2      # out/reward ranks
    python label.py --labeler=principles --answers=out/label/answers.jsonl --out=out/label3
    python label.py --labeler=principles --judge=out/chat --answers=out/data/hh_rlhf.jsonl

    {"prompt": P}                                            # of --data
    {"prompt": P, "completions": [text, text, ...]}          # of --answers, or pairs, or rankings
"""

from dataclasses import asdict, dataclass, fields

import cli
from cli import NotNegative, Positive, UserError
from data.synthetic.people import Labeler


@dataclass
class Config(cli.Config):
    out: str = "out/label"  # output folder: answers.jsonl, rankings.jsonl, card.json
    # --- what is ranked
    init: str = "out/sft"  # checkpoint to sample from; several, with commas between, take turns
    data: str = "synthetic"  # prompts: "synthetic" or a file of any records with prompts
    answers: str = ""  # a file of answers, pairs or rankings to rank again; nothing is sampled
    prompts: Positive[int] = 5500  # training prompts, at most
    held_out: NotNegative[int] = 500  # held-out prompts, at most, ranked for testing only
    skip_bad: bool = False  # go on without the records that cannot be used, and count them
    # --- answers
    k: Positive[int] = 6  # answers per prompt
    oversample: NotNegative[int] = 0  # draws per prompt beyond K, so that duplicates can be dropped
    temperature: Positive[float] = 0.7  # of the samples, as Stiennon et al. drew theirs; at 1 a
    #                                     small model slips often, and slips teach little
    max_new_tokens: Positive[int] | None = None  # longer responses are cut, and get no EOS
    chunk: Positive[int] = 64  # prompts sampled together
    # --- who ranks
    labeler: str = "simulated"  # "simulated", "model", "principles"; a person: "terminal", "page"
    reward_model: str = "out/reward"  # of --labeler=model: the checkpoint whose score ranks
    score_by: str = "mean"  # of an ensemble of reward models: "mean", "min", "mean-std"
    principles: str = ""  # a file, one a line; "": data/principles.txt, or of the embedded world
    judge: str = ""  # checkpoint that chooses by the principles; "": by rule, embedded world only
    repeat: NotNegative[float] = 0.1  # share of a person's questions that repeat an earlier one
    port: NotNegative[int] = 0  # of the page; 0: any that is free
    # --- the simulated labeler
    noise: NotNegative[float] = Labeler.noise  # scale of the logistic noise, in units of gold
    length: float = Labeler.length  # bias: for each word
    flattery: float = Labeler.flattery  # bias: for each flattering sentence
    bullets: float = Labeler.bullets  # bias: for a bullet list
    confidence: float = Labeler.confidence  # bias: for a show of confidence
    caution: float = Labeler.caution  # bias: for "I do not know" and refusals


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

from functools import partial
from itertools import islice
from pathlib import Path

import common
from cli import first_process, note, processes, progress, say, table
from data import batches, labels, principles
from data.files import file_hash, refusing, whole_file
from data.load import load_prompts
from data.records import (append_jsonl, check_answers, prompt_digest, read_sides, whole_lines,
                          write_jsonl)
from data.synthetic import principles as rules
from data.synthetic.gold import gold_reward
from data.synthetic.world import all_prompts, lookup, sample_prompts
from reward import load_reward_model

PERSONS = ("terminal", "page")


# --- what is ranked ------------------------------------------------------------------------------


def check_folder(config):
    """UserError where this run would write over a person's choices, or over its own input."""
    out, choices = Path(config.out), Path(config.out) / "choices.jsonl"
    for name in ("answers", "data"):
        path = Path(getattr(config, name))
        if path.is_file() and path.resolve().parent == out.resolve():
            raise UserError(f"--{name}={path} lies in --out={out}, whose files this run writes: "
                            "choose another --out=DIR")
    made = len(choices.read_bytes().splitlines()) if choices.exists() else 0
    goes_on = config.labeler in PERSONS and not config.overwrite and (
        (out / "state.pt").exists() or common.finished(out, "card.json"))
    if made and not goes_on:
        raise UserError(f"{out} holds {made} choices of a person, which are never overwritten: "
                        f"choose another --out=DIR, or move {choices} away")


def load_writers(config, device):
    """[(model, tokenizer, checkpoint), ...] of --init, whose answers are ranked."""
    if "," not in config.init:
        common.ensure_input(config, "init", "sft")
    paths = [path.strip() for path in config.init.split(",")]
    if not all(paths):
        raise UserError(f"--init={config.init}: a name is missing beside a comma")
    writers = [common.load_policy(path, common.POLICIES, device) for path in paths]
    for path, (_, tokenizer, _) in zip(paths, writers):
        common.check_same_tokenizer(tokenizer, writers[0][1], path, paths[0])
    return writers


def choose_prompts(config, writers):
    """[{"prompt", "held_out"}, ...], of embedded ones also "world" and "policy"; each leaves room
    for an answer in the context of every writer."""
    context = min(model.config.block_size for model, *_ in writers)
    _, tokenizer, parent = writers[0]
    if config.data == "synthetic":
        found = [p for n, held_out in ((config.prompts, False), (config.held_out, True))
                 for p in sample_prompts(n, held_out, config.seed)]
        longest = max(len(tokenizer.encode_prompt(p.text)) for p in found)
        if longest + config.max_new_tokens > context:
            raise UserError(f"--max_new_tokens={config.max_new_tokens} and the longest prompt of "
                            f"{longest} do not fit the context of {context}")
        return [dict(prompt=p.text, held_out=p.held_out, world="synthetic", policy=parent["hash"])
                for p in found]
    counts = {"training": config.prompts, "held-out": config.held_out}
    counts = {side: n for side, n in counts.items() if n}
    lists = load_prompts(config.data, counts, tokenizer, context - config.max_new_tokens,
                         skip_bad=config.skip_bad)
    return [dict(prompt=prompt, held_out=side == "held-out")
            for side, found in zip(counts, lists) for prompt, *_ in found]


def read_answers(config):
    """The records of --answers, with "ranks" where the file has them: of each side at most so many
    as --prompts and --held_out say, by a hash of the prompt."""
    sides, lines = read_sides(config.answers, check_answers, (), config.skip_bad), []
    for held_out, records, most in ((False, sides.train, config.prompts),
                                    (True, sides.held_out, config.held_out)):
        if config.labeler in PERSONS:
            few = [r for r in records if len(r["completions"]) <= 9]
            if len(few) < len(records):
                note(f"{config.answers}: dropped {len(records) - len(few)} records with more than "
                     "9 answers, which a person cannot rank")
            records = few
        chosen = sorted(records, key=prompt_digest)[:most]
        if len(chosen) < len(records):
            note(f"{config.answers}: left out {len(records) - len(chosen)} of {len(records)} "
                 f"records, over --{'held_out' if held_out else 'prompts'}={most}")
        for r in chosen:
            if r["prompt"] not in (all_prompts() if isinstance(r["prompt"], str) else ()) or \
                    r.get("world") != "synthetic" or "policy" not in r:
                r = {k: v for k, v in r.items() if k not in ("world", "policy")}
            lines.append(r | dict(held_out=held_out))
    if not lines:
        raise UserError(f"--answers={config.answers}: no record has two answers")
    return lines


def drawn_before(path, chunk, prompts):
    """The lines of answers.jsonl that an interrupted run has left, up to the last whole chunk.
    UserError if they are not those of these prompts."""
    lines = common.by_the_first(lambda: whole_lines(path, chunk, len(prompts)))
    with refusing(f"{path} does not hold answers to these prompts: --overwrite=true starts again"):
        for line, prompt in zip(lines, prompts, strict=False):
            if line != line | prompt or not all(isinstance(c, str) for c in line["completions"]):
                raise ValueError(f"prompt {prompt['prompt']!r:.40}")
    return lines


def uniforms_behind(start, seed, name, numbers, *size):
    """`common.uniforms` of prompts that are numbered from the first one of their chunk."""
    return common.uniforms(seed, "label", name, 0, [start + n for n in numbers], *size)


def draw(run, config, writers, prompts):
    """The prompts with their answers, {"completions": [text, ...]}, fewer than two among them; of
    several writers with "sources", who wrote which. Each line goes to answers.jsonl."""
    path = run.folder / "answers.jsonl"
    lines = drawn_before(path, config.chunk, prompts)
    each = -(-(config.k + config.oversample) // len(writers))  # draws of each writer
    for start in progress(range(len(lines), len(prompts), config.chunk), "answers",
                          initial=len(lines) // config.chunk, total=-(-len(prompts) //
                                                                      config.chunk)):
        run.save_state(start, len(prompts))
        part, samples = prompts[start:start + config.chunk], []
        for s, (model, tokenizer, _) in enumerate(writers):
            ids = [tokenizer.encode_prompt(p["prompt"]) for p in part]
            name = f"answers {s}" if s else "answers"
            uniforms = partial(uniforms_behind, start, config.seed, name)
            samples.append(batches.sample_texts(
                model, tokenizer, ids, config.max_new_tokens, uniforms, config.temperature,
                batch_size=len(ids) * each, samples=each))
        new = []
        for i, prompt in enumerate(part):
            texts = {}  # {text: who wrote it first}; with every prompt another one begins
            for j in range(each * len(writers)):
                who = (start + i + j) % len(writers)
                s = samples[who][i * each + j // len(writers)]
                # distinct and complete; white space alone is no answer to any later stage
                if s["finished"] and s["text"].strip() and len(texts) < config.k:
                    texts.setdefault(s["text"], who)
            new.append(dict(prompt=prompt["prompt"], completions=[*texts], **{
                k: v for k, v in prompt.items() if k != "prompt"}))
            if len(writers) > 1:
                new[-1]["sources"] = [*texts.values()]
        append_jsonl(path, new)
        lines += new
    return lines


def facts(line, noise):
    """What a record says beside its answers and ranks."""
    known = dict(held_out=line["held_out"])
    if "world" in line:
        prompt = line["prompt"]
        known = dict(gold=[round(gold_reward(prompt, t), 3) for t in line["completions"]],
                     family=lookup(prompt).family, **known, world="synthetic", noise=noise,
                     policy=line["policy"])
    known |= {"sources": line["sources"]} if "sources" in line else {}
    return known | ({"before": line["ranks"]} if "ranks" in line else {})  # ranks of --answers


# --- who ranks: each gives (rank, card, about, parents). rank([(n, item), ...]) of some prompts, n
# their numbers, is for each what its record gets, its "ranks" among it, or None where the judge's
# context is too short -----------------------------------------------------------------------------


def simulated(config, device):
    labeler = Labeler(**{f.name: getattr(config, f.name) for f in fields(Labeler)})

    def rank_one(n, item):
        # two people rank the same answers; the second only measures how far they agree
        ranks, second = (labeler.rank(item["prompt"], item["completions"], item["gold"],
                                      common.stream(config.seed, "label", f"labeler {person}", n))
                         for person in (1, 2))
        return dict(ranks=ranks, second=second)

    return lambda part: [rank_one(*p) for p in part], labeler.card(), asdict(labeler), {}


def by_model(config, device):
    """Online DPO, and Gao's gold: a reward model in a person's place."""
    common.ensure_input(config, "reward_model", "reward")
    model, tokenizer, parent = load_reward_model(config.reward_model, device, config.score_by)

    def rank(part):
        encoded = []  # (ids, mask) of each answer to each prompt, none where one is too long
        for _, item in part:
            head = tokenizer.prompt_pieces(item["prompt"])
            rows = tokenizer.encode_pieces(
                [[*head, (text, 1), (tokenizer.eos, 1)] for text in item["completions"]])
            fit = max(len(ids) for ids, _ in rows) <= model.gpt.config.block_size
            encoded.append(rows if fit else [])
        flat, scores = [row for rows in encoded for row in rows], []
        if flat:
            scores = batches.over_rows(model, *zip(*flat), tokenizer.pad, device)
            common.check_finite(config, f"prompts from {part[0][0]} on", score=scores)
        rest = iter(map(float, scores))
        scores = [list(islice(rest, len(rows))) for rows in encoded]
        return [dict(ranks=principles.ranks_of(s, 0.0), scores=s) if s else None for s in scores]

    accuracy = parent["metrics"].get("accuracy")
    about = dict(reward_model=config.reward_model, score_by=config.score_by, hash=parent["hash"],
                 accuracy=accuracy)
    card = (f"A reward model ranks by its score, equal ones tie: {config.reward_model} "
            f"({parent['hash']})" + (f", which orders {accuracy:.1%} of its held-out pairs as "
                                     "their labels do" if accuracy is not None else "") + ".")
    return rank, card, about, dict(reward=parent["hash"])


def by_principles(config, device):
    """RLAIF, after Bai et al. 2022: which of two answers is better under each principle?"""
    path = Path(config.principles or (principles if config.judge else rules).FILE)
    wanted = principles.read_principles(path)
    about = dict(principles=wanted, judge=config.judge or "by rule")
    parents = dict(principles=file_hash(path)[:16])
    card = f"AI feedback by {len(wanted)} principles of {path}, "
    if not config.judge:
        tests = rules.known(wanted, path)
        judge = lambda item: (rules.better(item["prompt"], item["completions"], tests), {})
        card += "judged by rule."
    else:
        model, tokenizer, parent = common.load_policy(config.judge, common.POLICIES, device)
        judge = lambda item: principles.ask(model, tokenizer, item["prompt"], item["completions"],
                                            wanted)
        card += f"judged by {config.judge} ({parent['hash']})."
        about["hash"] = parents["judge"] = parent["hash"]

    def rank_one(item):
        found = judge(item)
        if found is None:
            return None
        better, orders = found
        scores = principles.mean_wins(better)
        return dict(ranks=principles.ranks_of(scores), scores=scores, **orders)

    return lambda part: [rank_one(item) for _, item in part], card, about, parents


def by_person(config, device):
    about = dict(where=config.labeler, repeat=config.repeat)
    card = (f"A person ({config.labeler}); {config.repeat:.0%} of the questions repeat an earlier "
            "one.")
    return None, card, about, {}


LABELERS = dict(simulated=simulated, model=by_model, principles=by_principles, terminal=by_person,
                page=by_person)


def rank_all(run, config, rank, items):
    """What rank says of each of `items`, (n, item), in order. Until all are ranked they stand in
    another file than rankings.jsonl: no stage trains on half of them by mistake."""
    path = run.folder / "rankings.jsonl.part"
    size = config.chunk if config.labeler == "model" else 1  # prompts that are scored together
    found = common.by_the_first(lambda: whole_lines(path, size, len(items)))
    if not found and first_process():
        path.unlink(missing_ok=True)
    with refusing(f"{path} does not hold ranks of these answers: --overwrite=true starts again"):
        for ranked, (_, item) in zip(found, items, strict=False):
            if ranked is not None and len(ranked["ranks"]) != len(item["completions"]):
                raise ValueError(f"prompt {item['prompt']!r:.40}")
    for start in progress(range(len(found), len(items), size), "label",
                          initial=len(found) // size, total=-(-len(items) // size)):
        found += rank(items[start:start + size])
        append_jsonl(path, found[start:])
    return found


def ask_person(run, config, items):
    """(rankings so far, figures or None while some are missing): each choice is on disk at once."""
    from data.page import serve
    from data.person import Session, ask_in_terminal
    # in random order: who stops early has ranked some that are held out, too
    order = common.stream(config.seed, "label", "order").permutation(len(items))
    session = Session([items[n] for n in order], run.folder, config.seed, config.repeat)
    try:
        serve(session, config.port) if config.labeler == "page" else ask_in_terminal(session)
        records, known = session.records(), session.progress()
        if not session.finished:
            say(f"\n{len(records)} of {len(items)} prompts are ranked; this goes on:\n"
                f"    {cli.command_line()}")
            if records:
                say(f"and {run.folder}/rankings.jsonl can be trained on as it is")
            return records, None
    finally:
        session.close()
    return records, dict(self_agreement=known["agreement"], self_pairs=known["agreement_pairs"])


def check_flags(config):
    """UserError for flags that contradict each other, or that nothing would read."""
    person = config.labeler in PERSONS
    if config.labeler not in LABELERS:
        raise UserError(f"--labeler={config.labeler}: choose one of {', '.join(LABELERS)}")
    if config.k < 2:
        raise UserError(f"--k={config.k}: a ranking needs at least two answers")
    if person and processes()[1] > 1:
        raise UserError(f"--labeler={config.labeler}: a person answers one process; start it "
                        "without torchrun")
    if person and config.k > 9:
        raise UserError(f"--k={config.k}: a person ranks at most 9 answers")
    if config.repeat > 0.5:
        raise UserError(f"--repeat={config.repeat}: the share of repeated questions is 0 to 0.5")
    by = config.labeler == "principles"
    biases = [(f.name, "--labeler=simulated", config.labeler == "simulated")
              for f in fields(Labeler)]
    sampling = [(name, "no --answers: nothing is sampled", not config.answers)
                for name in ("init", "data", "k", "oversample", "temperature", "max_new_tokens")]
    cli.check_needs(config, (
        ("judge", "--labeler=principles", by), ("principles", "--labeler=principles", by),
        ("reward_model", "--labeler=model", config.labeler == "model"),
        ("score_by", "--labeler=model", config.labeler == "model"),
        ("port", "--labeler=page", config.labeler == "page"),
        ("repeat", "a person as the labeler", person), *biases, *sampling))


def main(config):
    check_flags(config)
    device = common.set_up(config, "label")
    check_folder(config)

    # --- prompts or answers, and the labeler ---------------------------------
    writers, parents = [], {}
    if config.answers:
        lines = read_answers(config)
    else:
        writers = load_writers(config, device)
        config = common.sized(config, "label", writers[0][0])
        lines = choose_prompts(config, writers)
        parents = {config.init.split(",")[n].strip() if n else c["stage"]: c["hash"]
                   for n, (*_, c) in enumerate(writers)}
    by_rule = config.labeler == "simulated" or config.labeler == "principles" and not config.judge
    foreign = sum("world" not in line for line in lines)
    if by_rule and foreign:
        raise UserError(
            f"--labeler={config.labeler} knows only the embedded world, and {foreign} of "
            f"{len(lines)} prompts are not from it: choose model, terminal or page, or principles "
            "with --judge=CHECKPOINT")
    rank, card, about, judges = LABELERS[config.labeler](config, device)
    run = common.Run("label", config, device, parents | judges, result="card.json",
                     others=("rankings.jsonl", "rankings.jsonl.part"))
    print(card)

    # --- sample and rank -----------------------------------------------------
    run.load_state()
    if config.answers:
        run.save_state(0, 0)
    else:
        lines = draw(run, config, writers, lines)
        run.save_state(len(lines), len(lines))
    noise = config.noise if config.labeler == "simulated" else 0.0
    items = [(n, dict(prompt=line["prompt"], completions=line["completions"], **facts(line, noise)))
             for n, line in enumerate(lines) if len(line["completions"]) > 1]
    if not items:
        raise UserError(f"no prompt got two complete answers: does {config.init} end its answers "
                        f"within {config.max_new_tokens} tokens?")
    if config.labeler in PERSONS:
        records, more = ask_person(run, config, [item for _, item in items])
        if more is None:
            return
    else:
        more, ranked = {}, rank_all(run, config, rank, items)
        records = [{k: item[k] for k in ("prompt", "completions")} | found | {
            k: v for k, v in item.items() if k not in found}
            for (_, item), found in zip(items, ranked) if found is not None]
    if not records:
        raise UserError(f"none of {len(items)} prompts is ranked: " + (
            "all were skipped" if config.labeler in PERSONS else
            "with its answers each is too long for the context of the judge"))

    # --- what the labels are like --------------------------------------------
    metrics = dict(prompts=len(records), skipped=len(lines) - len(items))
    if config.labeler != "simulated":
        metrics["left_out"] = len(items) - len(records)
    metrics |= more | labels.describe(records)
    for r in records[:6]:
        run.log("sample", **{k: r.get(k) for k in ("prompt", "completions", "ranks", "gold")})
    write_jsonl(run.folder / "rankings.jsonl", records)
    if first_process():
        (run.folder / "rankings.jsonl.part").unlink(missing_ok=True)
        with whole_file(run.folder / "card.json", "w") as file:
            file.write(cli.to_json(dict(card=card, labeler=about, parents=run.parents,
                                        metrics=metrics), indent=1) + "\n")
    first = records[0]
    asked = first["prompt"] if isinstance(first["prompt"], str) else first["prompt"][-1]["content"]
    value = first.get("gold") or first.get("scores")
    best = sorted(range(len(first["ranks"])), key=lambda i: (first["ranks"][i], value and value[i]))
    say(table(dict(rank=[first["ranks"][i] for i in best])
              | ({"gold" if "gold" in first else "score": [f"{value[i]:.2f}" for i in best]}
                 if value else {})
              | {f"an answer to: {cli.shorten(asked, 80)}": [
                  cli.shorten(first["completions"][i], 100) for i in best]}))
    say("\n" + labels.words(metrics, config.init))
    run.finish(metrics, f"python reward.py --data={config.out}/rankings.jsonl --init="
               + config.init.split(",")[0])


if __name__ == "__main__":
    cli.run_main(main, CONFIG, CONFIG.out)
