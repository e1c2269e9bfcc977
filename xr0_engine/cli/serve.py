"""`xr0 serve`: a checkpoint for robots to reach over the network."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from xr0_engine.cli.seeing import Rerun, check_rerun

if TYPE_CHECKING:
    from xr0_engine.engine import Engine
    from xr0_engine.serve.server import Server


def serve(
    checkpoint: Annotated[str | None, typer.Argument(help="Checkpoint folder, or a Hugging Face hub id.")] = None,
    export: Annotated[Path | None, typer.Option(help="Serve a folder of `xr0 export` instead of a checkpoint.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    robot_type: Annotated[
        str | None, typer.Option(help="Serve this one alone: requests need not name it. All, if not given.")
    ] = None,
    embodiment: Annotated[
        str | None,
        typer.Option(help="Views and layout: a built-in profile or your own YAML file. Follows from the robot type."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32; an export has its own.")] = "bfloat16",
    backend: Annotated[str, typer.Option(help="auto, reference or triton; of an export onnx or tensorrt.")] = "auto",
    image_size: Annotated[
        str, typer.Option(metavar="WIDTHxHEIGHT", help="Of the robot's images, to warm up with.")
    ] = "640x480",
    max_prefix: Annotated[
        int | None,
        typer.Option(min=0, help="Longest prefix taken; by default what the checkpoint was trained with."),
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="API keys, one a line; also from XR0_API_KEYS, with commas.")
    ] = None,
    allow_anyone: Annotated[
        bool, typer.Option("--allow-anyone", help="Without keys, serve other machines all the same.")
    ] = False,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE.pem", help="Certificate, for wss://.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE.pem", help="Its private key.")] = None,
    max_clients: Annotated[int, typer.Option(min=1, help="Connected at once.")] = 32,
    max_clients_per_key: Annotated[
        int | None,
        typer.Option(min=1, help="Of them, with one key; by default all but two places for each other key."),
    ] = None,
    max_inference_s: Annotated[
        float, typer.Option(min=0.1, help="Seconds; /healthz is 503 while one inference takes longer.")
    ] = 30.0,
    max_unhealthy_s: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="Seconds; once /healthz has told a fault for so long, end with exit code 1, for who starts it again. "
            "Without it, it goes on.",
        ),
    ] = None,
    host_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name of this machine, for its pages without keys; may be repeated."),
    ] = None,
    max_rate: Annotated[float, typer.Option(min=0.1, help="Requests per second of one client.")] = 200.0,
    legacy_pickle: Annotated[
        bool, typer.Option("--legacy-pickle", help="Also speak the released TCP protocol, through a safe unpickler.")
    ] = False,
    legacy_npz: Annotated[
        bool,
        typer.Option("--legacy-npz", help="Also speak Xiaomi-Robotics-1's, on the same port: archives of arrays."),
    ] = False,
    legacy_port: Annotated[int, typer.Option(min=1, max=65535, help="Their port.")] = 10086,
    legacy_ranks: Annotated[
        int, typer.Option(min=1, help="Their ports, one after the other: CALVIN's rank r takes --legacy-port + r.")
    ] = 1,
    ray: Annotated[
        bool, typer.Option("--ray", help="Replicas of the engine on Ray Serve, one per GPU (extra `ray`).")
    ] = False,
    replicas: Annotated[int, typer.Option(min=1, help="With --ray: how many there always are.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="With --ray: how many there may be; as many as --replicas.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="With --ray: requests inferred together.")] = 4,
    guard: Annotated[
        str | None,
        typer.Option(metavar="FILE|none", help="Thresholds to warn by; guard.json of the checkpoint if it has one."),
    ] = None,
    max_message_mb: Annotated[int, typer.Option(min=1, help="Largest request, in MiB.")] = 32,
    rerun: Rerun = None,
) -> None:
    """Serve chunks over websockets: to xr0_engine.Client, to openpi's client, and a status page to browsers.

    `xr0 serve CHECKPOINT`, then open http://localhost:8000. SIGTERM or Ctrl-C answers what was asked, then ends.
    """
    from xr0_engine import env
    from xr0_engine.drive.guarding import guard_file
    from xr0_engine.serve.access import read_keys, tls_context
    from xr0_engine.serve.server import Server
    from xr0_engine.serve.service import LEGACY_FORMATS, ServerConfig
    from xr0_engine.serve.worker import EngineThread

    if (checkpoint is None) == (export is None):
        raise ValueError("CHECKPOINT, --export: expected one of them")
    size = read_size(image_size)
    check_rerun(rerun)
    released = {"pickle": legacy_pickle, "npz": legacy_npz}
    formats = tuple(name for name, is_spoken in released.items() if is_spoken)
    thresholds = guard_file(guard, checkpoint)
    config = ServerConfig(
        host=host,
        port=port,
        keys=read_keys(api_keys, env.api_keys()),
        allow_anyone=allow_anyone,
        tls=tls_context(tls_cert, tls_key),
        max_clients=max_clients,
        max_clients_per_key=max_clients_per_key,
        max_inference_s=max_inference_s,
        max_unhealthy_s=max_unhealthy_s,
        host_names=tuple(host_name or ()),
        max_message_bytes=max_message_mb << 20,
        max_requests_per_s=max_rate,
        max_prefix=max_prefix,
        legacy_port=legacy_port if formats else None,
        legacy_ranks=legacy_ranks,
        legacy_formats=formats or LEGACY_FORMATS,
        guard=thresholds,
    )

    def load() -> Engine:
        from xr0_engine.engine import Engine

        if export is not None:
            engine = Engine.from_export(export, device, backend, embodiment)
        else:
            assert checkpoint is not None
            engine = Engine.from_pretrained(checkpoint, device, dtype, backend, embodiment)
        if thresholds is not None:
            _fit_guard(thresholds, engine)
        return engine

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    view = None
    if rerun is not None:
        from xr0_engine.viz import ServiceView

        view = ServiceView(rerun, f"xr0 serve {checkpoint or export}")
    if not ray:
        run(Server(EngineThread(load, size, robot_type), config, view))
        return
    from xr0_engine.serve.replicas import RayOptions, RayReplicas

    options = RayOptions(replicas, max_replicas or replicas, gpus=_gpus_per_replica(device), max_batch=max_batch)
    run(Server(RayReplicas(load, options, size, robot_type), config, view))


def _fit_guard(path: Path, engine: Engine) -> None:
    """Have the engine tell what a guard goes by, where it can. Raises FileError for another checkpoint's thresholds."""
    from xr0_engine.drive.guarding import guard_of
    from xr0_engine.guard import read_guard, statistics_digest
    from xr0_engine.model.xr0 import tell_bend

    for name in read_guard(path).keys() & set(engine.robot_types):
        statistics = engine.statistics[name]
        guard_of(path, name, engine.robot_info(name), statistics_digest(statistics.mean, statistics.std))
    tell_bend(engine.model)


