"""`spa-lite serve`: the policies of a run behind an OpenAI-compatible chat endpoint, on this machine alone."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spa_lite.cli.main import app
from spa_lite.cli.options import Config, Sets, command
from spa_lite.cli.speakers import GROUPS
from spa_lite.errors import ServeError

if TYPE_CHECKING:
    from spa_lite.door import Door
    from spa_lite.endpoint import Application, Visit

OWN = [group for group in GROUPS if group not in {"seed", "lengths.max_prompt_length"}]
"""Settings that matter here: a request brings its own seed, and a prompt may be as long as the model can read."""
PANEL = "Server"


@command(app, "serve", OWN)
def serve(
    given: dict[str, Any],
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A run: path, name, or its beginning (default: the newest).")
    ] = None,
    round_: Annotated[
        str | None, typer.Option("--round", metavar="N", help="Serve only this stage (a number, seed, last) and init.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=PANEL)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.", rich_help_panel=PANEL)] = 8080,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Let other machines in, by --host.", rich_help_panel=PANEL)
    ] = False,
    api_key_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Ask for the key in this environment variable.", rich_help_panel=PANEL),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Log prompts and answers, too.", rich_help_panel=PANEL)
    ] = False,
    config: Config = None,
    set_: Sets = None,
) -> None:
    """Serve every stage of a run (or --model and --adapter-path) as an OpenAI-compatible chat endpoint."""
    from spa_lite.backend import Sampling
    from spa_lite.cli import render
    from spa_lite.cli.speakers import opened, speakers
    from spa_lite.door import Door, is_loopback
    from spa_lite.endpoint import Endpoint, application, stages_of, work

    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise ServeError(f"serving needs {' and '.join(missing)}: pip install 'spa-lite[serve]'")
    if not (allow_remote or is_loopback(host)):
        raise ServeError(f"--host {host} would let other machines in: add --allow-remote if they may")
    key = _key(api_key_env) if api_key_env else None
    who = speakers(given, run, set_ or [], config)
    if round_ is not None:
        name = who.named(round_)
        who = dataclasses.replace(who, policies={"init": who.policies["init"], name: who.policies[name]})
    with listening(host, port) as sock:
        door = Door(host, sock.getsockname()[1], key)
        backend = opened(who, list(who.policies))
        sampling = who.recipe.sampling
        usual = Sampling(sampling.temp, sampling.top_p, sampling.max_tokens)
        endpoint = Endpoint(backend, stages_of(who.policies), usual)
        if not door.local:
            render.note(f"other machines may ask this one, {'with the key' if key else 'and there is no password'}")
        render.out.print(render.safe(_welcome(who.title, list(endpoint.stages), door, api_key_env)))

        def tell(visit: Visit) -> None:
            for line in _lines(visit, verbose):
                render.note(line)

        with answering(application(endpoint, door, tell), sock, lambda: endpoint.jobs.put(None)):
            work(endpoint.jobs)
        raise ServeError("the server ended by itself")


def _key(name: str) -> str:
    """The key in an environment variable."""
    key = os.environ.get(name, "").strip()
    if not key or not (key.isascii() and key.isprintable()):
        raise ServeError(f"--api-key-env {name}: that environment variable holds no key (printable ASCII): set it")
    return key


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ServeError if that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (")[0]  # Python adds the address
        raise ServeError(
            f"cannot listen on {host}, port {port} ({why}): choose another --port (0: any) or --host"
        ) from None


@contextmanager
def answering(asgi: Application, sock: socket.socket, ended: Any) -> Iterator[None]:
    """Inside, a server works in a thread of its own. `ended` is called when it ends."""
    import threading

    import uvicorn

    config = uvicorn.Config(
        asgi,
        lifespan="off",
        ws="none",
        http="h11",
        loop="asyncio",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)

    def run() -> None:
        try:
            server.run(sockets=[sock])
        finally:
            ended()

    thread = threading.Thread(target=run, name="server", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(timeout=3)


def _welcome(title: str, models: list[str], door: Door, key: str | None) -> str:
    """What is served where, and how to ask."""
    url, bearer = f"{door.url}/v1", f' -H "Authorization: Bearer ${key}"' if key else ""
    return "\n".join(
        [
            f"serving {title} at {url}",
            f"models: {', '.join(models)}",
            f"OPENAI_BASE_URL={url} OPENAI_API_KEY={f'${key}' if key else 'none'}",
            f"curl {url}/chat/completions -H 'Content-Type: application/json'{bearer} -d "
            '\'{"model": "last", "messages": [{"role": "user", "content": "Hello!"}]}\'',
            "Ctrl-C ends it",
        ]
    )


def _lines(visit: Visit, verbose: bool) -> Iterator[str]:
    """The log of one request: one line without anybody's words; with them, if `verbose`."""
    line = f"{visit.method} {visit.path[:80]} {visit.status or '-'}"
    if visit.why:
        line += f" ({visit.why[:60]})"
    if visit.stage:
        line += f" {visit.stage}"
    if visit.answers:
        speed = visit.tokens / max(visit.seconds, 1e-9)
        line += f": {visit.prompt:,} tokens asked, {visit.tokens:,} answered, {speed:,.0f} tokens/s"
    yield line + (", the client went away" if visit.left else "")
    if verbose and visit.asked is not None:
        yield from (f"  {turn.role}: {turn.message.content}" for turn in visit.asked.messages)
        yield from (f"  answer: {answer.said.text}" for answer in visit.answers)
