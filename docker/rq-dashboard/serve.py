"""rq-dashboard on embedq's queues: our serializer in place of pickle, and the password from a file.

As it comes, rq-dashboard reads pickle out of Redis: whoever may write there could run code here.
"""

from __future__ import annotations

import os
from typing import Any

import rq.serializers

from embedq.producer import Embeddings
from embedq.producer.password_file import with_password
from embedq.producer.serializer import EmbedSerializer


def load(data: bytes) -> Any:
    """What a page can show: of vectors how many there are."""
    value = EmbedSerializer.loads(data)
    return f"{len(value.vectors)} vectors by {value.model}" if isinstance(value, Embeddings) else value


# Before rq-dashboard is imported. Some of its pages name no serializer and get RQ's default one.
rq.serializers.DefaultSerializer.dumps = staticmethod(EmbedSerializer.dumps)
rq.serializers.DefaultSerializer.loads = staticmethod(load)

from rq_dashboard.cli import run  # noqa: E402

if __name__ == "__main__":
    run(["--redis-url", with_password(os.environ["EMBEDQ_URL"])], auto_envvar_prefix="RQ_DASHBOARD")
