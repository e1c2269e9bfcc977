"""Policies of xr0-engine in LeRobot: importing this registers the policy type `xr0`."""

from lerobot_policy_xr0.configuration_xr0 import XR0Config

__all__ = ["XR0Config"]
