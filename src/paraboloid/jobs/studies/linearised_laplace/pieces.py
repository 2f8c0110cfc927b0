"""Pieces of the study that are kept as they are finished, so that an interrupted run goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paraboloid.jobs.studies.comparing.kept import Kept
from paraboloid.jobs.studies.linearised_laplace.plan import Plan


def once(plan: Plan, make: Callable[[], Any], **what: Any) -> Any:
    """What the plan's file has of a piece, or what is made of it now."""
    shared = {"train": plan.train, "test": plan.test, "epochs": list(plan.epochs)}
    return make() if plan.keep is None else Kept(plan.keep).once({**shared, **what}, make)
