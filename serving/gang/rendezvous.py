"""What the ranks of a generation must tell each other so that their groups can form."""

import contextlib
from dataclasses import dataclass

from serving.gang.fabric import Fabric, FabricError, GlooFabric, host_store, join_store
from serving.gang.meeting import MOST_RANKS, Meeting, host_identity, join
from serving.gang.messages import RankSpec

_STORE = "store"
_HOST = "host"  # followed by the cell


@dataclass(slots=True)
class Fabrics:
    """The groups that a rank belongs to; None where it would be alone."""

    column: Fabric | None
    peers: Fabric | None

    def abort(self) -> None:
        for fabric in (self.column, self.peers):
            if fabric is not None:
                fabric.abort()


class Rendezvous:
    """One rank's part in the beginning of one generation."""

    def __init__(self, spec: RankSpec) -> None:
        self._spec = spec
        self._alone = spec.stages * spec.ranks == 1
        self._leads: dict[str, int] = {}  # groups, and how many ranks they have
        if spec.stages > 1 and spec.stage == 0:
            self._leads[f"column{spec.rank}"] = spec.stages
        if spec.ranks > 1 and spec.rank == 0:
            self._leads[f"stage{spec.stage}"] = spec.ranks
        self._store: object | None = None
        self._meetings: dict[str, Meeting] = {}
        self._led: set[str] = set()  # of these, those that have begun

    def offers(self) -> dict[str, bytes]:
        """This rank's contributions.

        On GPUs the NCCL ids of groups that it leads. On CPUs a store's address for gloo; and,
        for shared memory, the rank's host and where the groups that it leads meet.
        """
        if self._spec.device == "cuda":
            from serving.gang.nccl import new_unique_id

            return {name: new_unique_id() for name in self._leads}
        offers = {} if self._alone else self._memory_offers()
        if self._spec.stage == 0 and self._spec.rank == 0 and not self._alone:
            self._store, port = host_store(self._spec.host, self._spec.step_timeout_s)
            offers[_STORE] = f"{self._spec.host} {port}".encode()
        return offers

    def _memory_offers(self) -> dict[str, bytes]:
        identity = host_identity(self._spec.host) if self._spec.fabric != "gloo" else None
        if identity is None:
            return {}
        for name, size in self._leads.items():
            if size <= MOST_RANKS:
                with contextlib.suppress(OSError):  # not on this system: then all use gloo
                    self._meetings[name] = Meeting(size)
        meetings = {name: meeting.address for name, meeting in self._meetings.items()}
        return {_HOST + self._spec.cell: identity} | meetings

    def abort(self) -> None:
        """Lets `form` fail soon, from another thread."""
        for meeting in list(self._meetings.values()):
            meeting.abort()

    def form(self, offers: dict[str, bytes]) -> Fabrics:
        """Joins the rank's groups; waits until all their members have.

        Raises:
            FabricError: they did not come.
        """
        spec = self._spec
        fabrics = Fabrics(None, None)
        try:
            if spec.stages > 1:
                cells = [f"{stage}.{spec.rank}" for stage in range(spec.stages)]
                fabrics.column = self._group(f"column{spec.rank}", spec.stage, cells, offers)
            if spec.ranks > 1:
                cells = [f"{spec.stage}.{rank}" for rank in range(spec.ranks)]
                fabrics.peers = self._group(f"stage{spec.stage}", spec.rank, cells, offers)
        except FabricError:
            fabrics.abort()  # the one that did form, so that its other members see the end of it
            raise
        finally:
            self.close()
        return fabrics

    def close(self) -> None:
        """Ends the meetings that did not begin: of groups that are spread over hosts, say."""
        for name in self._meetings.keys() - self._led:
            self._led.add(name)
            self._meetings[name].close()

    def _group(self, name: str, rank: int, cells: list[str], offers: dict[str, bytes]) -> Fabric:
        """Joins a group; all its members see the same offers, and so choose the same fabric."""
        spec, size = self._spec, len(cells)
        if spec.device == "cuda":
            from serving.gang.nccl import NcclFabric

            return NcclFabric(offers[name], rank, size)
        hosts = {offers.get(_HOST + cell) for cell in cells}
        if name in offers and len(hosts) == 1 and None not in hosts:
            if name in self._meetings:
                self._led.add(name)
                return self._meetings[name].lead(spec.step_timeout_s)
            return join(offers[name], rank, size, spec.step_timeout_s)
        if spec.fabric == "shared_memory":
            raise FabricError(f"the ranks of {name} cannot share memory: gang.fabric must be gloo")
        host, port = offers[_STORE].decode().split()
        store = join_store(host, int(port), spec.step_timeout_s)
        return GlooFabric(store, name, rank, size, spec.host, spec.step_timeout_s)
