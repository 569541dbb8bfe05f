"""What every stage needs and no reader comes for: devices, optimiser, run folders, checkpoints.

No loss and no training loop lives here.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from cli import (NOTES, STARTED, Interrupted, UserError, as_text, catch_signals, check_locks,
                 command_line, first_process, interrupt, make_folder, note, one_process,
                 out_of_memory, processes, say, to_json)
from data.files import append, file_hash, is_data, missing, need_room, sweep, whole_file
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig

ROOT = Path(__file__).parent
STARTS = ("sft", "convert", "pretrain")  # what sft.py and reward.py start from
POLICIES = ("sft", "convert", "dpo", "ppo", "grpo")  # make an assistant: each can start the next

# flags that name data files, and checkpoints: a run is known by their content, not their paths
DATA = ("data", "answers", "demos", "pretrain_data", "ptx_data")
CHECKPOINTS = ("init", "policy", "reference", "policies", "reward_model", "judge")
# flags that may change where a run goes on: no number depends on them, or the last digits only
FREE = ("out", "resume", "overwrite", "port", "log_every", "save_every", "save_minutes", "device",
        "checkpointing", "reference_cache", "max_kl")
# which rows are computed together, and by which kernels: free, and the run says so
ROUNDING = ("micro_batch", "chunk", "compile")


# --- device, precision, seeds --------------------------------------------------------------------


def set_up(config, stage):
    """Seed what draws first weights and dropout, and return the torch.device."""
    keep_pages()
    torch.manual_seed(stable_seed(config.seed, stage, "weights", 0))
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs for what autocast leaves in fp32
    local = int(os.environ["LOCAL_RANK"]) if processes()[1] > 1 else 0
    if 0 < local < torch.cuda.device_count() and config.device != "cpu":
        torch.cuda.set_device(local)  # before the first tensor, which takes memory of its GPU
    device = find_device(config.device)
    return join_processes(device) if processes()[1] > 1 else device


def keep_pages():
    """Let malloc keep what is freed. By default large tensors go back to Linux at once, and every
    page of the next one is a fault: of a step with GPT-2's vocabulary 11% of the time."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a C library without mallopt
            ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a tensor
            ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


def find_device(name):
    """The torch.device of --device; "auto" takes a GPU where there is one."""
    asked = name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device={asked} is not available here") from None
    return device


def stream(seed, stage, purpose, step=0):
    """The one place where a random stream is made, a numpy Generator.

    It is named by all four, so that no two purposes draw the same numbers, in one stage or in two,
    and a resumed run draws what it would have drawn.
    """
    return np.random.default_rng(stable_seed(seed, stage, purpose, step))


def uniforms(seed, stage, purpose, step, prompts, max_new_tokens, samples=1):
    """What `generate` samples with: (prompts * samples, max_new_tokens), float64 in [0, 1).

    prompts: their numbers. Each has a stream of its own, named by step and number: what is sampled
    for it depends neither on the prompts beside it nor on the device or the number of processes.
    """
    return torch.from_numpy(np.array([
        stream(seed, stage, purpose, (step, n)).random((samples, max_new_tokens))
        for n in prompts]).reshape(-1, max_new_tokens))


def stable_seed(*parts):
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:15], 16)


