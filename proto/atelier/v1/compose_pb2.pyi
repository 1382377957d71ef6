from atelier.v1 import catalog_pb2 as _catalog_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WeightedRef(_message.Message):
    __slots__ = ("ref", "weight", "parts")
    class PartsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    REF_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    ref: str
    weight: float
    parts: _containers.ScalarMap[str, float]
    def __init__(self, ref: _Optional[str] = ..., weight: _Optional[float] = ..., parts: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Method(_message.Message):
    __slots__ = ("name", "rank", "energy", "strength", "protect", "mode", "side", "density", "seed", "mu", "rule", "keep_norm", "ratio", "every")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ENERGY_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    PROTECT_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    SIDE_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MU_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    KEEP_NORM_FIELD_NUMBER: _ClassVar[int]
    RATIO_FIELD_NUMBER: _ClassVar[int]
    EVERY_FIELD_NUMBER: _ClassVar[int]
    name: str
    rank: int
    energy: float
    strength: float
    protect: float
    mode: str
    side: str
    density: float
    seed: int
    mu: float
    rule: str
    keep_norm: bool
    ratio: float
    every: int
    def __init__(self, name: _Optional[str] = ..., rank: _Optional[int] = ..., energy: _Optional[float] = ..., strength: _Optional[float] = ..., protect: _Optional[float] = ..., mode: _Optional[str] = ..., side: _Optional[str] = ..., density: _Optional[float] = ..., seed: _Optional[int] = ..., mu: _Optional[float] = ..., rule: _Optional[str] = ..., keep_norm: _Optional[bool] = ..., ratio: _Optional[float] = ..., every: _Optional[int] = ...) -> None: ...

class MergeRequest(_message.Message):
    __slots__ = ("stack", "method", "name", "alias", "base")
    STACK_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    stack: _containers.RepeatedCompositeFieldContainer[WeightedRef]
    method: Method
    name: str
    alias: str
    base: str
    def __init__(self, stack: _Optional[_Iterable[_Union[WeightedRef, _Mapping]]] = ..., method: _Optional[_Union[Method, _Mapping]] = ..., name: _Optional[str] = ..., alias: _Optional[str] = ..., base: _Optional[str] = ...) -> None: ...

class MemberReport(_message.Message):
    __slots__ = ("ref", "weight", "kept", "parts", "left_out")
    class PartsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    REF_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    ref: str
    weight: float
    kept: float
    parts: _containers.ScalarMap[str, float]
    left_out: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ref: _Optional[str] = ..., weight: _Optional[float] = ..., kept: _Optional[float] = ..., parts: _Optional[_Mapping[str, float]] = ..., left_out: _Optional[_Iterable[str]] = ...) -> None: ...

class MergeResponse(_message.Message):
    __slots__ = ("version", "members", "truncation_error", "merge_seconds", "created")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_ERROR_FIELD_NUMBER: _ClassVar[int]
    MERGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    version: _catalog_pb2.Version
    members: _containers.RepeatedCompositeFieldContainer[MemberReport]
    truncation_error: float
    merge_seconds: float
    created: bool
    def __init__(self, version: _Optional[_Union[_catalog_pb2.Version, _Mapping]] = ..., members: _Optional[_Iterable[_Union[MemberReport, _Mapping]]] = ..., truncation_error: _Optional[float] = ..., merge_seconds: _Optional[float] = ..., created: _Optional[bool] = ...) -> None: ...

