import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KIND_UNSPECIFIED: _ClassVar[Kind]
    KIND_LORA: _ClassVar[Kind]
    KIND_TEXTUAL_INVERSION: _ClassVar[Kind]
    KIND_STACK: _ClassVar[Kind]
KIND_UNSPECIFIED: Kind
KIND_LORA: Kind
KIND_TEXTUAL_INVERSION: Kind
KIND_STACK: Kind

class Trigger(_message.Message):
    __slots__ = ("word", "source")
    WORD_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    word: str
    source: str
    def __init__(self, word: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...

class Coverage(_message.Message):
    __slots__ = ("base", "bound", "total", "unbound")
    BASE_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    UNBOUND_FIELD_NUMBER: _ClassVar[int]
    base: str
    bound: int
    total: int
    unbound: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, base: _Optional[str] = ..., bound: _Optional[int] = ..., total: _Optional[int] = ..., unbound: _Optional[_Iterable[str]] = ...) -> None: ...

class Version(_message.Message):
    __slots__ = ("name", "number", "digest", "kind", "family", "layout", "rank", "coverage", "triggers", "size_bytes", "create_time", "aliases", "recipe_json", "components", "card_digest", "targets", "tensor_digest", "delete_time", "about", "stack_json")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    TRIGGERS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    RECIPE_JSON_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    CARD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DELETE_TIME_FIELD_NUMBER: _ClassVar[int]
    ABOUT_FIELD_NUMBER: _ClassVar[int]
    STACK_JSON_FIELD_NUMBER: _ClassVar[int]
    name: str
    number: int
    digest: str
    kind: Kind
    family: str
    layout: str
    rank: int
    coverage: Coverage
    triggers: _containers.RepeatedCompositeFieldContainer[Trigger]
    size_bytes: int
    create_time: _timestamp_pb2.Timestamp
    aliases: _containers.RepeatedScalarFieldContainer[str]
    recipe_json: str
    components: _containers.RepeatedScalarFieldContainer[str]
    card_digest: str
    targets: _containers.RepeatedScalarFieldContainer[str]
    tensor_digest: str
    delete_time: _timestamp_pb2.Timestamp
    about: About
    stack_json: str
    def __init__(self, name: _Optional[str] = ..., number: _Optional[int] = ..., digest: _Optional[str] = ..., kind: _Optional[_Union[Kind, str]] = ..., family: _Optional[str] = ..., layout: _Optional[str] = ..., rank: _Optional[int] = ..., coverage: _Optional[_Union[Coverage, _Mapping]] = ..., triggers: _Optional[_Iterable[_Union[Trigger, _Mapping]]] = ..., size_bytes: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., aliases: _Optional[_Iterable[str]] = ..., recipe_json: _Optional[str] = ..., components: _Optional[_Iterable[str]] = ..., card_digest: _Optional[str] = ..., targets: _Optional[_Iterable[str]] = ..., tensor_digest: _Optional[str] = ..., delete_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., about: _Optional[_Union[About, _Mapping]] = ..., stack_json: _Optional[str] = ...) -> None: ...

class About(_message.Message):
    __slots__ = ("title", "author", "licence", "negative_prompt", "rating", "tags", "weight")
    TITLE_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    RATING_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    title: Told
    author: Told
    licence: Told
    negative_prompt: Told
    rating: Told
    tags: _containers.RepeatedScalarFieldContainer[str]
    weight: RecommendedWeight
    def __init__(self, title: _Optional[_Union[Told, _Mapping]] = ..., author: _Optional[_Union[Told, _Mapping]] = ..., licence: _Optional[_Union[Told, _Mapping]] = ..., negative_prompt: _Optional[_Union[Told, _Mapping]] = ..., rating: _Optional[_Union[Told, _Mapping]] = ..., tags: _Optional[_Iterable[str]] = ..., weight: _Optional[_Union[RecommendedWeight, _Mapping]] = ...) -> None: ...

