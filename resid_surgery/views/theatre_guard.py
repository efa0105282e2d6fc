"""Who may talk to the theatre: pages that it served itself, to the browser of who started it.

A page elsewhere can make a browser send requests to this machine. It cannot choose their ``Host`` (which defeats DNS
rebinding: the name stays the attacker's) or their ``Origin`` (which defeats cross-site requests and websockets). So:

1. ``Host`` must name the loopback, once.
2. ``Origin``, where there is one, must be that very host; a websocket must have one.
3. What a browser marks as coming from another site (``Sec-Fetch-Site``) is refused, but for opening the page itself.
4. Every request must bring the key of this launch, which another user of this machine does not know: the address that
   is printed holds it, and opening that address exchanges it for a cookie.

Answers tell the browser to load nothing from elsewhere and to show the page in nobody's frame.
"""

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any, final
from urllib.parse import parse_qs

from resid_surgery._check import message
from resid_surgery.errors import ArgumentError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": (
        # Vue compiles the page's own templates in the browser, hence unsafe-eval
        "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "font-src 'self' data:; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


def loopback(host: Any) -> str:
    """The host to bind to.

    Raises:
        ArgumentError: it is not this machine's loopback.
    """
    if not isinstance(host, str) or host not in LOOPBACK:
        do = "The theatre runs what the page asks for, so only this machine may reach it; use ssh -L from elsewhere."
        raise ArgumentError(message("host", "one of " + ", ".join(LOOPBACK), host, do=do))
    return str(host)


def refusal(scope: MutableMapping[str, Any]) -> str:
    """Why a request is refused, or nothing.

    Args:
        scope: of ASGI, of type "http" or "websocket".
    """
    hosts, origins, sites, modes = (_headers(scope, name) for name in
                                    (b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode"))  # fmt: skip
    if len(hosts) != 1 or _name(hosts[0]) not in LOOPBACK:
        return "the Host is not this machine's loopback"
    if len(origins) > 1 or any(origin != f"http://{hosts[0]}" for origin in origins):
        return "the Origin is another page"
    if scope["type"] == "websocket":
        return "" if origins else "a websocket must say its Origin"
    opening = scope["method"] == "GET" and modes == ["navigate"] and scope["path"] == "/"
    if any(site not in ("same-origin", "none") for site in sites) and not opening:
        return "it comes from another site"
    return ""


def _headers(scope: MutableMapping[str, Any], name: bytes) -> list[str]:
    return [value.decode("latin-1").lower() for key, value in scope["headers"] if key.lower() == name]


def _name(host: str) -> str:
    """The name of a host, without its port."""
    name, _, port = host.rpartition(":")
    if not name or host.endswith("]"):
        name, port = host, ""
    if port and not port.isdecimal():
        return ""
    return name[1:-1] if name.startswith("[") and name.endswith("]") else name


@final
class Guard:
    """An ASGI application that lets only the theatre's own pages through to another, to who has the key.

    Attributes:
        app: the guarded one. key: of this launch.
    """

    def __init__(self, app: Any, key: str) -> None:
        self.app, self.key = app, key

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif why := refusal(scope):
            await _refuse(scope["type"], why, send)
        elif self._is(_cookie(scope)):
            await self.app(scope, receive, _marked(send))
        elif scope["type"] == "http" and scope["path"] == "/" and self._is(_asked(scope)):
            kept = f"{_cookie_name(scope)}={self.key}; Path=/; HttpOnly; SameSite=Strict"
            headers = [(b"location", b"/"), (b"set-cookie", kept.encode()), (b"cache-control", b"no-store")]
            await _marked(send)({"type": "http.response.start", "status": 303, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
        else:
            why = "the key of this launch is missing; open the whole address that `resid-surgery serve` printed"
            await _refuse(scope["type"], why, send)

    def _is(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.key.encode())


def new_key() -> str:
    """The key of a launch: 128 bits by chance."""
    return secrets.token_urlsafe(16)


def _asked(scope: MutableMapping[str, Any]) -> str:
    """The key in the address."""
    return str(parse_qs(scope.get("query_string", b"").decode("latin-1")).get("key", [""])[0])


def _cookie(scope: MutableMapping[str, Any]) -> str:
    """The key in the cookie."""
    given = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"cookie"]
    try:
        found = SimpleCookie("; ".join(given)).get(_cookie_name(scope))
    except CookieError:
        return ""
    return str(found.value) if found else ""


def _cookie_name(scope: MutableMapping[str, Any]) -> str:
    """Browsers keep cookies by host, not by port: two theatres must not overwrite one another's."""
    return "resid-surgery-" + _headers(scope, b"host")[0].rpartition(":")[2].rstrip("]")


async def _refuse(kind: str, why: str, send: Send) -> None:
    if kind == "websocket":  # closed before it is accepted: the browser sees status 403
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"x-content-type-options", b"nosniff")]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": f"refused: {why}\n".encode()})


def _marked(send: Send) -> Send:
    """Adds the headers to answers."""

    async def marked(given: Message) -> None:
        if given["type"] == "http.response.start":
            ours = {name.lower().encode(): value.encode() for name, value in HEADERS.items()}
            kept = [(name, value) for name, value in given.get("headers", ()) if name.lower() not in ours]
            given = {**given, "headers": [*kept, *ours.items()]}
        await send(given)

    return marked
