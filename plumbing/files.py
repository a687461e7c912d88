"""Files: written whole or not at all, digests of them, and errors in one line."""
import hashlib
import json
import os
import uuid
from pathlib import Path


def one_line(error):
    """An exception in a few words: ffmpeg's own message without its number and the call's name."""
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__


def write_file(path, content):
    """Write bytes so that `path` is either what it was or complete, whatever happens in between.
    A killed process leaves at most a .tmp file, which nothing reads; a full disk raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, {len(content)} bytes", str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def digest(content):
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def write_json(path, content):
    write_file(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode())


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None
