"""Pretrained models in and out: transformers is the referee for weights, tokens and templates.

Folders are made here with transformers itself, tiny and random; what needs the real SmolLM2 runs
where the environment variable SMOLLM2 names its folder.
"""

import functools
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import common
import convert
import numpy as np
import pytest
import torch
from cli import UserError
from conftest import ROOT, run_script
from data import batches, chat, download
from data.records import write_jsonl
from data.tokenizer import DIGITS, LLAMA3, PATTERN, QWEN, TEMPLATES, load_tokenizer, read_json
from hypothesis import given, settings
from hypothesis import strategies as st
from model import GPT, GPTConfig
from reward import RewardModel, load_reward_model

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.torch")
CPU = torch.device("cpu")
SHARED = ROOT.parent / "shared" / "data"
REAL = os.environ.get("SMOLLM2")
needs_real = pytest.mark.skipif(not REAL, reason="SMOLLM2 does not name the folder of the model")

# --- tokenizers and folders, made here -----------------------------------------------------------

TEXT = ["The quick brown fox jumps over the lazy dog. It's 12345 o'clock, isn't it?\n\n\tYes!  ",
        "def f(x):\n    return x ** 2  # naïve café 日本語 и так 😀 1,000.50 ½ Ⅻ\r\n",
        "we'll they'd I'M"]
level = tokenizers.pre_tokenizers.ByteLevel
split = lambda pattern: tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
sequence = tokenizers.pre_tokenizers.Sequence
CUTS = dict(
    gpt2=level(add_prefix_space=False),
    smollm=sequence([tokenizers.pre_tokenizers.Digits(True), level(add_prefix_space=False)]),
    qwen=sequence([split(QWEN), level(add_prefix_space=False, use_regex=False)]),
    llama3=sequence([split(LLAMA3), level(add_prefix_space=False, use_regex=False)]))
CHATML = """{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system
You help.<|im_end|>
{% endif %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>
{{ '' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# no default system; what an assistant says goes through code of its own, as Qwen3's does
BARE = """
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {%- set c = m.content.split('</think>')[-1] %}
    {{- '<|im_start|>assistant\n' + c + '<|im_end|>\n' }}
  {%- else %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
# a system turn in any case, with something before what it says, as Llama 3.1's
HEADERS = """{{- bos_token }}{%- set head = '<|start_header_id|>' %}
{%- if messages[0]['role'] == 'system' %}
  {%- set s = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set s = '' %}{%- endif %}
{{- head + 'system<|end_header_id|>\n\nKnowledge: 2023\nDate: today\n\n' + s + '<|eot_id|>' }}
{%- for m in messages %}
  {{- head + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- head + 'assistant<|end_header_id|>\n\n' }}{%- endif %}"""
PLAIN3 = """{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}
{{- '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
CHATS = dict(chatml=CHATML, bare=BARE, headers=HEADERS, plain3=PLAIN3, none=None, base3=None)
SPECIALS = dict(chatml=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                headers=["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                         "<|eot_id|>", "<|end_of_text|>"], none=["<|endoftext|>"])
SPECIALS |= dict(bare=SPECIALS["chatml"], plain3=SPECIALS["headers"], base3=SPECIALS["headers"])


@functools.cache
def trained(cut, form, letters=True):
    """A fast tokenizer of transformers, trained on a few lines. letters=False: bytes that the text
    lacks are not in its vocabulary."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = CUTS[cut], tokenizers.decoders.ByteLevel()
    if cut == "qwen":
        made.normalizer = tokenizers.normalizers.NFC()
    made.train_from_iterator(TEXT * 3, tokenizers.trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIALS[form], show_progress=False,
        initial_alphabet=level.alphabet() if letters else []))
    first, last = SPECIALS[form][0], SPECIALS[form][-1]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=first, eos_token=last, chat_template=CHATS[form])


def theirs(kind, size, vocabulary, seed=0):
    """A random model of transformers; weights large enough that an error shows."""
    layers, heads, kv, head, width, hidden = size
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_positions=256, n_layer=layers, n_head=heads,
            n_embd=heads * head, n_inner=hidden, layer_norm_epsilon=1e-4)
    else:
        more = dict(llama=dict(head_dim=head, attention_bias=seed == 1, mlp_bias=seed == 1),
                    qwen2=dict(), qwen3=dict(head_dim=head))[kind]
        rope = dict(rope_type="default", rope_theta=5e3)
        if kind == "llama" and seed == 2:
            rope = dict(rope_type="llama3", rope_theta=5e3, factor=8.0, low_freq_factor=1.0,
                        high_freq_factor=4.0, original_max_position_embeddings=32)
        config = transformers.AutoConfig.for_model(
            kind, vocab_size=vocabulary, max_position_embeddings=256, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv, intermediate_size=hidden,
            hidden_size=width if kind in ("llama", "qwen3") else heads * head,
            rms_norm_eps=1e-4, tie_word_embeddings=seed == 0, rope_parameters=rope, **more)
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, p in model.named_parameters():
        scale = 0.3 if p.dim() < 2 or "wte" in name or "embed" in name else p.shape[-1] ** -0.5 * 2
        torch.nn.init.normal_(p, float("norm" in name and p.dim() < 2 or "ln_" in name
                                       and name.endswith("weight")), scale)
    return model


def folder_of(path, kind="llama", size=(2, 4, 2, 8, 24, 40), cut="gpt2", form="chatml", seed=0,
              extra=0, **options):
    """Write a folder of transformers; extra: rows of the embedding behind the last token."""
    tok = trained(cut, form)
    model = theirs(kind, size, len(tok) + extra, seed)
    model.save_pretrained(path, **options)
    tok.save_pretrained(path)
    return model, tok


