"""File I/O: everything that is read or written goes through here.

reading(path)         any error while a file is read becomes one line with its path
atomic(path)          a file appears whole or not at all
atomic_folder(path)   the same for a folder and everything in it
save_tensors(path)    safetensors with a JSON header and a checksum of every byte
Tensors(path)         the same read back, memory-mapped; `check()` compares the checksum
inside(root, name)    a path that comes from a file may not leave its folder
writable, claim       check --out before any work is done
find_folder(name)     a model folder, local or on the hub
"""

import fcntl
import json
import os
import re
import shutil
import tempfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from cli import UserError, one_line


@contextmanager
def reading(path, advice=""):
    """Turn any error in the block into a UserError: the path, the reason, and `advice`.

    Decoders raise all kinds of exceptions, and our own bugs look the same: keep the block small.
    """
    hint = f"; {advice}" if advice else ""
    try:
        # opening a FIFO would block forever
        place = Path(path)
        assert place.is_file() or not place.exists(), "not a regular file"
        yield
    except UserError as error:
        named = str(path) in str(error)  # by a nested `reading` block
        raise UserError(f"{error}{hint}" if named else f"{path}: {error}{hint}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}{hint}") from None
    except Exception as error:  # noqa: BLE001
        # the system's errors repeat the path, except in their strerror
        reason = one_line(getattr(error, "strerror", None) or error, longest=160)
        if isinstance(error, KeyError):
            reason = f"it lacks {reason}"  # a KeyError holds only the key
        raise UserError(f"cannot read {path}: {reason or type(error).__name__}{hint}") from None


def read_text(path, errors="strict"):
    """The text of a file, with or without a byte order mark. UserError if it is not a text file."""
    with reading(path):
        # not the system's encoding: Windows and bare containers have other defaults
        return Path(path).read_text(encoding="utf-8-sig", errors=errors)


def read_json(path, advice=""):
    """The JSON object in a file, as a dict. UserError if the file does not hold one."""
    with reading(path, advice):
        content = json.loads(read_text(path))
        assert isinstance(content, dict), "it holds no JSON object"
        return content


@contextmanager
def writing(path, advice):
    """Turn a disk error in the block into a UserError: the path, the reason, and `advice`."""
    try:
        yield
    # safetensors raises its own error for a full disk
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}; {advice}") from None


@contextmanager
def made(folder):
    """Create a folder for the block, and remove what is still empty afterward.

    UserError if nothing can be written there.
    """
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    with writing(folder, "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        # permissions are not enough: the disk may be full, or this may be /proc
        tempfile.TemporaryFile(dir=folder).close()
    try:
        yield
    finally:
        with suppress(OSError):  # fails if the folder is not empty by now
            for place in new:  # innermost first
                place.rmdir()


@contextmanager
def atomic(path):
    """Yield a temporary path next to `path`; rename it if the block succeeds, else remove it.

    UserError if the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    # hidden, so `whole_files` skips it; only the end of the name, which may be long
    temporary = path.with_name(f".part-{os.getpid()}-{path.name[-60:]}")
    with made(path.parent), writing(path, "what was there is unchanged"):
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # the default permissions on this machine
            yield temporary
            temporary.chmod(mode)  # safetensors 0.8 makes files private
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path):
    """Yield a temporary folder next to `path`; rename it if the block succeeds, else remove it.

    UserError if `path` already holds something, or nothing can be written there.
    """
    path = Path(path)
    if path.is_dir() and any(path.iterdir()) or path.is_file():
        raise UserError(f"{path} already exists: delete it, or choose another folder")
    temporary = path.with_name(f".part-{os.getpid()}-{path.name[-60:]}")
    with made(path.parent), writing(path, "nothing was written"):
        try:
            temporary.mkdir()
            yield temporary
            temporary.replace(path)  # replaces an empty folder
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_json(path, content):
    """`content` as indented JSON, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def whole_files(folder, pattern):
    """The matching files in a folder, sorted, without those that a killed process left."""
    return sorted(path for path in Path(folder).glob(pattern) if not path.name.startswith("."))


# ---- safetensors


def checksum(arrays, about=""):
    """CRC-32, as text, of {name: numpy array} and a text: names, dtypes, shapes and bytes."""
    value = zlib.crc32(about.encode())
    # the order of tensors within a file is up to safetensors
    for name, array in sorted(arrays.items()):
        value = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), value)
        value = zlib.crc32(np.asarray(array, order="C").reshape(-1).view(np.uint8), value)
    return f"{value:08x}"


