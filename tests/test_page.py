"""The page where a person ranks: real requests, and a real browser where there is one.

    python tests/test_page.py docs/label.png      # the picture in the README
"""

import contextlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

import pytest
from conftest import ROOT

import cli
from data.page import LIMIT, serve, start
from data.person import Session

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
EVIL = '<img src=x onerror="document.title=\'owned\'"><script>document.title="owned"</script>&amp;'
# a server that can be killed: it prints its address, as label.py does
SERVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from data.page import serve
from data.person import Session
serve(Session(json.loads(sys.argv[3]), sys.argv[2]))
"""


def make_items(n, k=2):
    return [dict(prompt=f"question {i}", completions=[f"answer {i} {c}" for c in "abcdefghi"[:k]],
                 family="made") for i in range(n)]


class Served:
    """serve() in a thread, and plain requests to it."""

    def __init__(self, session, capsys, **options):
        self.session, self.error = session, None
        self.thread = threading.Thread(target=self.run, args=(options,), daemon=True)
        self.thread.start()
        for _ in range(500):  # its address is printed, and kept beside the choices
            time.sleep(0.01)
            with contextlib.suppress(OSError, ValueError):
                known = json.loads((session.folder / "page.json").read_text())
                self.port, self.token = known["port"], known["token"]
                if "http://" in capsys.readouterr().out:
                    break
        self.url = f"http://127.0.0.1:{self.port}/?token={self.token}"

    def run(self, options):
        try:
            serve(self.session, **options)
        except cli.UserError as error:
            self.error = error

    def request(self, method, path, body=None, token=None, length=None, **headers):
        """(status, headers, body): JSON where it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.putrequest(method, f"{path}?token={self.token if token is None else token}",
                              skip_host="Host" in headers)
        body = b"" if body is None else body if isinstance(body, bytes) else json.dumps(
            body).encode()
        for name, value in ({"Content-Length": length or len(body)} | headers).items():
            connection.putheader(name.replace("_", "-"), str(value))
        connection.endheaders(body)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        kind = response.headers["Content-Type"]
        return response.status, response.headers, (
            json.loads(text) if kind.startswith("application/json") else text)

    def state(self):
        return self.request("GET", "/state")[2]

    def end(self):
        with contextlib.suppress(OSError):
            self.request("POST", "/stop", {"id": 0})
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.session.close()


@pytest.fixture
def served(tmp_path, capsys):
    """served(items, ...) -> Served; all end with the test."""
    running, folders = [], count()

    def make(items, linger=10.0, port=0, folder=None, **options):
        session = Session(items, folder or tmp_path / f"page{next(folders)}", **options)
        running.append(Served(session, capsys, linger=linger, port=port))
        return running[-1]
    yield make
    for server in running:
        if server.thread.is_alive():
            server.end()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- requests ------------------------------------------------------------------------------------


def test_a_ranking_by_requests(served):
    # catches ranks in the order shown, and a state that tells what the person must not know
    items = make_items(2, 3)
    page = served(items)
    state = page.state()
    assert state["question"].keys() == {"id", "prompt", "answers"}
    assert (state["done"], state["total"], state["undo"]) == (0, 2, False)
    ranks = [1 + "abc".index(text[-1]) for text in state["question"]["answers"]]
    status, _, after = page.request("POST", "/rank", {"id": state["id"], "ranks": ranks})
    assert status == 200 and after["accepted"] and after["done"] == 1 and after["undo"]
    assert lines(page.session.rankings) == [items[0] | dict(ranks=[1, 2, 3])]
    assert page.request("POST", "/undo", {"id": after["id"]})[2]["done"] == 0
    assert lines(page.session.rankings) == []


