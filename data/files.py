"""Rows of a data file: JSON lines or one JSON list, plain or gzip. And how files are written.

What a file is is decided by its bytes, never by its name. A pipe, as in --data=<(zcat FILE), is
read once and kept. What is written stands there whole and on the disk, or not at all.
"""

import contextlib
import csv
import difflib
import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import socket
import time
import zlib
from functools import cache
from itertools import chain
from pathlib import Path

from cli import UserError, note, progress, shorten

# data sets with an adapter, python -m data.NAME
ADAPTERS = ("alpaca", "alpaca_eval", "anthropic_evals", "dolly", "gsm8k", "harmbench", "hh_rlhf",
            "tldr", "truthfulqa", "ultrafeedback", "xstest")
# how files begin that are no text: (bytes, what it is)
BINARY = ((b"PAR1", "a parquet file"), (b"PK\x03\x04", "a zip archive"), (b"\xfd7zXZ", "xz"),
          (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xff\xfe", "UTF-16 text"),
          (b"\xfe\xff", "UTF-16 text"), (b"SQLite", "a database"), (b"ARROW1", "an Arrow file"),
          (b"7z\xbc\xaf", "a 7z archive"), (b"Rar!", "a rar archive"), (b"%PDF", "a PDF"),
          (b"<!DOCTYPE", "a web page"), (b"<html", "a web page"))
HOST = socket.gethostname().replace(".", "-")
SPACE, LIST_END = re.compile(r"[ \t\n\r]*"), re.compile(r"\s*\]\s*$")


TWICE = []  # why the row that is being read is bad: which value of a doubled key is meant?


def _object(pairs):
    result = dict(pairs)
    if len(result) < len(pairs):
        TWICE.append(f"a key stands twice in {shorten(', '.join(k for k, _ in pairs), 60)}")
    return result


def _twice():
    """Why the row that was read is bad, or None."""
    why = TWICE[0] if TWICE else None
    TWICE.clear()
    return why


def _whole_number(text):
    if len(text) > 308:  # no float is that large: the first comparison with one would fail
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole_number)


def is_data(path):
    """Whether there is something to read at path: a file or a pipe."""
    try:
        return Path(path).is_file() or Path(path).is_fifo()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise UserError(f"cannot read {str(path)[:60]}: {error.strerror}") from None


@cache
def _pipe(path):
    return Path(path).read_bytes()  # what has been read from a pipe is gone


def open_file(path):
    if not is_data(path):
        raise UserError(missing(path))
    if Path(path).is_fifo():
        return io.BytesIO(_pipe(str(path)))
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def missing(path):
    """Why nothing can be read at path, and what to do."""
    name, path = str(path), Path(path)
    words = path.name.lower().replace("-", "_")  # as hubs call it: hh-rlhf, databricks-dolly-15k
    known = sorted((a for a in ADAPTERS if a in words), key=len)
    if known:
        source = f" --source={path}" if path.is_dir() else ""
        return (f"{name} is a data set, not a file: `python -m data.{known[-1]}{source}` writes "
                f"out/data/{known[-1]}.jsonl, which can be read here")
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.is_file())
        return f"{path} is a folder; name a file in it" + (
            f": {', '.join(inside[:5])}" + ", ..." * (len(inside) > 5) if inside else "")
    if path.exists():
        return f"{name} is neither a file nor a pipe"
    if path.is_symlink():
        return f"{name} is a link to {os.readlink(path)}, where there is nothing"
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, 1)
    return f"there is no file {name}" + (f"; did you mean {path.parent / close[0]}?" if close
                                         else "")


