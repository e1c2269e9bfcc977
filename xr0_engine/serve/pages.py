"""What the server answers over plain HTTP, on the port of its websockets (docs/serving.md has the table of paths)."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from http import HTTPStatus
from importlib.resources import files

from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from xr0_engine.robot.history import newest
from xr0_engine.serve.access import find_key, is_local_name, is_own_name
from xr0_engine.serve.images import encode_jpeg
from xr0_engine.serve.service import Service
from xr0_engine.types import Observation

FRAME_QUALITY = 80

_SINGLE = (
    *("Host", "Authorization", "Origin", "Upgrade", "Content-Length", "Transfer-Encoding"),
    *("Sec-Fetch-Site", "Sec-Fetch-Mode", "Sec-Fetch-Dest", "Sec-WebSocket-Key", "Sec-WebSocket-Version"),
)


async def answer_http(service: Service, connection: ServerConnection, request: Request) -> Response | None:
    """The answer to a plain HTTP request, or to a websocket that is not let in; None lets it in."""
    path = request.path.partition("?")[0]
    if doubled := next((name for name in _SINGLE if len(request.headers.get_all(name)) > 1), None):
        # Which of them counts, whoever stands between might see otherwise.
        return _response(HTTPStatus.BAD_REQUEST, f"{doubled}: expected this header once, got it twice".encode())
    if path == "/healthz":
        status, text = service.health()
        return _response(status, text.encode())
    if fault := _stranger(service, request.headers):
        service.monitor.rejected("unauthorized")
        return _response(HTTPStatus.FORBIDDEN, fault.encode())
    key = None
    if service.config.keys:
        authorization = request.headers.get("Authorization")
        key = find_key(authorization, service.config.keys)
        if key is None:
            service.monitor.rejected("unauthorized")
            if authorization is not None:
                await asyncio.sleep(service.wrong_keys.tried(str(connection.remote_address[0])))
            response = _response(HTTPStatus.UNAUTHORIZED, b"expected an API key in the Authorization header")
            response.headers["WWW-Authenticate"] = 'Basic realm="xr0"'
            return response
    if "Upgrade" in request.headers:
        if service.draining:
            return _response(HTTPStatus.SERVICE_UNAVAILABLE, b"the server is shutting down")
        if why := service.why_full(key):
            service.monitor.rejected("too_many_clients")
            return _response(HTTPStatus.SERVICE_UNAVAILABLE, why.encode())
        service.keys_of[connection] = key
        return None
    if path == "/":
        page = files("xr0_engine.serve").joinpath("page.html").read_bytes()
        return _response(HTTPStatus.OK, page, "text/html; charset=utf-8")
    if path == "/metrics":
        return _response(HTTPStatus.OK, service.monitor.prometheus(), "text/plain; version=0.0.4; charset=utf-8")
    if path == "/status.json":
        return _response(HTTPStatus.OK, _status(service), "application/json")
    if path.startswith("/frames/"):
        return await _frame(service, path)
    return _response(HTTPStatus.NOT_FOUND, b"not found")


def _stranger(service: Service, headers: Headers) -> str | None:
    """Why a request is none of somebody who came here on purpose, but of a page of another site; None if it is."""
    origin, host = headers.get("Origin"), headers.get("Host")
    # Browsers say where a websocket is opened from, and no page of ours opens one; other programs call a server of
    # this machine's network by whatever name they have for it.
    is_websocket = "Upgrade" in headers
    if is_websocket and origin is not None:
        return "expected no origin: web pages cannot open websockets here"
    if service.is_for_this_machine and not is_local_name(host):
        return "expected this machine's own name as the host"
    if not service.config.keys and not is_websocket and not is_own_name(host, service.config.host_names):
        return "expected an address of this machine, or a name of its own, as the host: --host-name tells others"
    if origin is not None and origin.partition("://")[2].lower() != (host or "").strip().lower():
        return "expected no other site's page to ask"
    site = headers.get("Sec-Fetch-Site", "none")
    follows_link = headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest") == "document"
    if site not in ("none", "same-origin") and not follows_link:
        return "expected no other site's page to ask"
    return None


def _status(service: Service) -> bytes:
    status, text = service.health()
    robots = {} if service.metadata is None else service.metadata.robots
    about = {
        "state": "unhealthy" if service.state == "ready" and status != HTTPStatus.OK else service.state,
        "health": text,
        "backend": service.network_backend,
        "max_clients": service.config.max_clients,
    }
    return json.dumps({**about, **service.monitor.snapshot(robots)}, allow_nan=False).encode()


async def _frame(service: Service, path: str) -> Response:
    """/frames/CLIENT/VIEW: what the client saw last, as JPEG."""
    _, _, number, view = (*path.split("/", 3), "")[:4]
    record = (
        service.monitor.record(int(number)) if number.isascii() and number.isdecimal() and len(number) < 20 else None
    )
    observation = record.last_observation if record is not None else None
    if not isinstance(observation, Observation) or view not in observation.images:
        return _response(HTTPStatus.NOT_FOUND, b"no such frame")
    image = newest(observation.images[view])
    work = partial(encode_jpeg, image, FRAME_QUALITY)
    if service.pages.why_not(0):
        return _response(HTTPStatus.TOO_MANY_REQUESTS, b"expected fewer or smaller frames")
    data = await service.decoder.run(work, image.shape[0] * image.shape[1], service.pages)
    return _response(HTTPStatus.OK, data, "image/jpeg")


def _response(status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8") -> Response:
    headers = Headers(
        {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Connection": "close",
            "X-Content-Type-Options": "nosniff",
            # Pages of other sites get no picture to show either.
            "Cross-Origin-Resource-Policy": "same-origin",
            # The page is complete in itself, and shows in no other site's frame.
            "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' data:; "
            "frame-ancestors 'none'",
        }
    )
    return Response(status.value, status.phrase, headers, body)
