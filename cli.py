"""Flags, help, messages and the one user error. Imports none of the other files, and no torch.

A script declares its settings as a dataclass and reads them before it imports what is slow:

    @dataclass
    class Config(cli.Config):
        out: str = "out/sft"  # output folder
        lr: Positive[float] = 1e-3  # peak; warm-up, then cosine to 0

    CONFIG = cli.parse(Config) if __name__ == "__main__" else None

Flags are --name=value for these fields and nothing else. The range of a number is part of its type,
the comment behind a field is its help, a line `# --- name` above some begins a group. A field of
the type Words has no flag: it takes the arguments that begin without a dash, as they come.
"""

import contextlib
import dataclasses
import difflib
import errno
import inspect
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar, get_args

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None

# Threads of a matrix product that wait for each other spin, by default some 300,000 times: beside
# another busy program they take the core from the very thread that they wait for, and decoding gets
# several times slower (docs/speed.md). Read when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# --name=value where the value is a number: a bare int or float may be any finite one
Number = TypeVar("Number", int, float)
Positive = Annotated[Number, lambda x: x > 0, "must be above 0"]
NotNegative = Annotated[Number, lambda x: x >= 0, "must not be negative"]
Words = tuple[str, ...]


NOTES = []  # what `note` said and common.Run has not yet written
STARTED = []  # the folder of the run that this process has begun, or goes on with


class UserError(Exception):
    """Bad input: printed as one line, exit status 2."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; its argument is the number of the signal."""


def interrupt(number, frame=None):
    raise Interrupted(number)


def processes():
    """(number of this process, how many there are): as torchrun says, in three whole numbers, else
    (0, 1)."""
    said = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    rank, n = map(int, said[:2]) if all(map(str.isdecimal, said)) else (0, 1)
    return (rank, n) if n > 1 else (0, 1)


def one_process():
    """The environment of a child that is none of several."""
    return {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}


def first_process():
    """Of several the one that writes and prints."""
    return processes()[0] == 0


def let_the_first_speak():
    """What is wrong in one process is mostly wrong in all. So the others wait: when the first one
    ends, torchrun ends them. If it does not, they say themselves what is wrong here."""
    if not first_process():
        catch_signals(lambda number, _: os._exit(128 + number))
        time.sleep(5)


def catch_signals(handler):
    """handler(number, frame) is called on Ctrl-C and on SIGTERM."""
    if threading.current_thread() is threading.main_thread():  # others get none
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)


@dataclass
class Config:
    """What means the same in every run; each script adds its own."""
    # --- the run
    out: str = ""  # output folder
    seed: NotNegative[int] = 1  # of every random stream
    device: str = "auto"  # "auto" (a GPU where there is one), "cpu", "cuda"
    resume: bool | None = None  # auto: go on with an interrupted run; true: or stop; false: never
    overwrite: bool = False  # start again in a folder that holds a run
    save_minutes: NotNegative[float] = 5.0  # a state is saved this often at least


def parse(config_class):
    """The settings that the command line gives. --help prints them all and stops."""
    # until `run_main` there is nothing to save, and torch is imported for seconds
    catch_signals(lambda number, _: os._exit(128 + number))
    sys.stdout, sys.stderr = robust(sys.stdout), robust(sys.stderr)
    if not first_process():
        sys.stdout = open(os.devnull, "w")
    with one_line_errors():
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(help_text(config_class))
            sys.exit(0)
        return read_flags(config_class, sys.argv[1:])


def run_main(main, config, folder=None):
    """What every script ends with: main(config), a user error as one line. folder: locked, this
    script writes there and no other process may."""
    sys.stdout, sys.stderr = robust(sys.stdout), robust(sys.stderr)
    NOTES.clear()
    catch_signals(interrupt)
    with one_line_errors():
        try:
            if processes()[1] > 1 and not (folder and isinstance(config, Config)):
                raise UserError("works in one process: start it without torchrun")
            with locked(folder) if folder and first_process() else contextlib.nullcontext():
                main(config)
        except KeyboardInterrupt as stop:
            if first_process():
                print("\ninterrupted" + (
                    f"; the same command goes on:\n    {command_line()}"
                    if "resume" in vars(config) and (config.overwrite is False or STARTED)
                    else ""), file=sys.stderr)
            sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
        except (MemoryError, RuntimeError, OSError) as error:
            if lost_process(error):
                raise UserError("another process of this run ended, and so this one does; the "
                                "same command goes on from the last saved state") from None
            if not out_of_memory(error):
                if isinstance(error, OSError):
                    raise UserError(f"{error.filename or 'a file'}: {error.strerror}") from None
                raise
            flags = [f"--{name} (now {as_text(getattr(config, name))})" for name in (
                "micro_batch", "batch_size", "chunk", "max_new_tokens") if hasattr(config, name)]
            raise UserError("out of memory: lower " + " or ".join(flags or ["the model's size"]) + (
                ", or take --checkpointing=true" if hasattr(config, "checkpointing")
                else "")) from None
        except FloatingPointError as error:  # see model.generate
            rates = [f"--{name} (now {as_text(getattr(config, name))})"
                     for name in ("lr", "critic_lr") if hasattr(config, name)]
            if getattr(config, "temperature", 1.0) < 1e-6:
                why = f"raise --temperature (now {config.temperature})"
            elif rates:
                why = (f"the weights are destroyed: lower {' or '.join(rates)}, or take another "
                       "--init")
            else:
                why = "the weights are destroyed: make the checkpoint again, with a lower --lr"
            raise UserError(f"{error}: {why}") from None


