"""What a machine says of itself: what results depend on, and nothing that tells it from another of its kind."""

from __future__ import annotations

import json
import re

import pytest
import torch

from xr0_engine.bench.machine import facts
from xr0_engine.bench.results import environment

LINE = "NVIDIA H200, 580.95.05, 96.00.BC.00.02, 9.0, 143771 MiB, 4 MiB, 700.00 W, 700.00 W, 1980 MHz, [N/A]"


def test_a_cpu_is_told_of_as_results_tell_of_it():
    told = json.loads(json.dumps(facts.examine("cpu")))
    assert told["environment"] == json.loads(json.dumps(environment("cpu")))
    assert told["gpu"] is None
    assert told["smi"] == {}
    assert set(told["optional"]) == set(facts.OPTIONAL)
    assert told["disk_free_bytes"] > 0
    assert told["memory_available_bytes"] > 2**20


def test_what_nvidia_smi_tells():
    told = facts.read_smi(LINE)
    assert told["driver_version"] == "580.95.05"
    assert told["clocks.max.sm"] == "1980 MHz"
    assert "clocks.max.memory" not in told
    assert facts.read_smi(None) == {}


def test_nothing_is_asked_that_tells_one_gpu_from_another():
    assert [field for field in facts.SMI if re.search(r"uuid|serial|bus|id$|name$", field) and field != "name"] == []


@pytest.mark.gpu
def test_a_gpu_is_told_of():
    told = facts.examine("cuda")
    assert told["gpu"]["name"] == torch.cuda.get_device_name()
    assert told["gpu"]["memory_bytes"] > 2**30
    assert told["smi"]["name"]
    assert str(torch.cuda.get_device_properties(0).uuid) not in json.dumps(told)
