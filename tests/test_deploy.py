"""What deploy/ and docs/deploy.md tell people to run is held against the program; the robot's program runs."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from tests.serve.support import EchoEngine, backend
from tests.support import ROOT
from xr0_engine.cli import app
from xr0_engine.executor import read_recording
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig

DEPLOY = ROOT / "deploy"
PAGE = ROOT / "docs" / "deploy.md"
UNITS = sorted(DEPLOY.glob("*.service"))
KEPT = ("Containerfile", "compose.yaml", "robot.py")
# Of the click that typer comes with.
UsageError = typer.BadParameter.__mro__[1]


def parse(words):
    """A command line of xr0, read as the program would read it, and not run. Raises UsageError."""
    command = typer.main.get_command(app)
    context = command.make_context("xr0", list(words))
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    return context


def unit(path):
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters="=")
    parser.optionxform = str
    parser.read_string(path.read_text())
    return parser


def blocks():
    return "\n".join(re.findall(r"```\n(.*?)```", PAGE.read_text(), re.DOTALL)).splitlines()


def section(numbers):
    """The page's text on one machine."""
    parts = re.split(r"(?m)^## (\d)\. ", PAGE.read_text())
    return "".join(part for number, part in zip(parts[1::2], parts[2::2], strict=True) if number in numbers)


# On the machine itself, not on another (`gpu-box:/etc/xr0`).
FOLDER = re.compile(r"(?<![\w:])/(?:etc|opt)/xr0\b")


@pytest.mark.parametrize(("numbers", "name"), [("1", "xr0-serve.service"), ("23", "xr0-robot.service")])
def test_folders_are_made_before_they_are_used(numbers, name):
    made = set()
    for block in re.findall(r"```\n(.*?)```", section(numbers), re.DOTALL):
        for line in block.splitlines():
            for command in line.split("  #")[0].split("&&"):
                made |= set(re.findall(r"^\s*(?:mkdir -p|python3 -m venv) (/\S+)", command))
                assert set(FOLDER.findall(command)) <= made, line
    used = set(FOLDER.findall((DEPLOY / name).read_text()))
    assert used == made == {"/etc/xr0", "/opt/xr0"}


def commands():
    """Each `xr0 ...` of the page, its units and its compose file."""
    found = [line.split("  #")[0] for line in blocks() if line.startswith("xr0 ")]
    found += [unit(path)["Service"]["ExecStart"] for path in UNITS]
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["xr0"]
    found.append(shlex.join(["xr0", *service["command"]]))
    return [line for line in found if Path(line.split()[0]).name == "xr0"]


@pytest.mark.parametrize("line", commands())
def test_commands_are_the_programs(line):
    assert parse(shlex.split(line)[1:]).params


def test_there_are_commands():
    assert len(commands()) >= 7


@pytest.mark.parametrize("line", ["serve /data --hots 0.0.0.0", "doctro", "drive --seconds soon", "data vew x"])
def test_what_is_no_command_is_noticed(line):
    with pytest.raises(UsageError):
        parse(line.split())


def options_of_robot():
    told = subprocess.run([sys.executable, DEPLOY / "robot.py", "--help"], capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z-]+", told.stdout))


def test_the_robots_program_has_the_options_that_it_is_given():
    asked = [line for line in blocks() if "/opt/xr0/robot.py" in line]
    asked.append(unit(DEPLOY / "xr0-robot.service")["Service"]["ExecStart"])
    assert len(asked) == 2
    for line in asked:
        assert set(re.findall(r"(--[a-z-]+)", line)) <= options_of_robot()


