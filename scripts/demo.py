"""The FastAPI example on a fake Replicate, called with the Portkey SDK and cURL; run by `scripts/demo`.

What is shown as a call is what is executed: Python calls are evaluated from the text that is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

    from replicate_proxy_mw.testing import FakeReplicate

HELLO_WORLD = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
ALWAYS_FAILS = "0c9d61643bde5cc6c7e3d4e61866c984b5e6950d4d08e2328ff4a9aedae3807e"
LLAMA, FLUX = "meta/meta-llama-3-8b-instruct", "black-forest-labs/flux-schnell"
RUN = "generate_content"  # the span of a model's run
ENDED = ("succeeded", "failed", "canceled", "aborted")
PORT = 8000
PATIENCE = 30.0  # seconds

TTY = sys.stdout.isatty()
COLOUR = TTY and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
BOLD, DIM, GREEN, CYAN = "1", "2", "32", "36"


class DemoFailed(Exception):
    """Something came back that should not have."""


def expect(condition: object, what: str) -> None:
    if not condition:
        raise DemoFailed(what)


# The terminal.


def paint(text: str, colour: str) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if COLOUR else text


def heading(text: str) -> None:
    width = min(shutil.get_terminal_size((100, 0)).columns, 100)
    print(paint(f"── {text} ".ljust(width, "─"), BOLD) + "\n")


def show_call(text: str) -> None:
    print("\n".join(f"  {paint(line, CYAN)}" for line in text.splitlines()))


def show_answer(answer: Mapping[str, Any], status: int | None = None) -> None:
    """The telling part of what came back."""
    names = ("title", "detail") if "detail" in answer else ("id", "status", "output", "error")
    told = {name: answer[name] for name in names if answer.get(name) is not None}
    if stream := (answer.get("urls") or {}).get("stream"):
        told["urls"] = {"stream": stream}
    print(f"  {paint('→', GREEN)} {'' if status is None else f'{status} '}{json.dumps(told, ensure_ascii=False)}\n")


@contextmanager
def progress(text: str) -> Iterator[None]:
    """`text` and the seconds gone by, in a line that vanishes; only where there is a terminal to see it move."""
    done = threading.Event()
    started = time.monotonic()

    def tick() -> None:
        while not done.wait(0.1):
            print(f"\r  {paint(f'{text} … {time.monotonic() - started:.1f} s', DIM)}", end="", flush=True)

    thread = threading.Thread(target=tick, daemon=True)
    if TTY:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if TTY:
            thread.join()
            print("\r\x1b[K" if os.environ.get("TERM") != "dumb" else "\n", end="", flush=True)


class Trees:
    """Where the span tree printer writes to, so that a tree comes after the answer of its request."""

    encoding = sys.stdout.encoding
    isatty = staticmethod(lambda: TTY)

    def __init__(self) -> None:
        self._trees: queue.SimpleQueue[str] = queue.SimpleQueue()

    def write(self, text: str) -> None:
        self._trees.put(text)

    def flush(self) -> None:
        pass

    def show(self, *, requests: int = 1) -> None:
        for tree in self._next(requests):
            print(tree, end="")

    def show_story(self, *, requests: int = 1) -> None:
        """The last of so many requests saw the end of a prediction: the tree of its create is there again, with the
        run of the model, and is shown last."""
        *trees, story = sorted(self._next(requests + 1), key=lambda tree: RUN in tree)
        expect(RUN in story, "the run of the model was not told")
        for tree in trees:
            print(tree, end="")
        print(f"  Its end is known now, and the tree of its create is complete:\n\n{story}", end="")

    def _next(self, count: int) -> list[str]:
        try:
            return [self._trees.get(timeout=5) for _ in range(count)]
        except queue.Empty:
            raise DemoFailed("the request left no spans") from None

    def show_all(self) -> None:
        while True:
            print(self._trees.get(), end="")


# The two ways to call.

URLLIB = {"Request": Request, "urlopen": urlopen}


class Http:
    """cURL, or Python's standard library where there is none."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.curl = shutil.which("curl")
        self.name = "cURL" if self.curl else "Python's urllib, since there is no cURL here"

    def call(self, path: str, *, api_key: str, body: Mapping[str, Any] | None = None, **more: str) -> Any:
        """Show the call, make it, and give the status and the JSON that came back; `more` are headers."""
        headers = {
            "x-portkey-api-key": api_key,
            "x-portkey-provider": "@replicate",
            "x-portkey-trace-id": "cover-story",
        }
        headers["x-portkey-metadata"] = json.dumps({"team": "web", "_user": "grace"})
        headers |= {name.replace("_", "-"): value for name, value in more.items()}
        method = "GET"
        data = None
        if body is not None:
            headers["content-type"], data, method = "application/json", json.dumps(body), "POST"
        if self.curl:
            argv = ["curl", "-sS", f"{self.url}{path}"]
            options = [("-H", f"{name}: {value}") for name, value in headers.items()]
            options += [("-d", data)] if data is not None else []
            options += [("-w", r"\n%{http_code}")]
            show_call(" \\\n    ".join(shlex.join(part) for part in (argv, *options)))
            text, _, status = _run([*argv, *(word for option in options for word in option)]).rpartition("\n")
            return int(status), json.loads(text)
        encoded = "" if data is None else f"\n    data={data.encode()!r},"
        listed = "".join(f"\n        {name!r}: {value!r}," for name, value in headers.items())
        source = (
            f"urlopen(Request({self.url + path!r},\n    method={method!r},{encoded}\n    headers={{{listed}\n    }}))"
        )
        show_call(source)
        try:
            with eval(source, URLLIB) as answer:
                return answer.status, json.load(answer)
        except HTTPError as error:
            with error:
                return error.status, json.load(error)

    def stream(self, url: str) -> Iterator[str]:
        """Show the call, and give the lines as they arrive."""
        if self.curl:
            argv = ["curl", "-sS", "-N", url, "-H", "accept: text/event-stream"]
            show_call(shlex.join(argv))
            with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
                assert process.stdout is not None
                yield from process.stdout
        else:
            source = f"urlopen(Request({url!r},\n    headers={{'accept': 'text/event-stream'}}))"
            show_call(source)
            with eval(source, URLLIB) as answer:
                yield from (line.decode() for line in answer)


