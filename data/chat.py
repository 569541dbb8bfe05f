"""Tokenizer and chat template of a folder of transformers: read for a checkpoint, written again.

A chat template is a Jinja program there and data here (data/tokenizer.py): it is recognised by what
it makes of a few dialogues.
"""

import json
import re
from itertools import pairwise

from cli import UserError
from data.files import parse_json
from data.tokenizer import LETTERS, ROLES, TEMPLATES, load_tokenizer, read_json, template

# --- in ------------------------------------------------------------------------------------------


def read_text(path, needed=True):
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, FileNotFoundError) and not needed:
            return None
        why = "it does not exist" if isinstance(error, FileNotFoundError) else error
        raise UserError(f"{path}: {why}; a folder of transformers has it") from None


def read_object(path, needed=True):
    """A JSON object, {} where there is no file and none is needed."""
    text = read_text(path, needed)
    try:
        content = parse_json(text or "{}")
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def render(form, turns):
    """What a template of data/tokenizer.py makes of turns, up to where the answer begins."""
    if turns[0]["role"] != "system" and form["default_system"] is not None:
        turns = [dict(role="system", content=form["default_system"]), *turns]
    text = lambda turn: turn["content"].strip() if form["trim"] else turn["content"]
    return form["begin"] + "".join(form["head"][t["role"]] + text(t) + form["tail"][t["role"]]
                                   for t in turns) + form["head"]["assistant"]