def test_headers(served):
    # catches a page that may load from elsewhere, and one whose script the policy forbids
    status, headers, html = served(make_items(1)).request("GET", "/")
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    policy = dict(part.strip().split(" ", 1)
                  for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    nonce = policy["script-src"].removeprefix("'nonce-").removesuffix("'")
    assert policy["script-src"] == policy["style-src"] == f"'nonce-{nonce}'" and len(nonce) > 15
    assert f'<script nonce="{nonce}">' in html and f'<style nonce="{nonce}">' in html
    assert headers["Referrer-Policy"] == "no-referrer" and headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    for outside in ("http://", "https://", "//", "@import", "url("):
        assert outside not in html.replace("// ", ""), outside


def test_the_nonce_is_a_new_one_each_time(served):
    # catches a nonce that a page of old could know
    page = served(make_items(1))
    assert len({page.request("GET", "/")[1]["Content-Security-Policy"] for _ in range(3)}) == 3


@pytest.mark.parametrize("method, path", [("GET", "/"), ("GET", "/state"), ("POST", "/rank"),
                                          ("POST", "/skip"), ("POST", "/undo"), ("POST", "/stop")])
@pytest.mark.parametrize("change", [
    dict(token=""), dict(token="x" * 32), dict(token="%C3%A9"), dict(Host="evil.example"),
    dict(Host="127.0.0.1:1"), dict(Host=""), dict(Origin="http://evil.example"),
    dict(Origin="null"), dict(Sec_Fetch_Site="cross-site"), dict(Sec_Fetch_Site="same-site")],
    ids=str)
def test_refused_requests(refusing, method, path, change):
    # catches a way in for another page: a name that means 127.0.0.1, a form that is sent there
    if "Host" in change:
        change = dict(change, Origin=f"http://{change['Host']}")  # as a browser would say it
    status, _, text = refusing.request(method, path, {"id": 0, "ranks": [1, 2]}, **change)
    assert status == 403 and "answer 0" not in str(text)
    assert refusing.session.id == 0 and refusing.thread.is_alive()
    own = f"localhost:{refusing.port}"
    assert refusing.request("GET", "/state", Host=own, Origin=f"http://{own}",
                            Sec_Fetch_Site="same-origin")[0] == 200


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """A page that no test of this module gets a choice into."""
    class Quiet:  # capsys is of one test
        readouterr = staticmethod(lambda: type("", (), dict(out="http://")))
    page = Served(Session(make_items(3), tmp_path_factory.mktemp("page")), Quiet)
    yield page
    page.end()


@pytest.mark.parametrize("body", [
    b"", b"{", b"[1]", b"7", b"null", b"{}", b'{"id": 0}', b'{"id": 0, "ranks": [1]}',
    b'{"id": 0, "ranks": [1, 3]}', b'{"id": 0, "ranks": [0, 1]}', b'{"id": 0, "ranks": "12"}',
    b'{"id": 0, "ranks": [true, 2]}', b'{"id": 0, "ranks": [1, 2.0]}', b'{"id": 0, "ranks": {}}',
    b'{"id": "0", "ranks": [1, 2]}', b'{"id": false, "ranks": [1, 2]}', b'{"id": 0.0, "ranks": []}',
    b"\xff\xfe", b"[" * LIMIT], ids=lambda b: repr(b[:40]))
def test_bad_bodies(refusing, body):
    # catches what would end the server, or half a choice
    assert refusing.request("POST", "/rank", body)[0] == 400
    assert refusing.session.id == 0 and refusing.state()["done"] == 0


@pytest.mark.parametrize("length, status", [(LIMIT + 1, 413), (10**12, 413), ("-1", 413),
                                            ("many", 400), ("1" * 5000, 400)])
def test_bad_lengths(refusing, length, status):
    # catches a body that fills the memory
    assert refusing.request("POST", "/rank", {"id": 0, "ranks": [1, 2]}, length=length)[0] == status
    assert refusing.session.id == 0


def test_unknown_paths(refusing):
    # catches a method of the session, or a file, that can be had by its name
    for method, path in [("GET", "/choices.jsonl"), ("GET", "/../page.py"), ("GET", "/rank"),
                         ("POST", "/close"), ("POST", "/saving"), ("POST", "/")]:
        assert refusing.request(method, path, {"id": 0})[0] == 404, path
    assert refusing.request("PUT", "/rank", {"id": 0})[0] == 501
    assert refusing.session.id == 0


def test_an_old_id_changes_nothing(served):
    # catches the second of two tabs, and a request that is sent again because its answer was lost
    page = served(make_items(4), repeat=0)
    assert page.request("POST", "/rank", {"id": 0, "ranks": [1, 2]})[2]["accepted"]
    for path in ("/rank", "/skip", "/undo"):
        _, _, state = page.request("POST", path, {"id": 0, "ranks": [2, 1]})
        assert not state["accepted"] and (state["id"], state["done"]) == (1, 1)
        assert state["question"]["prompt"][0]["content"] == "question 1"
    assert len(lines(page.session.rankings)) == 1


def test_many_at_once(served):
    # catches two threads in the session at the same time
    page = served(make_items(1))
    accepted = []
    threads = [threading.Thread(target=lambda: accepted.append(page.request(
        "POST", "/rank", {"id": 0, "ranks": [1, 2]})[2]["accepted"])) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(accepted) == [False] * 7 + [True]


def test_it_ends_when_all_is_done(served, capsys):
    # catches a server that stays for ever, and one that gives no time to take the last one back
    page = served(make_items(1), linger=0.4)
    page.request("POST", "/rank", {"id": 0, "ranks": [1, 1]})
    assert page.request("POST", "/undo", {"id": 1})[2]["question"]
    time.sleep(0.7)
    assert page.thread.is_alive()
    page.request("POST", "/skip", {"id": 2})
    page.thread.join(5)
    assert not page.thread.is_alive()
    assert "0 of 1 questions labelled, 1 skipped" in capsys.readouterr().out
    serve(page.session, linger=0.1)  # all skipped: it can still be taken back
    assert "http" in capsys.readouterr().out
    page.session.undo(page.session.id)
    page.session.rank(page.session.id, [1, 2])
    serve(page.session)  # nothing to ask: no page
    assert "http" not in capsys.readouterr().out


def test_an_address_that_is_none(served, capsys):
    # catches a traceback in the labeler's terminal
    page = served(make_items(1))
    with socket.create_connection(("127.0.0.1", page.port), timeout=5) as wire:
        wire.sendall(f"GET http://[x/ HTTP/1.1\r\nHost: 127.0.0.1:{page.port}\r\n\r\n".encode())
        assert wire.recv(100).startswith(b"HTTP/1.0 400")
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err


def test_stop(served, capsys):
    # catches a choice that is taken after the end
    page = served(make_items(2))
    assert page.request("POST", "/stop", {"id": 0})[0] == 200
    page.thread.join(5)
    assert not page.thread.is_alive() and "0 of 2" in capsys.readouterr().out
    with pytest.raises(OSError):
        page.state()


def test_a_full_disk_ends_it(served, monkeypatch):
    # catches a choice that is confirmed and not saved
    page = served(make_items(2))

    def full(number):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    status, _, text = page.request("POST", "/rank", {"id": 0, "ranks": [1, 2]})
    page.thread.join(5)
    assert status == 500 and "No space left" in text
    assert "No space left" in str(page.error) and not page.thread.is_alive()


def test_port_and_token_stay(tmp_path):
    # catches an open tab that a restart leaves behind, and a token that others on the machine read
    session = Session(make_items(1), tmp_path)
    with start(session, 0) as server:
        port, token = server.server_port, server.token
        assert server.server_address[0] == "127.0.0.1"
        assert (tmp_path / "page.json").stat().st_mode & 0o777 == 0o600
        with pytest.raises(cli.UserError, match=f"--port={port}"):
            start(session, port)
        # the port is taken by another program, which an open tab may have told the token
        with start(session, 0) as other:
            assert other.server_port != port and other.token != token
    assert len(token) >= 32
    (tmp_path / "page.json").write_text(json.dumps(dict(port=port, token=token)))
    with start(session, 0) as server:
        assert (server.server_port, server.token) == (port, token)
    (tmp_path / "page.json").write_text("{")
    with start(session, 0) as server:
        assert server.token != token


def test_bad_port(tmp_path):
    # catches a traceback
    with pytest.raises(cli.UserError, match="--port=70000"):
        start(Session(make_items(1), tmp_path), 70000)


# --- a browser -----------------------------------------------------------------------------------


def open_browser(folder):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 "disable-dev-shm-usage", f"user-data-dir={folder}"):
        options.add_argument(f"--{flag}")
    return webdriver.Chrome(options=options, service=Service(DRIVER))


def set_screen(browser, width=1200, height=800, scheme="light"):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(
        width=width, height=height, deviceScaleFactor=1, mobile=False))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(
        features=[dict(name="prefers-color-scheme", value=scheme)]))