def adamw(modules, lr, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8, without=()):
    """AdamW over all parameters of the modules but `without`; decay on matrices only; fused."""
    others = {id(p) for p in without}
    params = [p for m in modules for p in m.parameters() if p.requires_grad and id(p) not in others]
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def cosine(step, steps, warmup=0):
    """Learning-rate factor: warm-up in equal steps to 1, then cosine down to 0.

    In both schedules the warm-up takes at most a tenth of the run: a longer one would leave a short
    run far below its peak. `say_warmup` says so.
    """
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def linear(step, steps, warmup=0):
    """Learning-rate factor: warm-up in equal steps to 1, times a linear decay to a tenth."""
    warmup = min(warmup, steps // 10)
    return min(1.0, (step + 1) / max(1, warmup)) * (1 - 0.9 * step / steps)


def say_warmup(steps, warmup):
    if warmup > steps // 10:
        note(f"warm-up: {steps // 10} of {steps} steps, a tenth of the run, not --warmup={warmup}")


# --- several processes, under torchrun -----------------------------------------------------------
#
# All of them run the same script on the same data, with the same weights and random streams. Work
# that takes time is shared (`share` and `gather` in data/batches.py), and everybody gets all of its
# results; what is cheap everybody does. In an optimiser step each process takes its share of the
# rows, divides its sum by the count of the whole step, and the gradients are added up. The first
# process alone writes and prints (`first_process` in cli.py).


def join_processes(device):
    """Start torch.distributed, and return the device of this process."""
    if device.type == "cuda":
        local, n = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= n or device.index is not None:
            count = os.environ.get("LOCAL_WORLD_SIZE", local + 1)
            raise UserError(f"--device={device}: {count} processes need as many GPUs, here are {n};"
                            f" take --device=cuda, and torchrun with --nproc_per_node={n}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # it waits in C++, where no handler of ours is called: let torchrun end it at once, when
        # another process has failed before
        catch_signals(signal.SIG_DFL)
        try:
            # when a process ends, torchrun ends the others; the time is for stages before this one
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                    timeout=timedelta(days=7))
        except ValueError as error:
            raise UserError("several processes are started by torchrun; WORLD_SIZE is set here, "
                            f"but not all that it sets: {error}") from None
        catch_signals(interrupt)
    return device


def sum_gradients(*modules):
    """Add up the gradients of all processes: each had its share of the rows. A weight that has none
    in any process is left without one, as in a single process."""
    if processes()[1] == 1:
        return
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    found = torch.tensor([p.grad is not None for p in params], dtype=torch.int)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    params, waiting = [p for p, some in zip(params, found.tolist()) if some], []
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        waiting.append(dist.all_reduce(p.grad, async_op=True))
    for work in waiting:
        work.wait()


def total(x, most=False):
    """The sum, or the largest, of a tensor over all processes; in a single one it is x."""
    if processes()[1] > 1:
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX if most else dist.ReduceOp.SUM)
    return x


def by_the_first(fn):
    """fn() of the first process, in all of them: what reads files that it may write."""
    found = [fn() if first_process() else None]
    if processes()[1] > 1:
        dist.broadcast_object_list(found)
    return found[0]


# --- values that depend on the size of the model -------------------------------------------------
#
# What a flag left at "auto" stands for: up to 30 million parameters, up to 500 million, above. The
# first column is for small models from scratch, by sweeps on the embedded data; the others are for
# pretrained ones, which the rates of the first would destroy.

SIZES = (30e6, 500e6)
_LENGTHS = dict(max_new_tokens=(48, 128, 256))
_DPO = dict(warmup=(20, 20, 150), micro_batch=(0, 8, 4)) | _LENGTHS  # warm-up: Rafailov et al. 2023
AUTO = dict(
    # GPT-2 at 124M: 5e-5, for lack of a paper's; 1.3B: InstructGPT, 9.65e-6
    sft=dict(lr=(1e-3, 5e-5, 1e-5), warmup=(10, 20, 100), micro_batch=(0, 8, 4),
             text_length=(40, 256, 512)) | _LENGTHS,
    # 124M: Ziegler et al. 2019; 1.3B: 1.5e-5 of Stiennon et al. 2020, 6B: 9e-6 of InstructGPT
    reward=dict(lr=(8e-4, 5e-5, 1e-5), warmup=(10, 20, 50), micro_batch=(0, 8, 4)) | _LENGTHS,
    # 124M: Ziegler et al. 2019; 1B: Huang et al. 2024
    ppo=dict(lr=(3e-4, 1e-5, 3e-6), warmup=(5, 5, 10), micro_batch=(32, 8, 4),
             text_length=(64, 256, 512)) | _LENGTHS,
    critic=dict(critic_lr=(3e-4, 1e-5, 3e-6)),  # by the size of the reward model
    # 135M: docs/real.md; 7B: 1e-6 of Shao et al. 2024
    grpo=dict(lr=(3e-4, 2e-5, 1e-6), warmup=(5, 5, 10), micro_batch=(128, 8, 4),
              text_length=(64, 256, 512)) | _LENGTHS,
    label=_LENGTHS, evaluate=_LENGTHS,
    # dpo.py, by its loss. Small: dpo and ipo from a sweep, the others at a margin of like size
    # (docs/dpo.md). Pretrained: Rafailov et al. 2023 (beta 0.1, lr 5e-7 to 1e-6 at 2.8B), Tulu 3
    # (dpo_norm), Meng et al. 2024 (simpo), Ethayarajh et al. 2024 (kto)
    dpo=dict(beta=(0.3, 0.1, 0.1), lr=(3e-5, 5e-6, 1e-6)) | _DPO,
    cdpo=dict(beta=(0.3, 0.1, 0.1), lr=(3e-5, 5e-6, 1e-6)) | _DPO,
    ipo=dict(beta=(0.1, 0.1, 0.1), lr=(1e-4, 5e-6, 1e-6)) | _DPO,
    ipo_mean=dict(beta=(1.0, 1.0, 1.0), lr=(1e-4, 5e-6, 1e-6)) | _DPO,
    dpo_norm=dict(beta=(5.0, 5.0, 5.0), lr=(1e-4, 5e-6, 1e-6)) | _DPO,
    simpo=dict(beta=(2.0, 2.0, 2.0), lr=(3e-5, 5e-6, 5e-7)) | _DPO,
    kto=dict(beta=(0.3, 0.1, 0.1), lr=(1e-4, 5e-6, 5e-6)) | _DPO)


