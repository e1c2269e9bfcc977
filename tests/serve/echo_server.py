"""A server of the echo engine as a process of its own, to be killed: python -m tests.serve.echo_server PORT."""

from __future__ import annotations

import asyncio
import sys

from tests.serve.support import EchoEngine, backend
from xr0_engine.serve.server import Server
from xr0_engine.serve.service import ServerConfig


async def main(port: int) -> None:
    server = Server(backend(EchoEngine()), ServerConfig(port=port))
    await server.run(asyncio.Event(), lambda port: print(port, flush=True))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