def _run(argv: Sequence[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, encoding="utf-8")
    expect(done.returncode == 0, f"cURL ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def poll(get: Callable[[], Mapping[str, Any]]) -> tuple[Mapping[str, Any], int]:
    """Ask until it has ended; the last answer, and how often was asked."""
    started, asked, status = time.monotonic(), 0, "asking"
    while time.monotonic() - started < PATIENCE:
        answer = get()
        asked += 1
        if answer["status"] != status:
            status = answer["status"]
            print(f"  {time.monotonic() - started:4.1f} s  {status}")
        if status in ENDED:
            return answer, asked
        with progress(status):
            time.sleep(0.8)
    raise DemoFailed(f"still {status} after {PATIENCE:.0f} s")


def events(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Server-Sent Events: name and data."""
    name, data = "", []
    for line in lines:
        field, _, value = line.rstrip("\r\n").partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif not field and name:
            yield name, "\n".join(data)
            name, data = "", []


# What is shown.


def with_portkey(url: str, trees: Trees) -> None:
    from portkey_ai import Portkey

    source = f"""Portkey(api_key="pk-team-a", provider="@replicate", base_url="{url}",
    trace_id="demo", metadata={{"team": "design", "_user": "ada"}})"""
    with eval(source, {"Portkey": Portkey}) as portkey:

        def call(text: str) -> Any:
            show_call(text)
            return eval(text, {"portkey": portkey})

        heading("1. Create a prediction, with the Portkey SDK")
        show_call(f"portkey = {source}")
        created = call(f'portkey.post("predictions",\n    version="{HELLO_WORLD}",\n    input={{"text": "Alice"}})')
        show_answer(created.model_dump())
        trees.show()

        heading("2. Poll it to the end")
        get = f'portkey.get(path="predictions/{created.id}").json()'
        show_call(get)
        answer, asked = poll(lambda: eval(get, {"portkey": portkey}))
        show_answer(answer)
        expect(answer.get("output") == "hello Alice", "that is not what the model says to Alice")
        trees.show_story(requests=asked)

        heading("3. Create a longer one, and cancel it")
        created = call(f'portkey.post("models/{FLUX}/predictions",\n    input={{"prompt": "A tulip, slowly"}})')
        show_answer(created.model_dump())
        trees.show()
        with progress("letting it start"):
            time.sleep(0.6)
        canceled = call(f'portkey.post("predictions/{created.id}/cancel")')
        show_answer(canceled.model_dump())
        expect(canceled.status == "canceled", "it was not canceled")
        trees.show_story()


def with_http(http: Http, fake: FakeReplicate, trees: Trees) -> None:
    heading(f"4. Create one that streams, with {http.name}")
    prompt = {"prompt": "Each of these words comes in an event of its own."}
    status, created = http.call(f"/models/{LLAMA}/predictions", api_key="pk-team-b", body={"input": prompt})
    show_answer(created, status)
    expect(status == 201, "it was not created")
    trees.show()

    heading("5. Read the stream, from the urls.stream that came back")
    name, text = "", ""
    for name, data in events(http.stream(created["urls"]["stream"])):
        if name == "output":
            print(data if text else f"  {paint('→', GREEN)} {data}", end="", flush=True)
            text += data
    print(f"\n    {paint(f'event: {name}', DIM)}\n")
    expect(name == "done" and prompt["prompt"] in text, "the stream did not come to its end")
    if created["urls"]["stream"].startswith(http.url):
        trees.show()

    heading("6. Read it once more: Replicate fails at first, and is asked again")
    fake.fail(503, operation="predictions.get")
    retry = json.dumps({"retry": {"attempts": 2}})
    status, answer = http.call(f"/predictions/{created['id']}", api_key="pk-team-b", x_portkey_config=retry)
    show_answer({**answer, "urls": None, "output": "".join(answer["output"] or [])}, status)
    expect(answer["status"] == "succeeded", "it did not succeed")
    trees.show_story()

    heading("7. Wait for one that fails")
    body = {"version": ALWAYS_FAILS, "input": {"text": "Bob"}}
    status, failed = http.call("/predictions", api_key="pk-team-b", body=body, prefer="wait")
    show_answer(failed, status)
    expect(failed["status"] == "failed", "it did not fail")
    trees.show_story()

    heading("8. And with a key that nobody gave out")
    status, refused = http.call("/predictions", api_key="pk-stranger")
    show_answer(refused, status)
    expect(status == 401, "a stranger was let in")
    trees.show()


def stay(origin: str, trees: Trees) -> None:
    body = json.dumps({"version": HELLO_WORLD, "input": {"text": "you"}})
    headers = ("x-portkey-api-key: pk-team-a", "x-portkey-provider: @replicate", "content-type: application/json")
    argv = ["curl", f"{origin}/v1/predictions", *(part for header in headers for part in ("-H", header)), "-d", body]
    heading("Your turn")
    print(f"Everything above, and each request from now on, is here:\n\n{paint(f'{origin}/traces/', CYAN)}\n")
    print(f"The app stays up. From another terminal:\n\n{paint(shlex.join(argv), CYAN)}\n")
    print("The tree of each request appears here, too. Ctrl-C ends the demo.\n")
    trees.show_all()


# The servers.


def listener() -> socket.socket:
    """Port 8000, or another that is free. With its protocol named, since asyncio sets TCP_NODELAY only then."""
    for port in (PORT, 0):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
            sock.listen()
        except OSError:
            sock.close()
        else:
            return sock
    raise DemoFailed("no port to listen on at 127.0.0.1")


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """`app` on a port, in a thread; where it is."""
    import uvicorn

    with closing(listener()) as sock:
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, log_level="critical", access_log=False, timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        while not server.started:
            expect(thread.is_alive(), "the app did not start")
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def exporting(endpoint: str) -> SpanProcessor:
    """Sends spans to `endpoint`, after a look whether it takes any."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult

    traces = f"{endpoint.rstrip('/')}/v1/traces"
    try:
        where = urlsplit(endpoint)
        port = {"http": 80, "https": 443}[where.scheme]
        socket.create_connection((where.hostname or "", where.port or port), timeout=5).close()
    except (KeyError, ValueError):
        raise DemoFailed(f"--otlp wants a URL as http://127.0.0.1:4318, not {endpoint!r}") from None
    except OSError as error:
        raise DemoFailed(f"nothing takes spans at {endpoint}: {error}") from None
    exporter = OTLPSpanExporter(endpoint=traces, timeout=5)
    expect(exporter.export(()) is SpanExportResult.SUCCESS, f"{traces} does not take spans")
    return BatchSpanProcessor(exporter, schedule_delay_millis=500)


def demo(*, once: bool, otlp: str | None) -> None:
    print(paint("Replicate, called with Portkey's clients, through a proxy inside a FastAPI app.", BOLD))
    print("All of it runs on this machine, on FakeReplicate: no account, no token, no cost.\n")

    processor = None if otlp is None else exporting(otlp)
    with progress("Starting"):
        import portkey_ai  # noqa: F401  (takes a second or two, and is wanted next)
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        from examples.fastapi_app.app import create_app
        from replicate_proxy_mw.devtools import SpanTreePrinter, TraceBuffer
        from replicate_proxy_mw.testing import FakeModel, FakeReplicate

        trees, traces = Trees(), TraceBuffer()
        provider = TracerProvider(resource=Resource.create({"service.name": "illustration-desk"}))
        provider.add_span_processor(SpanTreePrinter(trees))
        provider.add_span_processor(traces)
        if processor is not None:
            provider.add_span_processor(processor)
        trace.set_tracer_provider(provider)
        owner, name = FLUX.split("/")
        slow = FakeModel(owner=owner, name=name, official=True, run=lambda given: None, run_time=60.0)
        fake = FakeReplicate(models=[slow], queue_time=0.4, run_time=1.1)

    with ExitStack() as stack:
        stack.enter_context(fake.serve())
        streams = [urlsplit(fake.streams_url).netloc]
        app = create_app(upstream=fake.url, token=fake.token, stream_hosts=streams, traces=traces)
        origin = stack.enter_context(serving(app))
        url = f"{origin}/v1"
        elsewhere = "" if origin.endswith(f":{PORT}") else f"; port {PORT} is taken"
        print(f"  the app     {origin}  (examples/fastapi_app{elsewhere})\n  Replicate   {fake.url}  (a fake)")
        print(f"  the viewer  {origin}/traces/  (open it now, and watch)")
        print(f"  spans       to {otlp}, too\n" if otlp else "")
        with_portkey(url, trees)
        with_http(Http(url), fake, trees)
        expect(not fake.violations, f"headers that must not reach Replicate did: {fake.violations}")
        provider.force_flush()
        if once:
            print("Every call went as it should.")
        else:
            try:
                stay(origin, trees)
            except KeyboardInterrupt:
                print("\nBye.")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description="The proxy at work, on a fake Replicate.")
    parser.add_argument("--once", action="store_true", help="end after the last call")
    parser.add_argument("--otlp", metavar="URL", help="send the spans there, too: http://127.0.0.1:4318, for example")
    given = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True, errors="replace")  # type: ignore[union-attr]
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    # What is set for other work on this machine would change what is shown here.
    for name in [name for name in os.environ if name.startswith(("OTEL_", "PORTKEY_"))]:
        del os.environ[name]
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
    try:
        demo(once=given.once, otlp=given.otlp)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        reason = str(error) if isinstance(error, DemoFailed) else f"{type(error).__name__}: {error}"
        print(f"\nThe demo failed: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