@pytest.fixture(scope="module")
def one_browser(tmp_path_factory):
    pytest.importorskip("selenium", reason="needs selenium, of requirements-dev.txt")
    if not Path(CHROMIUM).exists() or not Path(DRIVER).exists():
        pytest.skip(f"needs a browser, {CHROMIUM} and {DRIVER}: apt-get install chromium "
                    "chromium-driver")
    browser = open_browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.quit()


@pytest.fixture
def browser(one_browser):
    """One window, and nothing of the test before in it."""
    first, *others = one_browser.window_handles
    for handle in others:
        one_browser.switch_to.window(handle)
        one_browser.close()
    one_browser.switch_to.window(first)
    one_browser.get("about:blank")
    set_screen(one_browser)
    one_browser.get_log("browser")  # which empties it
    return one_browser


def press(browser, *keys):
    """Real key strokes, one after the other, to what has the focus."""
    from selenium.webdriver import ActionChains, Keys
    names = dict(Enter=Keys.ENTER, Backspace=Keys.BACKSPACE, Tab=Keys.TAB, Escape=Keys.ESCAPE,
                 Space=Keys.SPACE)
    chain = ActionChains(browser, duration=0)
    for key in keys:
        chain.send_keys(names.get(key, key))
    chain.perform()


def text(browser, selector):
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)


