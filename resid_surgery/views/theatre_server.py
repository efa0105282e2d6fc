"""Serving the theatre: one model, on this machine's loopback, to its own pages only."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, final

from resid_surgery._check import message, text, whole
from resid_surgery.errors import ArgumentError
from resid_surgery.views.theatre_guard import Guard, loopback, new_key

if TYPE_CHECKING:
    from resid_surgery.models.opening import OpenedModel

PORT = 8420
_set_up: list[Any] = []
_ready: list[Any] = []


@final
class Theatre:
    """A server that is bound and not yet running; made by `theatre`.

    Attributes:
        url: of its page, with the key of this launch.
    """

    def __init__(self, server: Any, held: socket.socket, url: str) -> None:
        self._server, self._held, self.url = server, held, url

    def run(self) -> None:
        """Serve until told to stop, by Ctrl-C or `stop`."""
        try:
            self._server.run(sockets=[self._held])
        finally:
            self._held.close()

    def stop(self) -> None:
        """Make `run` return; from another thread."""
        self._server.should_exit = True

    @property
    def started(self) -> bool:
        """Whether it answers."""
        return bool(self._server.started)


def bound(host: str, port: int) -> socket.socket:
    """A socket on the loopback, listened to by nobody else.

    Raises:
        ArgumentError: the host is not the loopback, or the port is taken.
    """
    host = loopback(host)
    whole("port", port, 0, 65535)
    found = socket.socket(socket.AF_INET6 if host == "::1" else socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(64)
    except OSError as error:
        found.close()
        do = "Choose another with --port, or 0 for any."
        raise ArgumentError(message("port", f"free ({error.strerror})", port, do=do)) from None
    return found


def theatre(
    model: OpenedModel, load: str, *, host: str = "127.0.0.1", port: int = PORT, opened: Callable[[str], Any] = str
) -> Theatre:
    """Set the theatre up for one model.

    Args:
        model: with a tokenizer. load: the expression that opens it, for exported recipes.
        host: of the loopback. port: 0 for any free one. opened: called with the page's address once it is served.

    Returns:
        `Theatre`, to be run. One a process: the web library keeps one application.

    Raises:
        ArgumentError: the model has no tokenizer; another host; a taken port; another theatre was set up in this
            process; see `prepare`.
    """
    from resid_surgery.stream.recording import need_model

    need_model(model)
    text("load", load)
    if not callable(opened):
        raise ArgumentError(message("opened", "a function of the page's address", opened))
    if model.tokenizer is None:
        raise ArgumentError(message("model", "one with a tokenizer, since its prompts are typed", model.name))
    if _set_up:
        raise ArgumentError("the theatre can be set up once in a process, and was. Start another process.")
    prepare()
    held = bound(host, port)
    shown = f"[{host}]" if ":" in host else host
    key = new_key()
    url = f"http://{shown}:{held.getsockname()[1]}/?key={key}"
    made = Theatre(_server(model, load, key, lambda: opened(url)), held, url)
    _set_up.append(made)
    return made


def prepare() -> None:
    """Import the web library. Before any model is opened: nnsight gives `object` attributes, over which the definitions
    of the library's own event loop layer (anyio) would stumble.

    Raises:
        ArgumentError: it is not installed (what to install is said), or a model was opened already.
    """
    if _ready:
        return
    absent = [name for name in ("nicegui", "uvicorn") if find_spec(name) is None]
    if absent:
        raise ArgumentError(
            f"the theatre needs the extra `theatre` ({absent[0]} is missing): pip install 'resid-surgery[theatre]'."
        )
    if "nnsight" in sys.modules:
        raise ArgumentError(
            "the theatre must be prepared before a model is opened in this process: call "
            "resid_surgery.views.theatre_server.prepare() first, or use `resid-surgery serve`."
        )
    import anyio
    import nicegui
    import uvicorn

    anyio.run(anyio.sleep, 0)
    _ready.extend((nicegui, uvicorn))


def _server(model: OpenedModel, load: str, key: str, opened: Callable[[], Any]) -> Any:
    import uvicorn

    from resid_surgery.views.theatre_page import application

    guarded = Guard(application(model, load, opened), key)
    return uvicorn.Server(uvicorn.Config(guarded, log_level="warning", lifespan="on", server_header=False,
                                         ws="websockets-sansio", timeout_graceful_shutdown=2))  # fmt: skip
