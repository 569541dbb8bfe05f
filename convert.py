"""Pretrained weights in, a folder that other tools open out.

In: a folder of transformers (or its name at the Hugging Face hub) with a model of GPT-2's kind, of
Llama's, Qwen2's or Qwen3's becomes a checkpoint that every stage takes as --init, its tokenizer and
chat template inside. A model without a template gets ours, its three markers in new rows.

Out: a checkpoint becomes a folder that transformers opens, AutoModelForCausalLM or of a reward
model AutoModelForSequenceClassification, with tokenizer and chat template.

    python convert.py --source=HuggingFaceTB/SmolLM2-135M-Instruct --out=out/smollm2
    python convert.py --source=FOLDER --out=out/smollm2 --block_size=1024
    python convert.py --source=out/ppo --to=transformers --out=out/ppo-transformers
"""

from dataclasses import dataclass

import cli
from cli import NotNegative, UserError


@dataclass
class Config:
    source: str = ""  # folder of transformers or name at the hub; with --to: a checkpoint
    out: str = ""  # folder to write
    to: str = "checkpoint"  # "checkpoint" of this project, or "transformers"
    template: str = "auto"  # markers, chatml or llama3; "auto": the source's own, if it is of these
    block_size: NotNegative[int] = 0  # longest sequence of all later stages; 0: the source's
    overwrite: bool = False  # write into a folder that holds files already


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import dataclasses
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch

import common
from cli import note
from data.chat import jinja, read_object, read_tokenizer, tokenizer_json, with_tokens
from data.download import fetch_model
from data.files import cannot_write, sweep, sync_folder, unfinished
from data.tokenizer import TEMPLATES
from model import GPT, GPTConfig
from reward import RewardModel

KINDS = ("gpt2", "llama", "qwen2", "qwen3")
SURPLUS = re.compile(r"\.attn\.(bias|masked_bias)$|rotary_emb\.inv_freq$")  # constants, not learned


# --- what the two sides call the same thing ------------------------------------------------------


def read_config(content, where):
    """(kind, GPTConfig) of a config.json, its vocabulary as the embedding has it. UserError for
    what model.py does not compute."""
    def need(name, *allowed):
        if content.get(name, allowed[0]) not in allowed:
            raise UserError(f"{where}: {name}={content[name]!r} is not supported")

    kind = content.get("model_type")
    if kind not in KINDS:
        raise UserError(f"{where}: models of type {kind!r} are not supported; those of "
                        f"{', '.join(KINDS)} are")
    need("quantization_config", None)
    need("tie_word_embeddings", True, False)
    try:
        if kind == "gpt2":
            need("activation_function", "gelu_new", "gelu_pytorch_tanh")
            need("scale_attn_weights", True)
            need("scale_attn_by_inverse_layer_idx", False)
            need("add_cross_attention", False)
            return kind, GPTConfig(
                content["vocab_size"] + 1, content["vocab_size"], content["n_positions"],
                content["n_layer"], content["n_head"], content["n_embd"],
                n_hidden=content.get("n_inner") or 0,
                norm_eps=float(content["layer_norm_epsilon"]),
                tied=content.get("tie_word_embeddings", True))
        need("hidden_act", "silu")
        need("use_sliding_window", False)
        bias = dict(llama="none", qwen2="qkv", qwen3="none")[kind]
        if kind == "llama" and content.get("attention_bias") and content.get("mlp_bias"):
            bias = "all"
        elif kind != "qwen2":
            need("attention_bias", False)
            need("mlp_bias", False)
        # the second since transformers 5; where both are there, the first one counts
        rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
        how = rope.get("rope_type", rope.get("type", "default"))
        if how not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
            raise UserError(f"{where}: rotary positions scaled by {how!r} are not supported")
        factors = ("factor", "low_freq_factor", "high_freq_factor",
                   "original_max_position_embeddings")
        return kind, GPTConfig(
            content["vocab_size"] + 1, content["vocab_size"], content["max_position_embeddings"],
            content["num_hidden_layers"], content["num_attention_heads"], content["hidden_size"],
            n_kv_head=content.get("num_key_value_heads") or 0,
            head_dim=content.get("head_dim") or 0, n_hidden=content["intermediate_size"],
            rope_theta=float(rope.get("rope_theta", content.get("rope_theta", 10000.0))),
            rope_scaling=tuple(float(rope[name]) for name in factors) if how == "llama3" else (),
            norm="rms", norm_eps=float(content["rms_norm_eps"]), mlp="swiglu", bias=bias,
            qk_norm=kind == "qwen3", tied=content.get("tie_word_embeddings", False))
    except KeyError as error:
        raise UserError(f"{where}: {error} is missing") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: {error}") from None


