"""Chunks to a stream of actions at the robot's control rate, while the next chunk is still being computed.

NumPy only: a robot's computer needs no torch. docs/realtime.md explains the terms; `Executor` is where to start.
"""

from __future__ import annotations

from xr0_engine.executor.clock import Clock, SystemClock, VirtualClock
from xr0_engine.executor.executor import Executor
from xr0_engine.executor.fit import frame_for
from xr0_engine.executor.interfaces import GuidedPolicy, Mistimed, Policy, Robot, SensorsNotReady, Snapshot, Watcher
from xr0_engine.executor.limits import Limits
from xr0_engine.executor.recording import Notes, Recorder, Recording, Several, read_recording
from xr0_engine.executor.report import Report
from xr0_engine.executor.sensors import Synchronizer
from xr0_engine.executor.settings import Settings
from xr0_engine.executor.worker import DelayedWorker, ThreadWorker, Worker
from xr0_engine.robot.layouts import BimanualFrame, Frame, PlainFrame

__all__ = [
    "BimanualFrame",
    "Clock",
    "DelayedWorker",
    "Executor",
    "Frame",
    "GuidedPolicy",
    "Limits",
    "Mistimed",
    "Notes",
    "PlainFrame",
    "Policy",
    "Recorder",
    "Recording",
    "Report",
    "Robot",
    "SensorsNotReady",
    "Settings",
    "Several",
    "Snapshot",
    "Synchronizer",
    "SystemClock",
    "ThreadWorker",
    "VirtualClock",
    "Watcher",
    "Worker",
    "frame_for",
    "read_recording",
]
