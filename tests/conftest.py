"""Shared by all tests: a tiny model, the repository root on the path, no network, no GPU."""

import contextlib
import io
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
from data.files import each_row  # noqa: E402
from data.load import make_elements  # noqa: E402
from data.records import ranking_rows  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from data.tokens import flatten, rows_of  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

torch.set_num_threads(1)  # tiny products: a second thread costs more than it brings


@pytest.fixture
def tiny():
    """A random transformer in float64, 13 real tokens and PAD = 13 in 16 rows, eval mode."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=16, n_tokens=13, block_size=24, n_layer=2, n_head=2, n_embd=16)
    model = GPT(config).double().eval()
    for name, p in model.named_parameters():
        # away from the small initial weights, where errors would hide; but the norms keep their
        # scale, or the biases drown the input and greedy text is one token for ever
        torch.nn.init.normal_(p, mean=float("ln_" in name and name.endswith("weight")), std=0.3)
    return model


def read_rows(path, check, skip_bad=False):
    return list(each_row(path, check, skip_bad))


def encode_messages(tokenizer, messages):
    """(ids, mask) of a dialogue."""
    return tokenizer.encode_pieces([tokenizer.message_pieces(messages)])[0]


def encode_response(tokenizer, text):
    """A complete response, by hand: its ids and exactly one EOS."""
    return [*tokenizer.encode(text), tokenizer.eos]


def rows_from(encoded, facts=None):
    """Rows of (ids, mask), lists of numbers, with a dict of facts for each."""
    return rows_of(flatten(load_tokenizer("synthetic"), [
        [([*zip(ids, mask)], known)] for (ids, mask), known in zip(encoded, facts or [{}] *
                                                                   len(encoded))]))


def elements_from(records):
    """Elements of checked records: rankings, and single answers with a label."""
    tokenizer = load_tokenizer("synthetic")
    encoded = [ranking_rows(tokenizer, record) for record in records]
    source, groups = rows_of(flatten(tokenizer, encoded)), []
    for rows in encoded:
        start = groups[-1].stop if groups else 0
        groups.append(range(start, start + len(rows)))
    return make_elements(source, groups)[0]


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu(request):
    """Exact numbers are those of a CPU: only test_gpu.py uses the GPU of a machine that has one."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_gpu":
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes of their own
        yield


@pytest.fixture(autouse=True)
def no_notes_of_another_test():
    cli.NOTES.clear()


@pytest.fixture
def one_thread():
    """For products so small that more threads only slow them down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_script(script, *flags, cwd):
    """Run a script by its command line, in this process, which has torch loaded already. Returns
    its exit status and its output as text, as subprocess.run does."""
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    status = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *flags])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        except Exception:
            status = 1
            traceback.print_exc()
    text = lambda f: f.buffer.getvalue().decode()
    return SimpleNamespace(returncode=status, stdout=text(out), stderr=text(err))


def run_process(script, *flags, cwd):
    """The same as a process of its own."""
    return subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=cwd, text=True,
                          capture_output=True, timeout=300)
