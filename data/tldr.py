"""TL;DR comparisons to preference pairs: people judged summaries of Reddit posts (Stiennon et al.).

    {"prompt": "SUBREDDIT: r/pets\\n\\nTITLE: Cat and piano\\n\\nPOST: My cat ...\\n\\nTL;DR:",
     "chosen": "My cat plays at night.", "rejected": "I own a piano.", "held_out": false}

A row is {"info": {"post", "title", "subreddit"}, "summaries": [{"text"}, {"text"}], "choice",
"split"}, choice 0 or 1. The prompt is laid out as in the paper. Upstream's valid1 and valid2 are
the held-out side; training rows with one of their posts are dropped.

    python -m data.tldr --source=DIR                           # a folder with batch3.json and so on
    python reward.py --data=out/data/tldr.jsonl --init=...

Only a local copy is read, since no published checksum is known. Most training rows are in batch3 to
batch10. batch0_cnndm compares summaries of news, which have no post: they are dropped.
Licence of the posts: CC BY 4.0 (github.com/openai/summarize-from-feedback).
"""

from collections import Counter
from dataclasses import dataclass

import cli
from cli import UserError
from data.download import check_out, convert_all, locate, text_field, without_tested, write
from data.files import json_rows

URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons"


@dataclass
class Config:
    source: str = ""  # folder with batch*.json
    out: str = "out/data/tldr.jsonl"  # the file to write
    overwrite: bool = False  # replace it if it exists


def convert(row, where="row"):
    """(pair, None), or (None, reason to drop it). UserError for a field that is wrong."""
    split = text_field(row, "split", where)
    info, summaries, choice = (row.get(key) for key in ("info", "summaries", "choice"))
    if split not in ("train", "valid1", "valid2"):
        raise UserError(f"{where}: 'split' is {split!r}, expected train, valid1 or valid2")
    if not isinstance(summaries, list) or len(summaries) != 2 or type(choice) is not int or \
            choice not in (0, 1):
        raise UserError(f"{where}: expected two 'summaries' and a 'choice' of 0 or 1")
    if isinstance(info, dict) and info.get("post") is None:
        return None, "without a post"
    subreddit, title, post = (text_field(info, k, where) for k in ("subreddit", "title", "post"))
    texts = [text_field(summary, "text", where) for summary in summaries]
    if not post:
        return None, "without a post"
    if not all(texts):
        return None, "with an empty summary"
    if texts[0] == texts[1]:
        return None, "with the same summary twice"
    return dict(prompt=f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:",
                chosen=texts[choice], rejected=texts[1 - choice], held_out=split != "train"), None


def main(config):
    check_out(config)
    if not config.source:
        raise UserError(f"--source=DIR is missing: `curl -O {URL}/batch3.json`, and so on to "
                        "batch20.json and batch22.json, gets the files into a folder")
    kept, dropped = [], Counter()
    for path in locate("tldr", config.source, {}, ("batch*.json",)):
        pairs, reasons = convert_all(json_rows(path), convert)
        kept, dropped = kept + pairs, dropped + reasons
    pairs = without_tested(kept, dropped, "post")
    write("tldr", config, pairs, +dropped)


if __name__ == "__main__":
    cli.run_main(main, cli.parse(Config))
