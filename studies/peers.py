"""The same work by others: TRL, transformers, nanochat's engine. `python studies/bench.py
--peer=true` runs this beside ours; its one argument is the task, in JSON, as `compare` there makes
it. Imports nothing of ours. What it needs is in requirements-dev.txt.

Random weights of the same shapes, random tokens of the same lengths, no dropout, AdamW. A step is
one optimiser step (PPO: one iteration), from the end of the one before, as a callback sees it.
"""

import json
import os
import resource
import statistics
import sys
import tempfile
import time
import types
import warnings
from itertools import combinations

if len(sys.argv) != 2 or not sys.argv[1].startswith("{"):
    print(f"{__doc__}\nstudies/peers.py TASK: bench.py starts it")
    sys.exit(0 if sys.argv[1:] == ["--help"] else 2)

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")
warnings.filterwarnings("ignore")

import torch

TASK = json.loads(sys.argv[1])
STAGE, SIZE, B, P, R = (TASK[name] for name in ("stage", "model", "B", "P", "R"))
V, GPU = SIZE["n_tokens"], torch.cuda.is_available()
EOS, PAD, FIRST = 0, 1, 2  # ids from FIRST on are drawn
STEPS = len(TASK["lengths"]) // B  # the first one to warm up
torch.manual_seed(0)
ticks, tokens = [], []  # a time at the end of each step; tokens of each step, without padding


def tick():
    if GPU:
        torch.cuda.synchronize()
    ticks.append(time.perf_counter())


def words(n):
    return " ".join(f"w{i}" for i in torch.randint(FIRST, V, (n,)).tolist())


def network(kind="AutoModelForCausalLM"):
    import transformers
    ids = dict(bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD, num_labels=1)
    if SIZE["rope_theta"]:
        config = transformers.LlamaConfig(
            vocab_size=V, hidden_size=SIZE["n_embd"], intermediate_size=SIZE["n_hidden"],
            num_hidden_layers=SIZE["n_layer"], num_attention_heads=SIZE["n_head"],
            num_key_value_heads=SIZE["n_kv_head"], max_position_embeddings=SIZE["block_size"],
            tie_word_embeddings=SIZE["tied"], **ids)
    else:
        config = transformers.GPT2Config(
            vocab_size=V, n_positions=SIZE["block_size"], n_embd=SIZE["n_embd"],
            n_layer=SIZE["n_layer"], n_head=SIZE["n_head"], resid_pdrop=0, embd_pdrop=0,
            attn_pdrop=0, **ids)
    return getattr(transformers, kind).from_config(config)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    names = {"<eos>": EOS, "<pad>": PAD} | {f"w{i}": i for i in range(FIRST, V)}
    plain = Tokenizer(models.WordLevel(names, unk_token="<eos>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<pad>",
                                   bos_token="<eos>", padding_side="left")


def settings(rows):
    """What all trainers of TRL are told. rows: of a step."""
    return dict(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows, report_to=[],
                save_strategy="no", logging_steps=1000, disable_tqdm=True, learning_rate=1e-4,
                use_cpu=not GPU, bf16=GPU, gradient_checkpointing=False)


def callback():
    from transformers import TrainerCallback

    class Tick(TrainerCallback):
        def on_step_end(self, *_, **__):
            tick()
    return Tick()


def train(trainer, passes=1, copies=1):
    """Run it, and note the tokens of each step, in so many passes, less the copies of a row."""
    collate, found = trainer.data_collator, []

    def counted(examples):
        batch = collate(examples)
        found.append(batch["attention_mask"].sum().item() / copies)
        return batch
    trainer.data_collator = counted
    trainer.train()
    found = found[-passes * STEPS:]  # before them TRL may read all of the data once
    tokens.extend(sum(found[i:i + passes]) for i in range(0, len(found), passes))


def trl_sft():
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    data = [dict(prompt=words(p) + " ", completion=words(r - 1)) for p, r in TASK["lengths"]]
    train(SFTTrainer(network(), args=SFTConfig(max_steps=STEPS, **settings(B)),
                     train_dataset=Dataset.from_list(data), processing_class=tokenizer(),
                     callbacks=[callback()]))


def trl_reward():
    """A ranking of 4 as its 6 pairs: TRL reads pairs, so each answer is read three times. At most
    32 pairs a pass: with all 192 of the tiny size at once it takes half as long again."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer
    data = []
    for p, *answers in TASK["lengths"]:
        asked = words(p)
        rows = [f"{asked} {words(r - 1)}".rstrip() for r in answers]
        data += [dict(chosen=a, rejected=b) for a, b in combinations(rows, 2)]
    k = len(TASK["lengths"][0]) - 1
    size = len(data) // STEPS  # pairs of a step
    passes = -(-size // 32)
    args = RewardConfig(max_steps=STEPS, gradient_accumulation_steps=passes,
                        **settings(size // passes))
    train(RewardTrainer(network("AutoModelForSequenceClassification"), args=args,
                        train_dataset=Dataset.from_list(data), processing_class=tokenizer(),
                        callbacks=[callback()]), passes, k - 1)


def trl_dpo():
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    data = [dict(prompt=words(p) + " ", chosen=words(a - 1), rejected=words(b - 1))
            for p, a, b in TASK["lengths"]]
    args = DPOConfig(max_steps=STEPS, precompute_ref_log_probs=TASK["precompute"], **settings(B))
    train(DPOTrainer(network(), network(), args=args, train_dataset=Dataset.from_list(data),
                     processing_class=tokenizer(), callbacks=[callback()]))


def trl_ppo():
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    judge = "AutoModelForSequenceClassification"
    data = Dataset.from_list([dict(input_ids=torch.randint(FIRST, V, (P,)).tolist())
                              for _ in range(B * STEPS)])
    args = PPOConfig(num_mini_batches=1, num_ppo_epochs=4, total_episodes=B * STEPS,
                     response_length=R, local_rollout_forward_batch_size=B,
                     num_sample_generations=0, **settings(B))
    tokens.extend([B * (P + R)] * STEPS)
    PPOTrainer(args=args, processing_class=tokenizer(), model=network(), ref_model=network(),
               reward_model=network(judge), value_model=network(judge), train_dataset=data,
               eval_dataset=data, callbacks=[callback()]).train()


def llama_sft():
    """transformers' own model and loss, which takes the logits of all tokens, in a plain loop."""
    model = network().train()
    model = model.cuda() if GPU else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    for step in range(STEPS):
        lengths = TASK["lengths"][step * B:(step + 1) * B]
        width = max(map(sum, lengths))
        ids = torch.full((B, width), PAD)
        for row, (p, r) in zip(ids, lengths):
            row[:p + r] = torch.randint(FIRST, V, (p + r,))
        at, ends = torch.arange(width), torch.tensor([p + r for p, r in lengths])[:, None]
        starts = torch.tensor([p for p, _ in lengths])[:, None]
        labels = ids.masked_fill((at < starts) | (at >= ends), -100)
        ids, labels, mask = (x.to(model.device) for x in (ids, labels, (at < ends).long()))
        with torch.autocast("cuda", torch.bfloat16, enabled=GPU):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        tokens.append(int(ends.sum()))
        tick()


def transformers_generate():
    model = network().eval()
    model = model.cuda().bfloat16() if GPU else model
    model.generation_config.eos_token_id = None  # every answer has R tokens
    prompts = torch.randint(FIRST, V, (B, P), device=model.device)
    for _ in range(STEPS):
        with torch.inference_mode():
            model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
                           top_k=0, max_new_tokens=R, pad_token_id=PAD)
        tokens.append(B * R)
        tick()