def write_config(kind, size, eos, pad):
    """The content of config.json."""
    both = dict(model_type=kind, vocab_size=size.n_tokens, eos_token_id=eos, bos_token_id=None,
                pad_token_id=pad, tie_word_embeddings=size.tied, dtype="float32")
    if kind == "gpt2":
        return both | dict(
            n_positions=size.block_size, n_layer=size.n_layer, n_head=size.n_head,
            n_embd=size.n_embd, n_inner=size.n_hidden, layer_norm_epsilon=size.norm_eps,
            activation_function="gelu_new", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    rope = dict(rope_type="default", rope_theta=size.rope_theta)
    if size.rope_scaling:
        factor, low, high, first = size.rope_scaling
        rope |= dict(rope_type="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high,
                     original_max_position_embeddings=first)
    return both | dict(
        max_position_embeddings=size.block_size, num_hidden_layers=size.n_layer,
        num_attention_heads=size.n_head, hidden_size=size.n_embd, head_dim=size.head_dim,
        num_key_value_heads=size.n_kv_head, intermediate_size=size.n_hidden, hidden_act="silu",
        rms_norm_eps=size.norm_eps, rope_parameters=rope, rope_theta=size.rope_theta,
        rope_scaling=rope if size.rope_scaling else None, attention_bias=size.bias != "none",
        mlp_bias=size.bias == "all", use_sliding_window=False)


def kind_of(size):
    """The type of transformers' model that computes what a GPTConfig says. UserError for a mixture
    that none of them computes."""
    square = size.head_dim * size.n_head == size.n_embd
    dialect = (size.norm, size.mlp, size.rope_theta > 0)
    if dialect == ("layer", "gelu", False) and size.bias == "all" and not size.qk_norm and square \
            and size.n_kv_head == size.n_head:
        return "gpt2"
    if dialect == ("rms", "swiglu", True):
        if size.qk_norm and size.bias == "none":
            return "qwen3"
        if size.bias == "qkv" and square and not size.qk_norm:
            return "qwen2"
        if size.bias != "qkv" and not size.qk_norm:
            return "llama"
    raise UserError("no model of transformers computes this mixture of dialects")


def layout(kind, size):
    """[(our name, their names, rows of each, whether they keep it transposed), ...]: where there
    are several, ours is theirs one below the other."""
    C, D = size.n_embd, size.head_dim
    qkv = [size.n_head * D, size.n_kv_head * D, size.n_kv_head * D]
    if kind == "gpt2":
        top, h, names = "transformer.", "h", dict(wte="wte", wpe="wpe", ln_f="ln_f")
        layer = [(name, [name], [rows]) for name, rows in (
            ("ln_1", C), ("attn.c_attn", sum(qkv)), ("attn.c_proj", C), ("ln_2", C),
            ("mlp.c_fc", size.n_hidden), ("mlp.c_proj", C))]
    else:
        top, h, names = "model.", "layers", dict(wte="embed_tokens", ln_f="norm")
        layer = [("ln_1", ["input_layernorm"], [C]),
                 ("attn.c_attn", [f"self_attn.{x}_proj" for x in "qkv"], qkv),
                 ("attn.c_proj", ["self_attn.o_proj"], [C]),
                 ("attn.q_norm", ["self_attn.q_norm"], [D]),
                 ("attn.k_norm", ["self_attn.k_norm"], [D]),
                 ("ln_2", ["post_attention_layernorm"], [C]),
                 ("mlp.c_fc", ["mlp.gate_proj", "mlp.up_proj"], [size.n_hidden] * 2),
                 ("mlp.c_proj", ["mlp.down_proj"], [C])]
    with torch.device("meta"):
        ours = GPT(size).state_dict()
    rows = [(name, [top + theirs], [len(ours[f"{name}.weight"])])
            for name, theirs in names.items()]
    rows += [(f"h.{n}.{name}", [f"{top}{h}.{n}.{x}" for x in theirs], counts)
             for n in range(size.n_layer) for name, theirs, counts in layer]
    rows.append(("lm_head", ["lm_head"], [size.vocab_size]))
    return [(f"{name}.{part}", [f"{x}.{part}" for x in theirs], counts,
             kind == "gpt2" and part == "weight" and ".c_" in name)
            for name, theirs, counts in rows for part in ("weight", "bias")
            if f"{name}.{part}" in ours]


# --- in -----------------------------------------------------------------------------------------


class Tensors:
    """The tensors of a folder by name: one file or several; safetensors, or else PyTorch's own."""

    def __init__(self, folder):
        self.folder, self.files = folder, {}  # {tensor: its file}
        for stem, self.ending in (("model", "safetensors"), ("pytorch_model", "bin")):
            single = folder / f"{stem}.{self.ending}"
            index = folder / f"{single.name}.index.json"
            if index.exists():
                named = read_object(index).get("weight_map")
                if not isinstance(named, dict) or not all(
                        isinstance(file, str) for file in named.values()):
                    raise UserError(f"{index}: its weight_map does not say which file holds what")
                self.files = {name: folder / file for name, file in named.items()}
                for path in sorted(set(self.files.values())):
                    missing = {n for n, p in self.files.items() if p == path} - {*self.names(path)}
                    if missing:
                        raise UserError(f"{path}: {some(missing)} missing, which {index.name} "
                                        "says it holds")
                return
            if single.exists():
                self.files = dict.fromkeys(self.names(single), single)
                return
        raise UserError(f"{folder}: no model.safetensors in it, and no pytorch_model.bin")

    def open(self, path):
        """What is in a file: memory-mapped, so that only what is looked at is read."""
        try:
            if self.ending == "bin":
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                if not all(isinstance(name, str) and isinstance(x, torch.Tensor)
                           for name, x in content.items()):
                    raise ValueError("holds other things than tensors")
                return content
            from safetensors import safe_open
            return safe_open(path, framework="pt")
        except ImportError:
            raise UserError(f"{path}: reading it needs the package safetensors: "
                            "pip install safetensors") from None
        except Exception as error:  # a different one for each way a file can be broken
            raise UserError(f"{path} cannot be read, it is truncated or of another kind: "
                            f"{common.describe(error)}") from None

    def names(self, path):
        return list(self.open(path).keys())

    def read(self, name):
        """One tensor. The file is opened for it alone: a mapped file counts as memory of ours until
        it is closed, and the whole of it would be the model a second time."""
        content = self.open(self.files[name])
        return content[name] if self.ending == "bin" else content.get_tensor(name)


def some(found):
    """Names of tensors, in a line: the first few, and how many more."""
    found = sorted(found)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more tensors" if len(found) > 3 else "")


def read_weights(kind, size, rows, tensors, model):
    """Fill the GPT with what a folder holds; rows: how many of the embedding's are there. UserError
    for tensors that are missing, surplus, of another shape or not finite."""
    table, where = layout(kind, size), tensors.folder
    top = "transformer." if kind == "gpt2" else "model."
    prefix = top if any(name.startswith(top) for name in tensors.files) else ""  # or a bare model
    theirs = lambda name: name.replace(top, prefix, 1) if name.startswith(top) else name
    expected = {theirs(name) for _, group, *_ in table for name in group}
    missing = expected - tensors.files.keys()
    if missing:
        raise UserError(f"{where}: {some(missing)} missing")
    surplus = {name for name in tensors.files.keys() - expected if not SURPLUS.search(name)}
    if size.tied and "lm_head.weight" in surplus and torch.equal(
            tensors.read("lm_head.weight"), tensors.read(theirs(table[0][1][0]))):
        surplus.remove("lm_head.weight")  # the embedding once more
    if surplus:
        raise UserError(f"{where}: {some(surplus)}: not part of a {kind} model with this "
                        "config.json")
    weights = model.state_dict()
    for ours, group, counts, transposed in table:
        target, start = weights[ours], 0
        for name, count in zip(group, counts):
            part = tensors.read(theirs(name))
            if transposed:
                part = part.T
            place = target[start:start + count]
            if ours in ("wte.weight", "lm_head.weight"):
                shape = (rows, size.n_embd)
                place = place[:min(rows, size.n_tokens)]
            else:
                shape = tuple(place.shape)
            if tuple(part.shape) != shape or not part.is_floating_point():
                raise UserError(f"{where}: {name} is {part.dtype} of shape {[*part.shape]}, "
                                f"expected {[*shape]}")
            place.copy_(part[:len(place)])
            if not place.isfinite().all():
                raise UserError(f"{where}: {name} holds numbers that are not finite")
            start += count


def read_model(config):
    """(GPT, tokenizer, kind) of a folder of transformers."""
    folder = Path(config.source).expanduser()
    local = "/" in config.source and folder.parent.exists()  # a path, with a slip in its last part
    if not folder.exists() and not local and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.source):
        folder = fetch_model(config.source)
    if (folder / "model.pt").exists() and not (folder / "config.json").exists():
        raise UserError(f"--source={folder} is a checkpoint of this project already; "
                        "--to=transformers makes a folder of transformers of it")
    path = folder / "config.json"
    content = read_object(path)
    kind, size = read_config(content, path)
    rows = size.n_tokens
    tensors = Tensors(folder)
    tokenizer, new = read_tokenizer(folder, Path(config.source).name, config.template,
                                    content.get("eos_token_id"))
    if tokenizer.n_tokens - len(new) > rows:
        raise UserError(f"{folder}: tokenizer.json has {tokenizer.n_tokens} tokens, the embedding "
                        f"{rows} rows")
    if config.block_size > size.block_size:
        raise UserError(f"--block_size={config.block_size}: the model knows {size.block_size} "
                        "positions")
    size = dataclasses.replace(size, vocab_size=tokenizer.vocab_size, n_tokens=tokenizer.n_tokens)
    with torch.device("meta"):  # config.json may declare any size: nothing is allocated for it yet
        count = GPT(size).num_params() if size.n_layer <= len(tensors.files) else math.inf
    count -= 2 * size.n_embd * max(0, size.vocab_size - rows)  # rows that are ours
    if count > sum(path.stat().st_size for path in set(tensors.files.values())):  # bytes
        raise UserError(f"{path}: it declares a model that is larger than the files beside it")
    model = GPT(size)
    read_weights(kind, size, rows, tensors, model)
    with torch.no_grad():
        for matrix in [model.wte.weight] + ([] if size.tied else [model.lm_head.weight]):
            matrix[size.n_tokens:] = 0  # never produced, and hidden by every mask
            if new:  # like an average token, and a little apart from each other
                old = matrix[:size.n_tokens - len(new)]
                noise = torch.randn(len(new), size.n_embd,
                                    generator=torch.Generator().manual_seed(0))
                matrix[new] = old.mean(0) + 0.1 * old.std(0) * noise
    if config.block_size:
        if not size.rope_theta:
            model.wpe = torch.nn.Embedding.from_pretrained(model.wpe.weight[:config.block_size])
        model.config = dataclasses.replace(size, block_size=config.block_size)
    return model, tokenizer, kind


