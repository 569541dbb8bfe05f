"""What the adapters of public data sets share: finding or downloading files, reading, writing.

An adapter is a flat script: `locate` its files, turn each row into a record or a reason to drop it
(`convert`), `write` the records and print the counts. It works on a local copy (--source=DIR) or
downloads the files that it pins by commit and SHA-256 into out/downloads/<set>/.
"""

import hashlib
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from cli import UserError, note
from data.files import file_hash, parse_json, sync_folder
from data.records import prompt_key, split_key, write_jsonl

DOWNLOADS = Path("out/downloads")
TRIES = 3  # per file; each goes on where the one before broke off
WAIT = 1.0  # seconds before the second try, doubled before each further one
TIMEOUT = 30  # seconds without a byte
CHUNK = 2**16  # bytes read at once
# of a model at the Hugging Face hub
MODEL_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config)\.json|chat_template\.jinja|"
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


# --- files ---------------------------------------------------------------------------------------


def fetch(url, path, sha256):
    """Download url to path unless the right file is there already. Returns the path.

    sha256: of the file, or of 40 digits git's hash of it, which the hub gives for small files.
    What has arrived is kept in path + ".part" and continued by the next try or the next run; only a
    whole file with the right SHA-256 gets the final name. UserError if the server cannot be reached
    or the checksum is wrong (then the part is deleted, or it would be continued for ever).
    """
    path = Path(path)
    checksum = file_hash if len(sha256) == 64 else git_hash
    if path.is_file() and checksum(path) == sha256:
        return path
    part = path.with_name(path.name + ".part")
    for attempt in range(TRIES):
        try:
            _transfer(url, part)
            break
        except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
            refused = 400 <= getattr(error, "code", 0) < 500  # asking again changes nothing
            if refused or attempt == TRIES - 1:
                raise UserError(f"cannot download {url}: {error}; "
                                "--source=DIR reads a local copy") from None
            time.sleep(WAIT * 2**attempt)
    found = checksum(part)
    if found != sha256:
        part.unlink()
        raise UserError(f"{url} arrived with SHA-{256 if len(sha256) == 64 else 1} {found}, "
                        f"expected {sha256}: it is deleted, "
                        "try again; --source=DIR reads a local copy")
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)
    return path