def sized(config, stage, model):
    """The config with the values of AUTO, for a model of this size, where a flag is at "auto"."""
    column = sum(model.num_params() > limit for limit in SIZES)
    return dataclasses.replace(config, **{name: row[column] for name, row in AUTO[stage].items()
                                          if getattr(config, name) is None})


def prepare_blocks(config, *models):
    """--checkpointing and --compile, of networks that are trained. UserError where nothing can be
    compiled."""
    if config.compile:
        try:
            torch.compile(torch.sin)(torch.zeros(8, device=models[0].wte.weight.device))
        except Exception as error:  # of many kinds: no compiler, no Triton, too new a Python
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"--compile=true: torch cannot compile here: {why}. Leave it out"
                            ) from None
    for model in models:
        model.checkpointing, model.compiled = config.checkpointing, config.compile


def freeze(model):
    """The model without gradients. On a GPU its blocks hold bf16: autocast would round them to that
    anyway, each time, so no number changes. Embedding, head and norms stay in fp32."""
    model.requires_grad_(False)
    if next(model.parameters()).device.type == "cuda":
        round_blocks(model)
    return model


def round_blocks(model):
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and re.search(r"(^|\.)h\.\d+\.", name):
            module.to(torch.bfloat16)


# --- numbers that go wrong -----------------------------------------------------------------------

# coefficients that can make numbers overflow, with what is usual
USUAL = dict(beta=1.0, temperature=1.0, missing_eos=-3.0, gamma=1.0, lam=1.0, ptx_coef=10.0,
             nll=1.0, pretrain_mix=1.0, entropy_coef=0.1, simpo_margin=1.0, desirable=1.0,
             undesirable=1.0, weight_decay=0.1)


def check_finite(config, step, **values):
    """UserError unless every value is finite: a loss, a gradient norm, scores, a module's weights.

    Called before the optimiser's step, so that nothing bad gets into weights, states or the log.
    values: tensors (any shape), floats, modules; one look at the device for all of them. step: the
    number of the optimiser step or iteration, or words that say where.
    """
    numbers = {name: norms(v) if isinstance(v, torch.nn.Module) else torch.as_tensor(v).detach()
               for name, v in values.items()}
    device = max((v.device for v in numbers.values()), key=lambda device: device.type == "cuda")
    if torch.stack([v.isfinite().all().to(device) for v in numbers.values()]).all():
        return
    name, bad = next((name, v[~v.isfinite()][0].item()) for name, v in numbers.items()
                     if not v.isfinite().all())
    where = f"step {step}" if isinstance(step, int) else step
    if isinstance(values[name], torch.nn.Module):
        what = f"the weights of the {name} are no longer finite"
    else:
        what = f"{name} is {bad}"
    raise UserError(f"{where}: {what}. {advice(config, name)}. {last_state(config)}")


def norms(module):
    """The norm of each tensor of a module. Above 1e19 it is infinite, as the first square is: no
    forward pass would give a number."""
    return torch.stack([v.float().norm() for v in module.state_dict().values()])


def advice(config, name=""):
    """The likely cause of a `name` that is not finite: coefficients far from what is usual, and
    the learning rates, with their values."""
    if name == "score":
        return "The reward model is destroyed: make it again, with a lower --lr"
    found = []
    for flag, usual in USUAL.items():
        value = getattr(config, flag, None)
        if value is not None and (abs(value) > 10 * abs(usual) or abs(value) < abs(usual) / 1000
                                  and value != getattr(type(config), flag)):
            found.append(f"{'lower' if value > usual else 'raise'} --{flag} (now {value})")
    found += [f"lower --{flag} (now {as_text(getattr(config, flag))})"
              for flag in ("lr", "muon_lr", "critic_lr") if hasattr(config, flag)]
    if not found:
        return "The checkpoint it comes from is destroyed: make it again, with a lower --lr"
    return "A learning rate or a coefficient is likely out of range: " + ", or ".join(
        [*found, "take another --init"])


def last_state(config):
    """In words, what a run that stops leaves behind."""
    path, step = Path(config.out) / "state.pt", "an earlier step"
    if not path.is_file():
        return "Nothing is saved"
    with contextlib.suppress(Exception):  # whatever is wrong with the file is another matter
        step = f"step {torch.load(path, 'cpu', weights_only=True, mmap=True)['step']}"
    return (f"Nothing of it is saved: {path} is still that of {step}; --overwrite=true starts "
            "again, with other flags")