def into(source, out, *flags):
    """convert.py in: (GPT, Tokenizer)."""
    done = run_script("convert.py", f"--source={source}", f"--out={out}", "--overwrite=true",
                      *flags, cwd=Path(out).parent)
    assert done.returncode == 0, done.stderr
    return common.load_policy(out, common.POLICIES, CPU)[:2]


SIZES = [(2, 4, 2, 8, 24, 40), (3, 2, 1, 16, 48, 64), (1, 3, 3, 32, 96, 12)]


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", convert.KINDS)
@pytest.mark.parametrize("n", range(3))
def test_logits_and_greedy_text_are_theirs(tmp_path, kind, n):
    """Would catch: any difference in norms, positions, heads, biases, gates, tying, order of rows;
    a cache of the wrong heads or positions."""
    model, _ = folder_of(tmp_path / "in", kind, SIZES[n], seed=n)
    ours, tok = into(tmp_path / "in", tmp_path / "out")
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.integers(0, tok.n_tokens, (3, 60)))
    with torch.no_grad():
        expected = model(tokens).logits
        torch.testing.assert_close(ours.logits(ours(tokens)), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1  # or nothing was compared
    # rows of different length, decoded together from one cache; EOS that never comes
    prompts = [tokens[i, :length].tolist() for i, length in enumerate((3, 17, 30))]
    from model import generate
    found, mask, _ = generate(ours, prompts, 64, eos=-1, temperature=0)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            greedy = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0]
        assert found[row][mask[row].bool()].tolist() == greedy[len(prompt):].tolist()
    assert len(set(found[0].tolist())) > 5


@pytest.mark.parametrize("how", ["sharded", "bare", "bf16", "bin", "shards of bin"])
def test_every_way_of_saving(tmp_path, monkeypatch, how):
    """Would catch: a shard that is not read, a prefix that is asked for, another precision."""
    model, _ = folder_of(tmp_path / "in", **dict(max_shard_size="20KB") if how == "sharded" else {})
    path = tmp_path / "in" / "model.safetensors"
    if how == "sharded":
        assert len(list((tmp_path / "in").glob("model-*.safetensors"))) > 2
    elif how == "bare":
        weights = safetensors.load_file(path)
        safetensors.save_file({k.removeprefix("model."): v for k, v in weights.items()}, path)
    elif how == "bf16":
        model.bfloat16().save_pretrained(tmp_path / "in")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "in", dtype=torch.float32).eval()
    else:
        weights = safetensors.load_file(path)
        path.unlink()
        names = sorted(weights)
        if how == "bin":
            torch.save(weights, tmp_path / "in" / "pytorch_model.bin")
        else:
            where = {n: f"pytorch_model-{i % 2}.bin" for i, n in enumerate(names)}
            for file in set(where.values()):
                torch.save({n: weights[n] for n in names if where[n] == file},
                           tmp_path / "in" / file)
            (tmp_path / "in" / "pytorch_model.bin.index.json").write_text(
                json.dumps(dict(weight_map=where)))
    ours, _ = into(tmp_path / "in", tmp_path / "out")
    tokens = torch.arange(50)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(tokens)), model(tokens).logits, atol=1e-4,
                                   rtol=0)


def test_spare_rows_and_a_shorter_context(tmp_path):
    """Would catch: rows that no token has in the softmax, markers without rows, a context that the
    flag does not cut."""
    model, tok = folder_of(tmp_path / "in", "gpt2", form="none", extra=2)
    ours, own = into(tmp_path / "in", tmp_path / "out", "--block_size=20")
    assert own.n_tokens == len(tok) + 3 and ours.config.block_size == 20  # one row is new
    assert ours.wpe.weight.shape[0] == 20
    old, rows = ours.wte.weight[:len(tok)], ours.wte.weight[len(tok):own.n_tokens]
    assert (rows - old.mean(0)).abs().max() < 5 * 0.1 * old.std(0).max()
    assert len({tuple(row) for row in rows.tolist()}) == 3  # and not all alike
    with torch.no_grad():
        found = ours.logits(ours(torch.arange(20)[None]))[..., :len(tok)]
        expected = model(torch.arange(20)[None]).logits[..., :len(tok)]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert own.encode_prompt("Hi") == [
        own.specials["<|user|>"], *tok("Hi").input_ids, own.specials["<|assistant|>"]]


