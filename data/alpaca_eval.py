"""AlpacaEval's annotations to preference pairs: GPT-4 judges text-davinci-003 against other models.

    {"prompt": "Which planet has the most moons?",
     "chosen": "Saturn, by the latest count.", "rejected": "The Moon.",
     "generator_chosen": "gpt4", "generator_rejected": "text_davinci_003"}

A row is {"instruction", "output_1", "generator_1", "output_2", "generator_2", "preference", ...};
preference 1 or 2 names the better output, as a whole number or a float.

    python -m data.alpaca_eval                                 # download 13 models, 20 MB
    python -m data.alpaca_eval --source=DIR --models=gpt4,phi-2
    python reward.py --data=out/data/alpaca_eval.jsonl --init=...

The 13 models, 10,465 rows, give 10,345 records over the same 805 prompts. The longer answer wins in
71% of them: report a reward model's accuracy against that. This is a public benchmark: a model that
was trained on these prompts must not report AlpacaEval's numbers.
Licence of the data: CC BY-NC 4.0, non-commercial (github.com/tatsu-lab/alpaca_eval).
"""

from dataclasses import dataclass

import cli
from cli import UserError
from data.download import check_out, convert_all, locate_parts, text_field, write
from data.files import json_rows

COMMIT = "cd543a149df89434d8a54582c0151c0b945c3d20"
URL = f"https://raw.githubusercontent.com/tatsu-lab/alpaca_eval/{COMMIT}/results"
# 13 of the 53 models judged by this annotator, win rates 14% to 96%. The rows of falcon-7b-instruct
# say generator_2 = falcon-40b-instruct: upstream has one file under both names.
SHA256 = {
    "alpaca-7b": "d44ea50f1a81f6ae6a95e8ac1dd08b7eca82cc0a9058a2923b1c70cec1e9eaa5",
    "alpaca-7b-neft": "d6203dc0eb0d23373db5bd1bd35b1b1ed9feaeeeac80c40b585722793090852b",
    "alpaca-farm-ppo-human": "93d4bd016124c5b6aba7fbf03aace5869fd69fbec6b63368b11ef09807d32689",
    "falcon-7b-instruct": "24e953bcc62a55dd0d360ed64de328dda5d1569b56ec567cc2a14f5cdebbcd70",
    "gpt4": "822d7ce0fc777c526bd063e5b44d3c179884654f63fe43fe359c5dec524727ff",
    "llama-2-7b-chat-hf": "a003092552c9d97793e6e08e82e2c73b96a1031e882e78ef65dfb972a9d74630",
    "minichat-3b": "dcd626f4798e57c2e506f9fa6a1c180bf1d7e34a471ba176c8ae0e3f9a0454ad",
    "oasst-rlhf-llama-33b": "6b72fe91c3addcc5bd9ce07d0b6e181585e5cde3ba7aa054b47abc4b65a0171b",
    "phi-2": "4eb708c0be289460cf66f2e7f8058c5dd481b19fa995ede24495580153086664",
    "phi-2-sft": "f7d9a0796e143a75ce7644383bfece6d207d39969838ca2f576c2dc8d290cc76",
    "text_davinci_001": "09d486ce69568c52229e2123c9e3a0d7c485d64c709d86505297301289c8880b",
    "vicuna-13b": "3e43d5de375aa1e8c9d0148a4b352dd5b5ee04f0644469e597c155d28641ea61",
    "wizardlm-13b": "f89104b2582ef638f83f312d427b975b4ed985953332030925e9d6d62172cf2a",
}
FILES = {f"{model}/annotations.json": (f"{URL}/{model}/alpaca_eval_gpt4/annotations.json", sha256)
         for model, sha256 in SHA256.items()}


@dataclass
class Config:
    source: str = ""  # folder with MODEL/annotations.json; "" downloads
    models: str = ""  # e.g. gpt4,phi-2: the models to take; "" takes every one that is there
    out: str = "out/data/alpaca_eval.jsonl"  # the file to write
    overwrite: bool = False  # replace it if it exists


def convert(row, where="row"):
    """(pair, None), or (None, reason to drop it). UserError for a field that is wrong."""
    prompt, *outputs = (text_field(row, k, where) for k in ("instruction", "output_1", "output_2"))
    generators = [text_field(row, k, where) for k in ("generator_1", "generator_2")]
    if "preference" not in row:
        raise UserError(f"{where}: the field 'preference' is missing")
    preference = row["preference"]
    if preference is None:
        return None, "without a preference"  # the annotator failed
    # AlpacaEval 2 has 1 + a probability under the same name: refused rather than rounded
    if isinstance(preference, bool) or preference not in (0, 1, 1.5, 2):
        raise UserError(f"{where}: 'preference' is {preference!r}, expected 1 or 2 "
                        "(0 or 1.5 for a tie, null for none)")
    if preference in (0, 1.5):
        return None, "with a tie"
    if not prompt:
        return None, "without an instruction"
    if not all(outputs):
        return None, "with an empty output"
    if outputs[0] == outputs[1]:
        return None, "with the same output twice"
    best = int(preference) - 1  # 0 or 1
    return dict(prompt=prompt, chosen=outputs[best], rejected=outputs[1 - best],
                generator_chosen=generators[best], generator_rejected=generators[1 - best]), None


def records(path):
    """(pairs, {reason: rows dropped}) of one file. UserError names file and row."""
    return convert_all(json_rows(path), convert)


def find(config):
    """Paths of the annotations of the models asked for."""
    return locate_parts("alpaca_eval", config.source, FILES, ["{}/annotations.json"],
                        lambda path: path.split("/")[0], "models", config.models)


def main(config):
    check_out(config)
    rows = [row for path in find(config) for row in json_rows(path)]
    write("alpaca_eval", config, *convert_all(rows, convert))


if __name__ == "__main__":
    cli.run_main(main, cli.parse(Config))
