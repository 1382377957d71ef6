from atelier.v1 import compose_pb2 as _compose_pb2
from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RenderRequest(_message.Message):
    __slots__ = ("prompt", "negative_prompt", "stack", "method", "seed", "steps", "guidance", "width", "height", "count", "base", "preview_every", "scheduler", "image", "mask", "strength", "batch", "priority", "request_id", "schedules", "controls", "references", "scheduler_options")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    STACK_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_EVERY_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SCHEDULES_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    negative_prompt: str
    stack: _containers.RepeatedCompositeFieldContainer[_compose_pb2.WeightedRef]
    method: _compose_pb2.Method
    seed: int
    steps: int
    guidance: float
    width: int
    height: int
    count: int
    base: str
    preview_every: int
    scheduler: str
    image: bytes
    mask: bytes
    strength: float
    batch: int
    priority: int
    request_id: str
    schedules: _containers.RepeatedCompositeFieldContainer[Schedule]
    controls: _containers.RepeatedCompositeFieldContainer[Control]
    references: _containers.RepeatedCompositeFieldContainer[Reference]
    scheduler_options: _struct_pb2.Struct
    def __init__(self, prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., stack: _Optional[_Iterable[_Union[_compose_pb2.WeightedRef, _Mapping]]] = ..., method: _Optional[_Union[_compose_pb2.Method, _Mapping]] = ..., seed: _Optional[int] = ..., steps: _Optional[int] = ..., guidance: _Optional[float] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., count: _Optional[int] = ..., base: _Optional[str] = ..., preview_every: _Optional[int] = ..., scheduler: _Optional[str] = ..., image: _Optional[bytes] = ..., mask: _Optional[bytes] = ..., strength: _Optional[float] = ..., batch: _Optional[int] = ..., priority: _Optional[int] = ..., request_id: _Optional[str] = ..., schedules: _Optional[_Iterable[_Union[Schedule, _Mapping]]] = ..., controls: _Optional[_Iterable[_Union[Control, _Mapping]]] = ..., references: _Optional[_Iterable[_Union[Reference, _Mapping]]] = ..., scheduler_options: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ...) -> None: ...

class Control(_message.Message):
    __slots__ = ("name", "image", "weight", "start", "end", "mode")
    NAME_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    name: str
    image: bytes
    weight: float
    start: float
    end: float
    mode: str
    def __init__(self, name: _Optional[str] = ..., image: _Optional[bytes] = ..., weight: _Optional[float] = ..., start: _Optional[float] = ..., end: _Optional[float] = ..., mode: _Optional[str] = ...) -> None: ...

class Reference(_message.Message):
    __slots__ = ("name", "image", "weight")
    NAME_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    name: str
    image: bytes
    weight: float
    def __init__(self, name: _Optional[str] = ..., image: _Optional[bytes] = ..., weight: _Optional[float] = ...) -> None: ...

class Schedule(_message.Message):
    __slots__ = ("phases",)
    PHASES_FIELD_NUMBER: _ClassVar[int]
    phases: _containers.RepeatedCompositeFieldContainer[Phase]
    def __init__(self, phases: _Optional[_Iterable[_Union[Phase, _Mapping]]] = ...) -> None: ...

class Phase(_message.Message):
    __slots__ = ("start", "end", "weight", "end_weight")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    END_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    start: float
    end: float
    weight: float
    end_weight: float
    def __init__(self, start: _Optional[float] = ..., end: _Optional[float] = ..., weight: _Optional[float] = ..., end_weight: _Optional[float] = ...) -> None: ...

class ReplayRequest(_message.Message):
    __slots__ = ("png", "manifest_json", "image", "mask", "control_images", "reference_images")
    PNG_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    CONTROL_IMAGES_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_IMAGES_FIELD_NUMBER: _ClassVar[int]
    png: bytes
    manifest_json: str
    image: bytes
    mask: bytes
    control_images: _containers.RepeatedScalarFieldContainer[bytes]
    reference_images: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, png: _Optional[bytes] = ..., manifest_json: _Optional[str] = ..., image: _Optional[bytes] = ..., mask: _Optional[bytes] = ..., control_images: _Optional[_Iterable[bytes]] = ..., reference_images: _Optional[_Iterable[bytes]] = ...) -> None: ...