def nanochat_generate():
    """The engine of nanochat on its own network of the same depth and widths. It draws B answers to
    one prompt, which it reads once."""
    sys.path.insert(0, TASK["nanochat"])
    # it reads checkpoints of its own, with packages that are not needed here
    stub = types.ModuleType("nanochat.checkpoint_manager")
    stub.load_model, sys.modules["nanochat.checkpoint_manager"] = None, stub
    from nanochat.engine import Engine
    from nanochat.gpt import GPT, GPTConfig
    with torch.device("meta"):
        model = GPT(GPTConfig(P + R, V, SIZE["n_layer"], SIZE["n_head"], SIZE["n_kv_head"],
                              SIZE["n_embd"], "L"))
    model.to_empty(device="cuda" if GPU else "cpu")
    model.init_weights()
    never = types.SimpleNamespace(encode_special=lambda name: -1, get_bos_token_id=lambda: -1)
    prompt = torch.randint(FIRST, V, (P,)).tolist()
    for seed in range(STEPS):
        for _ in Engine(model.eval(), never).generate(prompt, B, R, seed=seed):
            pass
        tokens.append(B * R)
        tick()


if STAGE == "generate":
    peer, run = ("nanochat", nanochat_generate) if TASK["nanochat"] else \
        ("transformers", transformers_generate)
elif STAGE == "sft" and SIZE["rope_theta"]:
    peer, run = "transformers", llama_sft
else:
    peer, run = "trl", dict(sft=trl_sft, reward=trl_reward, ranking=trl_reward, dpo=trl_dpo,
                            ppo=trl_ppo)[STAGE]
run()
seconds = [b - a for a, b in zip(ticks, ticks[1:])]
tokens = tokens[1:STEPS]
step = statistics.median(seconds)
full = len(set(map(tuple, TASK["lengths"]))) == 1
print(json.dumps(dict(
    stage=STAGE, peer=peer, s_per_step=round(step, 5),
    tok_per_s=round(tokens[0] / step if full else sum(tokens) / sum(seconds), 2),
    peak_mib=round(torch.cuda.max_memory_allocated() / 2**20 if GPU else
                   resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1))))
