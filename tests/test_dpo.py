"""DPO and its relatives: every loss, the pairs, the reference cache, and whole tiny runs."""

import json
import math
import sys

import cli
import common
import dpo
import evaluate
import pytest
import torch
import torch.nn.functional as F
from cli import UserError
from conftest import elements_from, encode_response, read_rows
from data.records import check_ranking, check_ranking_or_label, write_jsonl
from data.tokenizer import load_tokenizer
from dpo import (
    LOSSES,
    Config,
    cdpo_loss,
    dpo_loss,
    implicit_reward,
    ipo_loss,
    kl_baseline,
    kto_loss,
    mismatch,
    ordered,
    pair_loss,
    pair_metrics,
    reference_logprobs,
)
from model import GPT
from tiny_runs import FLAGS, make_inputs

tok = load_tokenizer("synthetic")
vector = lambda *x: torch.tensor(x, dtype=torch.float64)
PAIR_LOSSES = [name for name in LOSSES if name != "kto"]

# --- the losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_losses_at_the_start(loss):
    # catches a reference that is left out of a loss, or put into simpo, and a margin off zero
    seq_logp, length = vector(-6.0, -10.0), vector(4.0, 2.0)
    config = Config(loss=loss, beta=0.5, simpo_margin=0.25)
    expected = dict(ipo=1.0, ipo_mean=1.0,  # (0 - 1 / (2 * 0.5))^2
                    simpo=-math.log(1 / (1 + math.exp(-0.5 * (-1.5 + 5.0 - 0.25)))))
    found = pair_loss(config, seq_logp, seq_logp, length, [0], [1])
    assert found.tolist() == [pytest.approx(expected.get(loss, math.log(2)), rel=1e-12)]


@pytest.mark.parametrize("loss, beta, expected", [
    ("dpo", 0.5, 0.1269280110), ("cdpo", 0.5, 0.9 * 0.1269280110 + 0.1 * 2.1269280110),
    ("ipo", 0.5, 9.0), ("ipo_mean", 0.5, 0.25), ("dpo_norm", 2.0, 0.0485873516),
    ("simpo", 2.0, 0.002475685138)])
def test_losses_by_hand(loss, beta, expected):
    # catches a reversed pair, sums for means and means for sums, beta in the wrong place: the
    # log-ratios are 2 and -2, per token 0.5 and -1; log-probabilities per token -1.5 and -5
    config = Config(loss=loss, beta=beta, label_smoothing=0.1, simpo_margin=0.5)
    numbers = vector(-10.0, -6.0), vector(-8.0, -8.0), vector(2.0, 4.0)
    found = pair_loss(config, *numbers, [1], [0])
    assert found.tolist() == [pytest.approx(expected, rel=1e-8)]


