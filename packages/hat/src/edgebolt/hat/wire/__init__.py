"""Messages between device and cloud: written, and read with every size checked. hat_pb2.py is made from hat.proto."""

from __future__ import annotations

from itertools import pairwise

from edgebolt.hat.row_format import RowFormat
from edgebolt.hat.upload import Upload
from edgebolt.hat.wire import hat_pb2

__all__ = ["MOST_ANSWERED", "PROTOCOL", "SERVICE", "hat_pb2", "read_upload", "written_upload"]

PROTOCOL = 1
MOST_ANSWERED = 256  # rows that come back for an upload: those of a draft, which are run at once and before prompts
SERVICE = "edgebolt.hat.Middle"


def written_upload(conversation: bytes, sequence: int, upload: Upload, rows: RowFormat) -> hat_pb2.Upload:
    """An upload as a message."""
    return hat_pb2.Upload(
        conversation=conversation,
        sequence=sequence,
        start=upload.start,
        count=len(upload.rows),
        reply=upload.reply,
        rows=rows.encode(upload.rows),
        kept=upload.kept,
        tree=upload.parents is not None,
        parents=upload.parents or (),
    )


def read_upload(message: hat_pb2.Upload, rows: RowFormat, width: int, most_rows: int, longest: int) -> Upload:
    """A message as an upload.

    Args:
        message: from a peer that may send anything.
        rows: format that the stream has begun with.
        width: of hidden states.
        most_rows: of an upload.
        longest: tokens of a text.

    Raises:
        ValueError: if a number is out of range or the bytes are not those of the rows; nothing has been allocated by
            the numbers in the message.
    """
    if len(message.conversation) != 16:
        raise ValueError(f"A conversation is named by 16 bytes, not {len(message.conversation)}.")
    if message.sequence < 1:
        raise ValueError("Uploads are numbered from 1 on.")
    count = message.count
    if not 1 <= count <= most_rows:
        raise ValueError(f"{count} rows: an upload has 1 to {most_rows}.")
    if message.start + count > longest and not message.tree:
        raise ValueError(f"Rows up to position {message.start + count}: a text has at most {longest} tokens.")
    if message.start > longest or message.reply > count:
        raise ValueError(
            f"start={message.start} and reply={message.reply} do not fit {count} rows and {longest} tokens."
        )
    if message.reply > MOST_ANSWERED or (message.tree and count > MOST_ANSWERED):
        raise ValueError(f"{count} rows to be answered: a draft has at most {MOST_ANSWERED}.")
    most = max(len(message.kept), len(message.parents))
    if most > MOST_ANSWERED:
        raise ValueError(f"{most} kept positions or parents: a draft has at most {MOST_ANSWERED}.")
    kept, parents = tuple(message.kept), tuple(message.parents) if message.tree else None
    if len(kept) > message.start or any(later <= earlier for earlier, later in pairwise(kept)):
        raise ValueError(f"{len(kept)} kept positions are ascending and among the {message.start} that are kept.")
    if kept and kept[0] < message.start - len(kept):
        raise ValueError("Kept positions lie behind those that are kept anyway.")
    if parents is None and message.parents:
        raise ValueError("Parents belong to a tree.")
    if parents is not None:
        if len(parents) != count - 1:
            raise ValueError(f"{len(parents)} parents for {count} rows: every row but the first has one.")
        if any(not -1 <= parent < node for node, parent in enumerate(parents)):
            raise ValueError("A node of a tree follows an earlier one, or the root, -1.")
    return Upload(message.start, rows.decode(message.rows, count, width), message.reply, kept, parents)