@pytest.mark.parametrize("shape", ["gpt2", "llama3", "of the hub"])
def test_a_model_with_markers_of_its_own_keeps_them(tmp_path, shape):
    """Would catch: trained rows overwritten by noise when a model comes back; a base model of
    another EOS, or one whose files say as little as GPT-2's at the hub."""
    folder_of(tmp_path / "in", "gpt2", form="base3" if shape == "llama3" else "none",
              cut="llama3" if shape == "llama3" else "gpt2")
    path = tmp_path / "in" / "tokenizer.json"
    if shape == "of the hub":
        path.write_text(break_json(path.read_text(), lambda c: c["model"].pop("type")))
        edit(eos_token_id=0)(tmp_path / "in")
        (tmp_path / "in" / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    if shape == "llama3":  # it begins every text with a token
        path.write_text(break_json(path.read_text(), lambda c: c.update(
            post_processor=dict(type="TemplateProcessing", special="<|begin_of_text|>"))))
    ours, tok = into(tmp_path / "in", tmp_path / "one")
    with torch.no_grad():
        ours.wte.weight[tok.specials["<|user|>"]] = 0.5
    common.save_checkpoint(tmp_path / "one" / "model.pt", ours, "sft", tok, convert.Config(), {})
    out(tmp_path / "one", tmp_path / "folder")
    again, _ = into(tmp_path / "folder", tmp_path / "two")
    n = tok.n_tokens
    assert torch.equal(again.wte.weight[:n], ours.wte.weight[:n])
    assert _.template == tok.template and _.hash == tok.hash
    first = tok.encode_prompt("Hi")[0]
    assert first == tok.specials["<|begin_of_text|>" if shape == "llama3" else "<|user|>"]


def test_memory_is_that_of_one_model(tmp_path):
    """Would catch: the file held beside the model, or all of its tensors at once."""
    model, _ = folder_of(tmp_path / "in", size=(4, 8, 4, 64, 512, 2048))
    total = sum(p.numel() for p in model.parameters()) * 4
    assert total > 60e6
    code = ("import resource, sys; sys.path.insert(0, {root!r}); import convert, model; "
            "convert.read_model(convert.Config(source={source!r}, out='x', block_size={n})); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    folder_of(tmp_path / "small")
    peaks = [int(subprocess.run(
        [sys.executable, "-c", code.format(root=str(ROOT), source=str(tmp_path / name), n=0)],
        capture_output=True, text=True, check=True).stdout) * 1024 for name in ("small", "in")]
    assert peaks[1] - peaks[0] < 1.3 * total


# --- tokens --------------------------------------------------------------------------------------

ANY = st.text(st.sampled_from(" \n\t\r'aZésdm1٣½Ⅻ²日😀\u00a0\u200b\x04.,!-e\u0301") | st.characters(
    exclude_categories=["Cs"]), max_size=40)


@pytest.mark.parametrize("letters", [True, False])
@pytest.mark.parametrize("cut", CUTS)
def test_any_text_has_their_ids(cut, letters):
    """Would catch: another cut, a digit that takes its space along, an unknown byte, no NFC."""
    tok = trained(cut, "chatml", letters)
    own = state_of(tok)

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(ANY)
    def check(text):
        assert own.encode(text) == tok(text, add_special_tokens=False).input_ids

    check()
    for text in (*TEXT, "a  1", "a \n 1", "  12 ", "x\n\n  y", "'S 'll't", "1'2", "e\u0301", " \t"):
        assert own.encode_many([text] * 9)[8] == tok(text, add_special_tokens=False).input_ids
        if letters and cut != "qwen":
            assert own.decode(own.encode(text)) == text


@pytest.mark.parametrize("letters", [True, False])
def test_added_tokens_that_are_not_special_are_found_in_text(letters):
    """Would catch: <think> read as letters."""
    tok = trained("qwen", "chatml", letters)
    text = break_json(tok.backend_tokenizer.to_str(), lambda c: c["added_tokens"].extend(
        dict(id=len(c["model"]["vocab"]) + n, content=t, single_word=False, lstrip=False,
             rstrip=False, normalized=False, special=False)
        for n, t in enumerate(("<think>", "</think>"))))
    other = tokenizers.Tokenizer.from_str(text)
    own = state_of(text)
    for text in ("<think>\nthe fox</think> x", "a<think><think>", "<thin k>", "x </think>\x04"):
        assert own.encode(text) == other.encode(text, add_special_tokens=False).ids
        assert own.encode_many([text] * 9)[8] == own.encode(text)
    assert own.specials["<|im_end|>"] not in own.encode("a<|im_end|>")


def test_half_a_character_is_no_crash():
    for letters in (True, False):
        own = state_of(trained("gpt2", "chatml", letters))
        assert own.encode("a\ud800b") and own.encode("a\ud800\x04b") != own.encode("ab")


def state_of(tok, form="chatml"):
    text = tok if isinstance(tok, str) else tok.backend_tokenizer.to_str()
    return load_tokenizer({"name": "x", "tokenizer.json": text, "template": TEMPLATES[form]})


def all_texts():
    """Every string of the data sets that lie beside the project."""
    def strings(x):
        if isinstance(x, str):
            yield x
        elif isinstance(x, (list, dict)):
            for y in x.values() if isinstance(x, dict) else x:
                yield from strings(y)

    import gzip
    for path in sorted(SHARED.rglob("*")):
        if path.suffix in (".json", ".jsonl", ".txt", ".csv", ".md", ".gz") and path.is_file():
            raw = path.read_bytes()
            text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode(errors="ignore")
            lines = text.splitlines()
            if path.suffix == ".json":
                yield from strings(json.loads(text))
            elif ".jsonl" in path.name:
                yield from (s for line in lines if line.strip() for s in strings(json.loads(line)))
            else:
                yield from lines


@pytest.fixture(scope="module")
def texts():
    if not SHARED.exists():
        pytest.skip("the data sets are not beside the project")
    found = [t for t in dict.fromkeys(all_texts()) if t]
    found = found if os.environ.get("ALL_TEXTS") else found[::6]  # all: two minutes more
    assert len(found) > 20000
    return found


def same_ids(own, tok, texts):
    for i in range(0, len(texts), 2000):
        part = texts[i:i + 2000]
        expected = tok(part, add_special_tokens=False, split_special_tokens=True).input_ids
        assert own.encode_many(part) == expected


@pytest.mark.skipif("GPT2_RANKS" not in os.environ and not (SHARED / "gpt2_bpe").exists(),
                    reason="no ranks of GPT-2")
def test_gpt2s_tokens_on_every_text(tmp_path, texts, monkeypatch):
    """Would catch: merges that are not those of the ranks, in the folder that goes out."""
    monkeypatch.setenv("GPT2_RANKS", os.environ.get("GPT2_RANKS") or str(
        SHARED / "gpt2_bpe" / "gpt2.tiktoken"))
    own = load_tokenizer("gpt2")
    (tmp_path / "tokenizer.json").write_text(chat.tokenizer_json(own))
    tok = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert len(tok) == own.n_tokens
    same_ids(own, tok, texts)
    again = read_json(chat.tokenizer_json(own), "x")
    assert again == (own.encoding._mergeable_ranks, own.specials, PATTERN, False, [])


@needs_real
def test_smollm2s_tokens_on_every_text(texts, tmp_path):
    """As the tool writes it, and with the published one's digits, which stand alone."""
    tok = transformers.AutoTokenizer.from_pretrained(REAL)
    own, _ = chat.read_tokenizer(Path(REAL), "x", "auto")
    same_ids(own, tok, texts)
    path = tmp_path / "tokenizer.json"
    path.write_text(break_json((Path(REAL) / "tokenizer.json").read_text(), lambda c: c.update(
        pre_tokenizer=dict(type="Sequence", pretokenizers=[
            dict(type="Digits", individual_digits=True), dict(c["pre_tokenizer"])]))))
    own = state_of(path.read_text())
    tok = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    same_ids(own, tok, [t for t in texts if any(c.isdigit() for c in t)][:5000])


def break_json(text, change):
    content = json.loads(text)
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize("change, message", [
    (lambda c: c["model"].update(type="Unigram"), "its model is Unigram"),
    (lambda c: c["model"].update(byte_fallback=True), "not byte-level BPE"),
    (lambda c: c["model"].update(dropout=0.1), "dropout"),
    (lambda c: c["model"].update(unk_token="<unk>"), "unk_token"),
    (lambda c: c.update(normalizer=dict(type="NFKC")), "NFKC"),
    (lambda c: c.update(pre_tokenizer=dict(type="Metaspace")), "Metaspace"),
    (lambda c: c.update(pre_tokenizer=None), "pre_tokenizer"),
    (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space"),
    (lambda c: c["pre_tokenizer"].update(use_regex=False), "use_regex"),
    (lambda c: c["model"]["merges"].reverse(), "order of the merges"),
    (lambda c: c["model"]["merges"].pop(), "no merge makes"),
    (lambda c: c["model"]["vocab"].update({"Ġt": 5000}), "no merge makes"),
    (lambda c: c["added_tokens"].pop(), "no merge makes|without gaps"),
    (lambda c: c["added_tokens"][0].update(rstrip=True), "has rstrip"),
    (lambda c: c.pop("model"), "KeyError"),
    (lambda c: c["model"].update(vocab=[1]), "Error")])
def test_a_tokenizer_that_we_cannot_be_is_refused(change, message):
    text = trained("gpt2", "chatml").backend_tokenizer.to_str()
    read_json(text, "x")
    with pytest.raises(UserError, match=message) as error:
        read_json(break_json(text, change), "tokenizer.json")
    assert str(error.value).startswith("tokenizer.json: ") and "\n" not in str(error.value)


def test_digits_stand_alone():
    # by hand: a space before a digit is a piece of its own
    tok = trained("smollm", "chatml")
    assert read_json(tok.backend_tokenizer.to_str(), "x")[2] == DIGITS
    pieces = [tok.decode([i]) for i in state_of(tok).encode("a 12")]
    assert pieces == ["a", " ", "1", "2"]


# --- templates -----------------------------------------------------------------------------------


def dialogues(n=200, trim=False):
    """Of one turn and several, with a system prompt, an empty one, and none. trim: the template
    takes white space off the ends of all texts; else answers have none, which are tokenised apart.
    """
    rng = random.Random(0)
    words = "It's the quick brown fox 12 <|im_end|> \n über 日本".split(" ")
    text = lambda: " ".join(rng.choices(words, k=rng.randint(1, 6))).strip() or "x"
    space = lambda: rng.choice(["", "\n", "\n\n ", "  "])
    answer = lambda: space() + text() + space() if trim else text()
    for i in range(n):
        turns = [dict(role="system", content="" if i % 6 == 1 else text())] if i % 3 else []
        for _ in range(rng.randint(0, 2)):
            turns += [dict(role="user", content=text()), dict(role="assistant", content=answer())]
        # white space that BPE joins with the newline before it
        yield [*turns, dict(role="user", content=space() + text() + space())]


def check_dialogues(own, tok):
    ids = lambda turns, **more: tok.apply_chat_template(
        turns, tokenize=True, return_dict=False, **more)
    for turns in dialogues(trim=own.template["trim"]):
        if any("<|" in t["content"] for t in turns):  # there a marker in a text is a marker
            turns = [dict(t, content=t["content"].replace("<|", "<")) for t in turns]
        assert own.encode_prompt(turns) == ids(turns, add_generation_prompt=True)
        whole = [*turns, dict(role="assistant", content="I see.")]
        found, mask = own.encode_pieces([own.message_pieces(whole)])[0]
        expected = ids(whole)
        assert found == expected[:len(found)] and len(expected) - len(found) < 2
        scored = [i for i, m in zip(found, mask) if m]
        assert scored[-1] == own.eos == found[-1] and own.decode(scored).endswith("I see.")
    with_marker = own.encode_prompt("<|im_end|> <|eot_id|> <|user|>")
    assert len([i for i in with_marker if i in own.specials.values()]) == len(
        [i for i in own.encode_prompt("x") if i in own.specials.values()])


def cut_of(form):
    return dict(bare="qwen", headers="llama3", plain3="llama3").get(form, "gpt2")


@pytest.mark.parametrize("form", [f for f in CHATS if CHATS[f]])
def test_template_ids_are_theirs(tmp_path, form):
    """Would catch: a lost default system prompt, a missing newline, text and marker merged."""
    folder_of(tmp_path / "in", form=form, cut=cut_of(form))
    _, own = into(tmp_path / "in", tmp_path / "out")
    check_dialogues(own, transformers.AutoTokenizer.from_pretrained(tmp_path / "in"))


@needs_real
def test_smollm2s_template_ids():
    own, _ = chat.read_tokenizer(Path(REAL), "x", "auto")
    check_dialogues(own, transformers.AutoTokenizer.from_pretrained(REAL))


def test_templates_by_hand():
    # in letters: what the three look like
    turns = [dict(role="system", content="S"), dict(role="user", content=" U "),
             dict(role="assistant", content="A"), dict(role="user", content="V")]
    assert chat.render(TEMPLATES["markers"], turns) == (
        "<|system|>S<|user|> U <|assistant|>A<|endoftext|><|user|>V<|assistant|>")
    assert chat.render(TEMPLATES["chatml"], turns[:2]) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n U <|im_end|>\n<|im_start|>assistant\n")
    assert chat.render(TEMPLATES["llama3"], turns[1:2]) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_a_date_does_not_go_out_again(tmp_path):
    """Would catch: a folder whose template names another day than the model was trained with."""
    folder_of(tmp_path / "in", form="headers", cut="llama3")
    (tmp_path / "in" / "chat_template.jinja").write_text(HEADERS.replace(
        "today", "' + (strftime_now('%d') if strftime_now is defined else '26 Jul') + '"))
    _, own = into(tmp_path / "in", tmp_path / "out")
    out(tmp_path / "out", tmp_path / "folder")
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    check_dialogues(own, tok)
    assert "26 Jul" in own.decode(own.encode_prompt("Hi"))


@pytest.mark.parametrize("source, message", [
    ("{{ 1 / 0 }}", "division by zero"), ("{{ range(10**9) | list }}", "does not take"),
    ("{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}", "is none of"),
    (CHATML.replace("<|im_end|>\n{% endif", "<|im_end|>{% endif"), "is none of"),
    ("{{ raise_exception('no system') }}", "no system"), ("{% for %}", "does not take")])
def test_an_unknown_template_is_refused(tmp_path, source, message):
    folder_of(tmp_path / "in")
    (tmp_path / "in" / "chat_template.jinja").write_text(source)
    done = run_script("convert.py", "--source=in", "--out=out", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert message in done.stderr and "--template=" in done.stderr
    _, own = into(tmp_path / "in", tmp_path / "out", "--template=chatml")
    assert own.template == TEMPLATES["chatml"]


@pytest.mark.parametrize("form", [f for f in CHATS if CHATS[f]])
def test_our_jinja_says_what_the_data_says(form):
    data = chat.recognise(CHATS[form], dict(bos_token="<|begin_of_text|>"), "x")
    assert chat.recognise(chat.jinja(data), {}, "x") == data


# --- out, and the round trip ---------------------------------------------------------------------


def out(source, folder):
    done = run_script("convert.py", f"--source={source}", f"--out={folder}", "--to=transformers",
                      "--overwrite=true", cwd=Path(folder).parent)
    assert done.returncode == 0, done.stderr
    return done


def check_folder(ours, own, folder):
    """The same logits, greedy text and template ids."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, own.n_tokens, (2, 30)))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, ours.logits(ours(tokens)), atol=1e-4,
                                   rtol=0)
    check_dialogues(own, tok)
    ids = own.encode_prompt("The quick")
    [ours_says] = batches.sample_texts(ours, own, [ids], 30, None, temperature=0)
    with torch.no_grad():
        said = model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0]
    assert said[len(ids):].tolist()[:len(ours_says["ids"])] == ours_says["ids"]
    plain = model.generation_config
    assert (plain.do_sample, plain.top_k, plain.temperature, plain.eos_token_id) == (
        True, 0, 1.0, own.eos)
    assert tok.eos_token_id == own.eos
    return model, tok


def ends_often(path, model, tok):
    """Give EOS a fair chance at every position, or nothing could be scored."""
    head = model.wte if model.config.tied else model.lm_head
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, tok.n_tokens, (8, 20)))
    with torch.no_grad():
        mean = model(tokens).mean((0, 1))
        most = model.logits(model(tokens)).logsumexp(-1).mean()
        head.weight[tok.eos] = most * mean / mean.square().sum()
    common.save_checkpoint(path / "model.pt", model, "convert", tok, convert.Config(), {})


DEMOS = [dict(prompt=f"The quick {n}", completion=f"brown fox {n} jumps") for n in range(40)]
PAIRS = [dict(prompt=f"The quick {n}", chosen=f"brown fox {n} jumps", rejected=f"dog {n}")
         for n in range(40)]
SUMS = [dict(prompt=f"The {n}", answer=str(n)) for n in range(40)]


@pytest.mark.parametrize("kind, form", [("gpt2", "none"), ("llama", "chatml"), ("qwen2", "bare"),
                                        ("qwen3", "bare"), ("llama", "headers")])
def test_round_trip_through_every_stage(tmp_path, kind, form):
    """Would catch: a stage that cannot start from it or loses its tokenizer or dialect, and a
    folder that others read otherwise."""
    for name, rows in (("demos", DEMOS), ("pairs", PAIRS), ("sums", SUMS)):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    folder_of(tmp_path / "in", kind, form=form, cut=cut_of(form))
    ends_often(tmp_path / "start", *into(tmp_path / "in", tmp_path / "start"))
    shutil.rmtree(tmp_path / "in")  # the checkpoint has all that it needs
    run = lambda script, *flags: run_script(script, "--max_new_tokens=8", *flags, cwd=tmp_path)
    rl = ("--iterations=1", "--batch_size=4", "--minibatches=1", "--eval_prompts=2")
    steps = [("sft", "--init=start", "--data=demos.jsonl", "--epochs=1", "--samples=4"),
             ("reward", "--init=start", "--data=pairs.jsonl", "--samples=40"),
             ("dpo", "--init=out/sft", "--data=pairs.jsonl", "--eval_prompts=2"),
             ("ppo", "--init=out/dpo", "--reward_model=out/reward", "--data=pairs.jsonl", *rl),
             ("grpo", "--init=out/ppo", "--data=sums.jsonl", "--k=2", *rl)]
    for stage, *flags in steps:
        done = run(f"{stage}.py", *flags)
        assert done.returncode == 0, done.stderr
    done = run_script("evaluate.py", "--policy=out/grpo", "--reference=out/sft",
                      "--data=sums.jsonl", "--max_new_tokens=8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for stage in ("sft", "dpo", "ppo", "grpo"):
        out(tmp_path / "out" / stage, tmp_path / "folder")
        ours, own, _ = common.load_policy(tmp_path / "out" / stage, common.POLICIES, CPU)
        check_folder(ours, own, tmp_path / "folder")
    out(tmp_path / "out" / "reward", tmp_path / "judge")
    transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")


def test_our_own_model_in_other_tools(tmp_path):
    """Would catch: a tokenizer.json that cuts otherwise, GPT-2 matrices the wrong way round."""
    own = load_tokenizer("synthetic")
    torch.manual_seed(0)
    for name, more in (("gpt2", {}), ("llama", dict(
            rope_theta=1e4, norm="rms", mlp="swiglu", bias="none", n_kv_head=2, n_hidden=40))):
        size = GPTConfig(own.vocab_size, own.n_tokens, 64, 2, 4, 32, **more)
        model = GPT(size).eval()
        (tmp_path / name).mkdir()
        common.save_checkpoint(tmp_path / name / "model.pt", model, "sft", own, convert.Config(),
                               {})
        out(tmp_path / name, tmp_path / "folder")
        _, tok = check_folder(model, own, tmp_path / "folder")
        for text in TEXT:
            assert own.encode(text) == tok(text).input_ids


@pytest.mark.parametrize("kind", convert.KINDS)
def test_a_reward_model_scores_the_same_there(tmp_path, kind):
    """Would catch: shift and scale that are lost, a score read in the padding or before EOS."""
    folder_of(tmp_path / "in", kind, form="none" if kind == "gpt2" else "chatml",
              cut="qwen" if kind.startswith("qwen") else "gpt2")
    if kind == "llama":  # a token of this name is there already
        path = tmp_path / "in" / "tokenizer.json"
        path.write_text(path.read_text().replace("<|endoftext|>", "<|pad|>"))
    policy, tok = into(tmp_path / "in", tmp_path / "start")
    torch.manual_seed(0)
    model = RewardModel(policy.config)
    model.gpt.load_state_dict(policy.state_dict())
    for buffer, value in ((model.head.bias.data, 0.3), (model.shift, -1.7), (model.scale, 0.6)):
        buffer.fill_(value)
    (tmp_path / "rm").mkdir()
    common.save_checkpoint(tmp_path / "rm/model.pt", model, "reward", tok, convert.Config(), {})
    said = out(tmp_path / "rm", tmp_path / "folder").stdout
    there = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "folder").eval()
    assert there.config.num_labels == 1
    own, tok, _ = load_reward_model(tmp_path / "rm", CPU)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert other.pad_token_id == tok.pad != tok.eos
    rows = [[*tok.encode_prompt("The quick"), *tok.encode("fox " * n), tok.eos]
            for n in (1, 4, 9, 2)]
    masks = [[0] * (len(row) - 1) + [1] for row in rows]
    scores = batches.over_rows(own, rows, masks, tok.pad, CPU)
    padded = other.pad(dict(input_ids=rows), padding=True, padding_side="right",
                       return_tensors="pt")
    with torch.no_grad():
        found = there(**padded).logits[:, 0].double()
    if kind == "qwen3":  # its head has no bias, and that is said
        constant = (0.3 + 1.7) / 0.6
        assert f"less {constant:.6f}" in said
        scores = scores - constant
    torch.testing.assert_close(found, scores, atol=1e-4, rtol=1e-4)
    assert scores.std() > 0.05
    # a dialogue as one would give it: nothing may follow EOS
    turns = [dict(role="user", content="The quick"), dict(role="assistant", content="fox ")]
    ids = other.apply_chat_template(turns, return_dict=False)
    assert ids == rows[0]


# --- errors --------------------------------------------------------------------------------------


def edit(**change):
    def write(folder):
        path = folder / "config.json"
        content = json.loads(path.read_text()) | change
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    return write


def weights(change):
    def write(folder):
        path = folder / "model.safetensors"
        content = safetensors.load_file(path)
        change(content)
        safetensors.save_file(content, path)
    return write


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("change, message", [
    (lambda f: (f / "config.json").unlink(), "config.json: it does not exist"),
    (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json: not a JSON object"),
    (edit(model_type="mamba"), "models of type 'mamba' are not supported"),
    (edit(model_type=...), "models of type None"),
    (edit(hidden_size=...), "'hidden_size' is missing"),
    (edit(hidden_size="wide"), "config.json: "),
    (edit(hidden_act="relu"), "hidden_act='relu' is not supported"),
    (edit(attention_bias=True), "attention_bias=True is not supported"),
    (edit(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)), "scaled by 'yarn'"),
    (edit(rope_scaling=dict(type="linear", factor=2.0)), "scaled by 'linear'"),
    (edit(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.5)), "are not supported"),
    (edit(quantization_config=dict(bits=4)), "quantization_config="),
    (edit(mlp_bias=True), "mlp_bias=True is not supported"),
    (edit(use_sliding_window=True), "use_sliding_window=True is not supported"),
    (edit(tie_word_embeddings="no"), "tie_word_embeddings='no' is not supported"),
    (edit(model_type="gpt2", activation_function="relu"), "activation_function='relu'"),
    (edit(model_type="gpt2", scale_attn_weights=False), "scale_attn_weights=False"),
    (edit(model_type="gpt2", scale_attn_by_inverse_layer_idx=True), "inverse_layer_idx=True"),
    (edit(model_type="gpt2", add_cross_attention=True), "add_cross_attention=True"),
    (edit(max_position_embeddings="big"), "block_size='big': must be a whole number"),
    (edit(num_attention_heads=0), "n_head=0: must be a whole number"),
    (edit(hidden_size=24.0), "n_embd=24.0: must be a whole number"),
    (edit(intermediate_size=-3), "n_hidden=-3: must be a whole number"),
    (edit(head_dim=-8), "head_dim=-8: must be a whole number"),
    (edit(rms_norm_eps=...), "'rms_norm_eps' is missing"),
    (edit(rms_norm_eps=None), "config.json: "),
    (edit(rope_parameters=7), "config.json: "),
    (edit(num_key_value_heads=3), "n_kv_head=3"),
    (edit(vocab_size=1000), "embed_tokens.weight is torch.float32 of shape"),
    (edit(num_hidden_layers=3), "model.layers.2.input_layernorm.weight, "),
    (edit(num_hidden_layers=1), "not part of a llama model"),
    (edit(intermediate_size=41), "gate_proj.weight is torch.float32 of shape [40, 24], expected "
                                 "[41, 24]"),
    (weights(lambda w: w.pop(NORM)), f"{NORM} missing"),
    (weights(lambda w: w.update({"model.extra": torch.zeros(2)})), "model.extra: not part of"),
    (weights(lambda w: w.update({NORM: w[NORM][:5].clone()})), f"{NORM} is torch.float32 of sh"),
    (weights(lambda w: w.update({NORM: torch.zeros(24, dtype=torch.int64)})), "torch.int64"),
    (weights(lambda w: w.update({NORM: w[NORM] * float("nan")})), f"{NORM} holds numbers that are"),
    (lambda f: os.truncate(f / "model.safetensors", 9000), "truncated"),
    (lambda f: (f / "model.safetensors").write_text("hello"), "truncated or of another kind"),
    (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors in it"),
    (lambda f: (f / "model.safetensors.index.json").write_text(json.dumps(dict(
        weight_map={NORM: "model-00002.safetensors"}))), "model-00002.safetensors cannot be read"),
    (lambda f: (f / "model.safetensors.index.json").write_text(json.dumps(dict(
        weight_map={"model.other": "model.safetensors"}))), "model.other missing, which"),
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: it does not exist"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "not a tokenizer.json"),
    (lambda f: ((f / "chat_template.jinja").unlink(),
                (f / "tokenizer_config.json").write_text("{}")), "the EOS None"),
    (lambda f: ((f / "chat_template.jinja").unlink(), (f / "tokenizer_config.json").write_text(
        '{"chat_template": 7}')), "is no text"),
    (weights(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1})),
     "lm_head.weight: not part of"),
    (lambda f: (f / "tokenizer.json").write_text(break_json(
        (f / "tokenizer.json").read_text(), lambda c: c["added_tokens"].extend(
            dict(id=len(c["model"]["vocab"]) + n, content=f"<{n}>") for n in range(2)))),
     "the embedding"),
    (lambda f: (f / "tokenizer_config.json").write_text("x"), "tokenizer_config.json: not JSON"),
    (edit(num_hidden_layers=10**9), "declares a model that is larger than the files beside it"),
    (edit(intermediate_size=2**30), "declares a model that is larger than the files beside it"),
    (edit(max_position_embeddings=10**10), "block_size=10000000000: must be a whole number"),
    (lambda f: (f / "config.json").write_text("[" * 100000), "config.json: not JSON: too deep"),
    (lambda f: (f / "config.json").write_text('{"n": ' + "9" * 5000 + "}"), "of 5000 digits"),
    (lambda f: (f / "tokenizer.json").write_text("[" * 100000), "not a tokenizer.json"),
    (lambda f: (f / "tokenizer.json").write_text(break_json(
        (f / "tokenizer.json").read_text(), lambda c: c["added_tokens"].append(
            c["added_tokens"][0] | dict(content="<twice>")))), "ids do not run from 0")])
def test_a_broken_folder_is_one_clear_line(tmp_path, change, message):
    folder_of(tmp_path / "in")
    change(tmp_path / "in")
    done = run_script("convert.py", "--source=in", "--out=out", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("convert.py: error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_several_eos_in_the_config(tmp_path):
    # catches a traceback on Llama 3, whose config.json has a list of them
    folder_of(tmp_path / "in")
    edit(eos_token_id=[1, 2])(tmp_path / "in")
    done = run_script("convert.py", "--source=in", "--out=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


class Evil:
    def __reduce__(self):
        return os.system, ("touch was_run",)


@pytest.mark.parametrize("flags, message", [
    (["--out=o"], "--source= is missing"), (["--source=in"], "--out= is missing"),
    (["--source=in", "--out=o", "--to=onnx"], "--to=onnx: choose"),
    (["--source=in", "--out=full"], "exists already"),
    (["--source=in", "--out=o", "--template=zephyr"], "--template=zephyr: choose one of"),
    (["--source=in", "--out=o", "--template=llama3"], "has no tokens for its markers"),
    (["--source=in", "--out=o", "--block_size=300"], "the model knows 256 positions"),
    (["--source=full", "--out=o"], "is a checkpoint of this project already"),
    (["--source=in", "--out=o", "--to=transformers"], "no checkpoint"),
    (["--source=evil", "--out=o"], "pytorch_model.bin cannot be read"),
    (["--source=no/such/folder", "--out=o"], "config.json: it does not exist"),
    (["--source=mixed", "--out=o", "--to=transformers"], "mixture of dialects"),
    (["--source=in", "--out=run", "--overwrite=true"], "holds a run, whose checkpoint"),
    (["--source=full", "--out=in/config.json", "--overwrite=true", "--to=transformers"],
     "cannot write in/config.json")])
def test_bad_flags_are_one_clear_line(tmp_path, flags, message):
    folder_of(tmp_path / "in")
    shutil.copytree(tmp_path / "in", tmp_path / "evil")
    (tmp_path / "evil" / "model.safetensors").unlink()
    torch.save(dict(x=Evil()), tmp_path / "evil" / "pytorch_model.bin")
    own = load_tokenizer("synthetic")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("{}")
    for name, more in (("full", {}), ("mixed", dict(norm="rms"))):
        (tmp_path / name).mkdir()
        common.save_checkpoint(tmp_path / name / "model.pt", GPT(GPTConfig(
            own.vocab_size, own.n_tokens, 16, 1, 1, 8, **more)), "sft", own, convert.Config(), {})
    before = sorted(tmp_path.rglob("*"))
    done = run_script("convert.py", *flags, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_without_safetensors_one_line_says_what_to_install(tmp_path, monkeypatch):
    folder_of(tmp_path / "in")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    done = run_script("convert.py", "--source=in", "--out=out", cwd=tmp_path)
    assert done.returncode == 2 and "pip install safetensors" in done.stderr


def test_two_tokenizers_do_not_fit_together(tmp_path):
    """Would catch: a reward model that reads the ids of another vocabulary."""
    folder_of(tmp_path / "a", cut="gpt2")
    folder_of(tmp_path / "b", cut="smollm")
    _, one = into(tmp_path / "a", tmp_path / "one")
    _, two = into(tmp_path / "b", tmp_path / "two")
    with pytest.raises(UserError, match="do not fit together"):
        common.check_same_tokenizer(one, two, "one", "two")


# --- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server with one model, as the hub answers; breaks the connection once, in the middle."""
    folder_of(tmp_path / "in")
    seen, broken = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, dict(self.headers)))
            if self.path.startswith("/api/models/me/tiny?"):
                files = [p for p in (tmp_path / "in").iterdir()]
                return self.answer(json.dumps(dict(sha="c0ffee", siblings=[dict(
                    rfilename=p.name, blobId=download.git_hash(p), **(dict(lfs=dict(
                        sha256=hashlib.sha256(p.read_bytes()).hexdigest()))
                        if p.suffix == ".safetensors" else {})) for p in files] + [
                    dict(rfilename="pytorch_model.bin", blobId="0" * 40)])).encode())
            match = re.fullmatch(r"/me/tiny/resolve/c0ffee/(\S+)", self.path)
            if not match:
                return self.send_error(401 if "secret" in self.path else 404)
            content = (tmp_path / "in" / match[1]).read_bytes()
            start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
            if match[1] == "model.safetensors" and not broken:
                broken.append(True)
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[:1000])
                return None
            return self.answer(content[start:], 206 if start else 200)

        def answer(self, content, status=200):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(download, "WAIT", 0)
    yield seen
    server.shutdown()


def test_a_model_of_the_hub_is_downloaded_once(tmp_path, hub, monkeypatch):
    """Would catch: a part that is taken for the whole, a file fetched again, pickles fetched."""
    address = os.environ["HF_ENDPOINT"]
    monkeypatch.setenv("HF_TOKEN", "mine")
    convert_it = lambda name: run_script("convert.py", f"--source={name}", "--out=out",
                                         "--overwrite=true", cwd=tmp_path)
    done = convert_it("me/tiny")
    assert done.returncode == 0, done.stderr
    paths = [path for path, _ in hub]
    assert sum("model.safetensors" in p for p in paths) == 2  # it went on where it broke off
    assert any(h.get("Range") == "bytes=1000-" for _, h in hub)
    assert all(h["Authorization"] == "Bearer mine" for _, h in hub)
    assert not any("pytorch_model.bin" in p for p in paths)
    hub.clear()
    assert convert_it("me/tiny").returncode == 0 and len(hub) == 1  # what there is to have
    path = next((tmp_path / "out/downloads").rglob("config.json"))
    path.write_text("{}")
    hub.clear()
    assert convert_it("me/tiny").returncode == 0 and len(hub) == 2  # the damaged file again
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # no one listens
    done = convert_it("me/tiny")
    assert done.returncode == 0 and "cannot be reached, so the copy in" in done.stdout
    done = convert_it("me/other")
    assert done.returncode == 2 and "cannot be read" in done.stderr
    monkeypatch.setenv("HF_ENDPOINT", address)
    for name, message in (("me/none", "404"), ("me/secret", "HF_TOKEN")):
        done = convert_it(name)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


# --- the real model ------------------------------------------------------------------------------


@needs_real
def test_the_real_model(tmp_path):
    """Logits, 64 greedy tokens and a round trip, in fp32."""
    ours, own = into(REAL, tmp_path / "in")
    model = transformers.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32).eval()
    turns = [dict(role="user", content="Name three rivers, with a sentence about each.")]
    ids = own.encode_prompt(turns)
    other = own.encode_prompt("Hi")
    text = torch.tensor([own.encode((ROOT / "README.md").read_text())[:300]])
    with torch.no_grad():
        expected = model(text).logits
        torch.testing.assert_close(ours.logits(ours(text)), expected, atol=1e-4, rtol=0)
        greedy = model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0]
    both = batches.sample_texts(ours, own, [ids, other], 64, None, temperature=0)
    assert both[0]["ids"] == greedy[len(ids):].tolist() and len(both[0]["ids"]) > 40
    out(tmp_path / "in", tmp_path / "folder")
    del model
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(text).logits, expected, atol=1e-4, rtol=0)
