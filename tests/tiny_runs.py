"""Inputs on which a real stage script runs in a second: random checkpoints and small data files."""

import common
import torch
from data.records import write_jsonl
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig
from reward import RewardModel
from sft import Config

STAGES = ("sft", "reward", "dpo", "ppo", "grpo")
# every step sees all of the training data, so that the order of the file is the order of a batch
FLAGS = dict(
    sft=["--data=demos.jsonl", "--init=sft", "--epochs=2", "--samples=4", "--max_new_tokens=8",
         "--pretrain_data=text.txt", "--lr=0.5", "--warmup=1"],
    reward=["--data=pairs.jsonl", "--init=sft", "--epochs=2", "--batch_size=32", "--lr=0.5",
            "--warmup=1", "--samples=16", "--max_new_tokens=12"],
    dpo=["--data=pairs.jsonl", "--init=sft", "--epochs=2", "--batch_size=32", "--lr=0.5",
         "--warmup=1", "--max_new_tokens=12", "--eval_prompts=4"],
    ppo=["--data=pairs.jsonl", "--init=sft", "--reward_model=reward", "--iterations=1",
         "--batch_size=8", "--minibatches=1", "--epochs=3", "--max_new_tokens=12", "--lr=0.5",
         "--critic_lr=0.05", "--warmup=1", "--eval_prompts=4", "--best_of=1", "--log_every=1"],
    grpo=["--data=pairs.jsonl", "--init=sft", "--reward=model", "--reward_model=reward",
          "--iterations=1", "--batch_size=8", "--k=4", "--minibatches=1", "--epochs=3",
          "--max_new_tokens=12", "--lr=0.5", "--warmup=1", "--eval_prompts=4", "--log_every=1"])


def spy_temperatures(monkeypatch, stage):
    """{name: the temperatures that the stage's module calls generate, token_stats and
    token_logprobs with}, filled as it runs; every model has to be in eval mode."""
    temperatures = {}

    def spy(name, place):
        real = getattr(stage, name)

        def call(*args, **options):
            assert not args[0].training
            temperatures.setdefault(name, set()).add(args[place] if len(args) > place else 1.0)
            return real(*args, **options)

        monkeypatch.setattr(stage, name, call)

    for name, place in (("generate", 4), ("token_stats", 3), ("token_logprobs", 3)):
        if hasattr(stage, name):
            spy(name, place)
    return temperatures


def make_inputs(folder, n_embd=16):
    """Write sft/model.pt, reward/model.pt, demos.jsonl, pairs.jsonl and text.txt into folder.

    The policy is random, except that EOS has a probability of some 15% at every position: responses
    end at different lengths, and some are cut.
    """
    tokenizer = load_tokenizer("synthetic")
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, n_tokens=tokenizer.n_tokens, block_size=64,
                       n_layer=2, n_head=2, n_embd=n_embd)
    policy, reward_model = GPT(config), RewardModel(config)
    with torch.no_grad():
        policy.wte.weight[tokenizer.eos] = 1.4 * n_embd**-0.5
        policy.ln_f.bias.fill_(4 * n_embd**-0.5)
        reward_model.head.weight.mul_(3)
        reward_model.shift.fill_(0.4)
        reward_model.scale.fill_(1.7)
    for stage, model, parents in (("sft", policy, {}), ("reward", reward_model, None)):
        (folder / stage).mkdir(parents=True)
        if parents is None:
            content = torch.load(folder / "sft" / "model.pt", weights_only=True)
            parents = dict(sft=content["hash"])
        common.save_checkpoint(folder / stage / "model.pt", model, stage, tokenizer, Config(), {},
                               parents=parents)
    names = ["Bo", "Christopher", "Al", "Geraldine", "Di", "Maximilian", "Eve"]
    say = lambda i: "Say " + " and ".join(names[:1 + i % 4]) + f" {i}."
    answer = lambda i: "Hello" + f" {names[i % 7]}" * (1 + i % 3) + "."
    write_jsonl(folder / "demos.jsonl", [
        dict(prompt=say(i), completion=answer(i), held_out=i >= 24) for i in range(30)])
    write_jsonl(folder / "pairs.jsonl", [
        dict(prompt=say(i), completions=[answer(i), "No." * (1 + i % 2), "Go away, " + answer(i)],
             ranks=[[1, 2, 3], [2, 1, 2], [3, 2, 1]][i % 3], held_out=i >= 8) for i in range(14)])
    (folder / "text.txt").write_text("\n\n".join(f"{say(i)} {answer(i)}" for i in range(60)))
    return folder