# --- run folders, logs ---------------------------------------------------------------------------


def first_row(folder):
    """The row of settings of the run that a folder holds, None where there is no log. UserError
    where the log is none of ours."""
    path = Path(folder) / "log.jsonl"
    if not path.exists():
        return None
    try:
        with open(path, encoding="utf-8") as f:
            row = json.loads(f.readline())
        stage, settings, parents = row["stage"], row["config"], row["parents"]
        if isinstance(stage, str) and isinstance(settings, dict) and isinstance(parents, dict):
            return row
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        pass
    raise UserError(f"{path} is not the log of a run: choose another --out=DIR, or move it away")


def last_row(folder):
    """The last row of a folder's log, {} if there is none or it was written in part."""
    try:
        row = json.loads((Path(folder) / "log.jsonl").read_bytes().splitlines()[-1])
        return row if isinstance(row, dict) else {}
    except (OSError, ValueError, IndexError, RecursionError):
        return {}


def finished(folder, result="model.pt"):
    """Whether a run got to its end here: its last row, its result, and no state to go on from."""
    folder = Path(folder)
    return (last_row(folder).get("kind") == "final" and (folder / result).exists()
            and not (folder / "state.pt").exists())


class Run:
    """An output folder: log.jsonl, state.pt while the run goes on, model.pt at its end.

    First row of the log: config, parents, versions, device. Then a row per logged step; their keys
    are frozen at the first one of each kind, so a typo in a metric's name cannot pass. Last row:
    final. parents: {stage: hash} of the checkpoints that the run starts from; the hashes of its
    data files are added, and checkpoints carry them all. result: the file that the end of the run
    writes. others: further files of this stage, which go when it starts again.

    The same command always works. Nothing there: the run starts. Interrupted: it goes on from
    state.pt, or starts again where it was stopped before the first one. Finished: it says so and
    ends the process with exit status 0. UserError where the folder holds something else.
    """

    def __init__(self, stage, config, device, parents=None, result="model.pt", others=()):
        self.stage, self.config, self.device = stage, config, device
        self.folder, self.parents = Path(config.out), dict(parents or {})
        self.keys, self.start = {}, time.time()
        self.watched = {}  # {warning: how often in a row, or -1 once it was said}
        self.saved, self.saved_at, self.stop = None, time.monotonic(), None
        self.settings = dataclasses.asdict(config)
        for name in DATA:
            value = self.settings.get(name)  # a file, or a name such as "synthetic"
            if isinstance(value, str) and is_data(value):  # in sft.py --demos is a number
                self.parents[name] = file_hash(value)[:16]
        before = first_row(self.folder)  # of the run that the folder holds, if any
        if before and before["stage"] != stage:
            raise UserError(f"{self.folder} holds a {before['stage']} run: choose another --out")
        files = list(dict.fromkeys((result, "model.pt", "state.pt", "answers.jsonl", *others)))
        epochs = [path.name for path in self.folder.glob("model-epoch*.pt")]
        for name in (*files, *epochs):
            if not before and (self.folder / name).exists():
                raise UserError(f"{self.folder / name} is there without the log of a run that made "
                                "it: choose another --out=DIR, or move it away")
        state, ended = (self.folder / "state.pt").exists(), finished(self.folder, result)
        final = last_row(self.folder).get("kind") == "final"  # its result may be elsewhere now
        if before and (state or final) and not config.overwrite:
            self._must_match(before, "an interrupted run" if state else "a finished run")
        if ended and not config.overwrite and not config.resume:
            print(f"{stage}: {self.folder} holds this run, finished: --overwrite=true starts it "
                  "again, --out=DIR writes elsewhere", flush=True)
            sys.exit(0)
        self.resuming = state and not config.overwrite
        if self.resuming and config.resume is False:
            raise UserError(f"{self.folder} holds an interrupted run: without --resume=false it "
                            "goes on, --overwrite=true starts again, --out=DIR writes elsewhere")
        if config.resume and not self.resuming:
            raise UserError(f"--resume=true: {self.folder} holds no interrupted run (no state.pt)")
        by_the_first(lambda: make_folder("out", self.folder))  # all have looked before one writes
        if first_process():
            sweep(self.folder)
        if self.resuming:
            NOTES.clear()  # the log has them
            self._say_changes(before)
        elif first_process():  # the result first: no file ever belongs to another's log
            for name in (*files, *epochs):
                if name != "log.jsonl":
                    (self.folder / name).unlink(missing_ok=True)
            self._write(dict(kind="config", stage=stage, config=self.settings,
                             command=command_line(), parents=self.parents, **self._machine()),
                        new=True)
        STARTED.append(self.folder)
        flags = [f"--{f.name}={as_text(self.settings[f.name])}" for f in dataclasses.fields(config)
                 if self.settings[f.name] != f.default and f.name != "out"]
        print(f"{stage}: {'goes on in' if self.resuming else 'writes to'} {self.folder}, runs on "
              f"{self._machine()['device']}; {' '.join(flags) or 'flags at their defaults'}",
              flush=True)

    def _machine(self):
        """What else the last digits of a run depend on."""
        versions = dict(python=sys.version.split()[0], torch=torch.__version__)
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        return dict(versions=versions, device=name, threads=torch.get_num_threads(),
                    processes=processes()[1])

    def _must_match(self, before, what):
        """UserError if the run in the folder has other settings or inputs. Their paths may be
        others: it is their content that counts."""
        free = FREE + ROUNDING + CHECKPOINTS + tuple(name for name in DATA if name in self.parents)
        default = {f.name: f.default for f in dataclasses.fields(self.config)}
        made = {k: before["config"].get(k, default[k]) for k in self.settings}
        changed = [k for k, value in self.settings.items() if made[k] != value and k not in free]
        again = "--overwrite=true starts again, --out=DIR writes elsewhere"
        if changed:
            raise UserError(f"{self.folder} holds {what} with "
                            + ", ".join(f"--{k}={as_text(made[k])}" for k in changed)
                            + f", not as here: {again}")
        if before["parents"] != self.parents:  # trained again, or edited, in the meantime
            raise UserError(f"{self.folder} holds {what} made from {before['parents']}, but here "
                            f"are now {self.parents}: {again}")

    def _say_changes(self, before):
        """Warn of what makes the rest of the run differ in its last digits."""
        here = self._machine() | {k: v for k, v in self.settings.items() if k in ROUNDING}
        for key, value in here.items():
            made = (before["config"] if key in ROUNDING else before).get(key, value)
            if made != value:
                note(f"warning: {self.folder} was started with {key} {made}, here is {value}: it "
                     "goes on, but not to the last digit", sys.stderr)

    def _write(self, row, new=False):
        if not first_process():
            return NOTES.clear()
        check_locks()
        notes = [dict(kind="note", text=text) for text in NOTES]
        rows = [*notes, row] if row["kind"] == "final" else [row, *notes]  # that is the last row
        text = "".join(to_json(each) + "\n" for each in rows)
        path = self.folder / "log.jsonl"
        if new:  # in one piece: a first row is there or not, never half of it
            with whole_file(path, "w") as file:
                file.write(text)
        else:
            append(path, text)
        NOTES.clear()

    def log(self, kind="step", **row):
        keys = self.keys.setdefault(kind, set(row))
        if keys != set(row):
            raise KeyError(f"log row of kind {kind!r}: keys differ by {keys ^ set(row)}")
        self._write(dict(kind=kind, **row))

    def watch(self, text, bad, patience=5):
        """Warn once, when something has been bad so often in a row; `finish` says it again. To be
        called behind the `log` of the row that it is about."""
        count = self.watched.get(text, 0)
        if count >= 0:
            self.watched[text] = count + 1 if bad else 0
        if self.watched[text] >= patience:
            self.watched[text] = -1
            say(f"warning: {text}", sys.stderr)
            self._write(dict(kind="note", text=f"warning: {text}"))

    def save_model(self, model, tokenizer, metrics, name="model.pt"):
        save_checkpoint(self.folder / name, model, self.stage, tokenizer, self.config, metrics,
                        self.parents)

    def finish(self, metrics, then=None):
        """Write the last row; say where the result is, what draws the run, what to type next."""
        seconds = round(time.time() - self.start, 1)
        self._write(dict(kind="final", **metrics, seconds=seconds))
        if first_process():
            self._sync_log()  # or after a loss of power there might be neither this row nor a state
            (self.folder / "state.pt").unlink(missing_ok=True)
        print(f"\n{self.stage}: done after {seconds} s, result in {self.folder}"
              + "".join(f"\nwarning: {text}" for text, n in self.watched.items() if n < 0)
              + (f"\ncurves: python plot.py {self.folder}" if "lr" in self.settings else "")
              + (f"\nnext: {then}" if then else ""), flush=True)

    def due(self, step, every):
        """Whether to save a state now: every so many steps, every --save_minutes, and where Ctrl-C
        or SIGTERM asked to stop."""
        due = step != self.saved and (
            step % every == 0 or self.stop is not None
            or time.monotonic() - self.saved_at > 60 * self.config.save_minutes)
        return total(torch.tensor(int(due)), most=True).item() > 0  # in one, in all processes

    def save_state(self, step, steps, **state):
        """Everything an exact resume needs before step `step` of `steps`, modules and optimisers
        among it; written whole or not at all. If a signal asked to stop, it ends the run."""
        for name, value in state.items():
            if isinstance(value, torch.nn.Module):
                check_finite(self.config, step, **{name: value})
        if first_process():
            self._save_state(step, state)
        self.saved, self.saved_at = step, time.monotonic()
        stop = total(torch.tensor(self.stop or 0), most=True).item()  # of any process
        if stop:
            raise Interrupted(stop)
        if step == steps:  # what follows the loop stops at once: it begins here again
            catch_signals(interrupt)

    def _save_state(self, step, state):
        state = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
        check_locks()
        self._sync_log()  # the rows that the state counts on
        state |= dict(step=step, rng=torch.get_rng_state(), seconds=time.time() - self.start,
                      watched=self.watched,
                      log_size=(self.folder / "log.jsonl").stat().st_size)
        if self.device.type == "cuda":  # only dropout draws from it
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        if step != self.saved:  # else it is there: a resume needs no more room than it had
            save_file(state, self.folder / "state.pt")

    def _sync_log(self):
        with open(self.folder / "log.jsonl", "rb") as log:
            os.fsync(log.fileno())

    def load_state(self, **targets):
        """On resume load the targets, modules and optimisers, and return the rest of the saved
        state; else {}. Log rows written after it are cut off. From here to the end of the loop
        Ctrl-C and SIGTERM wait for the step's end, and `save_state` stops the run."""
        catch_signals(self._stop_soon)
        path = self.folder / "state.pt"
        if not self.resuming:
            # two states, one beside the other; then the model, where one of them was
            need_room(path, 2 * state_size(targets.values()), "a run of this model")
            return {}
        try:
            state = load_file(path, self.device)
            for name, target in targets.items():
                target.load_state_dict(state.pop(name))
            torch.set_rng_state(state["rng"].cpu())
            if "cuda_rng" in state:
                torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)
            self.start -= state["seconds"]  # of the sessions before
            self.watched, self.saved = state.pop("watched", {}), state["step"]
            if not 0 <= state["log_size"] <= (self.folder / "log.jsonl").stat().st_size:
                raise ValueError("log.jsonl is shorter")
        except UserError as error:
            raise UserError(f"{error}: --overwrite=true starts again") from None
        except Exception as error:  # as many kinds as there are ways in which it may not fit
            if out_of_memory(error):
                raise
            raise UserError(f"{path} is of another version of this project: --overwrite=true "
                            f"starts again ({describe(error)})") from None
        by_the_first(lambda: os.truncate(self.folder / "log.jsonl", state["log_size"]))
        return state

    def _stop_soon(self, number, frame):
        if self.stop:  # asked twice
            interrupt(number, frame)
        self.stop = number
        if first_process():
            os.write(2, b"\nsaves after this step and stops; once more: stops at once\n")