class RenderResponse(_message.Message):
    __slots__ = ("queued", "started", "step", "preview", "image", "summary")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    queued: Queued
    started: Started
    step: StepProgress
    preview: Preview
    image: ImageChunk
    summary: RenderSummary
    def __init__(self, queued: _Optional[_Union[Queued, _Mapping]] = ..., started: _Optional[_Union[Started, _Mapping]] = ..., step: _Optional[_Union[StepProgress, _Mapping]] = ..., preview: _Optional[_Union[Preview, _Mapping]] = ..., image: _Optional[_Union[ImageChunk, _Mapping]] = ..., summary: _Optional[_Union[RenderSummary, _Mapping]] = ...) -> None: ...

class Queued(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: int
    def __init__(self, position: _Optional[int] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("queue_seconds", "prompt")
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    queue_seconds: float
    prompt: str
    def __init__(self, queue_seconds: _Optional[float] = ..., prompt: _Optional[str] = ...) -> None: ...

class StepProgress(_message.Message):
    __slots__ = ("image", "step", "steps")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    image: int
    step: int
    steps: int
    def __init__(self, image: _Optional[int] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ...) -> None: ...

class Preview(_message.Message):
    __slots__ = ("image", "step", "png")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PNG_FIELD_NUMBER: _ClassVar[int]
    image: int
    step: int
    png: bytes
    def __init__(self, image: _Optional[int] = ..., step: _Optional[int] = ..., png: _Optional[bytes] = ...) -> None: ...

class ImageChunk(_message.Message):
    __slots__ = ("image", "data", "last")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    image: int
    data: bytes
    last: bool
    def __init__(self, image: _Optional[int] = ..., data: _Optional[bytes] = ..., last: _Optional[bool] = ...) -> None: ...

class RenderSummary(_message.Message):
    __slots__ = ("manifest_json", "seconds", "differences", "warnings")
    class SecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    manifest_json: _containers.RepeatedScalarFieldContainer[str]
    seconds: _containers.ScalarMap[str, float]
    differences: _containers.RepeatedScalarFieldContainer[str]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, manifest_json: _Optional[_Iterable[str]] = ..., seconds: _Optional[_Mapping[str, float]] = ..., differences: _Optional[_Iterable[str]] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class ListBasesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListBasesResponse(_message.Message):
    __slots__ = ("bases",)
    BASES_FIELD_NUMBER: _ClassVar[int]
    bases: _containers.RepeatedCompositeFieldContainer[Base]
    def __init__(self, bases: _Optional[_Iterable[_Union[Base, _Mapping]]] = ...) -> None: ...

class Base(_message.Message):
    __slots__ = ("name", "family", "digest", "device", "dtype", "modules", "width", "height", "steps", "guidance", "schedulers", "granularity", "controls", "references", "control_modes")
    class ControlModesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: ControlModes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[ControlModes, _Mapping]] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    SCHEDULERS_FIELD_NUMBER: _ClassVar[int]
    GRANULARITY_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    CONTROL_MODES_FIELD_NUMBER: _ClassVar[int]
    name: str
    family: str
    digest: str
    device: str
    dtype: str
    modules: int
    width: int
    height: int
    steps: int
    guidance: float
    schedulers: _containers.RepeatedScalarFieldContainer[str]
    granularity: int
    controls: _containers.RepeatedScalarFieldContainer[str]
    references: _containers.RepeatedScalarFieldContainer[str]
    control_modes: _containers.MessageMap[str, ControlModes]
    def __init__(self, name: _Optional[str] = ..., family: _Optional[str] = ..., digest: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., modules: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., steps: _Optional[int] = ..., guidance: _Optional[float] = ..., schedulers: _Optional[_Iterable[str]] = ..., granularity: _Optional[int] = ..., controls: _Optional[_Iterable[str]] = ..., references: _Optional[_Iterable[str]] = ..., control_modes: _Optional[_Mapping[str, ControlModes]] = ...) -> None: ...

class ControlModes(_message.Message):
    __slots__ = ("names",)
    NAMES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, names: _Optional[_Iterable[str]] = ...) -> None: ...