def out_of_memory(error):
    """Torch has a RuntimeError for it on a GPU, and others on a CPU; the system has a number."""
    return (isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
            or getattr(error, "errno", None) == errno.ENOMEM
            or re.search("can(.t|not) (allocate memory|start new thread)|bad_alloc|out of memory",
                         str(error), re.IGNORECASE) is not None)


def robust(stream):
    """Standard output, or error, that cannot end a run: `| head -1` closes it, a disk is full. What
    it does not take is dropped; half a surrogate pair is written as its escape."""
    if stream is None:  # closed from the start
        return open(os.devnull, "w")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.reconfigure(errors="backslashreplace")
    if isinstance(getattr(stream.buffer, "raw", stream.buffer), Output):  # it is one already
        return stream
    try:
        raw = Output(stream.fileno(), "w", closefd=False)
    except OSError:  # of a test, not of the system
        return stream
    raw.owner = stream  # which would close the number with it
    stream.flush()
    return io.TextIOWrapper(raw if stream.write_through else io.BufferedWriter(raw),
                            stream.encoding, stream.errors, None, stream.line_buffering,
                            stream.write_through)


class Output(io.FileIO):
    def write(self, content):
        try:
            return super().write(content)
        except OSError:
            return len(content)


def lost_process(error):
    """What torch.distributed raises in the others when one of several processes ends."""
    return processes()[1] > 1 and (type(error).__name__.startswith("Dist") or "gloo" in str(error))


@contextlib.contextmanager
def one_line_errors():
    """A UserError ends the script, with its one line and exit status 2."""
    try:
        yield
    except UserError as error:
        let_the_first_speak()
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception:
        let_the_first_speak()
        raise


def make_folder(flag, path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--{flag}={path} is no folder that can be written to: "
                        f"{error.strerror}") from None


@contextlib.contextmanager
def locked(folder):
    """Hold the folder, which goes at the end if nothing was written to it. UserError if another
    process holds it; the kernel takes the lock of one that is dead."""
    ours = not Path(folder).exists()
    make_folder("out", folder)
    path, file, held = Path(folder).resolve() / "lock", None, None
    while file is None and fcntl:
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{folder} is in use by process {file.read() or '?'}: wait for it, or "
                            "choose another --out=DIR") from None
        # who held it may have deleted it between these two lines, and a third have made a new one
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file = None
    if file:
        held = path, os.fstat(file.fileno())
        HELD.append(held)
        with contextlib.suppress(OSError):  # a full disk: it locks without these words, too
            file.truncate(0)
            file.write(f"{os.getpid()} since {time.strftime('%d %b %H:%M')}")
            file.flush()
    try:
        yield
    finally:
        if held:
            if still_there(held):
                path.unlink()
            HELD.remove(held)
        if ours:
            with contextlib.suppress(OSError):  # it holds something
                path.parent.rmdir()


HELD = []  # (path, what os.stat says) of each lock of this process


def still_there(held):
    try:
        return os.path.samestat(held[1], held[0].stat())
    except OSError:
        return False


def check_locks():
    """UserError where a folder that this process holds was removed, or was and is there again:
    what it writes would mix with the files of another run."""
    for held in HELD:
        if not still_there(held):
            raise UserError(f"{held[0].parent} was removed while this run went on; it stops here")


def command_line():
    """The command that goes on: as it was typed, without what would start again."""
    n, again = processes()[1], re.compile("--(overwrite|resume)=.*", re.IGNORECASE)
    words = [word for word in sys.argv[1:] if not again.fullmatch(word)]
    start = ["python"] if n == 1 else ["torchrun", f"--nproc_per_node={n}"]
    if n > 1 and os.environ.get("LOCAL_WORLD_SIZE") != str(n):
        start = ["torchrun", "..."]  # on several machines: what else was typed is not known here
    return shlex.join([*start, sys.argv[0], *words])


def read_flags(config_class, argv):
    """An instance of the dataclass from the arguments. UserError for one that fits no field."""
    fields = {f.name: f for f in dataclasses.fields(config_class) if f.type != Words}
    words = next((f.name for f in dataclasses.fields(config_class) if f.type == Words), None)
    values = {}
    for argument in argv:
        if words and not argument.startswith("-"):
            values[words] = (*values.get(words, ()), argument)
            continue
        match = re.fullmatch(r"--([A-Za-z_][\w-]*)=(.*)", argument, re.DOTALL)
        if not match:
            raise UserError(f"cannot read {argument!r}: flags are written --name=value "
                            "(--help lists them)")
        name, text = match.groups()
        if name not in fields:
            near = difflib.get_close_matches(name.replace("-", "_"), fields, 1, 0.0)
            raise UserError(f"unknown flag --{name}: did you mean --{near[0]}?")
        if name in values:
            raise UserError(f"--{name} is given twice")
        values[name] = _read_value(name, text, fields[name].type)
        if values[name] == "" != fields[name].default:
            raise UserError(f"--{name}= is empty: leave it out for its default")
    return config_class(**values)


