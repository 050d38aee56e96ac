"""ROOM: the deployer. Deployments, their generations, and the loop that makes what runs what is wanted."""

from __future__ import annotations

from ..kernel.service import Service
from .api import routes
from .converge import CONVERGE, SWEEP
from .handlers import HANDLERS
from .model import Deployment, Sweep

SERVICE = Service("deployer", documents=(Deployment, Sweep), owns=("/v1/deployments",), routes=routes,
                  handlers=HANDLERS, loops=(CONVERGE, SWEEP))
