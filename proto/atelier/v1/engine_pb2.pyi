import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchStatusRequest(_message.Message):
    __slots__ = ("interval_seconds",)
    INTERVAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    interval_seconds: float
    def __init__(self, interval_seconds: _Optional[float] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("time", "uptime_seconds", "queue", "bases", "adapters", "rates", "phases", "caches", "memory", "outcomes", "versions")
    class OutcomesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TIME_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    BASES_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    CACHES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    time: _timestamp_pb2.Timestamp
    uptime_seconds: float
    queue: Queue
    bases: _containers.RepeatedCompositeFieldContainer[WarmBase]
    adapters: Residents
    rates: Rates
    phases: _containers.RepeatedCompositeFieldContainer[PhaseLatency]
    caches: _containers.RepeatedCompositeFieldContainer[Cache]
    memory: Memory
    outcomes: _containers.ScalarMap[str, int]
    versions: _containers.ScalarMap[str, str]
    def __init__(self, time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., uptime_seconds: _Optional[float] = ..., queue: _Optional[_Union[Queue, _Mapping]] = ..., bases: _Optional[_Iterable[_Union[WarmBase, _Mapping]]] = ..., adapters: _Optional[_Union[Residents, _Mapping]] = ..., rates: _Optional[_Union[Rates, _Mapping]] = ..., phases: _Optional[_Iterable[_Union[PhaseLatency, _Mapping]]] = ..., caches: _Optional[_Iterable[_Union[Cache, _Mapping]]] = ..., memory: _Optional[_Union[Memory, _Mapping]] = ..., outcomes: _Optional[_Mapping[str, int]] = ..., versions: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Queue(_message.Message):
    __slots__ = ("waiting", "capacity", "jobs", "running", "draining", "coalesced")
    WAITING_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    COALESCED_FIELD_NUMBER: _ClassVar[int]
    waiting: int
    capacity: int
    jobs: _containers.RepeatedCompositeFieldContainer[WaitingJob]
    running: _containers.RepeatedCompositeFieldContainer[RunningJob]
    draining: bool
    coalesced: int
    def __init__(self, waiting: _Optional[int] = ..., capacity: _Optional[int] = ..., jobs: _Optional[_Iterable[_Union[WaitingJob, _Mapping]]] = ..., running: _Optional[_Iterable[_Union[RunningJob, _Mapping]]] = ..., draining: _Optional[bool] = ..., coalesced: _Optional[int] = ...) -> None: ...

class WaitingJob(_message.Message):
    __slots__ = ("client", "kind", "waited_seconds", "priority", "phase", "callers")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    WAITED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    CALLERS_FIELD_NUMBER: _ClassVar[int]
    client: str
    kind: str
    waited_seconds: float
    priority: int
    phase: str
    callers: int
    def __init__(self, client: _Optional[str] = ..., kind: _Optional[str] = ..., waited_seconds: _Optional[float] = ..., priority: _Optional[int] = ..., phase: _Optional[str] = ..., callers: _Optional[int] = ...) -> None: ...

class RunningJob(_message.Message):
    __slots__ = ("client", "request_id", "kind", "phase", "image", "images", "step", "steps", "seconds", "base")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    client: str
    request_id: str
    kind: str
    phase: str
    image: int
    images: int
    step: int
    steps: int
    seconds: float
    base: str
    def __init__(self, client: _Optional[str] = ..., request_id: _Optional[str] = ..., kind: _Optional[str] = ..., phase: _Optional[str] = ..., image: _Optional[int] = ..., images: _Optional[int] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., seconds: _Optional[float] = ..., base: _Optional[str] = ...) -> None: ...

class WarmBase(_message.Message):
    __slots__ = ("name", "family", "device", "dtype", "size_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    family: str
    device: str
    dtype: str
    size_bytes: int
    def __init__(self, name: _Optional[str] = ..., family: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class Residents(_message.Message):
    __slots__ = ("count", "size_bytes", "budget_bytes", "adapters", "merges")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    MERGES_FIELD_NUMBER: _ClassVar[int]
    count: int
    size_bytes: int
    budget_bytes: int
    adapters: _containers.RepeatedCompositeFieldContainer[ResidentAdapter]
    merges: int
    def __init__(self, count: _Optional[int] = ..., size_bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ..., adapters: _Optional[_Iterable[_Union[ResidentAdapter, _Mapping]]] = ..., merges: _Optional[int] = ...) -> None: ...

class ResidentAdapter(_message.Message):
    __slots__ = ("ref", "digest", "size_bytes")
    REF_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ref: str
    digest: str
    size_bytes: int
    def __init__(self, ref: _Optional[str] = ..., digest: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class Rates(_message.Message):
    __slots__ = ("renders", "steps", "requests")
    RENDERS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    renders: float
    steps: float
    requests: float
    def __init__(self, renders: _Optional[float] = ..., steps: _Optional[float] = ..., requests: _Optional[float] = ...) -> None: ...

class PhaseLatency(_message.Message):
    __slots__ = ("phase", "count", "p50", "p95", "p99")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    P50_FIELD_NUMBER: _ClassVar[int]
    P95_FIELD_NUMBER: _ClassVar[int]
    P99_FIELD_NUMBER: _ClassVar[int]
    phase: str
    count: int
    p50: float
    p95: float
    p99: float
    def __init__(self, phase: _Optional[str] = ..., count: _Optional[int] = ..., p50: _Optional[float] = ..., p95: _Optional[float] = ..., p99: _Optional[float] = ...) -> None: ...

class Cache(_message.Message):
    __slots__ = ("name", "hits", "misses")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    name: str
    hits: int
    misses: int
    def __init__(self, name: _Optional[str] = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ...) -> None: ...

class Memory(_message.Message):
    __slots__ = ("resident_bytes", "device_used_bytes", "device_total_bytes", "budget_bytes", "parts", "host_golden_bytes")
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    HOST_GOLDEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    resident_bytes: int
    device_used_bytes: int
    device_total_bytes: int
    budget_bytes: int
    parts: _containers.RepeatedCompositeFieldContainer[MemoryPart]
    host_golden_bytes: int
    def __init__(self, resident_bytes: _Optional[int] = ..., device_used_bytes: _Optional[int] = ..., device_total_bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ..., parts: _Optional[_Iterable[_Union[MemoryPart, _Mapping]]] = ..., host_golden_bytes: _Optional[int] = ...) -> None: ...

class MemoryPart(_message.Message):
    __slots__ = ("name", "size_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...