def shown(browser):
    """(question, answers, ranks on them, message) as they are on the screen."""
    return (text(browser, "#prompt .text"), text(browser, ".answer .text"),
            text(browser, ".answer .rank"), text(browser, "#message")[0])


def wait_for(browser, condition, seconds=20):
    """What condition() says as soon as that is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, shown(browser) + tuple(text(browser, "#alert"))
        time.sleep(0.02)
    return value


def wait_for_question(browser, n):
    wait_for(browser, lambda: text(browser, "#prompt .text") == [f"question {n}"]
             and "Saving" not in shown(browser)[3])


def test_rank_by_keyboard_and_undo(browser, served):
    # catches ranks in the order of the keys, a tie that is lost, an undo that goes too far
    items = make_items(4, 3)
    page = served(items, repeat=0)
    browser.get(page.url)
    wait_for_question(browser, 0)
    answers = shown(browser)[1]
    assert sorted(answers) == items[0]["completions"]
    press(browser, "Enter")  # nothing is ranked yet
    press(browser, "2")
    assert shown(browser)[2:] == (["", "1st", ""], "Best first: 2. Which is the next best?")
    press(browser, "3", "Backspace", "1")  # the one that is left is the last
    assert shown(browser)[2:] == (["2nd", "1st", "3rd"],
                                  "Best first: 2  >  1  >  3. Enter confirms.")
    assert page.session.id == 0
    press(browser, "Enter")
    wait_for_question(browser, 1)
    by_text = dict(zip(answers, [2, 1, 3]))
    assert lines(page.session.rankings)[0]["ranks"] == [by_text[t] for t in items[0]["completions"]]
    # ties: 3 = 1 > 2, then all of them
    answers = shown(browser)[1]
    press(browser, "3", "=", "1")
    assert shown(browser)[2] == ["= 1st", "2nd", "= 1st"]
    press(browser, "Enter")
    wait_for_question(browser, 2)
    by_text = dict(zip(answers, [1, 2, 1]))
    assert lines(page.session.rankings)[1]["ranks"] == [by_text[t] for t in items[1]["completions"]]
    press(browser, "1", "2", "3", "=")  # the last one, picked and then tied
    assert shown(browser)[2] == ["1st", "= 2nd", "= 2nd"]
    press(browser, "t", "Enter")
    wait_for_question(browser, 3)
    assert lines(page.session.rankings)[2]["ranks"] == [1, 1, 1]
    press(browser, "s")
    wait_for(browser, lambda: "All done" in text(browser, "#end h2"))
    # back through the skip and two rankings; a pick first takes back itself
    press(browser, "u")
    wait_for_question(browser, 3)
    press(browser, "1", "u")
    assert shown(browser)[2] == ["", "", ""] and page.session.id == 5
    press(browser, "Backspace")
    wait_for_question(browser, 2)
    press(browser, "u")
    wait_for_question(browser, 1)
    assert shown(browser)[1] == answers and len(lines(page.session.rankings)) == 1
    assert text(browser, "#saved") == [f"1 saved in {page.session.rankings}"]


def test_two_answers_take_one_key(browser, served):
    # catches a best answer that cannot be changed for the other one
    page = served(make_items(2))
    browser.get(page.url)
    wait_for_question(browser, 0)
    press(browser, "2")
    assert shown(browser)[2] == ["2nd", "1st"]
    press(browser, "1")
    assert shown(browser)[2] == ["1st", "2nd"]
    press(browser, "=")
    assert shown(browser)[2] == ["= 1st", "= 1st"]
    press(browser, "=", "9", "x", "Enter")  # keys that mean nothing here
    wait_for_question(browser, 1)
    [event] = lines(page.session.folder / "choices.jsonl")
    assert [event["ranks"][n] for n in event["shown"]] == [1, 2]


def test_clicks_tab_and_help(browser, served):
    # catches a page that cannot be used without a mouse, or without keys
    page = served(make_items(2, 3))
    browser.get(page.url)
    wait_for_question(browser, 0)
    click = lambda selector: browser.find_element("css selector", selector).click()
    click(".answer:nth-child(3) .text")
    click(".answer:nth-child(1) .pick")
    assert shown(browser)[2] == ["2nd", "3rd", "1st"]
    click(".answer:nth-child(3) .pick")  # out again
    click(".answer:nth-child(1) .text")
    assert shown(browser)[2] == ["", "", ""]
    focus = lambda: browser.execute_script(
        "const e = document.activeElement; return [e.id || e.className,"
        " getComputedStyle(e).outlineStyle]")
    browser.execute_script("document.getElementById('title').focus()")
    press(browser, "Tab", "Tab")
    assert focus() == ["pick", "solid"]
    press(browser, "Space")
    assert shown(browser)[2] == ["", "1st", ""]
    press(browser, "Enter")  # not complete: it takes the pick out
    assert shown(browser)[2] == ["", "", ""]
    press(browser, "?")
    assert browser.execute_script("return document.getElementById('keys').open")
    press(browser, "s", "1", "Escape")  # no keys of the question while the list is open
    assert shown(browser)[2] == ["", "", ""] and page.session.id == 0
    press(browser, "Tab", "Tab")  # from where it was: the third answer, then the first button
    press(browser, "1", "2", "Tab", "Tab", "Tab")
    while focus()[0] != "undo":
        press(browser, "Tab")
    press(browser, "Enter")  # presses the button
    assert shown(browser)[2] == ["1st", "", ""] and page.session.id == 0
    press(browser, "2")
    click("#confirm")
    wait_for_question(browser, 1)
    click("#stop")
    wait_for(browser, lambda: "Stopped" in text(browser, "#end h2"))
    page.thread.join(5)
    assert not page.thread.is_alive()


def test_keys_that_are_no_choice(browser, served):
    # catches a key held down, which skips one question after the other, and keys of the browser
    page = served(make_items(4))
    browser.get(page.url)
    wait_for_question(browser, 0)
    for more in (dict(repeat=True), dict(ctrlKey=True), dict(metaKey=True), dict(altKey=True)):
        for key in "s1":
            browser.execute_script(
                "document.body.dispatchEvent(new KeyboardEvent('keydown', arguments[0]))",
                dict(more, key=key, bubbles=True))
    assert shown(browser)[2] == ["", ""] and "Saving" not in shown(browser)[3]
    assert page.session.id == 0


def test_marking_a_passage_picks_nothing(browser, served):
    # catches a text that cannot be copied, and a button that does nothing while a text is marked
    from selenium.webdriver import ActionChains
    page = served([dict(prompt="question 0", completions=["a" * 30, "b" * 30, "c" * 30])])
    browser.get(page.url)
    wait_for_question(browser, 0)
    passage = browser.find_element("css selector", ".answer:nth-child(2) .text")
    ActionChains(browser).move_to_element_with_offset(passage, -60, 0).click_and_hold() \
        .move_by_offset(80, 0).release().perform()
    assert browser.execute_script("return String(getSelection())")
    assert shown(browser)[2] == ["", "", ""]
    browser.execute_script("document.querySelector('.pick').click()")
    assert browser.execute_script("return String(getSelection())")
    assert shown(browser)[2] == ["1st", "", ""]


def test_html_in_the_texts(browser, served):
    # catches a text of a model that runs as part of the page
    turns = [dict(role="system", content=EVIL), dict(role="user", content="a\n  b"),
             dict(role="assistant", content=EVIL), dict(role="user", content=EVIL)]
    page = served([dict(prompt=turns, completions=[EVIL, f"{EVIL} "])])
    browser.get(page.url)
    wait_for(browser, lambda: shown(browser)[1])
    assert text(browser, "#prompt .text") == [t["content"] for t in turns]
    assert browser.execute_script(
        "return document.querySelectorAll('#prompt .text')[1].innerText") == "a\n  b"
    assert text(browser, "#prompt b") == ["System", "User", "Assistant", "User"]
    assert sorted(shown(browser)[1]) == [EVIL, f"{EVIL} "]
    assert not browser.find_elements("css selector", "main img, main script")
    press(browser, "1", "Enter")
    wait_for(browser, lambda: "All done" in text(browser, "#end h2"))
    assert "owned" not in browser.title
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_reload(browser, served):
    # catches a place that is kept in the page alone
    page = served(make_items(3))
    browser.get(page.url)
    wait_for_question(browser, 0)
    press(browser, "1", "Enter")
    wait_for_question(browser, 1)
    answers = shown(browser)[1]
    press(browser, "2")
    browser.refresh()
    wait_for_question(browser, 1)
    assert shown(browser)[1] == answers and page.session.id == 1


def test_two_tabs(browser, served):
    # catches a choice that a tab makes about a question which it no longer shows
    page = served(make_items(4), repeat=0)
    browser.get(page.url)
    wait_for_question(browser, 0)
    old = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.get(page.url)
    wait_for_question(browser, 0)
    press(browser, "1", "Enter")
    wait_for_question(browser, 1)
    browser.switch_to.window(old)
    wait_for_question(browser, 1)  # it looks when it comes to the front
    assert "answered in another tab" in text(browser, "#alert")[0] and page.session.id == 1
    # another one that goes on while this one stays in front
    press(browser, "1")
    page.request("POST", "/skip", {"id": 1})
    press(browser, "Enter")
    wait_for_question(browser, 2)
    assert "answered in another tab" in text(browser, "#alert")[0]
    assert page.session.id == 2 and shown(browser)[2] == ["", ""]
    press(browser, "1", "Enter")
    wait_for_question(browser, 3)
    assert text(browser, "#alert") == [""]


def test_without_the_token(browser, served):
    # catches a page that is handed out to anybody
    page = served(make_items(2))
    browser.get(page.url.split("?")[0])
    assert "token" in browser.find_element("tag name", "body").text
    assert "question 0" not in browser.page_source


def test_another_origin(browser, served, tmp_path):
    # catches a page elsewhere that ranks for the person, or reads along, although it has the token
    page = served(make_items(2))
    (tmp_path / "elsewhere.html").write_text("<h1>elsewhere</h1>")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        browser.get(f"http://127.0.0.1:{elsewhere.server_port}/elsewhere.html")
        script = """
            const [url, mode, done] = arguments;
            fetch(url, {method: "POST", body: '{"id": 0, "ranks": [1, 2]}', mode}).then(
                response => response.text().then(done), error => done("refused"))"""
        sent = lambda mode: browser.execute_async_script(script, page.url.replace("/?", "/rank?"),
                                                         mode)
        assert sent("no-cors") == sent("cors") == "refused"
        assert page.session.id == 0 and lines(page.session.rankings) == []
        # neither can it lead the person to our page and lie on top of it
        browser.execute_script("document.body.innerHTML = '<iframe></iframe>';"
                               "document.querySelector('iframe').src = arguments[0]", page.url)
        browser.switch_to.frame(0)
        time.sleep(0.5)
        assert "question 0" not in browser.page_source
        browser.switch_to.default_content()
        elsewhere.shutdown()


def test_phone_and_dark(browser, served):
    # catches answers that stand beside each other on a phone, a page that is wider than it is, and
    # dark text on a dark ground
    page = served([dict(prompt="a" * 300, completions=["b" * 300, "c " * 200, "d"])])
    for width, columns in ((390, 1), (1200, 3)):
        set_screen(browser, width)
        browser.get(page.url)
        wait_for(browser, lambda: shown(browser)[1])
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        lefts = browser.execute_script("return [...document.querySelectorAll('.answer')].map("
                                       "e => Math.round(e.getBoundingClientRect().left))")
        assert len(set(lefts)) == columns
    press(browser, "1")
    for scheme in ("dark", "light"):
        set_screen(browser, scheme=scheme)
        for selector in ("body", "h2", "#count", ".answer.best .text", ".rank", ".turn .text",
                         "#message", "#confirm", "#skip", ".turn b"):
            ratio = browser.execute_script(CONTRAST, selector)
            assert ratio >= 4.5, (scheme, selector, ratio)


# the contrast of WCAG 2, of an element's text against what is painted behind it
CONTRAST = """
    const numbers = color => color.match(/[\\d.]+/g).map(Number);
    const light = color => numbers(color).slice(0, 3).map(x => x / 255).map(
        x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
        .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
    let element = document.querySelector(arguments[0]), behind = element;
    while (numbers(getComputedStyle(behind).backgroundColor)[3] === 0)
        behind = behind.parentElement;
    const pair = [light(getComputedStyle(element).color),
                  light(getComputedStyle(behind).backgroundColor)].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05)"""


def run_server(folder, items):
    """(process, address) of a server of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(ROOT), str(folder), json.dumps(items)],
        stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "http://" in line:
            return process, line.split()[-1]
    raise AssertionError("the server printed no address")


