"""A Redis password that stands in a file, as container platforms hand out secrets: EMBEDQ_PASSWORD_FILE.

A URL without a password can be shown, logged and kept in a configuration; the file is read when a command starts. Knows
no Redis.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote

from embedq.producer.errors import ConfigurationError

VARIABLE = "EMBEDQ_PASSWORD_FILE"
#: Characters; a longer file is another one than was meant.
MAX_PASSWORD_CHARS = 4096


def with_password(url: str) -> str:
    """`url` with the password of the file that EMBEDQ_PASSWORD_FILE names, for the URL's user or the default one.

    A password in the URL counts more, and so does an empty one. The password is the file's first line: a Redis that
    takes the others as well can be told of a new password before its users are. Raises ConfigurationError.
    """
    file = os.environ.get(VARIABLE)
    scheme, separator, rest = url.partition("://")
    credentials, at, _ = re.split("[/?#]", rest, maxsplit=1)[0].rpartition("@")
    if not file or not separator or ":" in credentials:
        return url
    return f"{scheme}://{credentials}:{quote(_read(file), safe='')}@{rest[len(credentials + at) :]}"


def _read(file: str) -> str:
    try:
        with Path(file).open(encoding="utf-8") as opened:
            line = opened.readline(MAX_PASSWORD_CHARS + 1)
    except (OSError, ValueError) as err:
        reason = err.strerror if isinstance(err, OSError) else "it is no UTF-8 text"
        raise ConfigurationError(f"{VARIABLE}={file} cannot be read: {reason}") from err
    password = line.rstrip("\r\n")
    if not password:
        raise ConfigurationError(f"{VARIABLE}={file} has no password in its first line")
    if len(password) > MAX_PASSWORD_CHARS:
        raise ConfigurationError(f"{VARIABLE}={file} is no password: its first line is too long")
    return password
