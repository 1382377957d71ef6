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
    __slots__ = ("word", "source", "group")
    WORD_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    word: str
    source: str
    group: str
    def __init__(self, word: _Optional[str] = ..., source: _Optional[str] = ..., group: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("name", "number", "digest", "kind", "family", "layout", "rank", "coverage", "triggers", "size_bytes", "create_time", "aliases", "recipe_json", "components", "card_digest", "targets", "tensor_digest", "delete_time", "about", "stack_json", "origin_json", "body_digest")
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
    ORIGIN_JSON_FIELD_NUMBER: _ClassVar[int]
    BODY_DIGEST_FIELD_NUMBER: _ClassVar[int]
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
    origin_json: str
    body_digest: str
    def __init__(self, name: _Optional[str] = ..., number: _Optional[int] = ..., digest: _Optional[str] = ..., kind: _Optional[_Union[Kind, str]] = ..., family: _Optional[str] = ..., layout: _Optional[str] = ..., rank: _Optional[int] = ..., coverage: _Optional[_Union[Coverage, _Mapping]] = ..., triggers: _Optional[_Iterable[_Union[Trigger, _Mapping]]] = ..., size_bytes: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., aliases: _Optional[_Iterable[str]] = ..., recipe_json: _Optional[str] = ..., components: _Optional[_Iterable[str]] = ..., card_digest: _Optional[str] = ..., targets: _Optional[_Iterable[str]] = ..., tensor_digest: _Optional[str] = ..., delete_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., about: _Optional[_Union[About, _Mapping]] = ..., stack_json: _Optional[str] = ..., origin_json: _Optional[str] = ..., body_digest: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("header", "chunk", "digest")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    header: CheckInHeader
    chunk: bytes
    digest: str
    def __init__(self, header: _Optional[_Union[CheckInHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., digest: _Optional[str] = ...) -> None: ...

class CheckInHeader(_message.Message):
    __slots__ = ("name", "base", "card", "triggers", "alias", "file_name", "adapter_config", "request_id", "size_bytes", "offset", "origin_json")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    TRIGGERS_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    FILE_NAME_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_CONFIG_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_JSON_FIELD_NUMBER: _ClassVar[int]
    name: str
    base: str
    card: bytes
    triggers: _containers.RepeatedScalarFieldContainer[str]
    alias: str
    file_name: str
    adapter_config: bytes
    request_id: str
    size_bytes: int
    offset: int
    origin_json: str
    def __init__(self, name: _Optional[str] = ..., base: _Optional[str] = ..., card: _Optional[bytes] = ..., triggers: _Optional[_Iterable[str]] = ..., alias: _Optional[str] = ..., file_name: _Optional[str] = ..., adapter_config: _Optional[bytes] = ..., request_id: _Optional[str] = ..., size_bytes: _Optional[int] = ..., offset: _Optional[int] = ..., origin_json: _Optional[str] = ...) -> None: ...

class GetUploadRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class GetUploadResponse(_message.Message):
    __slots__ = ("offset", "version")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    offset: int
    version: Version
    def __init__(self, offset: _Optional[int] = ..., version: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class CheckInResponse(_message.Message):
    __slots__ = ("version", "created", "same_bytes", "same_tensors", "similar", "warnings")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    SAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    SAME_TENSORS_FIELD_NUMBER: _ClassVar[int]
    SIMILAR_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    version: Version
    created: bool
    same_bytes: _containers.RepeatedScalarFieldContainer[str]
    same_tensors: _containers.RepeatedScalarFieldContainer[str]
    similar: _containers.RepeatedCompositeFieldContainer[Similar]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., created: _Optional[bool] = ..., same_bytes: _Optional[_Iterable[str]] = ..., same_tensors: _Optional[_Iterable[str]] = ..., similar: _Optional[_Iterable[_Union[Similar, _Mapping]]] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class Similar(_message.Message):
    __slots__ = ("version", "cosine")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COSINE_FIELD_NUMBER: _ClassVar[int]
    version: Version
    cosine: float
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., cosine: _Optional[float] = ...) -> None: ...

class GetVersionRequest(_message.Message):
    __slots__ = ("ref",)
    REF_FIELD_NUMBER: _ClassVar[int]
    ref: str
    def __init__(self, ref: _Optional[str] = ...) -> None: ...

class GetVersionResponse(_message.Message):
    __slots__ = ("version", "card", "previews", "declared")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    PREVIEWS_FIELD_NUMBER: _ClassVar[int]
    DECLARED_FIELD_NUMBER: _ClassVar[int]
    version: Version
    card: bytes
    previews: _containers.RepeatedCompositeFieldContainer[PreviewImage]
    declared: CheckInHeader
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., card: _Optional[bytes] = ..., previews: _Optional[_Iterable[_Union[PreviewImage, _Mapping]]] = ..., declared: _Optional[_Union[CheckInHeader, _Mapping]] = ...) -> None: ...

class PreviewImage(_message.Message):
    __slots__ = ("digest", "width", "height", "caption")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    CAPTION_FIELD_NUMBER: _ClassVar[int]
    digest: str
    width: int
    height: int
    caption: str
    def __init__(self, digest: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., caption: _Optional[str] = ...) -> None: ...

class SetCardRequest(_message.Message):
    __slots__ = ("ref", "card", "expected_card_digest")
    REF_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_CARD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ref: str
    card: bytes
    expected_card_digest: str
    def __init__(self, ref: _Optional[str] = ..., card: _Optional[bytes] = ..., expected_card_digest: _Optional[str] = ...) -> None: ...

class SetCardResponse(_message.Message):
    __slots__ = ("version", "revision")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    version: Version
    revision: int
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., revision: _Optional[int] = ...) -> None: ...

class ListCardsRequest(_message.Message):
    __slots__ = ("ref",)
    REF_FIELD_NUMBER: _ClassVar[int]
    ref: str
    def __init__(self, ref: _Optional[str] = ...) -> None: ...

class ListCardsResponse(_message.Message):
    __slots__ = ("revisions",)
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    revisions: _containers.RepeatedCompositeFieldContainer[CardRevision]
    def __init__(self, revisions: _Optional[_Iterable[_Union[CardRevision, _Mapping]]] = ...) -> None: ...

class CardRevision(_message.Message):
    __slots__ = ("revision", "card", "digest", "time", "actor")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    revision: int
    card: bytes
    digest: str
    time: _timestamp_pb2.Timestamp
    actor: str
    def __init__(self, revision: _Optional[int] = ..., card: _Optional[bytes] = ..., digest: _Optional[str] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., actor: _Optional[str] = ...) -> None: ...

class AddPreviewRequest(_message.Message):
    __slots__ = ("ref", "image", "caption")
    REF_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    CAPTION_FIELD_NUMBER: _ClassVar[int]
    ref: str
    image: bytes
    caption: str
    def __init__(self, ref: _Optional[str] = ..., image: _Optional[bytes] = ..., caption: _Optional[str] = ...) -> None: ...

class AddPreviewResponse(_message.Message):
    __slots__ = ("preview",)
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    preview: PreviewImage
    def __init__(self, preview: _Optional[_Union[PreviewImage, _Mapping]] = ...) -> None: ...

class RemovePreviewRequest(_message.Message):
    __slots__ = ("ref", "digest")
    REF_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ref: str
    digest: str
    def __init__(self, ref: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class RemovePreviewResponse(_message.Message):
    __slots__ = ("previews",)
    PREVIEWS_FIELD_NUMBER: _ClassVar[int]
    previews: _containers.RepeatedCompositeFieldContainer[PreviewImage]
    def __init__(self, previews: _Optional[_Iterable[_Union[PreviewImage, _Mapping]]] = ...) -> None: ...

class GetPreviewRequest(_message.Message):
    __slots__ = ("ref", "digest")
    REF_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ref: str
    digest: str
    def __init__(self, ref: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class GetPreviewResponse(_message.Message):
    __slots__ = ("png", "preview")
    PNG_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    png: bytes
    preview: PreviewImage
    def __init__(self, png: _Optional[bytes] = ..., preview: _Optional[_Union[PreviewImage, _Mapping]] = ...) -> None: ...

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
    __slots__ = ("ref", "offset")
    REF_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    ref: str
    offset: int
    def __init__(self, ref: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("versions", "orphans", "size_bytes", "held")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    ORPHANS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedScalarFieldContainer[str]
    orphans: _containers.RepeatedScalarFieldContainer[str]
    size_bytes: int
    held: _containers.RepeatedCompositeFieldContainer[HeldVersion]
    def __init__(self, versions: _Optional[_Iterable[str]] = ..., orphans: _Optional[_Iterable[str]] = ..., size_bytes: _Optional[int] = ..., held: _Optional[_Iterable[_Union[HeldVersion, _Mapping]]] = ...) -> None: ...

class HeldVersion(_message.Message):
    __slots__ = ("ref", "merge")
    REF_FIELD_NUMBER: _ClassVar[int]
    MERGE_FIELD_NUMBER: _ClassVar[int]
    ref: str
    merge: str
    def __init__(self, ref: _Optional[str] = ..., merge: _Optional[str] = ...) -> None: ...

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