class CalibrateRequest(_message.Message):
    __slots__ = ("ref", "prompts", "pictures", "steps", "again", "base", "size")
    REF_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    PICTURES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    ref: str
    prompts: _containers.RepeatedScalarFieldContainer[str]
    pictures: int
    steps: int
    again: bool
    base: str
    size: int
    def __init__(self, ref: _Optional[str] = ..., prompts: _Optional[_Iterable[str]] = ..., pictures: _Optional[int] = ..., steps: _Optional[int] = ..., again: _Optional[bool] = ..., base: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class CalibrateResponse(_message.Message):
    __slots__ = ("queued", "step", "summary")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    queued: Queued
    step: StepProgress
    summary: CalibrateSummary
    def __init__(self, queued: _Optional[_Union[Queued, _Mapping]] = ..., step: _Optional[_Union[StepProgress, _Mapping]] = ..., summary: _Optional[_Union[CalibrateSummary, _Mapping]] = ...) -> None: ...

class CalibrateSummary(_message.Message):
    __slots__ = ("ref", "base", "prompts", "inputs", "digest", "known")
    REF_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    ref: str
    base: str
    prompts: _containers.RepeatedScalarFieldContainer[str]
    inputs: int
    digest: str
    known: bool
    def __init__(self, ref: _Optional[str] = ..., base: _Optional[str] = ..., prompts: _Optional[_Iterable[str]] = ..., inputs: _Optional[int] = ..., digest: _Optional[str] = ..., known: _Optional[bool] = ...) -> None: ...

class TuneRequest(_message.Message):
    __slots__ = ("stack", "prompts", "pictures", "steps", "weights", "base", "size")
    STACK_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    PICTURES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    stack: _containers.RepeatedCompositeFieldContainer[_compose_pb2.WeightedRef]
    prompts: _containers.RepeatedScalarFieldContainer[str]
    pictures: int
    steps: int
    weights: bool
    base: str
    size: int
    def __init__(self, stack: _Optional[_Iterable[_Union[_compose_pb2.WeightedRef, _Mapping]]] = ..., prompts: _Optional[_Iterable[str]] = ..., pictures: _Optional[int] = ..., steps: _Optional[int] = ..., weights: _Optional[bool] = ..., base: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class TuneResponse(_message.Message):
    __slots__ = ("trial", "summary")
    TRIAL_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    trial: Trial
    summary: TuneSummary
    def __init__(self, trial: _Optional[_Union[Trial, _Mapping]] = ..., summary: _Optional[_Union[TuneSummary, _Mapping]] = ...) -> None: ...

class Trial(_message.Message):
    __slots__ = ("method", "stack", "retention", "value", "prompt")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    STACK_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    method: _compose_pb2.Method
    stack: _containers.RepeatedCompositeFieldContainer[_compose_pb2.WeightedRef]
    retention: _containers.RepeatedScalarFieldContainer[float]
    value: float
    prompt: float
    def __init__(self, method: _Optional[_Union[_compose_pb2.Method, _Mapping]] = ..., stack: _Optional[_Iterable[_Union[_compose_pb2.WeightedRef, _Mapping]]] = ..., retention: _Optional[_Iterable[float]] = ..., value: _Optional[float] = ..., prompt: _Optional[float] = ...) -> None: ...

class Climb(_message.Message):
    __slots__ = ("place", "weights", "retention", "chosen")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    place: int
    weights: _containers.RepeatedScalarFieldContainer[float]
    retention: _containers.RepeatedScalarFieldContainer[float]
    chosen: float
    def __init__(self, place: _Optional[int] = ..., weights: _Optional[_Iterable[float]] = ..., retention: _Optional[_Iterable[float]] = ..., chosen: _Optional[float] = ...) -> None: ...

class TuneSummary(_message.Message):
    __slots__ = ("best", "naive", "prompts", "scorer", "picture", "base", "climbs", "unmergeable")
    BEST_FIELD_NUMBER: _ClassVar[int]
    NAIVE_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    SCORER_FIELD_NUMBER: _ClassVar[int]
    PICTURE_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    CLIMBS_FIELD_NUMBER: _ClassVar[int]
    UNMERGEABLE_FIELD_NUMBER: _ClassVar[int]
    best: Trial
    naive: Trial
    prompts: _containers.RepeatedScalarFieldContainer[str]
    scorer: str
    picture: bytes
    base: str
    climbs: _containers.RepeatedCompositeFieldContainer[Climb]
    unmergeable: str
    def __init__(self, best: _Optional[_Union[Trial, _Mapping]] = ..., naive: _Optional[_Union[Trial, _Mapping]] = ..., prompts: _Optional[_Iterable[str]] = ..., scorer: _Optional[str] = ..., picture: _Optional[bytes] = ..., base: _Optional[str] = ..., climbs: _Optional[_Iterable[_Union[Climb, _Mapping]]] = ..., unmergeable: _Optional[str] = ...) -> None: ...
