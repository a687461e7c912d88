"""Files and folders: written whole or not at all, claimed, digested; and errors in one line."""
import hashlib
import json
import os
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm


# ---- words ----

def one_line(error):
    """An exception in a few words: ffmpeg's own message without its number and the call's name."""
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__


def printable(text):
    """A name as it can be printed anywhere: line breaks, escapes and bytes that are no UTF-8 as
    \\n, \\x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


# ---- writing ----

TEMPORARY = ".geo-align-*.tmp"  # nothing else is ever removed as a leftover


def temporary_name(folder):
    """A new name in a folder, short, so that a file's own name may be as long as file systems
    allow."""
    return Path(folder) / TEMPORARY.replace("*", uuid.uuid4().hex[:12])


def write_file(path, content):
    """Write bytes so that `path` is either what it was or complete, whatever happens in between.

    A killed process leaves at most a file named as TEMPORARY, which nothing reads; a full disk
    raises OSError. A link at `path` is replaced, not followed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path.parent)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, {len(content)} bytes", str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    """JSON without NaN. Bytes of a file name that are no UTF-8 become \\udc.. and are read back as
    they were."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_file(path, text.encode(errors="backslashreplace"))


def read_json(path):
    """A JSON object; ValueError that names the file where it is damaged, or holds anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, found {type(content).__name__}")
        return content
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({one_line(error)})") from None


# ---- claiming a folder ----

def lock_folder(folder, patience=30):
    """Claims a folder that is written to until this process ends or closes the file that is
    returned.

    Waits `patience` seconds for a process that is about to end; ValueError where it does not. A
    link among its entries that leads to a folder is refused: nothing is written outside. A file
    system without locks is said.
    """
    import fcntl  # not on Windows
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if entry.is_symlink() and entry.is_dir() and not entry.name.startswith("iteration_"):
            raise ValueError(f"{entry}: a link to another folder; expected a folder, or nothing")
    end = None
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        lock = os.fdopen(os.open(folder / "lock", flags, 0o666), "rb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_still(lock, folder / "lock"):
                return lock
        except BlockingIOError:
            if end is None:
                end = time.monotonic() + patience
                print(f"{folder}: another process is writing there; waiting {patience} s",
                      file=sys.stderr)
            if time.monotonic() >= end:
                raise ValueError(f"{folder}: another process is writing there; wait for it or "
                                 "choose another --out") from None
            time.sleep(0.2)
        except OSError as error:
            print(f"warning: {folder}: this file system has no locks ({error.strerror}): two "
                  "processes that write there would spoil each other's files", file=sys.stderr)
            return lock
        lock.close()  # its file was removed meanwhile, or is another's: look again


def is_still(file, path):
    """Whether an open file is what its path leads to: neither removed nor replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def remove_leftovers(folder, *below):
    """Removes what a killed process left in a folder, and in those `below` it; only from a claimed
    one."""
    for place in (Path(folder), *(Path(folder) / name for name in below)):
        for leftover in place.glob(TEMPORARY):
            if leftover.is_dir() and not leftover.is_symlink():
                for file in leftover.iterdir():
                    file.unlink()
                leftover.rmdir()
            else:
                leftover.unlink()


# ---- digests ----

def digest(content):
    return hashlib.blake2b(content, digest_size=16).hexdigest()


PIECE = 1 << 26  # bytes hashed at a time: pieces of a large file are hashed side by side
MOST_FILES = 2000  # read whole; of more files, the sizes of all and the content of so many


def digest_files(files, quiet=True):
    """One digest of the contents of files, under their names relative to the folder that holds them
    all.

    The same files in another folder give the same. Of more than MOST_FILES, as many as that are
    read, evenly spread, and the others count by name and size. quiet: no bar. OSError where one
    cannot be read.
    """
    files = sorted(Path(file) for file in files)
    if not files:
        return digest(b"")
    root = os.path.commonpath([file.parent for file in files])
    sizes = [file.stat().st_size for file in files]
    listing = "".join(f"{os.path.relpath(file, root)}\0{size}\n"
                      for file, size in zip(files, sizes))
    read = {round(i * (len(files) - 1) / (MOST_FILES - 1)) for i in range(MOST_FILES)}
    pieces = [(file, at) for i, (file, size) in enumerate(zip(files, sizes))
              if i in read or len(files) <= MOST_FILES for at in range(0, size, PIECE)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(tqdm(pool.map(digest_piece, pieces), "reading the inputs", len(pieces),
                          delay=2, disable=quiet, leave=False))
    return digest(listing.encode(errors="surrogateescape") + "".join(found).encode())


def digest_piece(piece):
    file, at = piece
    with open(file, "rb") as f:
        f.seek(at)
        return digest(f.read(PIECE))
