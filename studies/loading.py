"""What a file of pairs costs before the first step: seconds, memory, and padding in the batches.

    python studies/loading.py --data=out/data/hh_rlhf.jsonl --tokenizer=gpt2 --megabytes=400

The file is repeated, with a number before each prompt, until it has that size. It is read in a
process of its own, as reward.py and dpo.py read it, twice: the second one finds the tokens.
"""

import json
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import cli
from cli import NotNegative, Positive, UserError


@dataclass
class Config(cli.Config):
    data: str = "out/data/hh_rlhf.jsonl"  # file of pairs or rankings
    tokenizer: str = "gpt2"  # or "synthetic"
    megabytes: NotNegative[int] = 0  # repeat the records until the file has this size; 0: as it is
    block_size: Positive[int] = 512  # tokens; longer rankings are dropped
    out: str = "out/loading"  # output folder; what it holds is removed
    child: bool = False  # for the study itself: read the file and say what it took


CONFIG = cli.parse(Config) if __name__ == "__main__" else None

import numpy as np

import common
from data import batches, tokens
from data.files import json_rows
from data.load import load_rankings
from data.tokenizer import load_tokenizer


def repeated(path, out, size):
    """Write the records of path to out, again and again under other prompts, up to size bytes."""
    rows = [row for _, row, _ in json_rows(path)]
    with open(out, "w", encoding="utf-8") as f:
        for n in range(size):
            for row in rows:
                prompt = row["prompt"]
                prompt = f"({n}) {prompt}" if isinstance(prompt, str) else [
                    dict(prompt[0], content=f"({n}) {prompt[0]['content']}"), *prompt[1:]]
                f.write(json.dumps(dict(row, prompt=prompt), ensure_ascii=False) + "\n")
                if f.tell() >= size:
                    return


def padding(elements, size, order):
    """Positions that a run over the Elements computes, over the tokens that they have."""
    longest, answers, real = (np.array(x) for x in zip(*(
        (e.longest, len(e.numbers), sum(map(len, e.rows))) for e in elements)))
    return sum(longest[order[i:i + size]].max() * answers[order[i:i + size]].sum()
               for i in range(0, len(order), size)) / real.sum()


def main(config):
    tokenizer = load_tokenizer(config.tokenizer)
    if config.child:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        tokens.CACHE = Path(config.out) / "cache"
        train = load_rankings(config.data, tokenizer, config.block_size).train
        seconds = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB on Linux
        print(f"read in {seconds:.1f} s, {used / 1024:.0f} MiB above the imports")
        rng = lambda: common.stream(config.seed, "loading", "order")
        for size in (8, 32):
            like = batches.like_length([e.longest for e in train], size, rng())
            print(f"{size} prompts a step: padded over real tokens "
                  f"{padding(train, size, like):.2f}, in random order "
                  f"{padding(train, size, rng().permutation(len(train))):.2f}")
        return
    out = Path(config.out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    data = Path(config.data)
    if not data.is_file():
        raise UserError(f"there is no file {data}: `python -m data.hh_rlhf` makes one")
    if config.megabytes:
        data = out / "pairs.jsonl"
        repeated(config.data, data, config.megabytes * 10**6)
    print(f"{data}: {data.stat().st_size / 2**20:.0f} MiB")
    for name in ("first time", "again"):
        print(f"\n{name}:", flush=True)
        subprocess.run([sys.executable, __file__, f"--data={data}", "--child=true",
                        f"--tokenizer={config.tokenizer}", f"--out={out}",
                        f"--block_size={config.block_size}"], check=True)


if __name__ == "__main__":
    cli.run_main(main, CONFIG)