@pytest.mark.parametrize("beta", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("margin", [-4.0, 0.0, 2.5])
def test_dpo_gradient(beta, margin):
    # catches a lost beta and a weight that does not fade: -beta sigmoid(-beta m), and the opposite
    chosen = vector(0.7 + margin).requires_grad_()
    rejected = vector(0.7).requires_grad_()
    dpo_loss(chosen, rejected, beta).sum().backward()
    weight = beta / (1 + math.exp(beta * margin))
    assert chosen.grad.item() == pytest.approx(-weight, rel=1e-12)
    assert rejected.grad.item() == pytest.approx(weight, rel=1e-12)


@pytest.mark.parametrize("e", [0.1, 0.3])
def test_cdpo_is_least_where_its_preference_is_the_labels_reliability(e):
    # catches smoothing on the wrong side: the minimum is at sigmoid(beta m) = 1 - e, not e
    margin = vector(math.log((1 - e) / e) / 0.2).requires_grad_()
    loss = cdpo_loss(margin, vector(0.0), 0.2, e)
    assert torch.autograd.grad(loss.sum(), margin)[0].abs().item() < 1e-12
    assert loss.item() == pytest.approx(-e * math.log(e) - (1 - e) * math.log(1 - e))
    for step in (-1.0, 1.0):
        assert cdpo_loss(margin + step, vector(0.0), 0.2, e).item() > loss.item()
    torch.testing.assert_close(cdpo_loss(margin, vector(0.0), 0.2, 0.0),  # e = 0 is dpo
                               dpo_loss(margin, vector(0.0), 0.2))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_ipo_is_least_at_its_margin(beta):
    # catches 1 / beta for 1 / (2 beta), and beta times the margin in its place
    for distance in (0.0, 0.3, -0.3):
        margin = vector(1 / (2 * beta) + distance).requires_grad_()
        loss = ipo_loss(margin, vector(0.0), beta)
        assert loss.item() == pytest.approx(distance**2, abs=1e-12)
        assert torch.autograd.grad(loss.sum(), margin)[0].item() == pytest.approx(2 * distance)


def test_ipo_of_sums_and_of_means_have_their_minimum_at_other_places():
    # catches the two choices taken for one another: lengths 8 and 2, target 1 / (2 beta) = 1
    length, zero = vector(8.0, 2.0), vector(0.0, 0.0)
    per_token, summed = vector(0.75, -0.25), vector(0.75, -0.25) * length  # means differ by 1
    value = lambda loss, x: pair_loss(Config(loss=loss, beta=0.5), x, zero, length, [0], [1]).item()
    assert value("ipo_mean", summed) == pytest.approx(0)
    assert value("ipo", summed) == pytest.approx((6.5 - 1) ** 2)
    assert value("ipo", per_token) == pytest.approx(0)


def test_length_normalised_losses_see_means_only():
    # catches a sum: an answer twice as long with the same mean costs the same; dpo tells them apart
    seq_logp, ref, length = vector(-6.0, -9.0), vector(-8.0, -7.0), vector(4.0, 2.0)
    twice = vector(2.0, 1.0)
    for loss in PAIR_LOSSES:
        config = Config(loss=loss, beta=2.0)
        first, second = (pair_loss(config, seq_logp * k, ref * k, length * k, [0], [1]).item()
                         for k in (1.0, twice))
        assert (first == second) == (loss in ("dpo_norm", "simpo", "ipo_mean"))


def test_simpo_has_no_reference_and_a_margin_in_nats_a_token():
    # catches a reference in simpo, and gamma that is not beta times the margin
    config = Config(loss="simpo", beta=2.5, simpo_margin=3.5)  # -1.5 + 5 is just that
    for ref in (vector(0.0, 0.0), vector(-50.0, 3.0)):
        found = pair_loss(config, vector(-6.0, -10.0), ref, vector(4.0, 2.0), [0], [1])
        assert found.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("loss, expected", [
    ("dpo", [1.0, -1.0]), ("cdpo", [1.0, -1.0]), ("ipo", [1.0, -1.0]), ("kto", [1.0, -1.0]),
    ("ipo_mean", [0.25, -0.5]), ("dpo_norm", [0.25, -0.5]), ("simpo", [-0.75, -2.25])])
def test_implicit_reward(loss, expected):
    # catches a reward without beta or reference, and one per sequence where the loss is per token
    found = implicit_reward(vector(-6.0, -9.0), vector(-8.0, -7.0), vector(4.0, 2.0), loss, 0.5)
    assert found.tolist() == pytest.approx(expected)


def test_ordered_counts_ties_half():
    # catches ties that count as right: at the start every pair is one, up to rounding
    assert ordered(vector(2.0, -2.0, 0.0, 1e-7, -1e-7)).tolist() == [1.0, 0.0, 0.5, 0.5, 0.5]


# --- kto -----------------------------------------------------------------------------------------


def test_kto_by_hand():
    # catches flipped labels, swapped weights, z0 with the wrong sign: 1 - sigmoid(+-0.5 (2 - 1))
    config = Config(loss="kto", beta=0.5, desirable=1.5, undesirable=0.5)
    found = kto_loss(vector(2.0, 2.0, 2.0), vector(1.0, -1.0, 0.0), 1.0, config)
    assert found.tolist() == pytest.approx([1.5 * 0.3775406688, 0.5 * 0.6224593312, 0.0])
    start = kto_loss(vector(0.0, 0.0), vector(1.0, -1.0), 0.0, config)
    assert start.tolist() == pytest.approx([0.75, 0.25])  # lambda / 2


def test_kto_gradient():
    # catches a desirable answer that is pushed down, and one without a label that is moved at all
    config = Config(loss="kto", beta=0.5, desirable=1.5, undesirable=0.5)
    ratio = vector(2.0, 2.0, 2.0).requires_grad_()
    kto_loss(ratio, vector(1.0, -1.0, 0.0), 1.0, config).sum().backward()
    slope = 0.5 * 0.3775406688 * 0.6224593312  # beta s (1 - s)
    assert ratio.grad.tolist() == pytest.approx([-1.5 * slope, 0.5 * slope, 0.0])


def test_kl_baseline():
    # catches a z0 below zero, one that is trained through, and a mean without its sign
    seq_logp = vector(-3.0, -4.0).requires_grad_()
    assert kl_baseline(seq_logp, vector(-6.0, -3.0)).item() == 1.0  # mean of 3 and -1
    assert kl_baseline(seq_logp, vector(-2.0, -4.5)).item() == 0.0  # mean -0.25
    assert not kl_baseline(seq_logp, vector(-6.0, -3.0)).requires_grad


def test_mismatch_is_one_prompt_with_the_answer_to_another():
    # catches a matched answer, a lost EOS, and a prompt that is scored
    first, second = elements_from([
        dict(prompt=p, completions=[a, "Other."], ranks=[1, 2])
        for p, a in (("Say one.", "One."), ("Say two or so.", "It is two."))])
    for n, text in enumerate(("It is two.", "Other.", "It is two.")):  # chosen and rejected in turn
        ids, mask = mismatch(first, second, n)
        head, answer = tok.encode_prompt("Say one."), encode_response(tok, text)
        assert (ids, mask) == (head + answer, [0] * len(head) + [1] * len(answer))


# --- elements ------------------------------------------------------------------------------------


TEXTS = ["One.", "It is one, I think.", "No."]


def element(pairs):
    ranking = lambda texts, ranks: dict(prompt="Say one.", completions=texts, ranks=ranks)
    [e] = elements_from([ranking(TEXTS, [1, 1, 1]), *(
        ranking([TEXTS[i], TEXTS[j]], [1, 2]) for i, j in pairs)])
    return e


@pytest.mark.parametrize("pairs, labels, best", [
    ([(0, 1), (0, 2), (1, 2)], [1, 0, -1], [0]),  # the one in the middle wins as often as it loses
    ([(1, 0), (2, 0)], [-1, 1, 1], [1, 2]),  # two share the first place
    ([(0, 1), (1, 2), (1, 2)], [1, 1, -1], [0]),  # wins more often than it loses, but loses
    ([(0, 1), (1, 0)], [0, 0, 0], []),  # labelers who contradict each other
    ([(0, 1)], [1, -1, 0], [0])])  # the third was tied with both
def test_labels_and_best_of_a_ranking(pairs, labels, best):
    # catches labels that are flipped, an answer called best that lost, or that was never compared
    assert (element(pairs).labels, element(pairs).best) == (tuple(labels), tuple(best))


def test_labels_of_single_answers():
    # catches an undesirable answer that the NLL term teaches
    wanted, unwanted = elements_from([dict(prompt="Say one.", completion="One.", label=x)
                                      for x in (True, False)])
    assert (wanted.labels, wanted.best) == ((1,), (0,))
    assert (unwanted.labels, unwanted.best) == ((-1,), ())


def test_answers_of_a_prompt_share_its_ids_and_end_with_eos():
    # catches a prompt that is tokenised with its answer, and an EOS outside the mask or the length
    e = element([(0, 1), (1, 2)])
    e.ref = [0.0, 0.0, 0.0]
    head = tok.encode_prompt("Say one.")
    for row, mask in zip(e.rows, e.masks):
        assert row[:len(head)] == head and mask == [0] * len(head) + [1] * (len(row) - len(head))
        assert row[-1] == tok.eos and row.count(tok.eos) == 1
    tokens, mask, _, length, _, winners, losers, best = dpo.batch_tensors([e, e], tok.pad, "cpu")
    assert length.tolist() == [len(tok.encode(t)) + 1 for t in TEXTS] * 2
    assert (winners, losers, best) == ([0, 1, 3, 4], [1, 2, 4, 5], [0, 3])
    assert tokens[mask.bool()].tolist().count(tok.eos) == 6


@torch.no_grad()
def test_sequence_logprobs_are_sums_with_eos_in_the_order_given(tiny):
    # catches a mean, EOS or the prompt left out or in, and rows handed back by length
    rows = [[1, 2, 3, 4, 0], [5, 6, 0], [8, 9, 10, 11, 12, 1, 0], [3, 3, 1, 0]]
    masks = [[0, 0, 1, 1, 1], [0, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1]]
    expected = []
    for row, mask in zip(rows, masks):
        logp = torch.log_softmax(tiny.logits(tiny(torch.tensor([row])))[0], -1)
        expected.append(sum(logp[t - 1, row[t]].item() for t in range(len(row)) if mask[t]))
    for size in (64, 1, 3):
        found = evaluate.sequence_logprobs(tiny, rows, masks, 13, size=size)
        assert found.tolist() == pytest.approx(expected, rel=1e-5)
    cold = evaluate.sequence_logprobs(tiny, rows, masks, 13, temperature=0.5)
    assert (cold - torch.tensor(expected)).abs().min() > 1e-3


# --- records with labels -------------------------------------------------------------------------


@pytest.mark.parametrize("label", [True, False])
def test_label_records(label):
    # catches a label, a side or a text that is lost
    record = dict(prompt="a", completion="b", label=label, held_out=True)
    assert check_ranking_or_label(dict(record, source="x")) == record
    turns = [dict(role="user", content="a")]
    checked = check_ranking_or_label(dict(prompt=turns, completion="b", label=label))
    assert checked["prompt"] == turns
    pair = dict(prompt="a", chosen="b", rejected="c")
    assert check_ranking_or_label(pair)["completions"] == ["b", "c"]  # kto takes pairs as well


@pytest.mark.parametrize("change, message", [
    (dict(label=2), "'label' must be true or false"), (dict(label="yes"), "'label' must be"),
    (dict(label=None), "one answer is no pair: `python sft.py`"),
    (dict(completion=""), "'completion' is empty"),
    (dict(completion=None), "'completion' is missing"), (dict(prompt=3), "expected text or a list"),
    (dict(held_out=1), "'held_out' must be true or false")])
def test_label_records_that_are_none(change, message):
    # catches a label that is neither, and a record that fails later with a traceback
    with pytest.raises(UserError, match=message):
        check_ranking_or_label(dict(prompt="a", completion="b", label=True) | change)


# --- whole runs on tiny inputs -------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("dpo"))
    say, answers = "Say {}.", ["It is {}.", "Go away, {} it is, as everybody knows."]
    write_jsonl(folder / "two.jsonl", [
        dict(prompt=say.format(i), chosen=answers[0].format(i), held_out=i >= 8,
             rejected=answers[1].format(i)) for i in range(12)])
    write_jsonl(folder / "labels.jsonl", [
        dict(prompt=say.format(i), completion=answers[i % 2].format(i), label=i % 2 == 0,
             held_out=i >= 8) for i in range(14)])
    mixed = [json.loads(line) for name in ("labels", "pairs", "two")
             for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    write_jsonl(folder / "mixed.jsonl", mixed)
    return folder


def run(folder, monkeypatch, out, *flags):
    """dpo.main in this process; returns the rows of its log."""
    monkeypatch.chdir(folder)
    given = {f.split("=")[0]: f for f in (*FLAGS["dpo"], *flags, f"--out={out}")}
    dpo.main(cli.read_flags(Config, given.values()))
    return [json.loads(line) for line in (folder / out / "log.jsonl").read_text().splitlines()]


def command(folder, monkeypatch, capsys, *flags):
    """(exit status, stderr) of the script as a command, in this process."""
    monkeypatch.chdir(folder)
    given = {f.split("=")[0]: f for f in (*FLAGS["dpo"], *flags)}
    monkeypatch.setattr(sys, "argv", ["dpo.py", *given.values()])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run_main(dpo.main, cli.parse(dpo.Config))
    return stop.value.code, capsys.readouterr().err


def of_kind(rows, kind):
    return [r for r in rows if r["kind"] == kind]


@pytest.mark.parametrize("data", ["pairs", "two"])
@pytest.mark.parametrize("loss", [*LOSSES, "dpo --nll=0.5"])
def test_every_loss_trains(folder, monkeypatch, loss, data):
    # catches a loss that only some data can use, that does not fall, or does not order its pairs
    loss, *more = loss.split()
    rows = run(folder, monkeypatch, f"{data}_{loss}{len(more)}", f"--loss={loss}", *more,
               f"--data={data}.jsonl", "--epochs=6", "--lr=0.02", "--batch_size=4")
    checks, final = of_kind(rows, "validation"), of_kind(rows, "final")[0]
    assert [r["epoch"] for r in checks] == list(range(7))
    assert checks[-1]["train_loss"] < checks[0]["train_loss"]
    assert checks[-1]["train_accuracy"] > 0.5
    if loss != "simpo":  # there the reference's own likings are part of the reward
        assert checks[0]["accuracy"] == 0.5 and checks[0]["margin"] == pytest.approx(0, abs=1e-5)
    config = rows[0]["config"]
    assert (config["beta"], config["lr"]) == (common.AUTO[loss]["beta"][0], 0.02)
    assert {"loss", "accuracy", "train_accuracy", "chosen_reward", "rejected_reward", "margin",
            "chosen_logp", "rejected_logp", "kl", "kl_se", "length", "eos_rate"} <= set(final)
    assert final["accuracy"] == checks[-1]["accuracy"]
    saved = torch.load(folder / f"{data}_{loss}{len(more)}" / "model.pt", weights_only=True)
    assert saved["stage"] == "dpo" and saved["metrics"]["kl"] == final["kl"]


@pytest.mark.parametrize("data", ["labels", "mixed"])
def test_kto_trains_on_single_answers(folder, monkeypatch, data):
    # catches unpaired records that are refused, or whose label is read the wrong way round
    rows = run(folder, monkeypatch, f"kto_{data}", "--loss=kto", f"--data={data}.jsonl",
               "--epochs=6", "--lr=0.02", "--batch_size=4", "--desirable=1.5")
    checks = of_kind(rows, "validation")
    assert checks[-1]["train_loss"] < checks[0]["train_loss"]
    assert checks[-1]["train_accuracy"] > 0.5 and checks[-1]["margin"] > 0
    assert all(r["baseline"] >= 0 for r in of_kind(rows, "step"))


def test_labels_are_those_of_the_file(folder, monkeypatch):
    # catches true read as undesirable, which training alone cannot show: it would fit them as well
    monkeypatch.chdir(folder)
    data = dpo.load_data(Config(data="labels.jsonl", loss="kto"), tok, 64)
    train, held_out = data.train, data.held_out
    found = {tuple(e.rows[0]): e.labels for e in train + held_out}
    records = read_rows("labels.jsonl", check_ranking_or_label)
    assert len(found) == len(records) and {r["label"] for r in records} == {True, False}
    for r in records:
        row = tok.encode_prompt(r["prompt"]) + encode_response(tok, r["completion"])
        assert found[tuple(row)] == (1 if r["label"] else -1,)


def train_elements(data="pairs", loss="dpo"):
    """The training Elements of a file, and the model that they start from."""
    config = Config(data=f"{data}.jsonl", loss=loss)
    model, tokenizer, _ = common.load_policy("sft", ("sft",), torch.device("cpu"))
    return model, dpo.load_data(config, tokenizer, model.config.block_size).train


@pytest.mark.parametrize("loss, data", [
    ("dpo", "pairs"), ("ipo_mean", "pairs"), ("simpo", "pairs"), ("kto", "mixed"),
    ("kto", "labels")])
def test_a_step_is_the_gradient_of_the_written_loss(folder, monkeypatch, loss, data):
    # catches reversed pairs, a mean of means, pairs across prompts, an NLL term with another sign,
    # over other answers or of other tokens: one step of plain gradient descent from the reference
    monkeypatch.setattr(common, "adamw", lambda modules, lr, *_: torch.optim.SGD(
        [p for m in modules for p in m.parameters()], lr=lr))
    flags = [f"--loss={loss}", f"--data={data}.jsonl", "--epochs=1", "--batch_size=64", "--beta=2",
             "--nll=0.3", "--lr=0.05", "--grad_clip=1e9", "--micro_batch=3", "--desirable=1.5"]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        run(folder, monkeypatch, f"step_{loss}_{data}", *flags)
        model, elements = train_elements(data, loss)
        objective, count, nll, tokens = 0.0, 0, 0.0, 0
        for e in elements:
            logp = []  # of each answer, one row at a time
            for row, mask in zip(e.rows, e.masks):
                at = [t for t, m in enumerate(mask) if m]
                table = torch.log_softmax(model.logits(model(torch.tensor([row]))[0]).double(), -1)
                logp.append(sum(table[t - 1, row[t]] for t in at))
                if loss in ("ipo_mean", "simpo"):
                    logp[-1] = logp[-1] / len(at)
            if loss == "kto":  # log-ratios are 0: -lambda beta / 4 times the log-probability
                for x, label in zip(logp, e.labels):
                    objective = objective - label * (1.5 if label > 0 else 1.0) * 2 / 4 * x
                    count += abs(label)
            for i, j in e.pairs if loss != "kto" else ():
                margin = 2 * (logp[i] - logp[j])
                count += 1
                if loss == "ipo_mean":
                    objective = objective + ((margin - margin.detach()) / 2 - 0.25) ** 2
                elif loss == "simpo":
                    objective = objective - F.logsigmoid(margin - 2 * 0.5)
                else:
                    objective = objective - F.logsigmoid(margin - margin.detach())
            lost = {j for _, j in e.pairs}
            for n, x in enumerate(logp):
                if n not in lost and e.labels[n] > 0:
                    length = sum(e.masks[n])
                    nll = nll - (x * length if loss in ("ipo_mean", "simpo") else x)
                    tokens += length
        total = objective / count + 0.3 * nll / tokens
        gradients = torch.autograd.grad(total, list(model.parameters()), materialize_grads=True)
    finally:
        torch.set_default_dtype(default)
    end = torch.load(folder / f"step_{loss}_{data}" / "model.pt", weights_only=True)["weights"]
    moved = torch.cat([(p.detach() - end[name]).flatten() for name, p in model.named_parameters()])
    expected = 0.05 * torch.cat([g.flatten() for g in gradients])
    assert (moved - expected).norm() < 1e-4 * expected.norm()


def test_z0_never_takes_an_answer_to_the_same_prompt():
    # catches matched answers where a prompt has several labelled ones, each an element of its own
    train = elements_from([dict(prompt=p, completion=a, label=a == "One.")
                           for p, a in (("A?", "One."), ("A?", "No."), ("B?", "Two."),
                                        ("A?", "Three."))])
    prompts, answers = ([tok.encode_prompt(f"{p}?") for p in "AABA"],
                        [encode_response(tok, a) for a in ("One.", "No.", "Two.", "Three.")])
    _, others = dpo.batch_of(train, [0, 1, 2, 3], 0, Config(loss="kto", batch_size=4))
    assert [ids for ids, _ in others] == [prompts[n] + answers[other]
                                          for n, other in ((0, 2), (1, 2), (2, 3), (3, 2))]
    _, [(ids, _)] = dpo.batch_of(train[:2], [0, 1], 1, Config(loss="kto", batch_size=1))
    assert ids == prompts[0] + answers[0]  # nothing else is there


def test_z0_comes_from_the_answers_to_the_next_prompts(folder, monkeypatch):
    # catches matched answers and a reversal, which leaves the middle one in place
    asked, real = [], dpo.mismatch

    def spy(first, second, n):
        asked.append((tuple(first.rows[0]), tuple(second.rows[0]), n))
        return real(first, second, n)

    monkeypatch.setattr(dpo, "mismatch", spy)
    run(folder, monkeypatch, "rotation", "--loss=kto", "--data=labels.jsonl", "--epochs=1",
        "--batch_size=4")
    first, second, n = zip(*asked)
    assert len(set(first)) == 8 and second == (*first[1:], first[0]) and n == (*range(8),)


def test_z0_leaves_out_what_does_not_fit(folder, monkeypatch):
    # catches a long prompt and a long answer that fit apart and crash together
    long, short = "Say " + "one " * 25 + ".", "Say one."
    write_jsonl(folder / "long_mix.jsonl", [
        dict(prompt=f"{long if i % 2 else short} {i}", label=i % 3 > 0, held_out=i >= 8,
             completion=short if i % 2 else long) for i in range(14)])
    for size in (1, 8):
        rows = run(folder, monkeypatch, f"long{size}", "--loss=kto", "--data=long_mix.jsonl",
                   f"--batch_size={size}", "--max_new_tokens=8")
        assert all(r["baseline"] >= 0 for r in of_kind(rows, "step"))


def test_answers_that_nobody_prefers_cost_nothing(folder, monkeypatch):
    # catches 0 / 0 in a step whose answers are all without a label, here three steps of four
    write_jsonl(folder / "nearly.jsonl", [
        dict(prompt=f"Say {i}.", chosen=a, rejected=b, held_out=i >= 4) for i in range(6)
        for a, b in (("One.", "Two."), ("Two.", "One."))[:1 if i in (3, 5) else 2]])
    rows = run(folder, monkeypatch, "nearly", "--loss=kto", "--data=nearly.jsonl", "--batch_size=1",
               "--warmup=1")
    assert math.isfinite(of_kind(rows, "final")[0]["loss"])
    start, end = (torch.load(folder / name / "model.pt", weights_only=True)["weights"]
                  for name in ("sft", "nearly"))
    assert any((start[k] != end[k]).any() for k in start)
    assert all(w.isfinite().all() for w in end.values())


def test_both_log_probabilities_are_reported(folder, monkeypatch):
    # catches metrics of other answers than their name says, or in other units: against plain loops
    monkeypatch.chdir(folder)
    model, elements = train_elements()
    for n, e in enumerate(elements):
        e.ref = [-20.0 - n - 3 * k for k in range(len(e.rows))]
    seq_logp = [evaluate.sequence_logprobs(model, e.rows, e.masks, tok.pad).tolist()
                for e in elements]
    for loss, scale in (("dpo", lambda mask: 1), ("dpo_norm", sum)):
        found = pair_metrics(model, elements, Config(loss=loss, beta=0.3), tok.pad)
        sides = {0: [], 1: []}
        for e, logp in zip(elements, seq_logp):
            for pair in e.pairs:
                for side in (0, 1):
                    n = pair[side]
                    sides[side].append((0.3 * (logp[n] - e.ref[n]) / scale(e.masks[n]), logp[n]))
        mean = lambda side, k, sides=sides: sum(x[k] for x in sides[side]) / len(sides[side])
        margins = [w[0] - l[0] for w, l in zip(sides[0], sides[1])]
        assert found == pytest.approx(dict(
            loss=sum(math.log1p(math.exp(-m)) for m in margins) / len(margins),
            accuracy=sum(m > 0 for m in margins) / len(margins), margin=sum(margins) / len(margins),
            chosen_reward=mean(0, 0), rejected_reward=mean(1, 0),
            chosen_logp=mean(0, 1), rejected_logp=mean(1, 1)), rel=1e-4)


def test_held_out_and_training_pairs_are_told_apart(folder, monkeypatch):
    # catches training accuracy that goes by the name of held-out accuracy, or the other way round
    asked, real = [], dpo.pair_metrics

    def spy(policy, elements, *rest):
        metrics = real(policy, elements, *rest)
        asked.append(({tuple(row) for e in elements for row in e.rows}, metrics))
        return metrics

    monkeypatch.setattr(dpo, "pair_metrics", spy)
    rows = run(folder, monkeypatch, "apart", "--epochs=1", "--lr=0.02")
    sides = {True: set(), False: set()}
    for record in read_rows("pairs.jsonl", lambda r, where: r):
        sides[record["held_out"]] |= {
            tuple(row) for row in elements_from([check_ranking(record)])[0].rows}
    for row, (held_out, trained) in zip(of_kind(rows, "validation"), zip(asked[::2], asked[1::2])):
        assert held_out[0] <= sides[True] and trained[0] <= sides[False]
        for name in ("loss", "accuracy"):
            assert row[name] == held_out[1][name] and row[f"train_{name}"] == trained[1][name]


def test_no_held_out_pair_is_trained_on(folder, monkeypatch):
    # catches a split that is not kept: held-out accuracy would be training accuracy
    seen, real = set(), dpo.batch_tensors

    def spy(elements, pad, device):
        if device != "cpu":  # a step; the metrics ask for "cpu" by its name
            seen.update(tuple(row) for e in elements for row in e.rows)
        return real(elements, pad, device)

    monkeypatch.setattr(dpo, "batch_tensors", spy)
    run(folder, monkeypatch, "sides", "--epochs=1", "--batch_size=4")
    for record in read_rows("pairs.jsonl", lambda r, where: r):
        rows = {tuple(row) for row in elements_from([check_ranking(record)])[0].rows}
        assert rows <= seen or record["held_out"]
        assert not rows & seen or not record["held_out"]


def test_the_reference_stays_where_it_was(folder, monkeypatch):
    # catches a reference that moves along with the policy: its KL and z0 would be 0
    models, real = [], dpo.compare

    def spy(policy, reference, *rest):
        models.extend((policy, reference))
        return real(policy, reference, *rest)

    monkeypatch.setattr(dpo, "compare", spy)
    rows = run(folder, monkeypatch, "frozen", "--loss=kto", "--lr=0.05", "--epochs=4",
               "--batch_size=2", "--max_new_tokens=40")
    policy, reference = (dict(m.named_parameters()) for m in models)
    start = torch.load("sft/model.pt", weights_only=True)["weights"]
    for name, p in reference.items():
        assert torch.equal(p, start[name]) and not p.requires_grad
        assert p.data_ptr() != policy[name].data_ptr()
    assert any(not torch.equal(p, start[name]) for name, p in policy.items())
    assert of_kind(rows, "final")[0]["kl"] > 0.1
    assert all(not isinstance(m, GPT) or not m.training for m in models)


class Stop(Exception):
    pass


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_resume_is_exact(folder, monkeypatch, loss):
    # catches anything that resume forgets: optimiser, order of the data, step, metrics
    flags = (f"--loss={loss}", "--batch_size=2", "--epochs=2", "--lr=0.01", "--save_every=3")
    whole = run(folder, monkeypatch, f"whole_{loss}", *flags)
    save, calls = common.Run.save_state, []

    def save_and_stop(self, *args, **state):
        save(self, *args, **state)
        calls.append(1)
        if len(calls) == 3:
            self.log("later", x=1)  # written after the state: resume must cut it off
            raise Stop

    monkeypatch.setattr(common.Run, "save_state", save_and_stop)
    with pytest.raises(Stop):
        run(folder, monkeypatch, f"parts_{loss}", *flags)
    monkeypatch.setattr(common.Run, "save_state", save)
    parts = run(folder, monkeypatch, f"parts_{loss}", *flags)
    same = lambda rows: [{k: v for k, v in r.items() if not k.endswith("per_s") and k != "seconds"}
                         for r in rows[1:]]
    assert same(parts) == same(whole)
    hashes = {torch.load(folder / f"{name}_{loss}" / "model.pt", weights_only=True)["hash"]
              for name in ("whole", "parts")}
    assert len(hashes) == 1


def test_an_over_long_answer_drops_its_ranking(folder, monkeypatch, capsys):
    # catches an answer that is cut, and so taught without its end or with an EOS it never had
    monkeypatch.chdir(folder)
    record = lambda i, text: dict(prompt=f"Say {i}.", completions=["One.", text, "No."],
                                  ranks=[1, 2, 3], held_out=i >= 4)
    write_jsonl(folder / "cut.jsonl", [record(i, "Two. " * (40 if i in (1, 5) else 1))
                                       for i in range(7)])
    data = dpo.load_data(Config(data="cut.jsonl"), tok, 64)
    train, held_out = data.train, data.held_out
    assert (len(train), len(held_out)) == (3, 2)
    assert all(len(e.rows) == 3 and all(r[-1] == tok.eos for r in e.rows)
               for e in train + held_out)
    printed = capsys.readouterr().out
    assert "training rankings: dropped 1 of 4, over 64 tokens long" in printed
    assert "held-out rankings: dropped 1 of 3" in printed


def test_evaluate_as_a_command_says_what_the_stage_said(folder, monkeypatch):
    # catches an instrument that measures another KL, length or EOS rate than the end of a stage
    final = of_kind(run(folder, monkeypatch, "judged", "--lr=0.01", "--epochs=4"), "final")[0]
    given = ["--policy=judged", "--reference=sft", "--data=pairs.jsonl", "--out=judge",
             "--eval_prompts=4", "--max_new_tokens=12", "--split=held_out"]
    evaluate.main(cli.read_flags(evaluate.Config, given))
    lines = (folder / "judge" / "log.jsonl").read_text().splitlines()
    found = json.loads(lines[-1])
    for name in ("kl", "kl_se", "length", "length_sft", "eos_rate", "eos_rate_sft"):
        assert found[name] == pytest.approx(final[name], rel=1e-5), name
    assert found["kl"] != 0


# --- the reference's log-probabilities on disk ---------------------------------------------------


@pytest.fixture
def cached(folder, monkeypatch, tmp_path):
    """f(model, elements, tokenizer) fills `ref`; returns how many times it was computed."""
    monkeypatch.chdir(folder)
    calls, real = [], dpo.sequence_logprobs

    def spy(*args, **options):
        calls.append(1)
        return real(*args, **options)

    monkeypatch.setattr(dpo, "sequence_logprobs", spy)

    def fill(model, elements, tokenizer=tok):
        calls.clear()
        for e in elements:
            e.ref = None
        reference_logprobs(model, elements, tokenizer, Config(
            reference_cache=str(tmp_path / "cache")), torch.device("cpu"))
        return len(calls)

    return fill


def test_the_cache_is_used_again_when_nothing_changed(cached, tmp_path):
    # catches numbers that are computed every time, or that come back to other answers
    model, elements = train_elements()
    assert cached(model, elements) == 1
    first = [e.ref for e in elements]
    for e in elements:
        logp = evaluate.sequence_logprobs(model, e.rows, e.masks, tok.pad).tolist()
        assert e.ref == pytest.approx(logp, rel=1e-5)
    assert cached(model, elements) == 0 and [e.ref for e in elements] == first
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_another_reference_has_another_cache(cached, tmp_path):
    # catches a stale cache: the weights are not part of the key
    model, elements = train_elements()
    cached(model, elements)
    before = elements[0].ref
    with torch.no_grad():
        model.ln_f.bias.add_(0.3)
    assert cached(model, elements) == 1 and elements[0].ref != before
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("change", ["answer", "order", "fewer", "mask"])
def test_other_data_has_another_cache(cached, change):
    # catches a stale cache: the data, their order or what is scored of them is not part of the key
    model, elements = train_elements()
    cached(model, elements)
    ids, masks = elements[0].source.ids, elements[0].source.masks
    ids.values, masks.values = ids.values.copy(), masks.values.copy()  # of a file
    end = ids.ends[elements[0].numbers[0]]
    if change == "answer":
        ids.values[end - 2] = 7
    elif change == "order":
        elements = elements[::-1]
    elif change == "fewer":
        elements = elements[:-1]
    else:
        masks.values[end - 1] = 0
    assert cached(model, elements) == 1


def test_another_tokenizer_has_another_cache(cached):
    # catches a stale cache: ids of one tokenizer scored as those of another
    class Other:
        name, hash, pad, eos = tok.name, "another", tok.pad, tok.eos

    model, elements = train_elements()
    cached(model, elements)
    assert cached(model, elements, Other) == 1


@pytest.mark.parametrize("content", [
    dict(key="another", logps=torch.zeros(42)), dict(logps=torch.zeros(42)), [1.0], None, "more",
    dict(logps=3)])
def test_a_cache_that_is_not_what_its_name_says_is_refused(folder, monkeypatch, capsys, content):
    # catches a file that was renamed, damaged or written by other code, used in silence
    monkeypatch.chdir(folder)
    run(folder, monkeypatch, "cache_run", "--reference_cache=doubt", "--overwrite=true")
    path = next((folder / "doubt").iterdir())
    good = path.read_bytes()
    assert len(torch.load(path)["logps"]) == 42  # so that the files below err by their key alone
    if content is None:
        path.write_bytes(good[:100])
    elif content == "more":
        common.save_file(dict(torch.load(path), logps=torch.zeros(43)), path)
    else:
        (common.save_file if isinstance(content, dict) else torch.save)(content, path)
    status, error = command(folder, monkeypatch, capsys, "--reference_cache=doubt",
                            "--out=cache_run2", "--overwrite=true")
    path.write_bytes(good)
    assert status == 2 and error.count("dpo.py: error: doubt/") == 1
    assert ("stale or mixed up" in error) == (content not in (None, [1.0]))


# --- what a user sees when something is wrong ----------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    (["--loss=orpo"], "--loss=orpo: expected one of dpo, cdpo, ipo, ipo_mean, dpo_norm, "),
    (["--beta=-1"], "--beta=-1.0: must be above 0"),
    (["--undesirable=-1"], "--undesirable=-1.0: must not be negative"),
    (["--label_smoothing=0.5"], "--label_smoothing=0.5: expected 0 to below 0.5"),
    (["--epochs=0"], "--epochs=0: must be above 0"),
    (["--lr=-1"], "--lr=-1.0: must be above 0"),
    (["--lr=inf"], "--lr=inf: must be a finite number"),
    (["--beta=nan"], "--beta=nan: must be a finite number"),
    (["--weight_decay=-1"], "--weight_decay=-1.0: must not be negative"),
    (["--micro_batch=-1"], "--micro_batch=-1: must not be negative"),
    (["--los=dpo"], "unknown flag --los: did you mean --loss?"),
    (["--init=reward"],
     "is a reward checkpoint; needed here: sft or convert or dpo or ppo or grpo"),
    (["--init=nowhere"], "--init=nowhere does not exist"),
    (["--data=missing.jsonl"], "--data: there is no file missing.jsonl"),
    (["--data=labels.jsonl"], "labels.jsonl:1: one answer is no pair: `python dpo.py --loss=kto`"),
    (["--data=wrong_label.jsonl", "--loss=kto"], "wrong_label.jsonl:1: 'label' must be true or"),
    (["--data=ties.jsonl"], "no training ranking is left to use"),
    (["--data=one_side.jsonl"], "is on the held-out side"),
    (["--data=one.jsonl", "--loss=kto"], "kto needs at least two prompts"),
    (["--data=even.jsonl", "--loss=kto"], "so kto has no labels"),
    (["--data=."], "--data: . is a folder; name a file in it: "),
    (["--reference_cache=pairs.jsonl"], "--reference_cache=pairs.jsonl is no folder"),
    (["--reference_cache=pairs.jsonl/a"], "--reference_cache=pairs.jsonl/a is no folder"),
    (["--max_new_tokens=63"], "no held-out prompt of at most 1 tokens"),
])
def test_bad_input_is_one_clear_line(folder, monkeypatch, capsys, flags, message):
    # catches tracebacks, wrong exit statuses, and a run that starts with what cannot be right
    ranking = lambda i, ranks, side: dict(prompt=f"Say {i}.", completions=["One.", "No."],
                                          ranks=ranks, held_out=side)
    write_jsonl(folder / "ties.jsonl", [ranking(i, [1, 1], i > 3) for i in range(6)])
    write_jsonl(folder / "even.jsonl", [dict(ranking(i, [1, 2], False), ranks=ranks)
                                        for i in range(3) for ranks in ([1, 2], [2, 1])]
                + [ranking(i, [1, 2], True) for i in (4, 5)])
    write_jsonl(folder / "one_side.jsonl", [ranking(i, [1, 2], False) for i in range(6)])
    write_jsonl(folder / "one.jsonl", [ranking(i, [1, 2], i > 0) for i in range(3)])
    write_jsonl(folder / "wrong_label.jsonl", [dict(prompt="a", completion="b", label="good")])
    status, error = command(folder, monkeypatch, capsys, *flags, "--out=new")
    assert status == 2 and message in error
    assert error.startswith("dpo.py: error: ") and error.count("\n") == 1
    assert not (folder / "new" / "model.pt").exists()


def test_a_loss_without_a_line_is_no_dpo_loss():
    # catches a new name in LOSSES that trains by another loss
    with pytest.raises(ValueError, match="no line for new"):
        dpo.pair_loss(Config(loss="new", beta=1.0), torch.zeros(2), torch.zeros(2), torch.ones(2),
                      [0], [1])