# --- out -----------------------------------------------------------------------------------------


def with_constant(size, weights, head, constant):
    """(size, weights, head) of a model whose head, without a bias, gives head . h + constant.

    With LayerNorm the constant goes into the bias of the last one. RMSNorm has none, and what is
    added before it is divided by the length of a vector that differs from token to token. So a last
    block computes the score s from the normalised h, and writes (s, B) into two coordinates, so
    large that nothing else counts: RMSNorm makes of them sqrt(C) (s / B, 1), up to (s / B)^2 / 2.
    Too large for fp16, which ends at 65,504; bf16 does not.
    """
    if size.norm == "layer":
        weights["ln_f.bias"] = weights["ln_f.bias"] + constant * head / head.square().sum()
        return size, weights, head
    B, large = 1e4, 1e12
    size = dataclasses.replace(size, n_layer=size.n_layer + 1, bias="all")
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in GPT(size).state_dict().items()}
    last = f"h.{size.n_layer - 1}."
    old, weights = weights, {name: weights.get(name, torch.zeros(shape))
                             for name, shape in shapes.items()}
    fc, proj = torch.zeros(shapes[last + "mlp.c_fc.weight"]), torch.zeros(
        shapes[last + "mlp.c_proj.weight"])
    fc_bias = torch.zeros(len(fc))
    fc_bias[:2] = 1.0  # two open gates: silu(1), whatever the input
    fc[size.n_hidden] = head  # and behind them s and 1
    fc_bias[size.n_hidden + 1] = 1.0
    gate = torch.nn.functional.silu(torch.ones(()))
    proj[0, 0], proj[1, 1] = large / gate, large * B / gate
    two = torch.zeros(size.n_embd)
    two[:2] = 1.0
    weights |= {last + "ln_1.weight": torch.ones(size.n_embd),
                last + "ln_2.weight": old["ln_f.weight"], last + "mlp.c_fc.weight": fc,
                last + "mlp.c_fc.bias": fc_bias, last + "mlp.c_proj.weight": proj,
                "ln_f.weight": two}
    return size, weights, torch.tensor([B, constant] + [0.0] * (size.n_embd - 2)) \
        / size.n_embd ** 0.5


