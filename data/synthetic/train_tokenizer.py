"""Learn the small byte-level BPE of the world: `python -m data.synthetic.train_tokenizer`.

The ranks file is committed, because every checkpoint of the embedded data depends on it. The
learning itself is tiktoken's own teaching code.
"""

import base64
from pathlib import Path

from tiktoken._educational import bpe_train

from data.synthetic.corpus import documents
from data.synthetic.people import demonstrations
from data.synthetic.world import all_prompts
from data.tokenizer import PATTERN

RANKS = 1787  # with EOS, three markers and PAD: 1,792 rows, all used


def main():
    demos = demonstrations(all_prompts().values(), seed=0)
    texts = list(documents(500, seed=0)) + [f"{d['prompt']} {d['completion']}" for d in demos]
    # rare words often enough that each becomes one token: a subject of several tokens is harder to
    # copy into an answer, and every token is another chance to sample a wrong one
    words = " ".join(texts + list(documents(5000, seed=1))).replace(".", "").split()
    texts += [" " + " ".join(sorted(set(words)))] * 20
    ranks = bpe_train("\n".join(texts), RANKS, PATTERN, visualise=None)
    path = Path(__file__).parent / "synthetic.tiktoken"
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    path.write_text("".join(lines))
    print(f"{path}: {len(ranks)} tokens")


if __name__ == "__main__":
    main()
