"""Serving the page: on this machine alone unless asked, without telemetry, and with nothing from other hosts."""

import argparse
import contextlib
import errno
import importlib.util
import os
import shutil
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from scaling_perception.support.errors import UserError
from scaling_perception.support.failures import explain_os
from scaling_perception.support.stopping import removed_when_stopped

TITLE = "scaling-perception demo"
_QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_SERVER_NAME": "",
}
# Whatever a page of ours might name: the browser fetches nothing from another host.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' 'wasm-unsafe-eval' blob:; "
    "worker-src 'self' blob:; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'self'"
)


def require_gradio() -> None:
    """UserError where Gradio is not installed. It is not imported."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the demo needs Gradio: pip install 'scaling-perception[demo]'")


def check_port(host: str, port: int) -> None:
    """UserError where this address cannot be listened on."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host {host} is no address of this machine: give 127.0.0.1, or 0.0.0.0 for all") from None
    family, kind, _, _, address = found[0]
    with socket.socket(family, kind) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(f"--port {port} is taken: give another, or 0 for a free one") from None
            if error.errno == errno.EADDRNOTAVAIL:
                raise UserError(f"--host {host} is no address of this machine: give 127.0.0.1 or 0.0.0.0") from None
            raise UserError(f"--port {port}: {explain_os(error, host)}") from None


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as one:
        one.bind((host, 0))
        return one.getsockname()[1]


class _Headers:
    """Puts the policy on every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", _POLICY.encode()), (b"x-content-type-options", b"nosniff")]
                message["headers"] = [*message.get("headers", []), *more, (b"referrer-policy", b"no-referrer")]
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


@contextlib.contextmanager
def served(session: Any, host: str, port: int, quiet: bool = True) -> Any:
    """Serve the page of a session while the block runs; yields its address."""
    os.environ.update({name: value for name, value in _QUIET.items() if value})
    os.environ["GRADIO_TEMP_DIR"] = str(session.folder / "uploads")
    from starlette.middleware import Middleware  # pyright: ignore[reportMissingImports]

    from scaling_perception.demo.page import build
    from scaling_perception.demo.style import CSS, theme

    page = build(session, TITLE)
    page.queue(max_size=session.limits.waiting, default_concurrency_limit=4)
    page.launch(
        server_name=host,
        server_port=port or _free_port(host),
        prevent_thread_lock=True,
        quiet=quiet,
        share=False,
        show_error=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        inbrowser=False,
        max_file_size=int(session.limits.megabytes * 1e6),
        app_kwargs={"middleware": [Middleware(_Headers)]},
        theme=theme(),
        head=f"<style>{CSS}</style>",  # as css, Gradio would drop what is within @media
    )
    try:
        yield f"http://{'localhost' if host == '0.0.0.0' else host}:{page.server_port}"
    finally:
        page.close(verbose=False)


def serve(args: argparse.Namespace) -> int:
    """Load the model and serve the page until Ctrl-C, or with ``--smoke`` until one request was answered."""
    from scaling_perception.demo.session import Limits, Session

    folder = Path(tempfile.mkdtemp(prefix="scaling-perception-demo-"))
    try:
        with removed_when_stopped(folder):  # a signal ends the process at once
            limits = Limits(args.megapixels, args.megabytes, args.waiting)
            session = Session(args.model, folder, args.autoencoder, args.dtype, limits)
            with served(session, args.host, 0 if args.smoke else args.port) as address:
                if args.smoke:
                    from scaling_perception.demo.smoke import one_request

                    print(one_request(address, session))
                    return 0
                print(f"{TITLE}: {address} (Ctrl-C ends it)", flush=True)
                if args.host not in ("127.0.0.1", "localhost", "::1"):
                    print(f"note: everybody who reaches {args.host} can use it; there is no password", file=sys.stderr)
                session.measure()
                print("measured: the page shows the seconds of this machine", file=sys.stderr, flush=True)
                threading.Event().wait()
                return 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)
