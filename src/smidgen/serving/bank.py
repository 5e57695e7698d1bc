"""Bank: deltas by name, in memory as far as there is room, the others where they lie."""

from __future__ import annotations

import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Lock

from smidgen.common.byte_sizes import parse_bytes
from smidgen.common.errors import DeltaError, nearest
from smidgen.delta.delta import Delta
from smidgen.serving.delta_store import NAME, DeltaStore, check_name
from smidgen.serving.errors import UnknownDeltaError
from smidgen.serving.tenants import Tenant

Make = Callable[[str, Delta], Tenant]


@dataclass(eq=False)
class _Entry:
    """What is known of one name. A new one takes its place when the delta is replaced, so nothing is seen half."""

    loading: Lock = field(default_factory=Lock)
    stored: bool = True
    version: tuple[object, ...] = ()
    seen: float = field(default_factory=time.monotonic)


class Bank:
    """Deltas of one base by name, of any recipes.

    A delta is loaded when it is first asked for; those used least recently are let go of at a limit of memory, and
    loaded again when they are asked for. What has no file stays in memory. For any number of threads.

    Args:
        place: a folder with deltas, each in a folder of its own, or a URL of fsspec; None for deltas in memory alone.
        max_memory: of all values in memory, such as "1GiB"; None for no limit.
        recheck: seconds after which a delta in use is compared with its file, which another process may have replaced
            or taken away.

    Raises:
        ServingError: there is no such folder.
        TrainError: max_memory is no size.
    """

    def __init__(
        self,
        place: str | os.PathLike[str] | None = None,
        *,
        max_memory: str | int | None = None,
        recheck: float = 1.0,
    ) -> None:
        self.store = None if place is None else DeltaStore(place)
        self.max_memory = None if max_memory is None else parse_bytes(max_memory)
        self.recheck = recheck
        self._lock = Lock()  # of what is in memory; held for moments
        self._writing = Lock()  # of what is stored: memory and file change in one order
        self._looked = -math.inf
        self._entries: dict[str, _Entry] = {}
        self._tenants: OrderedDict[str, Tenant] = OrderedDict()  # the least recently used first
        self._bytes = 0
        self.loads = self.dropped = 0
        self.refresh()

    def refresh(self) -> None:
        """Look again at what lies in the folder: names that came or went there."""
        if self.store is None:
            return
        there = set(self.store.names())
        with self._lock:
            for name in there - set(self._entries):
                self._entries[name] = _Entry()
            for name in [n for n, entry in self._entries.items() if entry.stored and n not in there]:
                del self._entries[name]
                self._forget(name)

    def names(self) -> list[str]:
        """All that are there, sorted; the folder is looked at again, at most once in `recheck` seconds."""
        if time.monotonic() - self._looked >= self.recheck:
            self._looked = time.monotonic()
            self.refresh()
        return list(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all values in memory."""
        return self._bytes

    @property
    def loaded(self) -> int:
        """Number of deltas in memory."""
        return len(self._tenants)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def peek(self, name: str) -> Tenant | None:
        """A delta that is in memory, without a use of it."""
        return self._tenants.get(name)

    def tenant(self, name: str, make: Make) -> Tenant:
        """A delta's values, loaded if need be.

        Args:
            make: a name and a delta to a tenant of the base.

        Raises:
            UnknownDeltaError: no delta has this name.
            DeltaError: its file is damaged, or of another base.
            AttachError: it cannot be mixed.
        """
        self.look(name)
        while True:
            with self._lock:
                if (found := self._tenants.get(name)) is not None:
                    self._tenants.move_to_end(name)
                    return found
                entry = self._entries.get(name)
            if entry is None:
                raise UnknownDeltaError(f"no delta is called {name!r}{nearest(name, self._entries)}")
            with entry.loading:
                with self._lock:
                    if self._entries.get(name) is not entry or name in self._tenants:
                        continue  # replaced, removed, or loaded by another thread meanwhile
                assert self.store is not None  # what has no file is in memory
                version = self.store.version(name)
                try:
                    tenant = make(name, self.store.load(name))
                except (DeltaError, FileNotFoundError):
                    if self._as_it_was(name, entry, version):
                        raise
                    continue  # replaced or removed while it was read
                with self._lock:
                    if self._entries.get(name) is not entry:
                        continue
                    self.loads += 1
                    entry.version, entry.seen = version, time.monotonic()
                    self._keep(name, tenant)
                    return tenant

    def _as_it_was(self, name: str, entry: _Entry, version: tuple[object, ...]) -> bool:
        """Whether a delta's file is still the one of a version; forgets a delta that has none any more."""
        assert self.store is not None
        now = self.store.version(name)
        there = bool(now)
        with self._lock:
            if not there and self._entries.get(name) is entry:
                del self._entries[name]
        return there and now == version

    def look(self, name: str) -> None:
        """See what another process did to a name: new ones at once, others after a while."""
        if self.store is None:
            return
        with self._lock:
            entry = self._entries.get(name)
            fresh = entry is not None and (not entry.stored or time.monotonic() - entry.seen < self.recheck)
            if fresh or (entry is not None and (name not in self._tenants or entry.loading.locked())):
                return
        version = self.store.version(name) if NAME.fullmatch(name) else ()
        with self._lock:
            if self._entries.get(name) is not entry:
                return
            if entry is not None and entry.version == version:
                entry.seen = time.monotonic()
                return
            self._forget(name)
            self._entries.pop(name, None)
            if version:
                self._entries[name] = _Entry()

    def put(self, name: str, delta: Delta, make: Make) -> Tenant:
        """Add a delta, or put it in the place of one of the same name; saved, if the bank has a folder.

        Raises:
            ServingError: it is no name for a delta.
            DeltaError, AttachError: it does not fit the base, cannot be mixed or saved; what was there stays.
        """
        check_name(name)
        tenant = make(name, delta)
        with self._writing:
            version = () if self.store is None else self._saved(self.store, name, delta)
            with self._lock:
                self._entries[name] = _Entry(stored=self.store is not None, version=version)
                self._keep(name, tenant)
        return tenant

    def _saved(self, store: DeltaStore, name: str, delta: Delta) -> tuple[object, ...]:
        """Store a delta; meanwhile nobody looks at what is stored under its name. Its version."""
        entry = self._entries.get(name, _Entry())
        with entry.loading:
            try:
                store.save(name, delta)
            except BaseException:
                entry.version = store.version(name)  # what was there is put back, and may be a file of another time
                raise
            return store.version(name)

    def remove(self, name: str) -> None:
        """Take a delta away, with its file. Raises UnknownDeltaError if there is none."""
        self.look(name)
        with self._writing:
            entry = self._entries.get(name)
            if entry is None:
                raise UnknownDeltaError(f"no delta is called {name!r}{nearest(name, self._entries)}")
            if entry.stored and self.store is not None:
                self.store.remove(name)
            with self._lock:
                self._entries.pop(name, None)
                self._forget(name)

    def _keep(self, name: str, tenant: Tenant) -> None:
        """Hold a delta in memory, and let go of those used least recently that have a file, as far as need be."""
        self._forget(name)
        self._tenants[name] = tenant
        self._bytes += tenant.nbytes
        if self.max_memory is None:
            return
        for other in list(self._tenants):
            if self._bytes <= self.max_memory:
                return
            if other != name and self._entries[other].stored:
                self._forget(other)
                self.dropped += 1

    def _forget(self, name: str) -> None:
        if (tenant := self._tenants.pop(name, None)) is not None:
            self._bytes -= tenant.nbytes