def _read_value(name, text, kind):
    if type(None) in get_args(kind):  # `X | None`: what "auto" means the script decides later
        if text == "auto":
            return None
        kind = get_args(kind)[0]
    kind, *bounds = get_args(kind) or (kind,)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"--{name}={text}: expected true or false")
        return text.lower() == "true"
    if kind is str and name != "prompt":  # a path, or some: the shell does not see their ~
        text = re.sub(r"(?:^|(?<=,))~(?=/|,|$)", os.path.expanduser("~"), text)
    try:
        value = kind(text)
    except ValueError:
        expected = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise UserError(f"--{name}={text}: expected {expected}") from None
    if kind is float and not math.isfinite(value):  # nan would pass any comparison below
        raise UserError(f"--{name}={value}: must be a finite number")
    if bounds and not bounds[0](value):
        raise UserError(f"--{name}={value}: {bounds[1]}")
    return value


def check_needs(config, rules):
    """UserError for a flag that nothing would read. rules: (flag, what it needs, is that there)."""
    for name, needed, given in rules:
        if getattr(config, name) != getattr(type(config), name) and not given:
            raise UserError(f"--{name}={getattr(config, name)} needs {needed}")


def say(text="", file=None):
    """Print above the bar, if there is one."""
    if first_process():
        tqdm.write(text, file=file)


def note(text, file=None):
    """Say it, and keep it for the log: what was dropped, what is not as one would expect."""
    if first_process():
        tqdm.write(text, file=file)
    NOTES.append(text)


def progress(items, name, **options):
    """The items, with a bar while that takes longer than a second; none where the output is no
    terminal, or without a name."""
    return tqdm(items, name, mininterval=1, delay=1, leave=False,
                disable=None if name and first_process() else True, **options)


def to_json(value, **options):
    """JSON text. nan and infinities, which JSON does not know, become null, nested ones too."""
    try:
        return json.dumps(value, default=float, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_without_nan(value), **options)


def _without_nan(value):
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    if value is None or isinstance(value, (str, int)):
        return value
    return float(value) if math.isfinite(value) else None


def table(columns):
    """{name: cells} as text: floats with six digits, None as "-", the last column left-aligned."""
    show = lambda x: "-" if x is None else f"{x:.6f}" if isinstance(x, float) else str(x)
    cells = [[name, *map(show, values)] for name, values in columns.items()]
    widths = [max(map(len, column)) for column in cells]
    return "".join("\n" + " ".join(x.rjust(width) for x, width in zip(row, widths)) + "  " + last
                   for *row, last in zip(*cells))


def plus_minus(mean, se):
    """A mean with its standard error, or without where there is none."""
    return f"{mean:.3f}" if se is None or se != se else f"{mean:.3f} ± {se:.3f}"


def shorten(text, width, end=False):
    """The text on one line of at most `width` characters: its beginning, or its end."""
    text = " ".join(text.split())
    cut = "..." + text[3 - width:] if end else text[:width - 3] + "..."
    return text if len(text) <= width else cut


def as_text(value):
    """A value of a Config as it is typed behind --name=."""
    return "auto" if value is None else str(value).lower() if isinstance(value, bool) else value


def help_text(config_class):
    """What the script is for, examples, record formats, every flag with default and comment."""
    doc = inspect.getdoc(sys.modules[config_class.__module__])
    lines = [doc.split("\n")[0], "", *(line for line in doc.split("\n")
                                       if re.match(r" +(python |\{\")", line))]
    default = {f.name: f.default for f in dataclasses.fields(config_class)}
    for owner in [c for c in config_class.__mro__ if dataclasses.is_dataclass(c)]:
        source = inspect.getsource(owner)
        for heading, name, comment in re.findall(
                r"^    (?:# --- (.*)|(\w+): [^#\n]*(?:# (.*(?:\n +# {2,}.*)*))?)$", source, re.M):
            if heading:
                lines += ["", f"{heading}:"]
            elif name in default:  # a field that two classes declare is shown once
                value = default.pop(name)
                comment = " ".join(re.sub(r"\n *#", "", comment).split())
                shown = f"--{name}={as_text(value)}" if value != () else f"{name.upper()} ..."
                lines.append(f"  {shown}".ljust(38) + comment)
    if any("=auto" in line for line in lines):
        lines += ["", "auto, without a word beside it: by the size of the model (AUTO in "
                  "common.py); a run prints what it took"]
    return "\n".join(lines)