@pytest.mark.parametrize("mode", ["async", "guided"])
def test_the_robots_program_runs(tmp_path, mode):
    engine = EchoEngine()
    if mode == "guided":
        engine.max_prefix = 0
    with BackgroundServer(backend(engine), ServerConfig(port=0)) as server:
        given = ["--server", server.url, "--robot-type", "bimanual", "--record", tmp_path, "--seconds", "1"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, DEPLOY / "robot.py", *given], capture_output=True, text=True, env=environment, timeout=60
        )
    # 1 says that a busy machine was late, not that something is wrong.
    assert done.returncode in (0, 1), done.stderr
    assert "ended: time" in done.stderr
    (path,) = tmp_path.iterdir()
    recording = read_recording(path)
    assert recording.header["settings"]["mode"] == mode
    if mode == "async":
        assert recording.lines["chunk"]
        assert recording.lines["step"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units_are_what_systemd_takes(path, tmp_path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze")
    # It looks for the program, which is not installed here.
    text = re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", path.read_text())
    copy = tmp_path / path.name
    copy.write_text(text)
    done = subprocess.run([analyze, "verify", "--man=no", copy], capture_output=True, text=True)
    assert (done.returncode, [line for line in done.stderr.splitlines() if path.name in line]) == (0, [])


def test_a_server_that_stays_unhealthy_is_started_again():
    """Neither systemd nor Compose looks at its health: it ends by itself, and is not served by the CPU then."""
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["xr0"]
    started = unit(DEPLOY / "xr0-serve.service")["Service"]
    assert (service["restart"], started["Restart"]) == ("unless-stopped", "on-failure")
    for line in (shlex.split(started["ExecStart"])[1:], service["command"]):
        asked = parse(line).params
        assert asked["device"] == "cuda"
        assert 0 < asked["max_unhealthy_s"] <= 60


def test_a_robot_is_started_by_a_person():
    robot = unit(DEPLOY / "xr0-robot.service")
    assert robot["Service"]["Restart"] == "no"
    assert robot["Service"]["KillSignal"] == "SIGINT"


def test_compose_refers_to_what_is_there():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    service = compose["services"]["xr0"]
    assert (DEPLOY / service["build"]["context"]).resolve() == ROOT.resolve()
    assert (ROOT / service["build"]["dockerfile"]).is_file()
    assert set(service["secrets"]) == set(compose["secrets"])
    mounted = {f"/run/secrets/{name}" for name in service["secrets"]}
    used = {word.partition("=")[2] for word in service["command"] if "/run/secrets/" in word}
    assert used == mounted
    assert any(volume.endswith(":/checkpoint:ro") for volume in service["volumes"])
    compile(service["healthcheck"]["test"][-1], "healthcheck", "exec")
    # Longer than the server takes.
    for given in (service["stop_grace_period"], unit(DEPLOY / "xr0-serve.service")["Service"]["TimeoutStopSec"]):
        assert float(given.removesuffix("s")) > ServerConfig().drain_s


def ignored(file):
    """An ignore file's patterns for this folder."""
    return [line for line in (ROOT / file).read_text().splitlines() if line.startswith("deploy/")]


@pytest.mark.parametrize("file", [".gitignore", ".dockerignore"])
def test_secrets_are_in_no_commit_and_no_image(file):
    """What Compose reads from deploy/, and what else may lie there while a machine is set up."""
    named = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["secrets"].values()
    paths = [Path("deploy", secret["file"]) for secret in named]
    assert {path.name for path in paths} == {"api_keys.txt", "cert.pem", "key.pem"}
    # What Compose and the units read their variables from, XR0_API_KEY among them.
    paths += [Path("deploy", name) for name in (".env", "robot.env", "serve.env")]
    patterns = ignored(file)
    assert [path for path in paths if not any(path.match(pattern) for pattern in patterns)] == []
    kept = [path.relative_to(ROOT) for path in (*UNITS, *(DEPLOY / name for name in KEPT))]
    assert [path for path in kept if any(path.match(pattern) for pattern in patterns)] == []


def test_git_ignores_secrets():
    """By git's own word, where this is a checkout."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout")
    asked = [f"deploy/{name}" for name in ("api_keys.txt", "key.pem", ".env", *KEPT)]
    done = subprocess.run([git, "-C", ROOT, "check-ignore", *asked], capture_output=True, text=True)
    assert done.stdout.split() == asked[:3]


def test_the_container_file_refers_to_what_is_there():
    text = (DEPLOY / "Containerfile").read_text()
    tomllib = pytest.importorskip("tomllib", reason="part of Python 3.11 and later")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = re.search(r"(?m)^ARG EXTRAS=(\S+)$", text)[1].split(",")
    assert set(extras) <= set(project["optional-dependencies"])
    images = set(re.findall(r"(?m)^FROM \S+/python:(\d\.\d+)", text))
    assert {f"Programming Language :: Python :: {version}" for version in images} <= set(project["classifiers"])
    for copied in re.findall(r"(?m)^COPY (?!--)(\S+) ", text):
        assert (ROOT / copied).exists()
    assert 'ENTRYPOINT ["xr0"]' in text
    assert "xr0" in project["scripts"]