class SaveStackRequest(_message.Message):
    __slots__ = ("stack", "name", "alias", "prompt", "negative_prompt", "steps", "guidance", "dry_run")
    STACK_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    stack: _containers.RepeatedCompositeFieldContainer[WeightedRef]
    name: str
    alias: str
    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    dry_run: bool
    def __init__(self, stack: _Optional[_Iterable[_Union[WeightedRef, _Mapping]]] = ..., name: _Optional[str] = ..., alias: _Optional[str] = ..., prompt: _Optional[str] = ..., negative_prompt: _Optional[str] = ..., steps: _Optional[int] = ..., guidance: _Optional[float] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class SaveStackResponse(_message.Message):
    __slots__ = ("version", "created", "stack_json")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    STACK_JSON_FIELD_NUMBER: _ClassVar[int]
    version: _catalog_pb2.Version
    created: bool
    stack_json: str
    def __init__(self, version: _Optional[_Union[_catalog_pb2.Version, _Mapping]] = ..., created: _Optional[bool] = ..., stack_json: _Optional[str] = ...) -> None: ...

class CompareVersionsRequest(_message.Message):
    __slots__ = ("before", "after")
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    before: str
    after: str
    def __init__(self, before: _Optional[str] = ..., after: _Optional[str] = ...) -> None: ...

class LayerChange(_message.Message):
    __slots__ = ("layer", "before", "after", "change", "cosine")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    COSINE_FIELD_NUMBER: _ClassVar[int]
    layer: str
    before: float
    after: float
    change: float
    cosine: float
    def __init__(self, layer: _Optional[str] = ..., before: _Optional[float] = ..., after: _Optional[float] = ..., change: _Optional[float] = ..., cosine: _Optional[float] = ...) -> None: ...

class CompareVersionsResponse(_message.Message):
    __slots__ = ("before", "after", "layers", "total")
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    before: _catalog_pb2.Version
    after: _catalog_pb2.Version
    layers: _containers.RepeatedCompositeFieldContainer[LayerChange]
    total: LayerChange
    def __init__(self, before: _Optional[_Union[_catalog_pb2.Version, _Mapping]] = ..., after: _Optional[_Union[_catalog_pb2.Version, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[LayerChange, _Mapping]]] = ..., total: _Optional[_Union[LayerChange, _Mapping]] = ...) -> None: ...

class FindSimilarRequest(_message.Message):
    __slots__ = ("ref", "at_least")
    REF_FIELD_NUMBER: _ClassVar[int]
    AT_LEAST_FIELD_NUMBER: _ClassVar[int]
    ref: str
    at_least: float
    def __init__(self, ref: _Optional[str] = ..., at_least: _Optional[float] = ...) -> None: ...

class FindSimilarResponse(_message.Message):
    __slots__ = ("version", "similar")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SIMILAR_FIELD_NUMBER: _ClassVar[int]
    version: _catalog_pb2.Version
    similar: _containers.RepeatedCompositeFieldContainer[_catalog_pb2.Similar]
    def __init__(self, version: _Optional[_Union[_catalog_pb2.Version, _Mapping]] = ..., similar: _Optional[_Iterable[_Union[_catalog_pb2.Similar, _Mapping]]] = ...) -> None: ...

class InspectStackRequest(_message.Message):
    __slots__ = ("stack", "picture", "layers", "base")
    STACK_FIELD_NUMBER: _ClassVar[int]
    PICTURE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    stack: _containers.RepeatedCompositeFieldContainer[WeightedRef]
    picture: bool
    layers: bool
    base: str
    def __init__(self, stack: _Optional[_Iterable[_Union[WeightedRef, _Mapping]]] = ..., picture: _Optional[bool] = ..., layers: _Optional[bool] = ..., base: _Optional[str] = ...) -> None: ...

class Strength(_message.Message):
    __slots__ = ("ref", "weight", "parts", "norm", "relative", "calibrated", "apart")
    class PartsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    REF_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_FIELD_NUMBER: _ClassVar[int]
    CALIBRATED_FIELD_NUMBER: _ClassVar[int]
    APART_FIELD_NUMBER: _ClassVar[int]
    ref: str
    weight: float
    parts: _containers.ScalarMap[str, float]
    norm: float
    relative: float
    calibrated: bool
    apart: float
    def __init__(self, ref: _Optional[str] = ..., weight: _Optional[float] = ..., parts: _Optional[_Mapping[str, float]] = ..., norm: _Optional[float] = ..., relative: _Optional[float] = ..., calibrated: _Optional[bool] = ..., apart: _Optional[float] = ...) -> None: ...

class PartStrength(_message.Message):
    __slots__ = ("part", "norms", "relative", "apart", "coherence")
    PART_FIELD_NUMBER: _ClassVar[int]
    NORMS_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_FIELD_NUMBER: _ClassVar[int]
    APART_FIELD_NUMBER: _ClassVar[int]
    COHERENCE_FIELD_NUMBER: _ClassVar[int]
    part: str
    norms: _containers.RepeatedScalarFieldContainer[float]
    relative: _containers.RepeatedScalarFieldContainer[float]
    apart: _containers.RepeatedScalarFieldContainer[float]
    coherence: float
    def __init__(self, part: _Optional[str] = ..., norms: _Optional[_Iterable[float]] = ..., relative: _Optional[_Iterable[float]] = ..., apart: _Optional[_Iterable[float]] = ..., coherence: _Optional[float] = ...) -> None: ...

class Crosstalk(_message.Message):
    __slots__ = ("part", "lives", "answers", "loudness", "cosine", "input_cosine", "output_cosine", "in_weights")
    PART_FIELD_NUMBER: _ClassVar[int]
    LIVES_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    LOUDNESS_FIELD_NUMBER: _ClassVar[int]
    COSINE_FIELD_NUMBER: _ClassVar[int]
    INPUT_COSINE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_COSINE_FIELD_NUMBER: _ClassVar[int]
    IN_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    part: str
    lives: int
    answers: int
    loudness: float
    cosine: float
    input_cosine: float
    output_cosine: float
    in_weights: float
    def __init__(self, part: _Optional[str] = ..., lives: _Optional[int] = ..., answers: _Optional[int] = ..., loudness: _Optional[float] = ..., cosine: _Optional[float] = ..., input_cosine: _Optional[float] = ..., output_cosine: _Optional[float] = ..., in_weights: _Optional[float] = ...) -> None: ...

class Suggestion(_message.Message):
    __slots__ = ("method", "stack", "reason", "unmergeable")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    STACK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    UNMERGEABLE_FIELD_NUMBER: _ClassVar[int]
    method: Method
    stack: _containers.RepeatedCompositeFieldContainer[WeightedRef]
    reason: str
    unmergeable: str
    def __init__(self, method: _Optional[_Union[Method, _Mapping]] = ..., stack: _Optional[_Iterable[_Union[WeightedRef, _Mapping]]] = ..., reason: _Optional[str] = ..., unmergeable: _Optional[str] = ...) -> None: ...

class InspectStackResponse(_message.Message):
    __slots__ = ("adapters", "crosstalk", "coherence", "findings", "picture", "parts", "suggestion", "layers", "layer_crosstalk")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    CROSSTALK_FIELD_NUMBER: _ClassVar[int]
    COHERENCE_FIELD_NUMBER: _ClassVar[int]
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    PICTURE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    SUGGESTION_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    LAYER_CROSSTALK_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Strength]
    crosstalk: _containers.RepeatedCompositeFieldContainer[Crosstalk]
    coherence: float
    findings: _containers.RepeatedScalarFieldContainer[str]
    picture: bytes
    parts: _containers.RepeatedCompositeFieldContainer[PartStrength]
    suggestion: Suggestion
    layers: _containers.RepeatedCompositeFieldContainer[PartStrength]
    layer_crosstalk: _containers.RepeatedCompositeFieldContainer[Crosstalk]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Strength, _Mapping]]] = ..., crosstalk: _Optional[_Iterable[_Union[Crosstalk, _Mapping]]] = ..., coherence: _Optional[float] = ..., findings: _Optional[_Iterable[str]] = ..., picture: _Optional[bytes] = ..., parts: _Optional[_Iterable[_Union[PartStrength, _Mapping]]] = ..., suggestion: _Optional[_Union[Suggestion, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[PartStrength, _Mapping]]] = ..., layer_crosstalk: _Optional[_Iterable[_Union[Crosstalk, _Mapping]]] = ...) -> None: ...