def _gpus_per_replica(device: str) -> int:
    """A replica has a GPU to itself, which it sees as its only one."""
    from xr0_engine.backend import resolve_device

    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda beside --ray, which deals the GPUs out, got {device!r}")
    return int(resolve_device(device).type == "cuda")


def run(server: Server, announce: Callable[[int], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, and end within the server's drain_s of it, whatever its threads are at; a second
    one ends the process at once. So it ends, with exit status 1, once it has been unhealthy for max_unhealthy_s.
    announce: told the port once it is open; None prints where the server is."""
    import asyncio

    faults: list[str] = []

    async def until_signal() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def shut_down() -> None:
            _end_within(server.config.drain_s)
            stop.set()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_DFL)

        async def watch_health(lasting_s: float) -> None:
            faults.append(await server.until_unhealthy(lasting_s))
            logging.getLogger("xr0_engine.serve").error("unhealthy for %g s, so it ends: %s", lasting_s, faults[0])
            shut_down()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, shut_down)
        lasting_s = server.config.max_unhealthy_s
        # Kept here, as asyncio keeps none.
        watching = [] if lasting_s is None else [asyncio.create_task(watch_health(lasting_s))]
        await server.run(stop, announce or (lambda port: _announce(server, port)))
        for task in watching:
            task.cancel()

    # Of whatever pictures clients send; each text is remembered for good.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    asyncio.run(until_signal())
    # Taking Python down takes seconds with torch in it, and a thread that is at work would go on in the ruins.
    is_idle = all(thread.name != "xr0-engine" for thread in threading.enumerate())
    if not is_idle:
        # One that was still being loaded owes nobody an answer.
        _end_now(int(server.metadata is not None), "the engine did not end in time")
    _end_now(len(faults))


MARGIN_S = 0.3
"""Before the time is up."""


def _end_within(seconds: float) -> None:
    """Have the process end by then."""
    reason = f"not done {seconds - MARGIN_S:g} s after it was told to end"
    timer = threading.Timer(max(seconds - MARGIN_S, 0.1), _end_now, (1, reason))
    timer.daemon = True
    timer.start()
    # A thread needs Python's lock; the kernel does not.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _end_now(status: int, reason: str | None = None) -> NoReturn:
    if reason:
        logging.getLogger("xr0_engine.serve").error("%s: the process ends without it", reason)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _announce(server: Server, port: int) -> None:
    config = server.config
    secure = "s" if config.tls is not None else ""
    print(
        f"listening on ws{secure}://{config.host}:{port}, status page http{secure}://{config.host}:{port}", flush=True
    )


def read_size(text: str) -> tuple[int, int]:
    """What --image-size says, WIDTHxHEIGHT, as (height, width). Raises ValueError."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) > 0 and int(height) > 0):
        raise ValueError(f"--image-size: expected WIDTHxHEIGHT such as 640x480, got {text!r}")
    return int(height), int(width)