def save_tensors(path, tensors, about):
    """Write {name: array or tensor} and the dict `about` as one safetensors file, with a checksum.

    Arrays are made contiguous first: safetensors 0.8 silently scrambles transposed ones.
    """
    from safetensors.numpy import save_file

    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    about = {**about, "crc32": checksum(arrays, json.dumps(about))}
    with atomic(path) as temporary:
        # one entry: with several, safetensors writes them in an order that changes from run to run
        save_file(arrays, temporary, metadata={"about": json.dumps(about)})


class Tensors:
    """An open file of `save_tensors`: `about` (dict), names() and tensors[name] (numpy)."""

    def __init__(self, path, advice=""):
        self.path = Path(path)
        self.advice = advice
        with reading(path, advice):
            self.file = safe_open(path, "numpy")
            header = self.file.metadata() or {}
            # "episode": the entry's name before episodes had checksums
            self.about = json.loads(header.get("episode") or header["about"])
            assert isinstance(self.about, dict), "its header is not a JSON object"
            self.stamp = self.about.pop("crc32", None)
            # in any other file a missing checksum means damage
            self.unstamped = "episode" in header

    def names(self):
        return set(self.file.keys())

    def __getitem__(self, name):
        with reading(self.path, self.advice):
            return self.file.get_tensor(name)

    def slice(self, name):
        """A tensor of which only the indexed part is read."""
        with reading(self.path, self.advice):
            return self.file.get_slice(name)

    def check(self):
        """UserError if a byte changed after writing; sets `checksum`. Returns self."""
        arrays = {name: self[name] for name in self.names()}
        self.checksum = checksum(arrays, json.dumps(self.about))
        with reading(self.path, self.advice):
            whole = self.unstamped or self.checksum == self.stamp
            assert whole, "its checksum does not match: the file is damaged"
        return self


# ---- folders


def inside(root, name):
    """The path `name` within the folder `root`. UserError if it is absolute or leaves the folder.

    Symbolic links that people put into their own folders may lead anywhere.
    """
    # abspath, not resolve: it removes ".." but does not follow links
    root = Path(os.path.abspath(root))
    path = Path(os.path.abspath(root / name))
    if not path.is_relative_to(root):
        raise UserError(f"{name} is outside {root}")
    return path


def writable(folder):
    """UserError if a folder cannot be written, to fail before any work. Leaves no trace."""
    with made(Path(folder)):
        pass


@contextmanager
def claim(folder):
    """Hold a folder for one writer at a time, and delete files that a killed one left unfinished.

    UserError if another process holds it.
    """
    folder = Path(folder)
    lock_file = folder / ".lock"  # empty: only the system's lock on it matters
    with made(folder), open(lock_file, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released even if killed
        except OSError:
            raise UserError(f"another process writes to {folder}: choose another --out") from None
        try:
            # there is no other writer now, so these are left over from killed processes
            for left in folder.rglob(".part-*"):
                left.unlink()
            yield
        finally:
            lock_file.unlink(missing_ok=True)


def find_folder(path_or_repo_id):
    """The folder itself if it exists; else that model on the hub, downloaded if not yet cached.

    A hub name looks like Qwen/Qwen2.5-VL-3B-Instruct. UserError if there is neither.
    """
    # only the top folder: repositories also contain checkpoint-500/ and the like
    files = ["*.json", "*.safetensors"]
    return find_or_fetch(path_or_repo_id, allow_patterns=files, ignore_patterns="*/*")


def find_or_fetch(source, **options):
    """A local folder, or a hub repository downloaded with these options of `snapshot_download`."""
    folder = Path(source)
    name = str(source)
    # a name that starts with an existing folder is a mistyped path, not a hub name
    on_hub = re.fullmatch(r"[\w-]+/[\w.-]+", name) and not Path(folder.parts[0]).exists()
    if folder.exists() or not on_hub:
        return folder
    from huggingface_hub import snapshot_download  # slow to load, and rarely needed

    with reading(name, "no such folder or hub repository, or no connection"):
        return Path(snapshot_download(name, **options))
