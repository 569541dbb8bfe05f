"""Does training reach the optimum that theory gives? Tiny problems, every response enumerated.

    J(pi) = E_{y ~ pi} [ r(y) ] - beta KL(pi || pi_ref)
    pi*(y) = pi_ref(y) exp(r(y) / beta) / Z,    J(pi*) = beta log Z

Three content tokens and EOS, responses of up to 4 tokens, a random transformer as reference, a
random score for every response (cut ones get the missing-EOS score, as in training). The stages'
own updates are driven there on sampled responses (DPO: on every pair of responses, each by its
probability), and what they reach is compared with pi*. At a temperature T, pi and pi_ref both stand
for softmax(logits / T): the optimum is relative to the tempered reference.

    python studies/closed_form.py            # the table; exit status 1 where a bound is missed
    python studies/closed_form.py --problems=1 --methods="PPO, KL in the reward"
"""

import collections
import copy
import itertools
import multiprocessing
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's path starts at its own folder

import cli
from cli import Positive, UserError


@dataclass
class Config:
    problems: Positive[int] = 5  # random problems a method
    cold_problems: Positive[int] = 2  # of them, how many again at temperature 0.7
    methods: str = "all"  # only the rows of the table whose name begins so
    workers: Positive[int] = 2  # processes, each with one thread


# --help and bad flags are answered before torch is imported
CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import numpy as np
import torch
from tqdm import tqdm

import common
import dpo
import grpo
import ppo
from model import GPT, GPTConfig, generate, token_logprobs
from reward import RewardModel

EOS, CONTENT, LENGTH = 0, (1, 2, 3), 4  # LENGTH: response tokens at most, EOS included
PROMPTS = ([2, 1],)
MISSING_EOS = -1.0  # low, yet pi* keeps some weight on cut responses
BETA = 1.0  # of scores with standard deviation 1


# --- the problem, enumerated ---------------------------------------------------------------------


def responses():
    """All responses: lists of ids that end with EOS or are cut at LENGTH tokens."""
    heads = [list(head) for n in range(LENGTH + 1) for head in itertools.product(CONTENT, repeat=n)]
    return [head if len(head) == LENGTH else [*head, EOS] for head in heads]


def optimum(ref_seq_logp, score, beta):
    """log pi*(y), (N,): ref_seq_logp + score / beta, normalised. All (N,), every response once."""
    return torch.log_softmax(ref_seq_logp + score / beta, 0)


def kl_estimates(logp, ref_logp):
    """Three estimators of KL(pi || ref) at samples from pi (Schulman 2020): k1, k2, k3.

    Shape kept, nats. Per token as given, or per sequence if logp and ref_logp are sums.
    """
    log_ratio = logp - ref_logp
    return log_ratio, 0.5 * log_ratio**2, (-log_ratio).exp() - 1 + log_ratio


