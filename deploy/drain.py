"""`expertline drain`: make an engine or a node leave, and wait until it has."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from deploy.errors import OperationError, UsageError
from deploy.local_ray import joined_ray

_POLL_S = 0.2
_CALL_S = 10.0


def drain_engine(engine: str, timeout_s: float, console: Console) -> None:
    """One engine finishes or hands over what it runs and ends; Serve starts another.

    Args:
        engine: its id, or an unmistakable beginning of it.

    Raises:
        UsageError: there is no such engine, or no server.
        OperationError: it did not leave in time.
    """
    with _engines() as handle:
        locations = _locations(handle)
        found = [each for each in locations if each.startswith(engine)]
        if len(found) != 1:
            known = ", ".join(sorted(locations))
            raise UsageError(f"no single engine {engine!r}; there is: {known}")
        if not any(handle.broadcast("drain", found[0]).results(timeout_s=_CALL_S)):
            raise OperationError(f"engine {found[0]} could not be told")
        _wait_gone(handle, set(found), timeout_s, console)


def drain_node(node: str, timeout_s: float, console: Console) -> None:
    """A node takes nothing new from now on, and every engine with a rank on it leaves.

    Args:
        node: its address, or the beginning of its id.

    Raises:
        UsageError: there is no such node, or no server.
        OperationError: Ray refused, or an engine did not leave in time.
    """
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # a compiled module
    from ray.core.generated import autoscaler_pb2

    with _engines() as handle:
        nodes = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}
        found = [i for i, address in nodes.items() if address == node or i.startswith(node)]
        if len(found) != 1:
            known = ", ".join(sorted(nodes.values()))
            raise UsageError(f"no single node {node!r}; there is: {known}")
        engines = {engine for engine, on in _locations(handle).items() if found[0] in on}
        gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
        deadline_ms = round((time.time() + timeout_s) * 1000)
        reason = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]
        accepted, why = gcs.drain_node(found[0], reason, "expertline drain", deadline_ms)
        if not accepted:
            raise OperationError(f"node {node} does not drain: {why}")
        if not engines:
            console.print(f"node {node} drains; no engine was on it", highlight=False)
            return
        _wait_gone(handle, engines, timeout_s, console)


@contextmanager
def _engines() -> Iterator[Any]:
    """The engines' handle in the cluster that RAY_ADDRESS names, else the one on this machine."""
    with joined_ray():
        from ray import serve
        from ray.serve.exceptions import RayServeException

        from serving.app import APP_NAME

        try:
            yield serve.get_deployment_handle("Engine", APP_NAME)
        except RayServeException as error:
            raise UsageError(f"no server runs in this cluster ({error})") from error


def _locations(handle: Any) -> dict[str, list[str]]:
    """Each engine's id, and its nodes."""
    return dict(handle.broadcast("location").results(timeout_s=_CALL_S))


def _wait_gone(handle: Any, engines: set[str], timeout_s: float, console: Console) -> None:
    """Until none of these is left; an engine that Serve has stopped is out of its handle."""
    from serving.app import APP_NAME

    started = time.monotonic()
    names = ", ".join(sorted(engines))
    while left := engines & _present(APP_NAME):
        if time.monotonic() - started > timeout_s:
            text = ", ".join(sorted(left))
            raise OperationError(f"still there after {timeout_s:.0f} s: {text}")
        time.sleep(_POLL_S)
    seconds = time.monotonic() - started
    console.print(f"drained {names} in {seconds:.1f} s", highlight=False, soft_wrap=True)


def _present(app: str) -> set[str]:
    """Engines that the router knows; one that has left is not among them."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        router = serve.get_deployment_handle("Router", app)
        status: dict[str, Any] = router.status.remote().result(timeout_s=_CALL_S)
    except (RayServeException, TimeoutError) as error:
        raise OperationError(f"the router does not answer ({type(error).__name__})") from error
    return set(status["engines"])
