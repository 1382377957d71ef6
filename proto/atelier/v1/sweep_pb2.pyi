from atelier.v1 import compose_pb2 as _compose_pb2
from atelier.v1 import render_pb2 as _render_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SweepRequest(_message.Message):
    __slots__ = ("common", "axes")
    COMMON_FIELD_NUMBER: _ClassVar[int]
    AXES_FIELD_NUMBER: _ClassVar[int]
    common: _render_pb2.RenderRequest
    axes: _containers.RepeatedCompositeFieldContainer[Axis]
    def __init__(self, common: _Optional[_Union[_render_pb2.RenderRequest, _Mapping]] = ..., axes: _Optional[_Iterable[_Union[Axis, _Mapping]]] = ...) -> None: ...

class Axis(_message.Message):
    __slots__ = ("weight", "seed", "prompt", "method", "version", "guidance", "steps", "scheduler")
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_FIELD_NUMBER: _ClassVar[int]
    weight: WeightAxis
    seed: SeedAxis
    prompt: PromptAxis
    method: MethodAxis
    version: VersionAxis
    guidance: GuidanceAxis
    steps: StepsAxis
    scheduler: SchedulerAxis
    def __init__(self, weight: _Optional[_Union[WeightAxis, _Mapping]] = ..., seed: _Optional[_Union[SeedAxis, _Mapping]] = ..., prompt: _Optional[_Union[PromptAxis, _Mapping]] = ..., method: _Optional[_Union[MethodAxis, _Mapping]] = ..., version: _Optional[_Union[VersionAxis, _Mapping]] = ..., guidance: _Optional[_Union[GuidanceAxis, _Mapping]] = ..., steps: _Optional[_Union[StepsAxis, _Mapping]] = ..., scheduler: _Optional[_Union[SchedulerAxis, _Mapping]] = ...) -> None: ...

class WeightAxis(_message.Message):
    __slots__ = ("adapter", "values", "part")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    values: _containers.RepeatedScalarFieldContainer[float]
    part: str
    def __init__(self, adapter: _Optional[str] = ..., values: _Optional[_Iterable[float]] = ..., part: _Optional[str] = ...) -> None: ...

class SeedAxis(_message.Message):
    __slots__ = ("values", "count")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[int]
    count: int
    def __init__(self, values: _Optional[_Iterable[int]] = ..., count: _Optional[int] = ...) -> None: ...

class PromptAxis(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, values: _Optional[_Iterable[str]] = ...) -> None: ...

class MethodAxis(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedCompositeFieldContainer[_compose_pb2.Method]
    def __init__(self, values: _Optional[_Iterable[_Union[_compose_pb2.Method, _Mapping]]] = ...) -> None: ...

class VersionAxis(_message.Message):
    __slots__ = ("adapter", "refs")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    REFS_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    refs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, adapter: _Optional[str] = ..., refs: _Optional[_Iterable[str]] = ...) -> None: ...

class GuidanceAxis(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class StepsAxis(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, values: _Optional[_Iterable[int]] = ...) -> None: ...

class SchedulerAxis(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, values: _Optional[_Iterable[str]] = ...) -> None: ...

class SweepResponse(_message.Message):
    __slots__ = ("plan", "progress", "cell", "grid", "summary")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CELL_FIELD_NUMBER: _ClassVar[int]
    GRID_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    plan: SweepPlan
    progress: SweepProgress
    cell: SweepCell
    grid: SweepGrid
    summary: SweepSummary
    def __init__(self, plan: _Optional[_Union[SweepPlan, _Mapping]] = ..., progress: _Optional[_Union[SweepProgress, _Mapping]] = ..., cell: _Optional[_Union[SweepCell, _Mapping]] = ..., grid: _Optional[_Union[SweepGrid, _Mapping]] = ..., summary: _Optional[_Union[SweepSummary, _Mapping]] = ...) -> None: ...

class SweepPlan(_message.Message):
    __slots__ = ("columns", "rows", "seed")
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    columns: _containers.RepeatedScalarFieldContainer[str]
    rows: _containers.RepeatedScalarFieldContainer[str]
    seed: int
    def __init__(self, columns: _Optional[_Iterable[str]] = ..., rows: _Optional[_Iterable[str]] = ..., seed: _Optional[int] = ...) -> None: ...

class SweepProgress(_message.Message):
    __slots__ = ("cells_done", "cells", "column", "row", "step", "steps")
    CELLS_DONE_FIELD_NUMBER: _ClassVar[int]
    CELLS_FIELD_NUMBER: _ClassVar[int]
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    cells_done: int
    cells: int
    column: int
    row: int
    step: int
    steps: int
    def __init__(self, cells_done: _Optional[int] = ..., cells: _Optional[int] = ..., column: _Optional[int] = ..., row: _Optional[int] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ...) -> None: ...

class SweepCell(_message.Message):
    __slots__ = ("column", "row", "data", "last")
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    column: int
    row: int
    data: bytes
    last: bool
    def __init__(self, column: _Optional[int] = ..., row: _Optional[int] = ..., data: _Optional[bytes] = ..., last: _Optional[bool] = ...) -> None: ...

class SweepGrid(_message.Message):
    __slots__ = ("data", "last")
    DATA_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    last: bool
    def __init__(self, data: _Optional[bytes] = ..., last: _Optional[bool] = ...) -> None: ...

class SweepSummary(_message.Message):
    __slots__ = ("sweep_json", "seconds", "warnings")
    class SecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SWEEP_JSON_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    sweep_json: str
    seconds: _containers.ScalarMap[str, float]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sweep_json: _Optional[str] = ..., seconds: _Optional[_Mapping[str, float]] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...
