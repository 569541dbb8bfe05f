"""The chat and the side-by-side comparison, through a real terminal where it matters."""

import contextlib
import dataclasses
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import common
import numpy as np
import pytest
import sample
import torch
from cli import UserError
from conftest import ROOT, run_script
from data.synthetic.gold import gold_reward
from data.tokenizer import TEMPLATES, Tokenizer, load_tokenizer
from evaluate import sequence_logprobs
from model import GPT, KVCache, generate
from reward import load_reward_model
from sample import Chat, Config, TextStream, choose, nucleus, score, stream, visible
from sft import Config as SFTConfig
from tiny_runs import make_inputs

ARITHMETIC = "How much is 10 minus 7?"  # a prompt of the embedded world


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """sft, reward, other (as sft, but less sure), long (never ends), small (a reward model)."""
    folder = make_inputs(tmp_path_factory.mktemp("sample"))
    model, tokenizer, _ = common.load_policy(folder / "sft", ("sft",), "cpu")
    save = lambda name, model, stage: (folder / name).mkdir() or common.save_checkpoint(
        folder / name / "model.pt", model, stage, tokenizer, SFTConfig(), {})
    with torch.no_grad():
        model.ln_f.weight.mul_(0.5)
        save("other", model, "dpo")
        long = GPT(dataclasses.replace(model.config, block_size=20000))
        long.wte.weight[tokenizer.eos] = -3.0
        long.ln_f.bias.fill_(1.0)
    save("long", long, "ppo")
    # the reward model again, with a context of 12 tokens
    shutil.copytree(folder / "reward", folder / "small")
    content = torch.load(folder / "small" / "model.pt", weights_only=True)
    content["model"]["block_size"] = 12
    content["weights"]["gpt.wpe.weight"] = content["weights"]["gpt.wpe.weight"][:12]
    common.save_file(content, folder / "small" / "model.pt")
    return folder


@pytest.fixture
def tokenizer():
    return load_tokenizer("synthetic")


# --- choosing a token ----------------------------------------------------------------------------


