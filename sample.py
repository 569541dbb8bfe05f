"""Talk to a checkpoint, or see what several answer to the same prompts, side by side.

    python sample.py --model=out/ppo                                # a chat in the terminal
    python sample.py --model=out/ppo --reward_model=out/reward      # /score judges its answers
    python sample.py --models=out/sft,out/ppo,out/dpo               # held-out embedded prompts
    python sample.py --models=out/sft,out/ppo --prompt="How much is 10 minus 7?"

    {"prompt": P}            # of --data; P is text or a list of turns

In a chat, Ctrl-C stops the answer that is being written: what was said so far stays in the history.
At the prompt, Ctrl-C or Ctrl-D ends the chat.
"""

from dataclasses import dataclass
from typing import Annotated

import cli
from cli import NotNegative, Positive

Share = Annotated[float, lambda p: 0 < p <= 1, "must be above 0 and at most 1"]


@dataclass
class Config:
    # --- models
    model: str = ""  # checkpoint to talk to
    models: str = ""  # or several, with commas between them: their answers side by side
    reward_model: str = ""  # checkpoint for the scores; "" leaves them out
    # --- what --models are asked
    prompt: str = ""  # one prompt; "" takes those of --data
    data: str = "synthetic"  # "synthetic", the held-out embedded ones, or a file with prompts
    prompts: Positive[int] = 6  # how many of them
    # --- answers
    temperature: NotNegative[float] = 1.0  # 0 takes the most probable token
    top_p: Share = 1.0  # of the most probable tokens that together have this much; 1: all
    max_new_tokens: Positive[int] | None = None  # a longer answer is cut; auto: half of the
    #                                              context, at most 512
    # --- the run
    seed: NotNegative[int] = 1  # of every random stream
    device: str = "auto"  # "auto" (a GPU where there is one), "cpu", "cuda"


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import codecs
import contextlib
import re
import shutil
import signal
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from cli import UserError, note
from data import batches
from data.load import load_prompts
from data.synthetic.gold import gold_reward
from data.synthetic.world import all_prompts
from evaluate import response_rows, sequence_logprobs
from model import KVCache, autocast, one_launch
from reward import load_reward_model

STAGES = ("pretrain", *common.POLICIES)

# --- one answer ----------------------------------------------------------------------------------


def nucleus(p, top_p):
    """p (V,), its sum 1, with 0 for all but the smallest set of most probable tokens whose sum
    reaches top_p (Holtzman et al., 2020). Of equal ones the lower id comes first.

    Only here: the stages need the log-probabilities of exactly what they sample from.
    """
    ordered, order = p.sort(descending=True, stable=True)
    kept = order[:int((ordered.cumsum(-1) < top_p).sum()) + 1]
    return torch.zeros_like(p).index_copy(0, kept, p[kept])


def choose(logits, temperature, top_p, generator):
    """The id of a token, sampled from logits (V,). generator: numpy's. FloatingPointError if they
    are not finite."""
    if not logits.isfinite().all():
        raise FloatingPointError("the logits are not finite")
    if temperature == 0:
        return int(logits.argmax())
    # fp64, and the largest is 0: no temperature, however small, makes a nan
    p = F.softmax((logits - logits.max()).double() / temperature, dim=-1)
    if top_p < 1:
        p = nucleus(p, top_p)
    cumulative = p.cumsum(-1)
    return int(torch.searchsorted(cumulative, generator.random() * cumulative[-1], right=True))


@torch.no_grad()
def stream(model, prompt, max_new_tokens, eos, temperature=1.0, top_p=1.0, generator=None):
    """Yield the ids of one answer as they are sampled, EOS included.

    model: frozen (common.freeze): on a GPU a graph holds the addresses of its bf16 weights.
    prompt: ids, which fit the context together with max_new_tokens. With top_p=1 this is what
    `generate` does to one row: the generator's numbers, in order, are its uniforms.
    """
    device, end = model.wte.weight.device, len(prompt) + max_new_tokens
    cache = KVCache(model.config, 1, end, device, model.h[0].attn.c_attn.weight.dtype)
    forward = lambda tokens, places: model(tokens, cache, places)[0, -1]
    tokens = torch.tensor([prompt], device=device)  # first all of it, then one token at a time
    for position in range(len(prompt), end):
        places = torch.arange(position - tokens.shape[1], position, device=device)[None]
        with autocast(device):
            if device.type == "cuda" and position == len(prompt) + 1:
                forward = one_launch(forward, tokens, places)
            hidden = forward(tokens, places)
        token = choose(model.logits(hidden), temperature, top_p, generator)
        yield token
        if token == eos:
            return
        tokens = torch.tensor([[token]], device=device)