def write_folder(config, out):
    """Write a checkpoint as a folder of transformers, whole or not at all."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("writing a folder of transformers needs the package safetensors: "
                        "pip install safetensors") from None
    checkpoint = common.load_checkpoint(
        config.source, ("pretrain", "reward", *common.POLICIES))
    is_reward = checkpoint["stage"] == "reward"
    if checkpoint["config"].get("ensemble", 1) != 1:
        raise UserError(f"{config.source} is an ensemble of reward models, for which transformers "
                        "has no class: train one with `python reward.py --ensemble=1`")
    model, tokenizer = common.build(RewardModel if is_reward else GPT, checkpoint, config.source,
                                    torch.device("cpu"))
    gpt = model.requires_grad_(False).gpt if is_reward else model
    size, weights = gpt.config, gpt.state_dict()
    kind, pad, rows, extra = kind_of(size), tokenizer.eos, size.n_tokens, {}
    if is_reward:
        pad, rows = tokenizer.pad, size.n_tokens + 1
        head = model.head.weight[0] / model.scale
        constant = ((model.head.bias - model.shift) / model.scale).item()
        if kind == "qwen3":
            note(f"warning: the head of a qwen3 model has no bias: its scores are ours less "
                 f"{constant:.6f}")
        else:
            size, weights, head = with_constant(size, weights, head, constant)
            kind = kind_of(size)
        extra = {"score.weight": head[None].contiguous()}
    size = dataclasses.replace(size, n_tokens=rows, vocab_size=rows + 1)
    tensors = {}
    for ours, theirs, counts, transposed in layout(kind, size):
        if ours == "lm_head.weight" and is_reward:
            continue
        whole = weights[ours][:rows] if ours in ("wte.weight", "lm_head.weight") else weights[ours]
        parts = [whole] if len(theirs) == 1 else whole.split(counts)
        tensors |= {name: (part.T if transposed else part).contiguous().clone()
                    for name, part in zip(theirs, parts)}
    what = ("ForSequenceClassification" if is_reward else
            "LMHeadModel" if kind == "gpt2" else "ForCausalLM")
    content = write_config(kind, size, tokenizer.eos, pad) | dict(
        architectures=[dict(gpt2="GPT2", llama="Llama", qwen2="Qwen2", qwen3="Qwen3")[kind] + what])
    if is_reward:
        content |= dict(num_labels=1, id2label={"0": "score"}, label2id={"score": 0})
    own = isinstance(tokenizer.state, dict)
    text = tokenizer.state["tokenizer.json"] if own else tokenizer_json(tokenizer)
    names_of = {i: token for token, i in tokenizer.specials.items()}
    settings = dict(tokenizer.state["tokenizer_config.json"]) if own else {}
    settings |= dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=names_of[tokenizer.eos],
                     model_max_length=size.block_size, clean_up_tokenization_spaces=False)
    settings["pad_token"] = settings.get("pad_token") or names_of[tokenizer.eos]
    if is_reward:  # which must not be EOS, where the score is read
        name = next(name for name in (f"<|pad{n or ''}|>" for n in range(99))
                    if name not in tokenizer.specials)
        text, settings["pad_token"] = with_tokens(text, [name]), name
    plain = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=tokenizer.eos,
                 pad_token_id=pad)
    # the source's own template may do more (tools), but not name another date each day
    form = own and tokenizer.state["chat_template.jinja"]
    if is_reward or not form or "strftime_now" in form:
        form = jinja(tokenizer.template, names_of[tokenizer.eos] if is_reward else None)
    files = {"config.json": content, "generation_config.json": plain,
             "tokenizer_config.json": settings, "tokenizer.json": text, "chat_template.jinja": form}
    sweep(out.parent, out.name)
    folder = unfinished(out)
    try:
        folder.mkdir(parents=True)
        save_file(tensors | extra, folder / "model.safetensors", metadata=dict(format="pt"))
        for name, value in files.items():
            (folder / name).write_text(value if isinstance(value, str) else
                                       json.dumps(value, indent=1) + "\n", encoding="utf-8")
        out.mkdir(exist_ok=True)
        for path in folder.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(path, out / path.name)
        sync_folder(out)
    except OSError as error:
        raise UserError(cannot_write(out, error)) from None
    except SafetensorError as error:
        raise UserError(f"cannot write {out}: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{out}: a {kind} model of transformers, "
          f"{sum(t.numel() for t in (tensors | extra).values()):,} numbers"
          + ("; for fp32 and bf16, not fp16" if is_reward and kind != "gpt2" else ""))


def main(config):
    for name in ("source", "out"):
        if not getattr(config, name):
            raise UserError(f"--{name}= is missing (--help has examples)")
    if config.to not in ("checkpoint", "transformers"):
        raise UserError(f"--to={config.to}: choose checkpoint or transformers")
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not config.overwrite:
        raise UserError(f"--out={out} exists already: --overwrite=true writes into it, another "
                        "--out elsewhere")
    if (out / "log.jsonl").exists():
        raise UserError(f"--out={out} holds a run, whose checkpoint would be lost: choose another")
    if config.to == "transformers":
        return write_folder(config, out)
    model, tokenizer, kind = read_model(config)
    common.make_folder("out", out)
    common.save_checkpoint(out / "model.pt", model, "convert", tokenizer, config, {})
    form = next((n for n, t in TEMPLATES.items() if t["head"]["user"] ==
                 tokenizer.template["head"]["user"]), "")
    print(f"{out}: {model.num_params():,} parameters of a {kind} model, {tokenizer.n_tokens:,} "
          f"tokens, context {model.config.block_size:,}, chat template {form}\n"
          f"next: python sft.py --init={out} --data=DEMONSTRATIONS.jsonl")


if __name__ == "__main__":
    cli.run_main(main, CONFIG)
