"""A person as the labeler, on a web page: data/page.html, served to this computer alone.

    GET  /?token=T         the page
    GET  /state?token=T    {"question": {"id", "prompt", "answers"} or null, "done", "total", ...}
    POST /rank?token=T     {"id": of the question, "ranks": [...]}; the same for /skip, /undo and
                           /stop. The answer is the state, with "accepted": false where another
                           question is the current one by now

Any page that the person has open can send requests to 127.0.0.1, and any name can be made to mean
that address. So the token has to be right, and Host, Origin and Sec-Fetch-Site must say that the
request comes from our own page or from the address bar.
"""

import json
import os
import secrets
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from cli import UserError
from data.files import parse_json, whole_file

HTML = Path(__file__).with_name("page.html")
LIMIT = 1000  # bytes of a body: an id and nine ranks have less than 100
POLICY = ("default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
          "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
          "frame-ancestors 'none'")


class Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds without a byte

    def log_message(self, *args):
        pass  # the terminal stays readable

    def answer(self, status, content, kind="text/plain", nonce=""):
        if not isinstance(content, str):
            content, kind = json.dumps(content), "application/json"
        content = content.encode()
        self.send_response(status)
        for name, value in {
                "Content-Type": f"{kind}; charset=utf-8", "Content-Length": len(content),
                "Content-Security-Policy": POLICY.format(nonce=nonce),
                "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff",
                "Cache-Control": "no-store", "Cross-Origin-Resource-Policy": "same-origin",
                "Cross-Origin-Opener-Policy": "same-origin"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def refused(self):
        """Whether the request was refused, as none of our page and of this run."""
        port = self.server.server_port
        try:
            url = urlsplit(self.path)
        except ValueError:
            self.answer(400, "this is no address")
            return True
        hosts = self.headers.get_all("Host", [])
        if hosts not in ([f"127.0.0.1:{port}"], [f"localhost:{port}"]):
            why = f"the address has to begin with http://127.0.0.1:{port}/"
        elif self.headers.get("Origin", f"http://{hosts[0]}") != f"http://{hosts[0]}":
            why = "another page has no business here"
        elif self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            why = "a link from another page: copy the address into the address bar"
        elif not secrets.compare_digest(parse_qs(url.query).get("token", [""])[0].encode(),
                                        self.server.token.encode()):
            why = "the token is missing or wrong: open the address that the terminal shows"
        else:
            return False
        self.answer(403, why)
        return True

    def state(self, **more):
        """What the page shows. Not whether a question is a repeat: the person should not know."""
        session = self.server.session
        question = session.question()
        return session.progress() | dict(
            question=question and {key: question[key] for key in ("id", "prompt", "answers")},
            saved=str(session.rankings), **more)

    def do_GET(self):
        if self.refused():
            return
        path = urlsplit(self.path).path
        if path == "/":
            nonce = secrets.token_urlsafe(16)
            self.answer(200, HTML.read_text("utf-8").replace("NONCE", nonce), "text/html", nonce)
        elif path == "/state":
            with self.server.lock:
                state = self.state()
            self.answer(200, state)
        else:
            self.answer(404, "there is nothing here")

    def do_POST(self):
        if self.refused():
            return
        action = urlsplit(self.path).path[1:]
        if action not in ("rank", "skip", "undo", "stop"):
            return self.answer(404, "there is nothing here")
        try:
            length = int(self.headers.get("Content-Length", ""))
            if not 0 <= length <= LIMIT:
                return self.answer(413, f"a request has at most {LIMIT} bytes")
            body = json.loads(self.rfile.read(length))
            question_id, ranks = body["id"], body.get("ranks")
            if type(question_id) is not int:
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return self.answer(400, "this is no choice, and changes nothing")
        with self.server.lock:
            status, content = self.act(action, question_id, ranks)
        self.answer(status, content)
        if action == "stop":
            self.server.ended.set()

    def act(self, action, question_id, ranks):
        """(status, what to answer)."""
        session = self.server.session
        if self.server.ended.is_set():
            return 503, "the labelling has ended"
        try:
            if action == "rank":
                accepted = session.rank(question_id, ranks)
            else:
                accepted = action == "stop" or getattr(session, action)(question_id)
            return 200, self.state(accepted=accepted)
        except ValueError as error:
            return 400, str(error)
        except UserError as error:  # the disk takes no more
            self.server.failure = error
            self.server.ended.set()
            return 500, str(error)


class Server(ThreadingHTTPServer):
    def __init__(self, session, port, token):
        self.session, self.token = session, token
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.failure = None  # the UserError that ended it
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a browser that went away
            super().handle_error(request, client_address)


def start(session, port):
    """A bound Server. Port and token are kept in the folder, readable for its owner alone, so that
    a tab which is open goes on after a restart."""
    path = session.folder / "page.json"
    try:
        known = parse_json(path.read_text())
        before, token = int(known["port"]), str(known["token"])
    except (OSError, ValueError, KeyError, TypeError):
        before, token = 0, secrets.token_urlsafe(24)
    try:
        server = Server(session, port or before, token)
    except (OSError, OverflowError) as error:
        if port:
            raise UserError(f"--port={port}: {getattr(error, 'strerror', None) or error}; --port=0 "
                            "takes one that is free") from None
        # a tab of ours may have told the token to the program that has the port now
        server = Server(session, 0, secrets.token_urlsafe(24))
    with session.saving(), whole_file(
            path, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        json.dump(dict(port=server.server_port, token=server.token), file)
    return server


def serve(session, port=0, linger=10.0):
    """Serve the page until all is labelled, its stop button, or Ctrl-C; says what was done.

    port: 0 takes that of the last time where it is free, else any. linger: seconds after the last
    choice in which it can still be taken back. UserError: a port that cannot be had, a disk that
    takes no more.
    """
    if not session.finished or not session.records():  # all skipped: undo is still possible
        with start(session, port) as server:
            threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
            print(f"label at http://127.0.0.1:{server.server_port}/?token={server.token}\n"
                  "every choice is saved at once; Ctrl-C stops, the same command goes on",
                  flush=True)
            try:
                _wait(server, linger)
            except KeyboardInterrupt:
                print()
            with server.lock:  # no choice is half made, and none comes after
                server.ended.set()
            server.shutdown()
        if server.failure:
            raise server.failure
    print(session.summary(), flush=True)


def _wait(server, linger):
    """Until the server is told to end, or nothing is left to ask for `linger` seconds."""
    since = time.monotonic()
    while not server.ended.wait(0.1):
        with server.lock:
            if not server.session.finished:
                since = time.monotonic()
        if time.monotonic() - since > linger:
            return
