from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FromDevice(_message.Message):
    __slots__ = ("hello", "upload", "end")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    upload: Upload
    end: End
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., upload: _Optional[_Union[Upload, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ...) -> None: ...

class FromCloud(_message.Message):
    __slots__ = ("welcome", "deep", "missing", "refused")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    DEEP_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    deep: Deep
    missing: Missing
    refused: Refused
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., deep: _Optional[_Union[Deep, _Mapping]] = ..., missing: _Optional[_Union[Missing, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "model", "rows")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    model: str
    rows: str
    def __init__(self, protocol: _Optional[int] = ..., model: _Optional[str] = ..., rows: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("most_rows", "state")
    MOST_ROWS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    most_rows: int
    state: State
    def __init__(self, most_rows: _Optional[int] = ..., state: _Optional[_Union[State, _Mapping]] = ...) -> None: ...

class Upload(_message.Message):
    __slots__ = ("conversation", "sequence", "start", "count", "reply", "rows", "kept", "tree", "parents")
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    TREE_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    conversation: bytes
    sequence: int
    start: int
    count: int
    reply: int
    rows: bytes
    kept: _containers.RepeatedScalarFieldContainer[int]
    tree: bool
    parents: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, conversation: _Optional[bytes] = ..., sequence: _Optional[int] = ..., start: _Optional[int] = ..., count: _Optional[int] = ..., reply: _Optional[int] = ..., rows: _Optional[bytes] = ..., kept: _Optional[_Iterable[int]] = ..., tree: bool = ..., parents: _Optional[_Iterable[int]] = ...) -> None: ...

class Deep(_message.Message):
    __slots__ = ("conversation", "sequence", "rows", "state", "received")
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    conversation: bytes
    sequence: int
    rows: bytes
    state: State
    received: float
    def __init__(self, conversation: _Optional[bytes] = ..., sequence: _Optional[int] = ..., rows: _Optional[bytes] = ..., state: _Optional[_Union[State, _Mapping]] = ..., received: _Optional[float] = ...) -> None: ...

class Missing(_message.Message):
    __slots__ = ("conversation", "sequence", "held")
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    conversation: bytes
    sequence: int
    held: int
    def __init__(self, conversation: _Optional[bytes] = ..., sequence: _Optional[int] = ..., held: _Optional[int] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("conversation", "sequence", "reason")
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    conversation: bytes
    sequence: int
    reason: str
    def __init__(self, conversation: _Optional[bytes] = ..., sequence: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("conversation",)
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    conversation: bytes
    def __init__(self, conversation: _Optional[bytes] = ...) -> None: ...

class State(_message.Message):
    __slots__ = ("tokens", "delays")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DELAYS_FIELD_NUMBER: _ClassVar[int]
    tokens: float
    delays: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, tokens: _Optional[float] = ..., delays: _Optional[_Iterable[float]] = ...) -> None: ...