def load(path, device):
    """(path, frozen model, its tokenizer, its checkpoint without weights)."""
    model, *rest = common.load_policy(path, STAGES, device)
    return path, common.freeze(model), *rest


def visible(text):
    """The text without what a terminal would obey: control characters, but tab and line break."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


class TextStream:
    """Ids to text as they come. A character may need several tokens: it waits for the last one."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token):
        """The text that is complete with this id; EOS has none."""
        if token == self.tokenizer.eos:
            return ""
        return self.decoder.decode(self.tokenizer.encoding.decode_single_token_bytes(token))

    def end(self):
        """A character that is not complete, as the replacement character; or nothing."""
        return self.decoder.decode(b"", final=True)


def answer_limit(config, path, model):
    """The most tokens of an answer."""
    size = model.config.block_size
    if (config.max_new_tokens or 0) >= size:
        raise UserError(f"--max_new_tokens={config.max_new_tokens}: the context of {path} holds "
                        f"{size} tokens, and the prompt needs some of them")
    return config.max_new_tokens or min(size // 2, 512)


def load_judge(config, device):
    """(reward model, its tokenizer) or None."""
    return load_reward_model(config.reward_model, device)[:2] if config.reward_model else None


def score(judge, turns, answer, tokenizer):
    """The reward model's score of an answer {"text", "ids", "finished"} to turns (or text).

    It sees the sampled ids, or the text in its own tokens where its tokenizer is another one.
    UserError where it cannot be judged: cut, or too long.
    """
    model, own = judge
    if not answer["finished"]:
        raise UserError("no score: it is read at EOS, and this answer does not end with EOS")
    ids = answer["ids"] if own.hash == tokenizer.hash else [*own.encode(answer["text"]), own.eos]
    prompt, size = own.encode_prompt(turns), model.gpt.config.block_size
    if len(prompt) + len(ids) > size:
        raise UserError(f"no score: the dialogue has {len(prompt) + len(ids)} tokens, and the "
                        f"context of the reward model holds {size}")
    return batches.over_rows(model, *response_rows([prompt], [dict(ids=ids)]), own.pad,
                             model.shift.device).item()


# --- side by side --------------------------------------------------------------------------------


def read_prompts(config, models, limit):
    """The texts (or turns) that leave every model room for an answer of `limit` tokens."""
    texts, size = [config.prompt], min(model.config.block_size for _, model, _ in models)
    if not config.prompt:
        side = "held-out" if config.data == "synthetic" else "all"
        [found] = load_prompts(config.data, {side: config.prompts}, models[0][2], size - limit)
        texts = [text for text, *_ in found]
    kept = [text for text in texts if all(
        len(tokenizer.encode_prompt(text)) + limit <= model.config.block_size
        for _, model, tokenizer in models)]
    if not kept:
        raise UserError(f"the prompt is too long: of the smallest context, {size} tokens, {limit} "
                        "are kept for the answer (--max_new_tokens)")
    if len(kept) < len(texts):  # in the tokens of another model
        note(f"dropped {len(texts) - len(kept)} of {len(texts)} prompts: too long for a model")
    return kept


def print_answers(names, texts, facts):
    """One prompt's answers: columns as wide as the terminal, or else a line each."""
    width = (shutil.get_terminal_size().columns - 2 * (len(names) - 1)) // len(names)
    if not sys.stdout.isatty() or width < 20:
        for name, text, known in zip(names, texts, facts):
            print(f"{name}: {' '.join(visible(text).split())}  [{', '.join(known)}]")
        return
    wrap = lambda text: [part for line in visible(text).splitlines()
                         for part in textwrap.wrap(line, width) or [""]]
    for part in (names, texts, [f"[{', '.join(known)}]" for known in facts]):
        for line in zip_longest(*map(wrap, part), fillvalue=""):
            print("  ".join(cell.ljust(width) for cell in line).rstrip())


def side_by_side(config, device):
    paths = [path.strip() for path in config.models.split(",") if path.strip()]
    if not paths:
        raise UserError(f"--models={config.models}: names no checkpoint")
    models = [load(path, device)[:3] for path in paths]
    judge = load_judge(config, device)
    limit = min(answer_limit(config, path, model) for path, model, _ in models)
    texts = read_prompts(config, models, limit)
    first, first_tokenizer = models[0][1:]
    warmth = config.temperature or 1.0  # of the log-probabilities
    print(f"temperature {config.temperature}, top_p {config.top_p}, at most {limit} tokens\n"
          f"KL: log pi - log pi_first of this very answer, nats, at temperature {warmth}; pi_first "
          f"is {paths[0]} (k1 of one sample; a KL is its mean over many, all drawn at top_p 1)")
    if judge:
        print(f"score: by {config.reward_model}, - where an answer is cut or too long for it")
    others = [path for path, _, tokenizer in models if tokenizer.hash != first_tokenizer.hash]
    if others:
        print(f"no KL for {', '.join(others)}: the tokens are not those of {paths[0]}")
    for n, text in enumerate(texts):
        answers, facts = [], []
        for path, model, tokenizer in models:
            prompt = tokenizer.encode_prompt(text)
            # the same random numbers for every model: what differs is the models
            ids = list(stream(model, prompt, limit, tokenizer.eos, config.temperature, config.top_p,
                              common.stream(config.seed, "sample", "answers", n)))
            answer = dict(ids=ids, text=tokenizer.decode(ids), finished=ids[-1] == tokenizer.eos)
            known = []
            if judge:
                known.append("score -")
                with contextlib.suppress(UserError):
                    known = [f"score {score(judge, text, answer, tokenizer):.2f}"]
            if isinstance(text, str) and text in all_prompts():
                known.append(f"gold {gold_reward(text, answer['text']):.2f}")
            if path not in others:
                logp, first_logp = (sequence_logprobs(
                    m, *response_rows([prompt], [answer]), tokenizer.pad, warmth).item()
                    for m in (model, first))
                known.append(f"KL {logp - first_logp:.2f}")
            facts.append([*known, f"{len(ids)} tokens", "EOS" if answer["finished"] else "cut"])
            answers.append(answer["text"])
        turns = [dict(role="user", content=text)] if isinstance(text, str) else text
        print("\n" + "\n".join(visible(f"{turn['role']}: {turn['content']}") for turn in turns))
        print_answers(paths, answers, facts)


# --- chat ----------------------------------------------------------------------------------------


class Chat:
    """A dialogue in the terminal. A method do_NAME is the command /NAME, its docstring the help."""

    def __init__(self, config, device):
        self.config, self.device, self.judge = config, device, load_judge(config, device)
        self.generator = common.stream(config.seed, "sample", "chat")
        self.system, self.history = "", []  # turns, user and assistant in alternation
        self.last = None  # (turns, answer, tokenizer), for /score
        self.load(config.model)

    def load(self, path):
        _, model, tokenizer, checkpoint = load(path, self.device)
        self.limit = answer_limit(self.config, path, model)
        self.model, self.tokenizer, self.path = model, tokenizer, path
        print(f"({path}: {checkpoint['stage']}, {model.num_params():,} parameters, a context of "
              f"{model.config.block_size} tokens, answers of at most {self.limit})")

    def answer(self, turns):
        """Print the answer to `turns`, which end with the user's, as it is sampled; keep both."""
        before = len(turns)
        room = self.model.config.block_size - self.limit
        system = [dict(role="system", content=self.system)] if self.system else []
        prompt = self.tokenizer.encode_prompt(system + turns)
        while len(prompt) > room and len(turns) > 1:  # a question goes with its answer
            turns = turns[2:]
            prompt = self.tokenizer.encode_prompt(system + turns)
        if len(prompt) > room:
            raise UserError(f"too long: {len(prompt)} tokens with the system prompt; {room} fit, "
                            f"with {self.limit} kept for the answer (--max_new_tokens)")
        if len(turns) < before:
            print(f"(dropped the oldest {before - len(turns)} turns: the context is full)")
        ids, text, stops = [], TextStream(self.tokenizer), []
        print(f"{Path(self.path).name}> ", end="", flush=True)
        # a flag, not an exception: one that is raised inside a finaliser is lost
        before_it = signal.signal(signal.SIGINT, lambda *_: stops.append(True))
        try:
            for token in stream(self.model, prompt, self.limit, self.tokenizer.eos,
                                self.config.temperature, self.config.top_p, self.generator):
                ids.append(token)
                print(visible(text.add(token)), end="", flush=True)
                if stops:
                    break
        finally:
            signal.signal(signal.SIGINT, before_it)
        finished = ids[-1:] == [self.tokenizer.eos]
        end = "" if finished else " [stopped]" if stops else f" [cut at {self.limit} tokens]"
        print(visible(text.end()) + end)
        answer = dict(ids=ids, text=self.tokenizer.decode(ids), finished=finished)
        self.history = [*turns, dict(role="assistant", content=answer["text"])]
        self.last = system + turns, answer, self.tokenizer

    def do_reset(self, rest):
        """/reset: forget the history"""
        self.history, self.last = [], None
        print("(a new dialogue)")

    def do_system(self, rest):
        """/system TEXT: set the system prompt, or clear it; the dialogue starts again"""
        self.system = rest
        print("(system prompt set)" if rest else "(no system prompt)")
        self.do_reset("")

    def do_regenerate(self, rest):
        """/regenerate: answer the last message again"""
        if not self.history:
            raise UserError("there is no message to answer again")
        self.answer(self.history[:-1])

    def do_model(self, rest):
        """/model PATH: talk to another checkpoint, which reads the same history"""
        if not rest:
            raise UserError(f"the model is {self.path}; /model PATH takes another")
        self.load(rest)

    def set_number(self, name, text):
        if text:
            value = getattr(cli.read_flags(Config, [f"--{name}={text}"]), name)
            setattr(self.config, name, value)
        print(f"({name} {getattr(self.config, name)})")

    def do_temperature(self, rest):
        """/temperature X: sample at temperature X, 0 takes the most probable token"""
        self.set_number("temperature", rest)

    def do_top_p(self, rest):
        """/top_p X: sample from the most probable tokens that together have X, 1 takes all"""
        self.set_number("top_p", rest)

    def do_score(self, rest):
        """/score: what the reward model gives the last answer"""
        if not self.judge:
            raise UserError("there is no reward model: start with --reward_model=PATH")
        if not self.last:
            raise UserError("there is no answer to score")
        print(f"(score {score(self.judge, *self.last):.3f} by {self.config.reward_model})")

    def do_help(self, rest):
        """/help: this list"""
        for name in dir(self):
            if name.startswith("do_"):
                usage, text = getattr(self, name).__doc__.split(": ")
                print(f"  {usage:16}{text}")
        print("  Ctrl-C stops an answer; at the prompt, Ctrl-C or Ctrl-D ends the chat")

    def do_quit(self, rest):
        """/quit: end the chat"""
        raise EOFError

    def read(self, line):
        """Do what a line says: a command, or a message to answer."""
        if not line.startswith("/"):
            return self.answer([*self.history, dict(role="user", content=line)])
        name, _, rest = line[1:].partition(" ")
        command = getattr(self, f"do_{name}", None)
        if command is None:
            print(f"there is no command /{name}; these there are:")
            command = self.do_help
        command(rest.strip())

    def run(self):
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() then edits its line
        sys.stdin.reconfigure(errors="replace")  # half a character in what is typed
        print("/help lists the commands")
        while True:
            try:
                line = input("you> ").strip()
            except (EOFError, KeyboardInterrupt):
                print("\nbye")
                return
            try:
                if line:
                    self.read(line)
            except UserError as error:
                print(f"({error})")
            except KeyboardInterrupt:
                print("\n(stopped)")
            except EOFError:  # /quit
                print("bye")
                return


def main(config):
    if bool(config.model) == bool(config.models):
        raise UserError("give either --model=PATH, to talk to it, or --models=PATH,PATH,..., to "
                        "see their answers side by side")
    default = Config()
    for name in ("prompt", "data", "prompts"):
        given = getattr(config, name) != getattr(default, name)
        if given and config.model:
            raise UserError(f"--{name} goes with --models: --model is a chat, which asks nothing")
        if given and config.prompt and name != "prompt":
            raise UserError(f"--{name} and --prompt exclude each other: choose one")
    device = common.find_device(config.device)
    torch.set_float32_matmul_precision("high")
    side_by_side(config, device) if config.models else Chat(config, device).run()


if __name__ == "__main__":
    cli.run_main(main, CONFIG)
