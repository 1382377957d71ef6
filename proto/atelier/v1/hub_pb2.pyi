import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SyncDirection(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SYNC_DIRECTION_UNSPECIFIED: _ClassVar[SyncDirection]
    SYNC_DIRECTION_PUSH: _ClassVar[SyncDirection]
    SYNC_DIRECTION_PULL: _ClassVar[SyncDirection]

class SyncKeep(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SYNC_KEEP_UNSPECIFIED: _ClassVar[SyncKeep]
    SYNC_KEEP_OURS: _ClassVar[SyncKeep]
    SYNC_KEEP_THEIRS: _ClassVar[SyncKeep]
    SYNC_KEEP_BOTH: _ClassVar[SyncKeep]
SYNC_DIRECTION_UNSPECIFIED: SyncDirection
SYNC_DIRECTION_PUSH: SyncDirection
SYNC_DIRECTION_PULL: SyncDirection
SYNC_KEEP_UNSPECIFIED: SyncKeep
SYNC_KEEP_OURS: SyncKeep
SYNC_KEEP_THEIRS: SyncKeep
SYNC_KEEP_BOTH: SyncKeep

class HubStep(_message.Message):
    __slots__ = ("name", "repo", "what", "done", "total")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REPO_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    name: str
    repo: str
    what: str
    done: int
    total: int
    def __init__(self, name: _Optional[str] = ..., repo: _Optional[str] = ..., what: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("ref", "repo", "private", "strip", "dry_run", "hub", "sweep", "relink")
    REF_FIELD_NUMBER: _ClassVar[int]
    REPO_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_FIELD_NUMBER: _ClassVar[int]
    STRIP_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    HUB_FIELD_NUMBER: _ClassVar[int]
    SWEEP_FIELD_NUMBER: _ClassVar[int]
    RELINK_FIELD_NUMBER: _ClassVar[int]
    ref: str
    repo: str
    private: bool
    strip: bool
    dry_run: bool
    hub: str
    sweep: bool
    relink: bool
    def __init__(self, ref: _Optional[str] = ..., repo: _Optional[str] = ..., private: _Optional[bool] = ..., strip: _Optional[bool] = ..., dry_run: _Optional[bool] = ..., hub: _Optional[str] = ..., sweep: _Optional[bool] = ..., relink: _Optional[bool] = ...) -> None: ...

class PushResponse(_message.Message):
    __slots__ = ("step", "summary")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    step: HubStep
    summary: PushSummary
    def __init__(self, step: _Optional[_Union[HubStep, _Mapping]] = ..., summary: _Optional[_Union[PushSummary, _Mapping]] = ...) -> None: ...

class HubFile(_message.Message):
    __slots__ = ("path", "size_bytes", "fresh")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FRESH_FIELD_NUMBER: _ClassVar[int]
    path: str
    size_bytes: int
    fresh: bool
    def __init__(self, path: _Optional[str] = ..., size_bytes: _Optional[int] = ..., fresh: _Optional[bool] = ...) -> None: ...

class PushSummary(_message.Message):
    __slots__ = ("ref", "repo", "commit", "tag", "made", "files", "card", "notes", "url")
    REF_FIELD_NUMBER: _ClassVar[int]
    REPO_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    MADE_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    ref: str
    repo: str
    commit: str
    tag: str
    made: bool
    files: _containers.RepeatedCompositeFieldContainer[HubFile]
    card: bytes
    notes: _containers.RepeatedScalarFieldContainer[str]
    url: str
    def __init__(self, ref: _Optional[str] = ..., repo: _Optional[str] = ..., commit: _Optional[str] = ..., tag: _Optional[str] = ..., made: _Optional[bool] = ..., files: _Optional[_Iterable[_Union[HubFile, _Mapping]]] = ..., card: _Optional[bytes] = ..., notes: _Optional[_Iterable[str]] = ..., url: _Optional[str] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("repo", "revision", "name", "file", "hub", "without_card")
    REPO_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    HUB_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_CARD_FIELD_NUMBER: _ClassVar[int]
    repo: str
    revision: str
    name: str
    file: str
    hub: str
    without_card: bool
    def __init__(self, repo: _Optional[str] = ..., revision: _Optional[str] = ..., name: _Optional[str] = ..., file: _Optional[str] = ..., hub: _Optional[str] = ..., without_card: _Optional[bool] = ...) -> None: ...

class PullResponse(_message.Message):
    __slots__ = ("step", "summary")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    step: HubStep
    summary: PullSummary
    def __init__(self, step: _Optional[_Union[HubStep, _Mapping]] = ..., summary: _Optional[_Union[PullSummary, _Mapping]] = ...) -> None: ...

class PullSummary(_message.Message):
    __slots__ = ("ref", "digest", "created", "repo", "commit", "file", "notes")
    REF_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    REPO_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    ref: str
    digest: str
    created: bool
    repo: str
    commit: str
    file: str
    notes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ref: _Optional[str] = ..., digest: _Optional[str] = ..., created: _Optional[bool] = ..., repo: _Optional[str] = ..., commit: _Optional[str] = ..., file: _Optional[str] = ..., notes: _Optional[_Iterable[str]] = ...) -> None: ...

class SyncRequest(_message.Message):
    __slots__ = ("names", "direction", "keep", "delete", "dry_run", "hub")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    DELETE_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    HUB_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    direction: SyncDirection
    keep: SyncKeep
    delete: bool
    dry_run: bool
    hub: str
    def __init__(self, names: _Optional[_Iterable[str]] = ..., direction: _Optional[_Union[SyncDirection, str]] = ..., keep: _Optional[_Union[SyncKeep, str]] = ..., delete: _Optional[bool] = ..., dry_run: _Optional[bool] = ..., hub: _Optional[str] = ...) -> None: ...

class SyncResponse(_message.Message):
    __slots__ = ("step", "outcome", "summary")
    STEP_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    step: HubStep
    outcome: SyncOutcome
    summary: SyncSummary
    def __init__(self, step: _Optional[_Union[HubStep, _Mapping]] = ..., outcome: _Optional[_Union[SyncOutcome, _Mapping]] = ..., summary: _Optional[_Union[SyncSummary, _Mapping]] = ...) -> None: ...

class SyncOutcome(_message.Message):
    __slots__ = ("name", "repo", "action", "number", "commit", "notes", "ours", "theirs")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REPO_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    OURS_FIELD_NUMBER: _ClassVar[int]
    THEIRS_FIELD_NUMBER: _ClassVar[int]
    name: str
    repo: str
    action: str
    number: int
    commit: str
    notes: _containers.RepeatedScalarFieldContainer[str]
    ours: str
    theirs: str
    def __init__(self, name: _Optional[str] = ..., repo: _Optional[str] = ..., action: _Optional[str] = ..., number: _Optional[int] = ..., commit: _Optional[str] = ..., notes: _Optional[_Iterable[str]] = ..., ours: _Optional[str] = ..., theirs: _Optional[str] = ...) -> None: ...

class SyncSummary(_message.Message):
    __slots__ = ("actions",)
    class ActionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    actions: _containers.ScalarMap[str, int]
    def __init__(self, actions: _Optional[_Mapping[str, int]] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("names",)
    NAMES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, names: _Optional[_Iterable[str]] = ...) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("links", "hubs", "offline")
    LINKS_FIELD_NUMBER: _ClassVar[int]
    HUBS_FIELD_NUMBER: _ClassVar[int]
    OFFLINE_FIELD_NUMBER: _ClassVar[int]
    links: _containers.RepeatedCompositeFieldContainer[HubLink]
    hubs: _containers.RepeatedCompositeFieldContainer[HubEndpoint]
    offline: bool
    def __init__(self, links: _Optional[_Iterable[_Union[HubLink, _Mapping]]] = ..., hubs: _Optional[_Iterable[_Union[HubEndpoint, _Mapping]]] = ..., offline: _Optional[bool] = ...) -> None: ...

class HubEndpoint(_message.Message):
    __slots__ = ("url", "has_token")
    URL_FIELD_NUMBER: _ClassVar[int]
    HAS_TOKEN_FIELD_NUMBER: _ClassVar[int]
    url: str
    has_token: bool
    def __init__(self, url: _Optional[str] = ..., has_token: _Optional[bool] = ...) -> None: ...

class HubLink(_message.Message):
    __slots__ = ("name", "hub", "repo", "file", "number", "commit", "sync_time", "ahead")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HUB_FIELD_NUMBER: _ClassVar[int]
    REPO_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    SYNC_TIME_FIELD_NUMBER: _ClassVar[int]
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    name: str
    hub: str
    repo: str
    file: str
    number: int
    commit: str
    sync_time: _timestamp_pb2.Timestamp
    ahead: bool
    def __init__(self, name: _Optional[str] = ..., hub: _Optional[str] = ..., repo: _Optional[str] = ..., file: _Optional[str] = ..., number: _Optional[int] = ..., commit: _Optional[str] = ..., sync_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., ahead: _Optional[bool] = ...) -> None: ...