def git_hash(path):
    content = Path(path).read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def hub():
    """The address of the Hugging Face hub, or of what HF_ENDPOINT names in its place."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def request(url, **headers):
    """A request to the hub says who asks, if HF_TOKEN does; not to where the hub sends it on."""
    made = urllib.request.Request(url, headers=headers)
    if os.environ.get("HF_TOKEN") and url.startswith(hub() + "/"):
        made.add_unredirected_header("Authorization", f"Bearer {os.environ['HF_TOKEN']}")
    return made


def _transfer(url, part):
    """Append to part what it lacks of url. OSError if the connection fails or ends too early."""
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.is_file() else 0  # bytes
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        response = urllib.request.urlopen(request(url, **headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            return  # nothing lies behind `have`: the part is whole or wrong, the checksum tells
        raise
    with response:
        if response.status != 206:
            have = 0  # 200: the server ignores Range and sends everything, so start again
        length = response.headers["Content-Length"]  # of this answer, not of the file
        total = have + int(length) if length else None
        # disable=None: no bar where standard error is not a terminal
        with open(part, "ab" if have else "wb") as f, \
                tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True,
                     disable=None) as bar:
            while chunk := response.read(CHUNK):
                f.write(chunk)
                bar.update(len(chunk))
    # http.client takes a connection that breaks in the middle for the end of the file
    size = part.stat().st_size
    if total is not None and size != total:
        raise ConnectionError(f"{size} of {total} bytes arrived")


def locate(name, source, files, patterns):
    """Local paths of a data set's files, in the order of the patterns, sorted within each.

    source ""       download all of `files`, {path: (url, sha256)}, to DOWNLOADS/name/path
    source a folder take what matches the glob patterns below it. A file of `files` with another
                    checksum is only warned about: users bring newer or fuller sets.
    UserError if the folder does not exist or holds nothing that matches.
    """
    if not source:
        return [fetch(url, DOWNLOADS / name / path, sha256)
                for path, (url, sha256) in files.items()]
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"--source={source} is not a folder")
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern))
             if path.is_file()]
    if not paths:
        raise UserError(f"--source={source} holds no {' or '.join(patterns)}")
    for path in paths:
        pinned = files.get(path.relative_to(folder).as_posix())
        if pinned and file_hash(path) != pinned[1]:
            print(f"warning: {path} is not the file that this adapter was written for "
                  "(another SHA-256)", file=sys.stderr)
    return paths


def locate_parts(name, source, files, patterns, part_of, flag, wanted):
    """`locate` for a data set in parts, of which a flag takes some.

    wanted: the flag's value, names of parts with commas between, "" for all; part_of(path): the
    part that a path of `files` belongs to; patterns: globs with {} for the name of a part.
    UserError also for a part that is not there.
    """
    parts = [part.strip() for part in wanted.split(",") if part.strip()]
    if not source:
        known = dict.fromkeys(map(part_of, files))
        if unknown := sorted(set(parts) - set(known)):
            raise UserError(f"--{flag}: {', '.join(unknown)} cannot be downloaded; there are "
                            + ", ".join(known))
        return locate(name, "", {path: pinned for path, pinned in files.items()
                                 if not parts or part_of(path) in parts}, ())
    # one call per part, so that one that is not there is an error and not left out
    return [path for part in parts or ["*"]
            for path in locate(name, source, files, [p.format(part) for p in patterns])]


def fetch_model(name):
    """The folder of a model of the hub, its files downloaded where they are not yet there."""
    place = DOWNLOADS / "models" / name.replace("/", "+")
    url = f"{hub()}/api/models/{name}?blobs=true"
    try:
        with urllib.request.urlopen(request(url), timeout=TIMEOUT) as response:
            card = parse_json(response.read())
        files = {f["rfilename"]: f.get("lfs", {}).get("sha256") or f["blobId"]
                 for f in card["siblings"] if MODEL_FILES.fullmatch(f["rfilename"])}
        commit = card["sha"]
    except urllib.error.HTTPError as error:
        raise UserError(f"--source={name} is no folder, and {url} answers {error}"
                        + (": a model that asks for consent needs HF_TOKEN in the environment"
                           if error.code in (401, 403) else "")) from None
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError,
            AttributeError) as error:
        if done := sorted(place.glob("*/complete"), key=lambda path: path.stat().st_mtime):
            note(f"{hub()} cannot be reached, so the copy in {done[-1].parent} is read")
            return done[-1].parent
        raise UserError(f"--source={name} is no folder, and {url} cannot be read: "
                        f"{error}") from None
    if "model.safetensors.index.json" in files:  # then a single file holds the same once more
        files.pop("model.safetensors", None)
    folder = place / commit
    for path, checksum in sorted(files.items()):
        fetch(f"{hub()}/{name}/resolve/{commit}/{path}", folder / path, checksum)
    (folder / "complete").touch()
    return folder


# --- rows ----------------------------------------------------------------------------------------


def text_field(row, key, where):
    """row[key], stripped of whitespace at both ends; may be empty. UserError if it is not text."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object")
    if key not in row:
        raise UserError(f"{where}: the field {key!r} is missing")
    if not isinstance(row[key], str):
        raise UserError(f"{where}: {key!r} is {type(row[key]).__name__}, expected text")
    try:
        row[key].encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, UTF-8 cannot
        raise UserError(f"{where}: {key!r} holds a broken character") from None
    return row[key].strip()


def convert_all(rows, convert):
    """(records, {reason: rows dropped}) of rows as `json_rows` gives them; convert gives (record,
    reason). UserError for a row that cannot be read."""
    records, dropped = [], Counter()
    for where, row, why in rows:
        if why:
            raise UserError(f"{where}: {why}")
        record, reason = convert(row, where)
        if reason:
            dropped[reason] += 1
        else:
            records.append(record)
    return records, dropped


def without_tested(records, dropped, what):
    """The records without those of the training part whose prompt is held out as well, which are
    added to `dropped`: a prompt is on one side."""
    tested = {split_key(record) for record in records if record["held_out"]}
    kept = [r for r in records if r["held_out"] or split_key(r) not in tested]
    dropped[f"of the training part whose {what} is tested"] += len(records) - len(kept)
    return kept


# --- output --------------------------------------------------------------------------------------


def check_out(config):
    """Called first, so that nothing is downloaded for a file that may not be written."""
    out = Path(config.out)
    if out.is_dir():
        raise UserError(f"--out={config.out} is a folder: name a .jsonl file")
    if out.exists() and not config.overwrite:
        raise UserError(f"{out} exists already: --overwrite=true replaces it, "
                        "--out=FILE writes elsewhere")


def write(name, config, records, dropped):
    """Write config.out, whole or not at all, and print one line of counts."""
    n_dropped = sum(dropped.values())
    reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.most_common())
    if not records:
        raise UserError(f"{name}: no usable row of {n_dropped} read ({reasons or 'empty files'})")
    try:
        write_jsonl(config.out, records)
    except OSError as error:
        raise UserError(f"cannot write --out={config.out}: {error.strerror}") from None
    prompts = len({prompt_key(record) for record in records})
    print(f"{name}: {len(records) + n_dropped} rows read, {len(records)} written to {config.out}, "
          f"{prompts} distinct prompts, {n_dropped} dropped" + (f": {reasons}" if reasons else ""))