@pytest.mark.parametrize("top_p, kept", [
    (0.01, [1]), (0.5, [1]), (0.51, [1, 2]), (0.75, [1, 2]), (0.76, [0, 1, 2]),
    (0.875, [0, 1, 2]), (0.9, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_the_nucleus_by_hand(top_p, kept):
    # catches a set that stops one token early or late; of two equal tokens both or the later one
    p = torch.tensor([0.125, 0.5, 0.25, 0.125], dtype=torch.double)
    found = nucleus(p, top_p)
    assert found.nonzero()[:, 0].tolist() == kept
    assert torch.equal(found[kept], p[kept])


def test_tokens_are_drawn_in_proportion_from_the_nucleus():
    # catches a token from outside it, one that is left out, a temperature that is turned around
    p = torch.tensor([0.1, 0.4, 0.2, 0.3])
    rng = np.random.default_rng(0)
    draw = lambda *how: np.bincount([choose(p.log(), *how, rng) for _ in range(4000)],
                                    minlength=4) / 4000
    np.testing.assert_allclose(draw(1.0, 0.85), np.array([0, 4, 2, 3]) / 9, atol=0.03)
    np.testing.assert_allclose(draw(1.0, 1.0), p, atol=0.03)
    np.testing.assert_allclose(draw(0.5, 1.0), p**2 / (p**2).sum(), atol=0.03)
    assert choose(p.log(), 0, 1.0, rng) == choose(p.log(), 1e-320, 1.0, rng) == 1


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_the_chat_samples_as_generate_does(tiny, temperature):
    # catches a position or cache slot that is off by one, a token too many, an EOS that is missed
    lengths = set()
    for seed in range(12):
        prompt = torch.randint(12, (1 + seed % 7,), generator=torch.Generator().manual_seed(seed))
        rng = lambda seed=seed: np.random.default_rng(seed)
        tokens, mask, done = generate(tiny, [prompt.tolist()], 17, seed, temperature,
                                      torch.from_numpy(rng().random((1, 17))))
        found = list(stream(tiny, prompt.tolist(), 17, seed, temperature, generator=rng()))
        assert found == tokens[0][mask[0].bool()].tolist()
        assert done.item() == (found[-1] == seed)
        lengths.add(len(found))
    assert len(lengths) > 2 and 17 in lengths


def test_a_small_top_p_is_greedy_and_the_cache_is_no_larger_than_needed(tiny, monkeypatch):
    # catches top_p that does not arrive, a cache of the whole context (8192 in a real model)
    sizes = []

    class Spy(KVCache):
        def __init__(self, config, batch_size, max_length, *rest):
            sizes.append((batch_size, max_length))
            super().__init__(config, batch_size, max_length, *rest)

    monkeypatch.setattr(sample, "KVCache", Spy)
    greedy = list(stream(tiny, [1, 2, 5], 9, 99, 0))
    random = np.random.default_rng(0)
    assert list(stream(tiny, [1, 2, 5], 9, 99, 1.0, 1e-9, random)) == greedy and len(greedy) == 9
    assert sizes == [(1, 12)] * 2


# --- text ----------------------------------------------------------------------------------------


def test_a_character_waits_for_all_of_its_tokens(tokenizer):
    # catches half a character on the screen, text that is lost
    text = "Añ 🌟日本 z"
    ids = [*tokenizer.encode(text), tokenizer.eos]
    assert len(ids) > len(text) + 5  # bytes
    shown = TextStream(tokenizer)
    parts = [shown.add(i) for i in ids]
    assert "".join(parts) == text and "🌟" in parts and "" in parts and shown.end() == ""


def test_half_a_character_is_shown_at_the_end_as_decode_shows_it(tokenizer):
    star = tokenizer.encode("🌟")
    for ids in (star[:2], [*star[:2], *tokenizer.encode("x 🌟")], [*star[1:], *star]):
        shown = TextStream(tokenizer)
        assert "".join(map(shown.add, ids)) + shown.end() == tokenizer.decode(ids)


def test_nothing_that_a_terminal_obeys_is_printed():
    # catches an answer that moves the cursor; line breaks, tabs and other scripts stay
    assert visible("a\x1b[2J\x07\r\x9b\x7f") == "a\ufffd[2J" + "\ufffd" * 4
    assert visible("é\n\tх\u3000日\xa0") == "é\n\tх\u3000日\xa0"


# --- score ---------------------------------------------------------------------------------------


def reversed_tokenizer(tokenizer):
    """The same vocabulary in which the texts have other ids: no merge but bytes, and ChatML."""
    ranks = {bytes([b]): 255 - b for b in range(256)}
    specials = {f"<|{name}|>": 256 + n for n, name in enumerate(("im_start", "im_end"))}
    return Tokenizer("bytes", ranks, specials, template=TEMPLATES["chatml"])


def test_a_score_is_that_of_the_row_that_the_reward_model_sees(folder, tokenizer):
    # catches a score read before EOS, without the system turn, of text that was tokenised again
    judge = load_reward_model(folder / "reward", "cpu")[:2]
    turns = [dict(role="system", content="Be."), dict(role="user", content="Hi.")]
    ids = [*tokenizer.encode("Y"), *tokenizer.encode("e"), *tokenizer.encode("s."), tokenizer.eos]
    assert ids != [*tokenizer.encode("Yes."), tokenizer.eos]
    row = lambda ids: judge[0](torch.tensor([tokenizer.encode_prompt(turns) + ids]),
                               torch.tensor([[0.0] * (len(tokenizer.encode_prompt(turns))
                                                      + len(ids) - 1) + [1.0]])).item()
    answer = dict(ids=ids, text="Yes.", finished=True)
    assert score(judge, turns, answer, tokenizer) == pytest.approx(row(ids), abs=1e-5)
    other = reversed_tokenizer(tokenizer)  # its ids mean nothing to the reward model
    answer["ids"] = [1, 2, other.eos]
    again = row([*tokenizer.encode("Yes."), tokenizer.eos])
    assert score(judge, turns, answer, other) == pytest.approx(again, abs=1e-5)
    assert abs(again - row(ids)) > 1e-3
    with pytest.raises(UserError, match="no score: it is read at EOS"):
        score(judge, turns, answer | dict(finished=False), tokenizer)
    small = load_reward_model(folder / "small", "cpu")[:2]
    with pytest.raises(UserError, match="and the context of the reward model holds 12"):
        score(small, turns, answer | dict(ids=[1] * 9), tokenizer)


# --- the history ---------------------------------------------------------------------------------


@pytest.fixture
def chat(folder, tokenizer, monkeypatch):
    """A chat whose model says what `says` holds, and notes the prompts that it was given."""
    chat = Chat(Config(model=str(folder / "sft"), max_new_tokens=20), torch.device("cpu"))
    chat.says, chat.asked = [], []

    def answers(model, prompt, limit, eos, *how):
        chat.asked.append((prompt, limit, how[:2]))
        *ids, last = tokenizer.encode(chat.says.pop(0))
        yield from ids
        if chat.stops:
            signal.raise_signal(signal.SIGINT)  # it is looked at behind a token
        yield last
        yield eos

    chat.stops = False
    monkeypatch.setattr(sample, "stream", answers)
    return chat


def turns_of(*texts):
    return [dict(role=("user", "assistant")[n % 2], content=t) for n, t in enumerate(texts)]


def test_the_model_reads_the_dialogue(chat, tokenizer):
    # catches a turn that is lost or doubled, /regenerate that reads its own answer, a setting that
    # does not arrive, a system prompt that is not sent
    chat.says = ["One.", "Two.", "Three.", "Four."]
    chat.read("a")
    chat.read("b")
    chat.read("/regenerate")
    assert chat.history == turns_of("a", "One.", "b", "Three.")
    chat.read("/temperature 0.5")
    chat.read("/top_p 0.25")
    chat.read("/system Be brief.")
    assert chat.history == []
    chat.read("c")
    system = [dict(role="system", content="Be brief.")]
    assert chat.asked == [
        (tokenizer.encode_prompt(turns_of("a")), 20, (1.0, 1.0)),
        (tokenizer.encode_prompt(turns_of("a", "One.", "b")), 20, (1.0, 1.0)),
        (tokenizer.encode_prompt(turns_of("a", "One.", "b")), 20, (1.0, 1.0)),
        (tokenizer.encode_prompt(system + turns_of("c")), 20, (0.5, 0.25))]
    assert chat.last[0] == system + turns_of("c") and chat.last[1]["text"] == "Four."
    chat.read("/system")
    assert chat.system == "" and chat.history == [] and chat.last is None
    with pytest.raises(UserError, match="there is no message to answer again"):
        chat.read("/regenerate")


def test_a_stopped_answer_stays_in_the_history(chat, capsys):
    # catches two user turns in a row, and a stopped answer that counts as complete
    chat.says, chat.stops = ["One and", "Two."], True
    chat.read("a")
    assert capsys.readouterr().out.endswith("sft> One and [stopped]\n")
    assert chat.history == turns_of("a", "One and") and not chat.last[1]["finished"]
    chat.stops = False
    chat.read("b")
    assert chat.history == turns_of("a", "One and", "b", "Two.")


def test_the_oldest_turns_make_room(chat, tokenizer, capsys):
    # catches a prompt over the context, an answer without its question, a system prompt that is
    # dropped, room that is not used, a message too long that stays in the history
    chat.read("/system Be.")
    for n in range(9):
        chat.says = [f"Yes {n}."]
        chat.read(f"Is it {n}?")
    room = chat.model.config.block_size - 20
    system, full = [dict(role="system", content="Be.")], []
    for n in range(9):
        full = full + turns_of(f"Is it {n}?")
        while len(tokenizer.encode_prompt(system + full)) > room:
            full = full[2:]
        assert chat.asked[n][0] == tokenizer.encode_prompt(system + full)
        full = full + turns_of("", f"Yes {n}.")[1:]
    assert chat.history == full and 2 < len(full) < 18
    dropped = re.findall(r"dropped the oldest (\d+) turns", capsys.readouterr().out)
    assert sum(map(int, dropped)) == 18 - len(full)
    with pytest.raises(UserError, match=rf"too long: \d+ tokens .* prompt; {room} fit"):
        chat.read("Is it so? " * 30)
    assert chat.history == full


def test_another_model_reads_the_same_history(chat, folder):
    # catches a history that is lost, the limit of the model before, a bad path that half arrives
    chat.says = ["One."]
    chat.read("a")
    before = chat.model
    for bad in ("nowhere", folder / "reward", folder / "pairs.jsonl"):
        with pytest.raises(UserError):
            chat.read(f"/model {bad}")
    chat.config.max_new_tokens = 64
    with pytest.raises(UserError, match="holds 64 tokens"):
        chat.read(f"/model {folder / 'other'}")
    assert chat.model is before and chat.limit == 20 and chat.path == str(folder / "sft")
    chat.config.max_new_tokens = None
    chat.read(f"/model {folder / 'long'}")
    assert chat.model.config.block_size == 20000 and chat.limit == 512
    chat.read(f"/model {folder / 'other'}")
    assert chat.limit == 32 and chat.history == turns_of("a", "One.")


# --- in a terminal -------------------------------------------------------------------------------


class Terminal:
    """A script in a pseudo-terminal of 80 columns, which is its controlling one: Ctrl-C works."""

    def __init__(self, folder, *flags):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        start = ("import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
                 # a shell's background jobs, such as these tests, hand down that it is ignored
                 "signal.signal(signal.SIGINT, signal.SIG_DFL); "
                 "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])")
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, str(ROOT / "sample.py"), *flags], cwd=folder,
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env=env | dict(TERM="dumb", PYTHONIOENCODING="utf-8"))
        os.close(slave)
        self.output = ""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def read(self, deadline):
        """Take what there is; False at the end of the output."""
        if not select.select([self.master], [], [], max(0, deadline - time.monotonic()))[0]:
            raise TimeoutError(f"nothing more came within the time; so far: {self.output!r}")
        try:
            data = os.read(self.master, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            data = b""
        self.output += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)

    def expect(self, text, timeout=180):
        """Wait for this text (a pattern); return what came up to its end, and forget it."""
        deadline = time.monotonic() + timeout
        while not (found := re.search(text, self.output)):
            assert self.read(deadline), f"ended without {text!r}: {self.output!r}"
        shown, self.output = self.output[:found.end()], self.output[found.end():]
        return shown

    def send(self, keys):
        os.write(self.master, keys.encode())

    def type(self, line):
        """Send a line at the prompt, and return what comes before the next prompt."""
        self.send(line + "\n")
        return self.expect("you> ")

    def end(self, timeout=180):
        """Wait for the end: (exit status, what came until then)."""
        deadline = time.monotonic() + timeout
        while self.read(deadline):
            pass
        return self.process.wait(timeout), self.output


def test_a_chat_in_a_terminal(folder):
    with Terminal(folder, "--model=sft", "--reward_model=reward") as terminal:
        assert "(sft: sft, " in terminal.expect("you> ")
        assert "there is no answer to score" in terminal.type("/score")
        assert "\nsft> " in terminal.type("Say Bo.")
        assert re.search(r"\(score -?\d+\.\d{3} by reward\)", terminal.type("/score"))
        assert "\nsft> " in terminal.type("Say Al.")
        assert "\nsft> " in terminal.type("/regenerate")
        shown = terminal.type("/nonsense now")
        assert "there is no command /nonsense" in shown and "/regenerate" in shown
        shown = terminal.type("/help")
        for name in ("reset", "system TEXT", "regenerate", "model PATH", "temperature X",
                     "top_p X", "score", "help", "quit"):
            assert f"  /{name} " in shown
        assert "(no checkpoint at nowhere: " in terminal.type("/model nowhere")
        assert "(the model is sft; " in terminal.type("/model")
        assert "\nsft> " in terminal.type("Say Eve.")
        assert "(other: dpo, " in terminal.type("/model other")
        assert "(temperature 0.0)" in terminal.type("/temperature 0")
        first, again = terminal.type("/regenerate"), terminal.type("/regenerate")
        assert "\nother> " in first and first == again  # no chance is left
        assert "(--temperature=-1.0: must not be negative)" in terminal.type("/temperature -1")
        assert "(temperature 0.0)" in terminal.type("/temperature")
        assert "(top_p 0.5)" in terminal.type("/top_p 0.5")
        assert "must be above 0 and at most 1" in terminal.type("/top_p 0")
        assert "(a new dialogue)" in terminal.type("/reset")
        assert "there is no message to answer again" in terminal.type("/regenerate")
        assert "(system prompt set)" in terminal.type("/system Be brief.")
        assert "> " not in terminal.type("").removesuffix("you> ")  # nothing said, nothing answered
        terminal.send("/quit\n")
        status, shown = terminal.end()
        assert status == 0 and shown.split() == ["/quit", "bye"]


def test_ctrl_c_stops_the_answer_and_then_the_chat(folder):
    # catches a chat that an impatient user loses, a traceback
    with Terminal(folder, "--model=long", "--max_new_tokens=19000") as terminal:
        terminal.expect("you> ")
        for line in ("Talk.", "/regenerate"):
            terminal.send(f"{line}\n")
            terminal.expect(r"long> [^\n]{5}")
            terminal.send("\x03")
            terminal.expect(r" \[stopped\]\n")
            terminal.expect("you> ")
        for _ in range(20):  # readline sleeps on where one comes just before it waits for a key
            terminal.send("\x03")
            with contextlib.suppress(TimeoutError):
                terminal.expect("\nbye\n", timeout=5)
                break
        assert terminal.end() == (0, "")


def test_ctrl_d_ends_the_chat(folder):
    with Terminal(folder, "--model=long", "--max_new_tokens=8") as terminal:
        terminal.expect("you> ")
        assert " [cut at 8 tokens]\n" in terminal.type("Talk.")
        assert "start with --reward_model=PATH" in terminal.type("/score")
        terminal.send("\x04")
        status, shown = terminal.end()
        assert status == 0 and shown.endswith("\nbye\n") and "Traceback" not in shown


def test_side_by_side_in_a_terminal(folder):
    # catches columns wider than the terminal, a column that is lost
    with Terminal(folder, "--models=sft,other,long", "--prompts=2", "--reward_model=reward",
                  "--max_new_tokens=30") as terminal:
        status, shown = terminal.end()
    assert status == 0, shown
    head, *prompts = shown.split("\nuser: ")
    assert len(prompts) == 2
    for part in prompts:
        _, names, *lines = part.rstrip().split("\n")
        assert [names.index(name) for name in ("sft", "other", "long")] == [0, 27, 54]
        assert max(map(len, lines)) > 54 and max(map(len, [names, *lines])) <= 80
        column = " ".join(line[54:].strip() for line in lines)
        assert re.search(r"\[score -, gold -?[\d.]+, KL -?[\d.]+, 30 tokens, cut\]$", column)


# --- side by side --------------------------------------------------------------------------------


def compare(folder, *flags):
    result = run_script("sample.py", *flags, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


LINE = re.compile(r"^(\w+): (.*)  \[(?:score (\S+), )?(?:gold (\S+), )?(?:KL (\S+), )?"
                  r"(\d+) tokens, (EOS|cut)\]$", re.M)


def test_a_line_for_every_model_in_a_pipe(folder, tokenizer):
    # catches a KL with the wrong sign or of another answer, a number of another model's answer
    out = compare(folder, "--models=sft,other", f"--prompt={ARITHMETIC}", "--reward_model=reward",
                  "--temperature=0.8", "--seed=3")
    assert f"user: {ARITHMETIC}\n" in out and "pi_first is sft " in out
    found = LINE.findall(out)
    assert [line[0] for line in found] == ["sft", "other"]
    prompt = tokenizer.encode_prompt(ARITHMETIC)
    judge = load_reward_model(folder / "reward", "cpu")[:2]
    first = common.load_policy(folder / "sft", ("sft",), "cpu")[0]
    for name, text, points, gold, kl, tokens, end in found:
        model = common.load_policy(folder / name, ("sft", "dpo"), "cpu")[0]
        random = common.stream(3, "sample", "answers", 0).random((1, 32))
        drawn, mask, done = generate(model, [prompt], 32, tokenizer.eos, 0.8,
                                     torch.from_numpy(random))
        ids = drawn[0][mask[0].bool()].tolist()
        decoded = tokenizer.decode(ids)
        assert " ".join(visible(decoded).split()) == text
        assert int(tokens) == len(ids) and (end == "EOS") == done.item()
        answer = dict(ids=ids, text=decoded, finished=done.item())
        assert float(points) == pytest.approx(score(judge, ARITHMETIC, answer, tokenizer), abs=0.01)
        assert float(gold) == pytest.approx(gold_reward(ARITHMETIC, decoded), abs=0.01)
        rows = drawn.tolist(), mask.tolist()
        ratio = sequence_logprobs(model, *rows, tokenizer.pad, 0.8) \
            - sequence_logprobs(first, *rows, tokenizer.pad, 0.8)
        assert float(kl) == pytest.approx(ratio.item(), abs=0.01)
        assert (name == "sft") == (float(kl) == 0)


def test_prompts_of_a_file_and_of_nowhere_known(folder):
    # catches gold for a prompt that has none, a number of prompts that is not heeded
    out = compare(folder, "--models=sft,sft", "--data=pairs.jsonl", "--prompts=3",
                  "--temperature=0")
    found = LINE.findall(out)
    assert len(found) == 6 and out.count("\nuser: Say ") == 3
    assert all(line[2:5] == ("", "", "0.00") for line in found)
    assert found[::2] == found[1::2]
    # six embedded ones, and for both models the length that the smaller context allows
    out = compare(folder, "--models=long,sft")
    assert ", at most 32 tokens\n" in out and len(LINE.findall(out)) == 12


def test_models_with_other_tokens(folder, monkeypatch, capsys, tokenizer):
    # catches a KL between different tokens, one model's prompt in the other's ids
    other = reversed_tokenizer(tokenizer)
    real = common.load_policy

    def load(path, stages, device):
        if path != "bytes":
            return real(folder / path, stages, device)
        torch.manual_seed(0)
        sft = real(folder / "sft", stages, device)[0]
        return GPT(dataclasses.replace(sft.config, n_tokens=other.n_tokens,
                                       vocab_size=other.vocab_size)).eval(), other, {}

    monkeypatch.setattr(common, "load_policy", load)
    config = Config(models="sft,bytes,sft", prompt=ARITHMETIC, max_new_tokens=9)
    sample.main(config)
    out = capsys.readouterr().out
    assert out.count("no KL for bytes: ") == 1
    assert [bool(line[4]) for line in LINE.findall(out)] == [True, False, True]
    config = Config(models="sft,bytes", data=str(folder / "pairs.jsonl"), prompts=14)
    with pytest.raises(UserError, match="the prompt is too long"):  # as bytes they all are
        sample.main(dataclasses.replace(config, max_new_tokens=40))
    sample.main(dataclasses.replace(config, max_new_tokens=9))
    out = capsys.readouterr().out
    dropped = int(re.search(r"dropped (\d+) of 14 prompts: too long for a model", out)[1])
    assert 0 < dropped < 14 and len(LINE.findall(out)) == 2 * (14 - dropped)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, said", [
    ([], "give either --model=PATH"),
    (["--model=sft", "--models=sft,other"], "give either --model=PATH"),
    (["--model=nowhere"], "no checkpoint at nowhere"),
    (["--models=sft,nowhere"], "no checkpoint at nowhere"),
    (["--models= , "], "names no checkpoint"),
    (["--model=reward"], "is a reward checkpoint"),
    (["--model=sft", "--reward_model=sft"], "needed here: reward"),
    (["--models=sft", "--data=nothing.jsonl"], "there is no file nothing.jsonl"),
    (["--models=sft", "--prompt=Say so." + " Say so." * 40], "the prompt is too long"),
    (["--model=sft", "--max_new_tokens=64"], "the context of sft holds 64 tokens"),
    (["--model=sft", "--prompt=Hi."], "--prompt goes with --models"),
    (["--model=sft", "--prompts=9"], "--prompts goes with --models"),
    (["--models=sft", "--prompt=Hi.", "--data=pairs.jsonl"], "exclude each other"),
    (["--models=sft", "--top_p=0"], "above 0 and at most 1"),
    (["--models=sft", "--top_p=1.5"], "above 0 and at most 1")])
def test_an_error_is_one_line(folder, flags, said):
    result = run_script("sample.py", *flags, cwd=folder)
    assert result.returncode == 2 and result.stdout.count("Traceback") == 0
    assert said in result.stderr and result.stderr.count("\n") == 1
