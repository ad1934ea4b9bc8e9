"""A Google Cloud Storage of one bucket, on loopback: enough of its JSON API for TensorStore and gcsfs."""

import contextlib
import email
import http.server
import json
import sys
import threading
import time
import urllib.parse
import uuid
from collections.abc import Iterator

BUCKET = "bucket"


class Refused(Exception):
    """A status of HTTP, and what it is about."""


class Server(http.server.ThreadingHTTPServer):
    """Objects are kept in memory: name to (content, generation, time).

    down: whether it answers 503 and does nothing. deaf: how many more writes it does and then answers 503 to.
    requests: what was asked for, for tests: (method, path).
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, tuple[bytes, int, str]] = {}
        self.uploads: dict[str, tuple[str, dict, bytes]] = {}
        self.generation = 1_700_000_000_000_000
        self.changing = threading.Lock()
        self.down, self.deaf = False, 0
        self.requests: list[tuple[str, str]] = []

    @property
    def environment(self) -> dict[str, str]:
        """What sends gcsfs and TensorStore here, and keeps them from looking for credentials elsewhere."""
        url = f"http://127.0.0.1:{self.server_address[1]}"
        return {
            "STORAGE_EMULATOR_HOST": url,
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks by gRPC what kind of bucket it is
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        }

    def handle_error(self, request, address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # who asked has not waited for the answer
            super().handle_error(request, address)

    def check(self, name: str, query: dict[str, str]) -> tuple[bytes, int, str] | None:
        """The object, None where there is none. Raises `Refused` where it is not as the query demands."""
        found = self.objects.get(name)
        generation = str(found[1]) if found else "0"
        if query.get("ifGenerationMatch", generation) != generation:
            raise Refused(412, f"{name} has generation {generation}")
        if query.get("ifGenerationNotMatch") == generation:
            raise Refused(304, name)
        return found

    def store(self, name: str, content: bytes, query: dict[str, str]) -> dict:
        with self.changing:
            self.check(name, query)
            self.generation += 1
            now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
            self.objects[name] = (content, self.generation, now)
            if self.deaf:
                self.deaf -= 1
                raise Refused(503, "the answer is lost")
            return self.describe(name)

    def remove(self, name: str, query: dict[str, str]) -> None:
        with self.changing:
            if not self.check(name, query):
                raise Refused(404, name)
            del self.objects[name]

    def describe(self, name: str) -> dict:
        content, generation, made = self.objects[name]
        about = {"name": name, "bucket": BUCKET, "size": str(len(content)), "generation": str(generation)}
        return {"kind": "storage#object", "metageneration": "1", "timeCreated": made, "updated": made} | about

    def list(self, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        start, end = query.get("startOffset", ""), query.get("endOffset")
        names, folders = [], {}
        for name in sorted(self.objects):
            if name.startswith(prefix) and name >= start and (end is None or name < end):
                below, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                folders.update({prefix + below + delimiter: None} if found else {})
                names += [] if found else [name]
        return {"kind": "storage#objects", "items": [self.describe(n) for n in names], "prefixes": list(folders)}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *arguments) -> None:
        pass

    def respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        parts = [urllib.parse.unquote(part) for part in url.path.split("/") if part]
        self.server.requests.append((self.command, self.path))
        try:
            if self.server.down:
                raise Refused(503, "down")
            if parts[0] == "uploads":
                self.proceed(parts[1], body)
            elif (below := parts[parts.index("b") + 1 :])[0] != BUCKET:
                raise Refused(404, f"there is no bucket {below[0]}")
            elif parts[0] == "upload":
                self.upload(query, body)
            else:
                self.access(below[1:], query)
        except Refused as refusal:
            self.answer({"error": {"code": refusal.args[0], "message": refusal.args[1]}}, refusal.args[0])

    do_GET = do_POST = do_PUT = do_DELETE = respond

    def access(self, parts: list[str], query: dict[str, str]) -> None:
        """The bucket, its list of objects (`o`), or one of them (`o/NAME`)."""
        if len(parts) < 2:
            self.answer(self.server.list(query) if parts else {"kind": "storage#bucket", "name": BUCKET})
        elif self.command == "DELETE":
            self.server.remove(parts[1], query)
            self.answer(b"", 204)
        elif not (found := self.server.check(parts[1], query)):
            raise Refused(404, f"No such object: {parts[1]}")
        elif query.get("alt") == "media":
            self.media(found[0], found[1])
        else:
            self.answer(self.server.describe(parts[1]))

    def media(self, content: bytes, generation: int) -> None:
        headers = {"x-goog-generation": str(generation), "x-goog-metageneration": "1"}
        if not (wanted := self.headers.get("Range")):
            return self.answer(content, 200, headers)
        first, last = wanted.removeprefix("bytes=").split("-")
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(int(last) + 1 if first and last else len(content), len(content))
        if start >= len(content):
            raise Refused(416, f"{wanted} is not satisfiable")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self.answer(content[start:stop], 206, headers)

    def upload(self, query: dict[str, str], body: bytes) -> None:
        if query["uploadType"] == "multipart":
            whole = email.message_from_bytes(b"Content-Type: " + self.headers["Content-Type"].encode() + b"\n\n" + body)
            about, _ = whole.get_payload()
            boundary = b"--" + whole.get_boundary().encode()
            # Not the parser's second part: it changes the ends of lines.
            content = body.split(boundary, 2)[2].rpartition(b"\n" + boundary)[0].split(b"\n\n", 1)[1]
            self.answer(self.server.store(json.loads(about.get_payload())["name"], content, query))
        elif query["uploadType"] == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            self.server.uploads[key := uuid.uuid4().hex] = (name, query, b"")
            self.answer({}, 200, {"Location": f"http://{self.headers['Host']}/uploads/{key}"})
        else:
            self.answer(self.server.store(query["name"], body, query))

    def proceed(self, key: str, body: bytes) -> None:
        """The next piece of a resumable upload; it is the last where the range says how long the whole is."""
        name, query, before = self.server.uploads.pop(key)
        content = before + body
        if self.command == "DELETE":
            self.answer(b"", 204)
        elif self.headers["Content-Range"].endswith("/*"):
            self.server.uploads[key] = (name, query, content)
            self.answer(b"", 308, {"Range": f"bytes=0-{len(content) - 1}"})
        else:
            self.answer(self.server.store(name, content, query))

    def answer(self, content: dict | bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(body)


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
