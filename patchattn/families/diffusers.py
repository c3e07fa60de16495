"""Diffusers' attention modules (placeholder until the processor lands)."""

from __future__ import annotations

from typing import Any

from torch import nn


def site(name: str, module: nn.Module) -> Any:
    return None


def attach(site: Any, methods: Any) -> None: ...


def detach(site: Any) -> None: ...


def enable(site: Any, enabled: bool) -> None: ...