class RemakeRequest(_message.Message):
    __slots__ = ("ref",)
    REF_FIELD_NUMBER: _ClassVar[int]
    ref: str
    def __init__(self, ref: _Optional[str] = ...) -> None: ...

class RemakeResponse(_message.Message):
    __slots__ = ("version", "digest", "same", "differences")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SAME_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    version: _catalog_pb2.Version
    digest: str
    same: bool
    differences: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[_Union[_catalog_pb2.Version, _Mapping]] = ..., digest: _Optional[str] = ..., same: _Optional[bool] = ..., differences: _Optional[_Iterable[str]] = ...) -> None: ...

class ExportAdapterRequest(_message.Message):
    __slots__ = ("ref", "format")
    REF_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    ref: str
    format: str
    def __init__(self, ref: _Optional[str] = ..., format: _Optional[str] = ...) -> None: ...

class ExportAdapterResponse(_message.Message):
    __slots__ = ("file", "chunk", "left_out")
    FILE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    file: str
    chunk: bytes
    left_out: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, file: _Optional[str] = ..., chunk: _Optional[bytes] = ..., left_out: _Optional[_Iterable[str]] = ...) -> None: ...

class ListMethodsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListMethodsResponse(_message.Message):
    __slots__ = ("methods",)
    METHODS_FIELD_NUMBER: _ClassVar[int]
    methods: _containers.RepeatedCompositeFieldContainer[MethodInfo]
    def __init__(self, methods: _Optional[_Iterable[_Union[MethodInfo, _Mapping]]] = ...) -> None: ...

class MethodInfo(_message.Message):
    __slots__ = ("name", "summary", "parameters", "ordered", "calibrated", "renders")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    ORDERED_FIELD_NUMBER: _ClassVar[int]
    CALIBRATED_FIELD_NUMBER: _ClassVar[int]
    RENDERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    summary: str
    parameters: _containers.RepeatedScalarFieldContainer[str]
    ordered: bool
    calibrated: bool
    renders: bool
    def __init__(self, name: _Optional[str] = ..., summary: _Optional[str] = ..., parameters: _Optional[_Iterable[str]] = ..., ordered: _Optional[bool] = ..., calibrated: _Optional[bool] = ..., renders: _Optional[bool] = ...) -> None: ...
