"""What the server answers over plain HTTP, on the port of its websockets (docs/serving.md has the table of paths)."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from importlib.resources import files

from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from xr0_engine.serve.access import is_allowed, is_local_name
from xr0_engine.serve.images import encode_jpeg
from xr0_engine.serve.service import Service
from xr0_engine.types import Observation

FRAME_QUALITY = 80


async def answer_http(service: Service, request: Request) -> Response | None:
    """The answer to a plain HTTP request, or to a websocket that is not let in; None lets it in."""
    path = request.path.partition("?")[0]
    if path == "/healthz":
        status, text = service.health()
        return _response(status, text.encode())
    if service.is_for_this_machine and not is_local_name(request.headers.get("Host")):
        service.monitor.rejected("unauthorized")
        return _response(HTTPStatus.FORBIDDEN, b"expected this machine's own name as the host")
    if not is_allowed(request.headers.get("Authorization"), service.config.keys):
        service.monitor.rejected("unauthorized")
        response = _response(HTTPStatus.UNAUTHORIZED, b"expected an API key in the Authorization header")
        response.headers["WWW-Authenticate"] = 'Basic realm="xr0"'
        return response
    if "Upgrade" in request.headers:
        if service.draining:
            return _response(HTTPStatus.SERVICE_UNAVAILABLE, b"the server is shutting down")
        if service.is_full:
            service.monitor.rejected("too_many_clients")
            return _response(HTTPStatus.SERVICE_UNAVAILABLE, b"too many clients")
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
    record = {str(one): record for one, record in service.monitor.clients.items()}.get(number)
    observation = record.last_observation if record is not None else None
    if not isinstance(observation, Observation) or view not in observation.images:
        return _response(HTTPStatus.NOT_FOUND, b"no such frame")
    data = await asyncio.to_thread(encode_jpeg, observation.images[view], FRAME_QUALITY)
    return _response(HTTPStatus.OK, data, "image/jpeg")


def _response(status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8") -> Response:
    headers = Headers(
        {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Connection": "close",
            "X-Content-Type-Options": "nosniff",
            # The page is complete in itself, and shows in no other site's frame.
            "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' data:; "
            "frame-ancestors 'none'",
        }
    )
    return Response(status.value, status.phrase, headers, body)