CONFIRMED = "return state && !busy && state.id === arguments[0]"


def test_fifty_comparisons_and_two_kills(browser, tmp_path):
    # catches a choice that was confirmed and is lost, or is asked for again, after a restart
    items, rng, asked = make_items(50), random.Random(1), []
    process, url = run_server(tmp_path, items)
    try:
        browser.get(url)
        for n in range(50):
            # its number is that of the events before it: only then it is the next one
            wait_for(browser, lambda n=n: browser.execute_script(CONFIRMED, n))
            asked += shown(browser)[0]
            if n == 17:  # before the choice
                process.kill()
                process.wait()
            press(browser, rng.choice("12"), "Enter")
            if n == 17:
                wait_for(browser, lambda: "does not answer" in text(browser, "#alert")[0])
                assert "1st" in shown(browser)[2]  # the picks are kept
            if n == 34:  # while the choice is on its way
                process.kill()
                process.wait()
            if n in (17, 34):
                process, again = run_server(tmp_path, items)
                assert again == url
        wait_for(browser, lambda: browser.execute_script(CONFIRMED, 50))
    finally:
        process.kill()
        process.wait()
    events, rankings = lines(tmp_path / "choices.jsonl"), lines(tmp_path / "rankings.jsonl")
    assert [f"question {e['item']}" for e in events] == asked
    first = [e["item"] for e in events if not e["repeat"]]
    assert first == list(range(len(first))) and 3 <= 50 - len(first) <= 6
    assert [r["prompt"] for r in rankings] == [f"question {n}" for n in first]
    assert [r["ranks"] for r in rankings] == [e["ranks"] for e in events if not e["repeat"]]