def file_hash(path):
    with open_file(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def text_lines(path, broken=False):
    """Every line of a file as (number, text), without its line break or byte order mark. UserError
    where it is no UTF-8 text, with what reads it; with `broken` the text of such a line is None."""
    with open_file(path) as stream:
        head = stream.read(64)
        stream.seek(0)
        for start, kind in BINARY:
            if head.startswith(start):
                raise UserError(f"{path} is {kind}: " + (
                    "save it as UTF-8" if "UTF-16" in kind else "unpack it" if "parquet" not in kind
                    else f"`python -m data.convert {path} --out=FILE.jsonl` reads it"))
        if head.startswith(b"version https://git-lfs"):
            raise UserError(f"{path}: a git-lfs pointer, `git lfs pull` gets the data")
        size = stream.seek(0, 2)
        stream.seek(0)
        lines = gzip.open(stream) if head[:2] == b"\x1f\x8b" else stream
        bar = progress(None, f"{Path(path).name}, read", total=size, unit="B", unit_scale=True)
        try:
            for number, line in enumerate(lines, 1):
                if number == 1 and b"\0" in line:
                    raise UserError(f"{path} is no text, or UTF-16: save it as UTF-8")
                if number % 500 == 0:
                    bar.update(stream.tell() - bar.n)
                try:
                    text = line.decode()
                except UnicodeDecodeError:
                    if not broken:
                        raise UserError(f"{path}:{number}: not UTF-8 text") from None
                    text = None
                yield number, text and text.lstrip("\ufeff").rstrip("\r\n")
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise UserError(f"{path}: not a whole gzip file") from None
        finally:
            bar.close()


def is_json(path):
    """Whether a file begins as JSON does: an object, a list of something, or a text in quotes."""
    start = next((text.strip() for _, text in text_lines(path) if text.strip()), "")
    # [Verse 1] and {chorus} are text; "a" alone on a line is JSON, which its reader refuses
    return re.match(r"\[\s*($|[\[{\"\]\d])|\{\s*($|[\"}])", start) is not None or \
        start[0:1] == '"' and _parse(start)[1] is None


def json_rows(path):
    """(where, row, None) for each row of a file, or (where, None, why it cannot be read)."""
    lines = ((n, text) for n, text in text_lines(path, broken=True) if text is None or text.strip())
    first = next(lines, None)
    if first is None:
        return
    if first[1] and first[1].lstrip()[0] == "[":  # one list of rows
        yield from _list_rows(path, chain([first], lines))
        return
    for number, text in chain([first], lines):
        row, why = (None, "not UTF-8 text") if text is None else _parse(text)
        yield f"{path}:{number}", row, why or _twice()


def _list_rows(path, lines):
    """Of a file that is one JSON list: its text is in memory, its elements one at a time."""
    parts, last = [], 1
    for number, text in lines:
        if text is None:
            raise UserError(f"{path}:{number}: not UTF-8 text")
        parts.append("\n" * (number - last) + text)
        last = number
    text = "".join(parts)
    del parts
    place, n, end = SPACE.match(text).end() + 1, 0, None
    try:
        if LIST_END.match(text, place):
            return  # an empty list
        while not end:
            row, place = DECODER.raw_decode(text, SPACE.match(text, place).end())
            place, end = SPACE.match(text, place).end(), LIST_END.match(text, place)
            if not end and text[place:place + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
            place, n = place + 1, n + 1
            yield f"{path}: row {n}", row, _twice()
    except (ValueError, RecursionError) as error:  # also numbers too long, lists too deep
        raise UserError(f"{path}: not JSON ({_why(error)}): what begins with [ must be one whole "
                        "list") from None


def _why(error):
    return getattr(error, "msg", str(error)) + (
        f", line {error.lineno}" if getattr(error, "lineno", 1) > 1 else "")


def parse_json(text):
    """json.loads, where a list too deep is a ValueError as well: Python has a RecursionError. And
    a number too large."""
    try:
        return json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise ValueError("too deep") from None


@contextlib.contextmanager
def refusing(what):
    """UserError, `what`, where something that was read is not made as it should be."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{what} ({type(error).__name__}: {shorten(str(error), 80)})") from None


def _parse(text):
    """(what the JSON says, None), or (None, why it is none)."""
    try:
        return DECODER.decode(text), None
    except (ValueError, RecursionError) as error:  # also numbers too long, lists too deep
        TWICE.clear()
        return None, f"not JSON ({_why(error)})"


def each_row(path, check, skip_bad=False):
    """check(row, where) of all rows. Those that check answers with a UserError, or that are no JSON
    objects, are bad: all are counted, the first ten told. UserError unless skip_bad."""
    good, bad, first = 0, 0, []
    for where, row, why in json_rows(path):
        try:
            if why or not isinstance(row, dict):
                raise UserError(f"{where}: {why or 'a record must be a JSON object'}")
            checked = check(row, where)
        except UserError as error:
            bad += 1
            first += [str(error)][:10 - len(first)]
        else:
            good += 1
            if skip_bad or not bad:  # the run ends anyway; the rest is only checked
                yield checked
    if bad and not good:  # a file of another kind: its first record says it
        raise UserError(first[0] + f"; so are the other {bad - 1} records" * (bad > 1)
                        + ". `python -m data.convert` reads tables and other JSON"
                        * ("not JSON" in first[0]))
    if bad:
        listed = "\n  ".join(first) + "\n  ..." * (bad > 10)
        if not skip_bad:
            more = "--skip_bad=true goes on without"
            raise UserError(f"{listed} ({more} it)" if bad == 1 else
                            f"{path}: {bad} bad records of {good + bad}; {more} them:\n  {listed}")
        note(f"{path}: {bad} of {good + bad} records are bad and left out:\n  " + listed)
    if not good:
        raise UserError(f"{path}: holds no records")


def any_rows(path):
    """The same of a file that may be a table or parquet as well, for data/convert.py."""
    with open_file(path) as stream:
        is_parquet = stream.read(4) == b"PAR1"
    return (parquet_rows if is_parquet else json_rows if is_json(path) else table_rows)(path)


def parquet_rows(path):
    """The rows of a parquet file. UserError if it cannot be read."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} is a parquet file; to read it: pip install pyarrow") from None
    try:
        with open_file(path) as stream:
            rows = chain.from_iterable(
                batch.to_pylist() for batch in pyarrow.parquet.ParquetFile(stream).iter_batches())
            yield from ((f"{path}: row {n}", row, None) for n, row in enumerate(rows, 1))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole parquet file ({shorten(str(error), 60)})") from None


def table_rows(path):
    """The rows of a table with a header line, separated by what is most frequent in it."""
    lines = (text + "\n" for _, text in text_lines(path))
    header = next((line.lstrip("\ufeff") for line in lines if line.strip()), "")
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(chain([header], lines), strict=True,
                        delimiter=max(",\t;", key=header.count))
    n = 0
    try:
        names = next(reader)
        if len(set(names)) < len(names):
            raise UserError(f"{path}: two columns have the same name: {', '.join(names)}")
        for n, cells in enumerate(filter(None, reader), 1):
            why = None if len(cells) == len(names) else f"{len(cells)} cells, {len(names)} columns"
            yield f"{path}: row {n}", dict(zip(names, cells)), why
    except csv.Error as error:
        raise UserError(f"{path}: neither JSON nor a table (behind row {n}: {error})") from None


# --- writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path, mode="wb", size=0, **options):
    """An open file. What it was given stands at path at the end, on the disk; where that fails, the
    file that was there before. size: bytes to come, where they are known: they must be free.
    UserError where the file cannot be written."""
    path = Path(path)
    need_room(path, size)
    temporary = unfinished(path)
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or after a loss of power the name may stand for nothing
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(cannot_write(path, error, size)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def unfinished(path):
    """The name of a file or folder until it is whole: of this process alone, for two runs may write
    to one cache, of two machines even."""
    return path.with_name(f"{path.name}.{HOST}.{os.getpid()}.tmp")


def append(path, text):
    """More text at the end of a file, all of it or none: half a row would break its readers."""
    path = Path(path)
    before = path.stat().st_size if path.exists() else 0
    content = text.encode(errors="backslashreplace")  # half a surrogate pair, which is no UTF-8
    try:
        with open(path, "ab") as file:
            file.write(content)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, before)
        raise UserError(cannot_write(path, error, len(content))) from None


def sync_folder(folder):
    """The names in a folder, on the disk. Windows has no such call."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def need_room(path, size, what="it"):
    """UserError where the disk of path has fewer free bytes than size."""
    with contextlib.suppress(OSError):  # a folder that is not there: writing will say so
        free = shutil.disk_usage(Path(path).parent).free
        if free < size:
            raise UserError(f"cannot write {path}: {what} needs {_mb(size)}, {_mb(free)} are free")


def cannot_write(path, error, size=0):
    """A line for an OSError."""
    why = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needs = f"needs {_mb(size)}, " if size else ""
        with contextlib.suppress(OSError):
            why += f" ({needs}{_mb(shutil.disk_usage(Path(path).parent).free)} are free)"
    return f"cannot write {path}: {why}"


def _mb(size):
    return f"{size / 1e6:,.1f} MB"


def sweep(folder, name="*"):
    """Remove what dead processes have left of unfinished files, and of folders, in a folder. Of
    other machines that is what is older than a day."""
    for path in Path(folder).glob(f"{name}.*.*.tmp"):
        host, number = path.name.split(".")[-3:-1]
        with contextlib.suppress(OSError):
            old = path.stat().st_mtime < time.time() - 24 * 3600
            if number.isdigit() and (not _alive(int(number)) if host == HOST else old):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _alive(process):
    """Whether another process with this number runs: of ours nothing is unfinished yet."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return process != os.getpid()