def recognise(source, specials, where):
    """The template, as data, that does what the Jinja template `source` does. UserError if none
    does. specials: {"bos_token": text, ...}, for the template."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def fail(why):
        raise ValueError(why)

    def theirs(*texts):
        roles = ("user", "assistant") * 2 if len(texts) % 2 else ("system", "user", "assistant",
                                                                 "user")
        turns = [dict(role=r, content=t) for r, t in zip(roles, texts)]
        return turns, compiled.render(messages=turns, add_generation_prompt=True, **specials)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = fail
    try:
        # transformers' mark of what is trained on says nothing here
        compiled = environment.from_string(re.sub(r"{%-? *(end)?generation *-?%}", "", source))
        probes = [theirs(*texts) for texts in (
            ("one",), (" two\n",), ("S", "one"), ("", "one"), ("a", "b", "c"),
            (" S ", " one ", "two ", "three\n"))]
    except Exception as error:  # it is a program of someone else's
        raise UserError(f"{where}: its chat template does not take system, user and assistant "
                        f"({error}): --template= names another") from None
    own = [template("<|{role}|>", "", begin, specials["eos_token"])  # ours, of another EOS
           for begin in ("", specials.get("bos_token", "")) if "eos_token" in specials]
    for form in [*TEMPLATES.values(), *own]:
        form = form | dict(head=dict(form["head"]), begin=form["begin"])
        # what it says before the system's text (Llama 3.1: dates), and as a system of its own
        before = re.escape(form["begin"] + form["head"]["system"])
        said = re.match(before + "(.*?)S" + re.escape(form["tail"]["system"]), probes[2][1], re.S)
        if not said:
            continue
        form["head"]["system"] += said[1]
        own = re.match(before + re.escape(said[1]) + "(.*?)" + re.escape(
            form["tail"]["system"] + form["head"]["user"]) + "one", probes[0][1], re.S)
        form["default_system"] = own and own[1]
        if all(render(form, turns) == text for turns, text in probes):
            return form
    raise UserError(f"{where}: its chat template is none of {', '.join(TEMPLATES)}: it makes "
                    f"{probes[0][1]!r} of 'one'; --template= takes one of them all the same")


def read_tokenizer(folder, name, asked, eos_id=None):
    """(Tokenizer, ids of the markers that it had to be given). Its state, which a checkpoint keeps,
    has tokenizer.json, the template and what goes back into a folder of transformers. eos_id: EOS
    where no name is given for it."""
    settings = read_object(folder / "tokenizer_config.json", needed=False)
    path = folder / "tokenizer.json"
    text = read_text(path)
    added = read_json(text, path)[1]
    inside = settings.pop("chat_template", None)
    if isinstance(inside, list):  # several, by name
        inside = next((each.get("template") for each in inside if isinstance(each, dict)
                       and each.get("name") == "default"), None)
    own = read_text(folder / "chat_template.jinja", needed=False) or inside
    specials = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = settings.get(key)  # a text, or an object with it
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            specials[key] = token
    if not isinstance(own, str | None):
        raise UserError(f"{folder}: the chat_template of tokenizer_config.json is no text")
    names = {i: token for token, i in added.items()}
    eos_id = eos_id[0] if isinstance(eos_id, list) and eos_id else eos_id  # Llama 3 has several
    eos_id = eos_id if isinstance(eos_id, int) else None
    specials.setdefault("eos_token", names.get(eos_id))
    if asked not in ("auto", *TEMPLATES):
        raise UserError(f"--template={asked}: choose one of auto, {', '.join(TEMPLATES)}")
    if asked == "auto":
        form = recognise(own, specials, folder) if own else None
    else:
        form, own = TEMPLATES[asked] if asked != "markers" else None, None
    if form is None:  # ours
        eos, bos = specials["eos_token"], specials.get("bos_token")
        if eos not in added:
            raise UserError(f"{folder}: the EOS {eos!r} of tokenizer_config.json or config.json is "
                            "none of the added tokens of tokenizer.json")
        begins = bos and bos in json.dumps(json.loads(text).get("post_processor"))
        form = template("<|{role}|>", "", bos if begins else "", eos)
        text = with_tokens(text, [f"<|{role}|>" for role in ROLES])
    state = {"name": name, "tokenizer.json": text, "tokenizer_config.json": settings,
             "chat_template.jinja": own, "template": form}
    tokenizer = load_tokenizer(state)
    marked = [*tokenizer.head.values(), *tokenizer.tail.values(), tokenizer.begin]
    if any("<|" in piece for pieces in marked for piece in pieces if isinstance(piece, str)) \
            or not isinstance(tokenizer.eos, int):
        raise UserError(f"--template={asked}: {folder} has no tokens for its markers")
    return tokenizer, [i for text, i in tokenizer.specials.items() if text not in added]


def with_tokens(text, wanted):
    """tokenizer.json with these special tokens, behind all others where it lacks them."""
    content = json.loads(text)
    added = content["added_tokens"]
    known = {token["content"] for token in added}
    first = max([*content["model"]["vocab"].values(), *(token["id"] for token in added)]) + 1
    for n, token in enumerate(t for t in wanted if t not in known):
        added.append(dict(id=first + n, content=token, single_word=False, lstrip=False,
                          rstrip=False, normalized=False, special=True))
    return json.dumps(content, ensure_ascii=False)


# --- out -----------------------------------------------------------------------------------------


def jinja(form, eos=None):
    """The Jinja template that does what a template of data/tokenizer.py says. eos: the last turn
    ends with it, where a reward model reads its score; nothing follows."""
    text = "message['content'] | trim" if form["trim"] else "message['content']"
    lines = ["{{ " + json.dumps(form["begin"]) + " }}"] if form["begin"] else []
    if form["default_system"] is not None:
        lines.append("{% if messages[0]['role'] != 'system' %}{{ " + json.dumps(
            form["head"]["system"] + form["default_system"] + form["tail"]["system"])
            + " }}{% endif %}")
    lines.append("{% for message in messages %}")
    for role in ROLES:
        tail = form["tail"][role]
        lines.append("{% if message['role'] == '" + role + "' %}{{ " + json.dumps(
            form["head"][role]) + " + (" + text + ") + " + (
                f"({json.dumps(eos)} if loop.last else {json.dumps(tail)})"
                if eos and role == "assistant" else json.dumps(tail)) + " }}{% endif %}")
    lines.append("{% endfor %}{% if add_generation_prompt %}{{ " + json.dumps(
        form["head"]["assistant"]) + " }}{% endif %}")
    return "".join(lines)


def tokenizer_json(tokenizer):
    """A tokenizer.json of our own tokenizers, of which tiktoken knows ranks only: the two halves of
    a token are what BPE makes of it without that token itself."""
    write = lambda token: "".join(LETTERS[b] for b in token)
    ranks, merges = tokenizer.encoding._mergeable_ranks, []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            rank_of = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            n = rank_of.index(min(rank_of))
            parts[n:n + 2] = [parts[n] + parts[n + 1]]
        if len(parts) == 2:
            merges.append([write(part) for part in parts])
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    text = json.dumps(dict(
        version="1.0", truncation=None, padding=None, added_tokens=[], normalizer=None,
        pre_tokenizer=level, post_processor=None, decoder=level, model=dict(
            type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
            end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=False,
            vocab={write(token): rank for token, rank in ranks.items()}, merges=merges)))
    return with_tokens(text, sorted(tokenizer.specials, key=tokenizer.specials.get))