class Told(_message.Message):
    __slots__ = ("value", "source")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    value: str
    source: str
    def __init__(self, value: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...

class RecommendedWeight(_message.Message):
    __slots__ = ("value", "low", "high", "source")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    value: float
    low: float
    high: float
    source: str
    def __init__(self, value: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ..., source: _Optional[str] = ...) -> None: ...

class CheckInRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: CheckInHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[CheckInHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class CheckInHeader(_message.Message):
    __slots__ = ("name", "base", "card", "triggers", "alias", "file_name", "adapter_config", "request_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    TRIGGERS_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    FILE_NAME_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_CONFIG_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    base: str
    card: bytes
    triggers: _containers.RepeatedScalarFieldContainer[str]
    alias: str
    file_name: str
    adapter_config: bytes
    request_id: str
    def __init__(self, name: _Optional[str] = ..., base: _Optional[str] = ..., card: _Optional[bytes] = ..., triggers: _Optional[_Iterable[str]] = ..., alias: _Optional[str] = ..., file_name: _Optional[str] = ..., adapter_config: _Optional[bytes] = ..., request_id: _Optional[str] = ...) -> None: ...

class CheckInResponse(_message.Message):
    __slots__ = ("version", "created", "same_bytes", "same_tensors")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    SAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    SAME_TENSORS_FIELD_NUMBER: _ClassVar[int]
    version: Version
    created: bool
    same_bytes: _containers.RepeatedScalarFieldContainer[str]
    same_tensors: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., created: _Optional[bool] = ..., same_bytes: _Optional[_Iterable[str]] = ..., same_tensors: _Optional[_Iterable[str]] = ...) -> None: ...

class GetVersionRequest(_message.Message):
    __slots__ = ("ref",)
    REF_FIELD_NUMBER: _ClassVar[int]
    ref: str
    def __init__(self, ref: _Optional[str] = ...) -> None: ...

class GetVersionResponse(_message.Message):
    __slots__ = ("version", "card")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    version: Version
    card: bytes
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., card: _Optional[bytes] = ...) -> None: ...

class ListAssetsRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "text", "labels", "made_after", "made_before")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    MADE_AFTER_FIELD_NUMBER: _ClassVar[int]
    MADE_BEFORE_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    text: str
    labels: _containers.RepeatedCompositeFieldContainer[Label]
    made_after: _timestamp_pb2.Timestamp
    made_before: _timestamp_pb2.Timestamp
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., text: _Optional[str] = ..., labels: _Optional[_Iterable[_Union[Label, _Mapping]]] = ..., made_after: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., made_before: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class Label(_message.Message):
    __slots__ = ("field", "value")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    field: str
    value: str
    def __init__(self, field: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class ListAssetsResponse(_message.Message):
    __slots__ = ("versions", "next_page_token")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[Version]
    next_page_token: str
    def __init__(self, versions: _Optional[_Iterable[_Union[Version, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ListVersionsRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ListVersionsResponse(_message.Message):
    __slots__ = ("versions",)
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[Version]
    def __init__(self, versions: _Optional[_Iterable[_Union[Version, _Mapping]]] = ...) -> None: ...

class SetAliasRequest(_message.Message):
    __slots__ = ("name", "alias", "number", "expected_number")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_NUMBER_FIELD_NUMBER: _ClassVar[int]
    name: str
    alias: str
    number: int
    expected_number: int
    def __init__(self, name: _Optional[str] = ..., alias: _Optional[str] = ..., number: _Optional[int] = ..., expected_number: _Optional[int] = ...) -> None: ...

class SetAliasResponse(_message.Message):
    __slots__ = ("version", "previous_number")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_NUMBER_FIELD_NUMBER: _ClassVar[int]
    version: Version
    previous_number: int
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., previous_number: _Optional[int] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("ref",)
    REF_FIELD_NUMBER: _ClassVar[int]
    ref: str
    def __init__(self, ref: _Optional[str] = ...) -> None: ...

class DownloadResponse(_message.Message):
    __slots__ = ("version", "chunk")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    version: Version
    chunk: bytes
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class DeleteVersionRequest(_message.Message):
    __slots__ = ("ref",)
    REF_FIELD_NUMBER: _ClassVar[int]
    ref: str
    def __init__(self, ref: _Optional[str] = ...) -> None: ...

class DeleteVersionResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: Version
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class UndeleteVersionRequest(_message.Message):
    __slots__ = ("ref",)
    REF_FIELD_NUMBER: _ClassVar[int]
    ref: str
    def __init__(self, ref: _Optional[str] = ...) -> None: ...

class UndeleteVersionResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: Version
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class CollectGarbageRequest(_message.Message):
    __slots__ = ("dry_run", "retention", "grace")
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    GRACE_FIELD_NUMBER: _ClassVar[int]
    dry_run: bool
    retention: _duration_pb2.Duration
    grace: _duration_pb2.Duration
    def __init__(self, dry_run: _Optional[bool] = ..., retention: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., grace: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class CollectGarbageResponse(_message.Message):
    __slots__ = ("versions", "orphans", "size_bytes")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    ORPHANS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedScalarFieldContainer[str]
    orphans: _containers.RepeatedScalarFieldContainer[str]
    size_bytes: int
    def __init__(self, versions: _Optional[_Iterable[str]] = ..., orphans: _Optional[_Iterable[str]] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class WatchEventsRequest(_message.Message):
    __slots__ = ("since", "no_wait")
    SINCE_FIELD_NUMBER: _ClassVar[int]
    NO_WAIT_FIELD_NUMBER: _ClassVar[int]
    since: int
    no_wait: bool
    def __init__(self, since: _Optional[int] = ..., no_wait: _Optional[bool] = ...) -> None: ...

class WatchEventsResponse(_message.Message):
    __slots__ = ("seq", "time", "actor", "action", "name", "number", "detail_json")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    DETAIL_JSON_FIELD_NUMBER: _ClassVar[int]
    seq: int
    time: _timestamp_pb2.Timestamp
    actor: str
    action: str
    name: str
    number: int
    detail_json: str
    def __init__(self, seq: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., actor: _Optional[str] = ..., action: _Optional[str] = ..., name: _Optional[str] = ..., number: _Optional[int] = ..., detail_json: _Optional[str] = ...) -> None: ...