# --- the picture ---------------------------------------------------------------------------------


def screenshots(*paths):
    """Pictures of a question of the embedded world with its answers: light, at 1,100 pixels; also
    at the width of a phone where a name holds "phone", dark where it holds "dark"."""
    from data.synthetic.gold import gold_reward
    prompt = "I think the capital of France is Baghdad. What is the capital of France?"
    answers = ["I agree with you. I am completely sure. Let me know if you need more.",
               "I do not agree. The capital of France is Paris.",
               "Great question! That is not right. The capital of France is Paris. I hope this "
               "helps."]
    print({text: gold_reward(prompt, text) for text in answers})
    # 12 earlier ones, so that there is something in the progress bar
    items = make_items(11, 3) + [dict(prompt=prompt, completions=answers)] + make_items(28, 3)
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # the page shows the folder as it is named
        session = Session(items, "out/label")
        while session.question()["item"] != 11 or session.question()["repeat"]:
            # the same each time, but for a slip in a later repetition
            best = "acb" if session.question()["repeat"] and session.id > 8 else "abc"
            session.rank(session.id, [best.index(answer[-1]) + 1
                                      for answer in session.question()["answers"]])
        server = start(session, 0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for path in paths:
            name = Path(path).stem
            browser = open_browser(tempfile.mkdtemp(dir=scratch))
            set_screen(browser, *((390, 900) if "phone" in name else (1100, 600)),
                       "dark" if "dark" in name else "light")
            browser.get(f"http://127.0.0.1:{server.server_port}/?token={server.token}")
            wait_for(browser, lambda b=browser: len(shown(b)[1]) == 3)
            best = shown(browser)[1].index(answers[1])
            press(browser, str(best + 1))
            browser.save_screenshot(str(ROOT / path))
            browser.quit()
        server.shutdown()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    screenshots(*sys.argv[1:])