class Problem:
    """A reference model, a score for every response to every prompt, and their enumeration.

    N rows, every prompt with every response: tokens, mask (N, T); prompt, score, finished (N,).
    """

    def __init__(self, seed, temperature=1.0, dtype=torch.float32):
        torch.manual_seed(seed)
        self.seed, self.temperature, self.beta = seed, temperature, BETA
        size = GPTConfig(vocab_size=8, n_tokens=4, block_size=8, n_layer=2, n_head=2, n_embd=32)
        self.reference = GPT(size).eval().requires_grad_(False)
        for p in self.reference.parameters():  # away from the even initial distribution
            p.add_(0.15 * torch.randn_like(p))
        self.reference.to(dtype)
        self.pad, self.width = size.n_tokens, max(map(len, PROMPTS)) + LENGTH
        rows = [(i, p, y) for i, p in enumerate(PROMPTS) for y in responses()]
        fill = lambda row, x: row + [x] * (self.width - len(row))
        self.tokens = torch.tensor([fill(p + y, self.pad) for _, p, y in rows])
        self.mask = torch.tensor([fill([0.0] * len(p) + [1.0] * len(y), 0.0) for _, p, y in rows],
                                 dtype=dtype)
        self.prompt = torch.tensor([i for i, _, _ in rows])
        self.finished = torch.tensor([y[-1] == EOS for _, _, y in rows])
        # every prefix draws its share, so that responses with one start score alike
        draw = collections.defaultdict(lambda: torch.randn(()).item())
        score = [sum(draw[i, *y[:t + 1]] for t in range(len(y))) / len(y)**0.5 for i, _, y in rows]
        self.score = torch.where(self.finished, torch.tensor(score), MISSING_EOS).to(dtype)
        self.index = {tuple(row): i for i, row in enumerate(self.tokens.tolist())}
        # the state before each response token, (N, T): equal numbers for equal prefixes
        prefixes = {}
        self.state = torch.tensor(
            [[prefixes.setdefault(tuple(row[:t]), len(prefixes)) if m else -1
              for t, m in enumerate(ms)] for row, ms in zip(self.tokens.tolist(), self.mask)])
        self.ref_logp = self.logp(self.reference)
        self.best = torch.cat([optimum(self.ref_logp.sum(1)[self.prompt == i],
                                       self.score[self.prompt == i], self.beta)
                               for i in range(len(PROMPTS))])

    def logp(self, policy):
        """(N, T), by the stages' own function."""
        return token_logprobs(policy, self.tokens, self.mask, self.temperature).to(self.mask.dtype)

    def rows(self, tokens):
        """Which enumerated responses these sampled rows (B, T) are, (B,)."""
        tokens = torch.nn.functional.pad(tokens, (0, self.width - tokens.size(1)), value=self.pad)
        return torch.tensor([self.index[tuple(row)] for row in tokens.tolist()])

    def objective(self, seq_logp):
        """J, a mean over prompts, in units of score."""
        gain = self.score - self.beta * (seq_logp - self.ref_logp.sum(1))
        return (seq_logp.exp() * gain).sum() / len(PROMPTS)

    def distance(self, seq_logp, other):
        """Total variation, one number a prompt."""
        gap = (seq_logp.exp() - other.exp()).abs() / 2
        return torch.stack([gap[self.prompt == i].sum() for i in range(len(PROMPTS))])

    def state_mean(self, x, seq_logp):
        """E[x_t | state at t] for x (N, T), given back at every (y, t), (N, T); 0 off the mask."""
        kept, out = self.mask.bool(), torch.zeros_like(x)
        weight = seq_logp.exp()[:, None].expand_as(x)[kept]
        sums = torch.zeros(2, int(self.state.max()) + 1, dtype=x.dtype)
        sums[0].index_add_(0, self.state[kept], weight * x[kept])
        sums[1].index_add_(0, self.state[kept], weight)
        out[kept] = (sums[0] / sums[1])[self.state[kept]]
        return out

    def values(self, logp, kl_in):
        """What PPO's critic should say at each state, (N, T): score less beta KL still to come.

        With the KL in the loss the state's own KL is not part of it, see `ppo.next_state_kl`.
        """
        log_ratio = (logp - self.ref_logp) * self.mask
        to_go = log_ratio.flip(1).cumsum(1).flip(1)
        if kl_in == "loss":
            to_go = to_go - log_ratio
        return self.state_mean(self.score[:, None] - self.beta * to_go, logp.sum(1)) * self.mask

    def by_recursion(self, soft):
        """log pi(y), (N,), from the last token back: pi(a|s) ~ pi_ref(a|s) exp(Q(s, a) / beta).

        soft: Q holds score less beta KL to come, which gives pi*. Not soft: Q is the expected score
        alone, where KL in the loss ends if no action pays for the KL of the states it leads to.
        """
        log_pi = torch.zeros_like(self.score)

        def value(rows, t):  # rows: the responses that agree before column t
            if t == self.width or self.mask[rows[0], t] == 0:
                return self.score[rows[0]]
            children = [rows[self.tokens[rows, t] == a] for a in (EOS, *CONTENT)]
            q = torch.stack([value(child, t + 1) for child in children])
            weights = self.ref_logp[[child[0] for child in children], t] + q / self.beta
            log_p = torch.log_softmax(weights, 0)
            for child, lp in zip(children, log_p):
                log_pi[child] += lp
            return self.beta * weights.logsumexp(0) if soft else (log_p.exp() * q).sum()

        for i, prompt in enumerate(PROMPTS):
            value((self.prompt == i).nonzero()[:, 0], len(prompt))
        return log_pi