# --- checkpoints ---------------------------------------------------------------------------------


def save_file(content, path):
    """Write a dict of tensors and plain containers, and its digest, whole or not at all."""
    if not first_process():
        return
    digest, content = hashlib.sha256(), {k: v for k, v in content.items() if k != "digest"}
    size = add_to(digest, content)
    with whole_file(path, size=size) as file:
        try:
            torch.save(content | dict(digest=digest.hexdigest()), file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch's follows from it and says less
                raise error.__context__ from None
            raise


def load_file(path, device="cpu"):
    """The dict that save_file wrote. UserError unless it is that, to the last bit."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        if content.get("format") != "rlhf-1":  # that has no digest, but a hash of its weights
            found, digest = content.pop("digest", None), hashlib.sha256()
            add_to(digest, content)
            if found != digest.hexdigest():
                raise damaged(path, "it is not what was written, by its digest")
        return content
    except UserError:
        raise
    except Exception as error:  # torch raises a different error for each way a file can be broken
        if out_of_memory(error):
            raise
        raise UserError(f"{path} is not a checkpoint of this project "
                        f"({type(error).__name__})") from None


def add_to(digest, value):
    """Take all of a value of tensors and plain containers into a hash; the bytes of its tensors."""
    if isinstance(value, torch.Tensor):
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError("a tensor that repeats its numbers")  # they would all be written out
        digest.update(repr((value.dtype, *value.shape)).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return value.numel() * value.element_size()
    if isinstance(value, (dict, list, tuple)):
        digest.update(f"{type(value).__name__} {len(value)}".encode())
        parts = chain.from_iterable(value.items()) if isinstance(value, dict) else value
        return sum(add_to(digest, part) for part in parts)
    digest.update(f"{value!r};".encode("utf-8", "backslashreplace"))
    return 0


def state_size(targets):
    """Bytes of a state of these modules and optimisers: of a module its numbers, of an optimiser
    at most two for each number that it moves."""
    return sum(2 * sum(p.numel() * p.element_size() for g in t.param_groups for p in g["params"])
               if isinstance(t, torch.optim.Optimizer)
               else sum(v.numel() * v.element_size() for v in t.state_dict().values())
               for t in targets)


def describe(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def weights_hash(weights):
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def text_hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_checkpoint(path, model, stage, tokenizer, config, metrics, parents=None):
    """One file with all that a later stage needs; only tensors and plain containers.

    parents: {role: hash} of what this was made from, the lineage that `check_lineage` compares. A
    hash is that of the weights: what was trained. All of the file is in its digest.
    """
    check_finite(config, f"{path} is not written", model=model)
    if not first_process():  # only that writes: the others need no copy and no hash
        return
    gpt = model if isinstance(model, GPT) else model.gpt
    weights = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    save_file(dict(format="rlhf-2", stage=stage, weights=weights,
                   model=dataclasses.asdict(gpt.config), tokenizer=tokenizer.state,
                   config=dataclasses.asdict(config), metrics=metrics, hash=weights_hash(weights),
                   parents=parents or {}), Path(path))


def load_checkpoint(path, stages, device="cpu"):
    """The dict that save_checkpoint wrote. UserError unless it is one of `stages` and intact."""
    path = Path(path)
    if path.is_dir():
        path = path / "model.pt"
    if not path.is_file():
        folder = path.parent if path.suffix else path
        if folder.exists():  # nothing may be made in a folder that holds something else
            raise UserError(f"{folder} holds no checkpoint: there is no {path.name} in it")
        raise UserError(f"no checkpoint at {path}: make one with "
                        + " or ".join(f"`python {s}.py --out={folder}`" for s in stages))
    checkpoint = load_file(path, device)
    if checkpoint.get("format") not in ("rlhf-1", "rlhf-2"):
        raise UserError(f"{path} is not a checkpoint of this project")
    for name, kind in dict(stage=str, weights=dict, model=dict, tokenizer=(str, dict), config=dict,
                           metrics=dict, hash=str, parents=dict).items():
        if not isinstance(checkpoint.get(name), kind):
            raise damaged(path, f"no {name} in it")
    if checkpoint["stage"] not in stages:
        raise UserError(f"{path} is a {checkpoint['stage'][:20]} checkpoint; needed here: "
                        + " or ".join(stages))
    check_weights(checkpoint, path)
    return checkpoint


def damaged(path, why):
    return UserError(f"{path} is damaged, or of another version of this project: {why}")


def check_weights(checkpoint, path):
    """UserError where the weights are none, or of rlhf-1 not those of the hash. There the sizes of
    the model are checked by their shapes alone, which do not know n_head."""
    weights = checkpoint["weights"]
    for name, w in weights.items():
        if not (isinstance(name, str) and isinstance(w, torch.Tensor) and w.is_floating_point()
                and w.layout == torch.strided and w.is_contiguous()):
            raise damaged(path, f"its weight {str(name)[:50]} is none")
    if checkpoint["format"] == "rlhf-1" and weights_hash(weights) != checkpoint["hash"]:
        raise damaged(path, "its weights are not those of its hash")


def load_policy(path, stages, device):
    """(model, tokenizer, checkpoint without weights) of a language model, no dropout, eval mode."""
    checkpoint = load_checkpoint(path, stages, device)
    return *build(GPT, checkpoint, path, device), checkpoint


class NotDrawn(torch.overrides.TorchFunctionMode):
    """First weights are not drawn. On the meta device there are no numbers to draw, but torch would
    import torch._dynamo for it, a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.init.normal_:
            return kwargs["tensor"]
        return function(*args, **kwargs or {})


def build(network, checkpoint, path, device):
    """(network, tokenizer) of a checkpoint, which loses its weights. UserError if it is damaged."""
    tokenizer, size = declared(checkpoint, path)
    try:
        weights = checkpoint["weights"]
        if size.n_layer > len(weights):  # a layer takes time and memory without a number in it
            raise ValueError(f"{size.n_layer} layers in {len(weights)} tensors")
        with torch.device("meta"), NotDrawn():  # a declared size may be any: nothing is allocated
            shapes = {name: w.shape for name, w in network(size).state_dict().items()}
        found = {name: w.shape for name, w in weights.items()}
        if shapes != found:
            name = min(n for n in shapes | found if shapes.get(n) != found.get(n))
            show = lambda shape: "missing" if shape is None else [*shape]
            raise ValueError(f"{name} is {show(found.get(name))}, expected "
                             f"{show(shapes.get(name))}")
        model = network(size)
        model.load_state_dict(checkpoint.pop("weights"))  # or they would live as long as the dict
    except (ValueError, RuntimeError) as error:  # torch's for a size that no tensor can have
        if out_of_memory(error):
            raise
        raise damaged(path, describe(error)) from None
    if not norms(model).isfinite().all():
        raise UserError(f"{path} is destroyed: the weights of this {checkpoint['stage']} model are "
                        "not finite. Make it again, with a lower --lr")
    return model.to(device).eval(), tokenizer


def declared(checkpoint, path):
    """(tokenizer, GPTConfig) of a checkpoint. UserError if they are damaged."""
    try:
        tokenizer = load_tokenizer(checkpoint["tokenizer"])
        size = GPTConfig(**dict(checkpoint["model"], dropout=0.0))
        if not isinstance(tokenizer.eos, int):
            raise ValueError(f"EOS is {tokenizer.eos!r}")
    except UserError:
        raise
    except Exception as error:  # as many kinds as there are ways to be broken
        raise damaged(path, describe(error)) from None
    check_vocabulary(size, tokenizer, path)
    return tokenizer, size


def check_vocabulary(size, tokenizer, path):
    if (size.vocab_size, size.n_tokens) != (tokenizer.vocab_size, tokenizer.n_tokens):
        raise UserError(f"{path} has a vocabulary of {size.n_tokens} tokens, its tokenizer "
                        f"{tokenizer.name} {tokenizer.n_tokens}: they do not belong together")


def check_same_tokenizer(first, second, path, other):
    if first.hash != second.hash:
        raise UserError(f"{path} reads {first.name} tokens, {other} {second.name}"
                        + " with another chat template" * (first.name == second.name)
                        + ": they do not fit together")


def check_lineage(role, expected, parents, path):
    """Warn when what lies at path, made from `parents` ({role: hash}), was not made from the
    artefact whose hash is `expected`."""
    found = parents.get(role)
    if found != expected:
        note(f"warning: {path} does not descend from the {role} run used here ({expected}) but "
             f"from {found or parents}", sys.stderr)


# --- the stage before ----------------------------------------------------------------------------


def ensure_input(config, field, stage):
    """Run `stage` with its defaults if config.<field> is at its default and not there in whole; of
    several processes the first one does, as a single one."""
    by_the_first(lambda: make_input(config, field, stage))


def make_input(config, field, stage):
    path, out = Path(getattr(config, field)), getattr(config, "out", None)  # a study may have none
    default = next(f.default for f in dataclasses.fields(config) if f.name == field)
    if is_data(path) or (path / "model.pt").exists() and not (path / "state.pt").exists():
        return
    if Path(default).suffix and str(path) != default:  # a data file of the user's
        raise UserError(f"--{field}: {missing(path)}")
    if out and last_row(out).get("kind") == "final" and not Path(out, "state.pt").exists() \
            and not config.overwrite:
        raise UserError(f"{out} holds a finished run, but --{field}={path} is not there any more: "
                        "--overwrite=true makes both again, --out=DIR writes elsewhere")
    if str(path) != default:
        folder = path if not path.suffix else path.parent
        before = first_row(folder)
        if before:
            raise UserError(f"--{field}={path} holds a run that is not finished: this goes on\n    "
                            + before.get("command", f"python {stage}.py --out={folder}"))
        if path.exists():
            raise UserError(f"--{field}={path} is no output of `python {stage}.py`: no model.pt in "
                            "it")
        raise UserError(f"--{field}={path} does not exist: `python {stage}.py --out={folder}` "
                        "makes one")
    command = [sys.executable, str(ROOT / f"{stage}.py")]
    print(f"{path} is not there in whole: running `python {stage}.py` first", flush=True)
    if config.device != "auto":
        command.append(f"--device={config.device}")
    # in a process group of its own, so that Ctrl-C reaches it once, through this process
    child = subprocess.Popen(command, process_group=0, preexec_fn=end_with_parent,
                             env=one_process())
    try:
        status = child.wait()
    except Interrupted as stop:
        child.send_signal(stop.args[0])
        child.wait()
        raise
    if status:
        raise UserError(f"`python {stage}.py` failed with exit status {status}")


def end_with_parent():
    """In a child: SIGTERM, which saves and stops, when its parent is killed. On Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