def draw_problems(count, temperature=1.0, least=0.3):
    """The first `count` seeds' problems whose pi* lies at least `least` from pi_ref."""
    found = (Problem(seed, temperature) for seed in itertools.count())
    far = (p for p in found if p.distance(p.ref_logp.sum(1), p.best).min() >= least)
    return list(itertools.islice(far, count))


# --- the methods: drive a stage's update, return the policy and how far the critic is off --------


def run_ppo(problem, kl_in, priced=True, steps=200, batch_size=256):
    """PPO on sampled responses. Returns (policy, critic error or None).

    With the KL in the reward all returns from a state are equal at pi*: score and k1 cancel, and
    the noise fades on the way. Whitening would blow up what is left of it, so it is off. With the
    KL in the loss the noise of the score stays, which takes more samples.
    priced False leaves out the KL of later states (KL in the loss only), for comparison.
    The critic's error: root mean square over the states as often as the policy visits them, as a
    share of the range (largest less smallest) of the enumerated values.
    """
    config = ppo.Config(
        batch_size=batch_size, minibatches=2, epochs=1, lr=4e-3, critic_lr=2e-3, beta=problem.beta,
        temperature=problem.temperature, kl_in=kl_in, missing_eos=MISSING_EOS, whiten=False,
        value_clip=1.0, micro_batch=0)
    torch.manual_seed(0)
    policy = copy.deepcopy(problem.reference).requires_grad_(True)
    reward_model = RewardModel(policy.config)
    reward_model.gpt.load_state_dict(policy.state_dict())
    critic = ppo.ValueModel(reward_model)
    optimizers = [common.adamw([m], config.lr, eps=config.adam_eps) for m in (policy, critic)]
    draws, rng = (np.random.default_rng(n) for n in (1, 0))  # of tokens, of the order
    prompts = list(PROMPTS) * (batch_size // len(PROMPTS))
    for step in range(steps):
        for optimizer, lr in zip(optimizers, (config.lr, config.critic_lr)):
            common.set_lr(optimizer, lr * common.cosine(step, steps, 5))
        tokens, mask, finished = generate(policy, prompts, LENGTH, EOS, problem.temperature,
                                          torch.from_numpy(draws.random((batch_size, LENGTH))))
        batch = ppo.prepare(policy, critic, problem.reference, tokens, mask, finished,
                            problem.score[problem.rows(tokens)],
                            problem.beta if priced else 0.0, config)
        ppo.update(policy, critic, problem.reference, optimizers, batch, problem.beta, config, rng)
    if not priced:
        return policy, None
    with torch.no_grad():
        logp, value = problem.logp(policy), critic(problem.tokens, problem.mask)
    exact = problem.values(logp, kl_in)
    weight = problem.mask * logp.sum(1).exp()[:, None]  # how often each (y, t) is visited
    error = ppo.masked_mean((value - exact) ** 2, weight).sqrt()
    exact = exact[problem.mask.bool()]
    return policy, (error / (exact.max() - exact.min())).item()


def preferences(problem):
    """(winners, losers, weight), (pairs,): every ordered pair of responses to the same prompt.

    weight = pi_ref(y_w) pi_ref(y_l) P(y_w > y_l), both drawn from the tempered reference and
    judged by Bradley-Terry on the problem's scores, without a labeler's noise. Sums to the share of
    pairs whose two responses differ.
    """
    same = problem.prompt[:, None] == problem.prompt
    winners, losers = (same & ~torch.eye(len(same), dtype=torch.bool)).nonzero().T
    mu = problem.ref_logp.sum(1).exp()
    wins = torch.sigmoid(problem.score[winners] - problem.score[losers])
    return winners, losers, mu[winners] * mu[losers] * wins


def run_dpo(problem, steps=400):
    """DPO on all pairs at once, each by its probability: no sample and no labeler's noise.

    Only differences of scores reach the policy, in units of beta. Returns (policy, None).
    """
    config = dpo.Config(loss="dpo", beta=problem.beta)
    winners, losers, weight = preferences(problem)
    ref, length = problem.ref_logp.sum(1), problem.mask.sum(1)
    policy = copy.deepcopy(problem.reference).requires_grad_(True)
    optimizer = common.adamw([policy], 1e-2)
    for step in range(steps):
        common.set_lr(optimizer, 1e-2 * common.cosine(step, steps, 5))
        loss = dpo.pair_loss(config, problem.logp(policy).sum(1), ref, length, winners, losers)
        (weight * loss).sum().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return policy, None


def run_grpo(problem, steps=200, batch_size=256, **options):
    """GRPO on sampled responses, groups of K = 8. Returns (policy, None): there is no critic."""
    config = grpo.resolve(grpo.Config(
        reward="model", batch_size=batch_size, lr=4e-3, beta=problem.beta,
        temperature=problem.temperature, missing_eos=MISSING_EOS, max_new_tokens=LENGTH, **options))
    torch.manual_seed(0)
    policy = copy.deepcopy(problem.reference).requires_grad_(True)
    optimizer = common.adamw([policy], config.lr, eps=config.adam_eps)
    draws, rng = (np.random.default_rng(n) for n in (1, 0))  # of tokens, of the order
    prompts = list(PROMPTS) * (batch_size // config.k // len(PROMPTS))
    for step in range(steps):
        common.set_lr(optimizer, config.lr * common.cosine(step, steps, 5))
        tokens, mask, finished = generate(policy, prompts, LENGTH, EOS, problem.temperature,
                                          torch.from_numpy(draws.random((batch_size, LENGTH))),
                                          samples=config.k)
        batch = grpo.prepare(policy, problem.reference, tokens, mask, finished,
                             problem.score[problem.rows(tokens)], config)
        grpo.update(policy, optimizer, batch, config, rng)
    return policy, None


def group_std_limit(problem, draws=2000, iterations=40):
    """log pi(y), (N,), where the advantage (r - mean) / std of the group and k2 in the loss end up.

    Both terms follow dlog pi(y): the gradient vanishes where A(y) - beta (log pi - log pi_ref) is
    the same for every y, A(y) the mean advantage of y among K - 1 others drawn from pi. So

        pi(y) ~ pi_ref(y) exp(A(y; pi) / beta)       in place of        exp(r(y) / beta)

    The score is measured in standard deviations of the policy's own scores, or, the other way
    round, beta is multiplied by them: a prompt whose answers score alike is pulled to the
    reference less than one whose answers differ. That is no optimum of any J, because the unit
    moves with pi. A pi that gives itself, found by damped iteration over fixed random numbers.
    """
    K, N = grpo.Config.k, len(problem.score)
    start = log_pi = problem.ref_logp.sum(1)
    uniform = torch.rand(draws, K - 1, generator=torch.Generator().manual_seed(0))
    for _ in range(iterations):
        others = torch.searchsorted(log_pi.exp().cumsum(0), uniform).clamp(max=N - 1)
        groups = torch.cat([problem.score[:, None, None].expand(N, draws, 1),
                            problem.score[others].expand(N, draws, K - 1)], 2)
        advantage = grpo.group_advantage(groups.flatten(), K, "grpo").view(N, draws, K)[..., 0]
        following = optimum(start, advantage.mean(1), problem.beta)
        log_pi = torch.log_softmax((log_pi + following) / 2, 0)
    return log_pi


# name: (how to train, largest distance to pi*). None: shown for comparison, held to no bound
METHODS = {
    "PPO, KL in the reward": (lambda p: run_ppo(p, "reward"), 0.03),
    "PPO, KL in the loss": (lambda p: run_ppo(p, "loss", batch_size=512), 0.03),
    "PPO, KL in the loss, greedy": (lambda p: run_ppo(p, "loss", priced=False), None),
    "DPO, exact preferences": (run_dpo, 0.02),
    "RLOO, k1 in the reward": (lambda p: run_grpo(p, method="rloo"), 0.03),
    # k2 in the loss leaves the noise of the score, as in PPO: more samples
    "RLOO, k2 in the loss": (lambda p: run_grpo(p, method="rloo", kl_in="loss", batch_size=448),
                             0.03),
    # one choice changed, so that it is the std that is seen and not the length or k3 as well
    "GRPO, group std": (lambda p: run_grpo(p, method="rloo", advantage="grpo", kl_in="loss"), None),
}
PREDICTED = {  # name: log pi(y) of the place where theory says that it ends instead of at pi*
    "PPO, KL in the loss, greedy": lambda p: p.by_recursion(soft=False),
    "GRPO, group std": group_std_limit,
}
HEADROOM, CRITIC = 0.95, 0.05  # at least, at most


def measure(problem, policy, critic_error, predicted=None):
    """One row of figures, the worst prompt's where there is one figure a prompt.

    predicted: log pi(y), (N,), of another place than pi* that the policy should be near.
    """
    with torch.no_grad():
        seq_logp = problem.logp(policy).sum(1)
    start, best = problem.ref_logp.sum(1), problem.best
    gained, room = (problem.objective(x) - problem.objective(start) for x in (seq_logp, best))
    return dict(start=problem.distance(start, best).min().item(),
                end=problem.distance(seq_logp, best).max().item(),
                predicted=None if predicted is None else
                problem.distance(seq_logp, predicted).max().item(),
                headroom=(gained / room).item(), critic=critic_error)


def misses(row, bound):
    """The names of the bounds that a row of figures misses."""
    if bound is None:
        return []
    return ([] if row["end"] <= bound else ["distance"]) \
        + ([] if row["headroom"] >= HEADROOM else ["headroom"]) \
        + ([] if row["critic"] is None or row["critic"] <= CRITIC else ["critic"])


def run_one(job):
    """One row of figures for (method, seed, temperature); builds the problem in this process."""
    name, seed, temperature = job
    start, problem = time.time(), Problem(seed, temperature)
    predicted = PREDICTED[name](problem) if name in PREDICTED else None
    row = measure(problem, *METHODS[name][0](problem), predicted)
    return dict(row, method=name, temperature=temperature, seconds=time.time() - start)


def table(rows):
    """Markdown, a line for every method and temperature: the worst of its problems."""
    lines = ["| method | T | problems | TV(pi_ref, pi*) | TV(pi, pi*) | TV(pi, predicted) | "
             "headroom gained | critic error | s a problem |", "|" + "---|" * 9]
    for name, temperature in dict.fromkeys((r["method"], r["temperature"]) for r in rows):
        group = [r for r in rows if (r["method"], r["temperature"]) == (name, temperature)]
        worst = lambda pick, key, group=group: pick(r[key] for r in group)
        given = lambda key, form, group=group, worst=worst: \
            "" if group[0][key] is None else format(worst(max, key), form)
        lines.append(
            f"| {name} | {temperature} | {len(group)} | {worst(min, 'start'):.2f} | "
            f"{worst(max, 'end'):.3f} | {given('predicted', '.3f')} | "
            f"{worst(min, 'headroom'):.1%} | {given('critic', '.1%')} | "
            f"{sum(r['seconds'] for r in group) / len(group):.0f} |")
    return "\n".join(lines)


def main(config):
    names = [n for n in METHODS if config.methods == "all" or n.startswith(config.methods)]
    if not names:
        raise UserError(f"--methods={config.methods}: none of {', '.join(METHODS)}")
    start, jobs = time.time(), []
    for temperature, count in ((1.0, config.problems), (0.7, config.cold_problems)):
        seeds = [p.seed for p in draw_problems(count, temperature)]
        jobs += [(n, s, temperature) for n in names
                 for s in (seeds if METHODS[n][1] else seeds[:2])]  # two show where it ends up
    # products this small only get slower with more threads
    with multiprocessing.Pool(config.workers, torch.set_num_threads, (1,)) as pool:
        rows = list(tqdm(pool.imap(run_one, jobs), "closed form", len(jobs)))
    print(table(rows))
    print(f"\n{time.time() - start:.0f} s. Bounds: TV(pi, pi*) at most "
          + ", ".join(f"{bound} for {n}" for n in names if (bound := METHODS[n][1]))
          + f"; headroom at least {HEADROOM:.0%}, critic error at most {CRITIC:.0%}.")
    missed = [f"{r['method']}, T = {r['temperature']}: {m} missed"
              for r in rows for m in misses(r, METHODS[r["method"]][1])]
    print("\n".join(missed) or "every bound is kept")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    cli.run_main(main, CONFIG)
