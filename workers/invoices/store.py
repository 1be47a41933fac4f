"""Where the files go, a directory or an object store: each is created whole, once, and never replaced.

Of two processes that create one name at the same moment, one does, and the other is told so.
"""

import asyncio
import errno
import hashlib
import os
import re
import secrets
import time
from datetime import timedelta
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import quote, urlsplit

_LONGEST_STEM: Final = 180
"""Bytes of a name without suffix; a name may have 255, and the temporary one is longer."""


def file_name(name: str, suffix: str) -> str:
    """A file name for `name`, such as an invoice's number; different names get different files.

    Letters and digits of ASCII, ``-``, ``_`` and ``.`` stay, everything else and a leading dot are percent-encoded
    (RFC 3986). A name too long for a file ends in ``+`` and its SHA-256; no other name holds a ``+``.
    Raises ValueError for an empty name.
    """
    if not name:
        raise ValueError("a file needs a name that is not empty")
    stem = quote(name, safe="").replace("~", "%7E")
    if stem.startswith("."):
        stem = "%2E" + stem[1:]
    if len(stem) > _LONGEST_STEM:
        digest = hashlib.sha256(name.encode()).hexdigest()
        stem = f"{stem[: _LONGEST_STEM - len(digest) - 1]}+{digest}"
    return stem + suffix


class StoreError(OSError):
    """An object store is gone or says no. The text is ours: the library's and the server's may hold credentials."""


class Store(Protocol):
    """Holds files by name. Its methods raise OSError."""

    async def get(self, name: str) -> bytes | None:
        """The content; None when there is no such file."""

    async def create(self, name: str, content: bytes) -> bool:
        """Creates the file, whole and durable. False when there is one, which stays as it is."""

    def place(self, name: str) -> str:
        """The file's path or URL."""


def open_store(path: str | Path) -> Store:
    """The directory or the object store at this path or URL. Raises ValueError, saying what is wrong with it.

    Nothing is asked of an object store yet.
    """
    return ObjectStore(path) if isinstance(path, str) and "://" in path else Directory(Path(path))


_LEFT_OVER: Final = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_LEFT_OVER_AGE: Final = 600.0
"""Seconds after which a temporary file is a dead process'. A living one needs its file for a moment."""


class Directory:
    """A folder on a file system with hard links. Opening it removes what a crash left in it."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError("is no directory that exists, and no URL of an object store, such as s3://bucket/prefix")
        self._folder = folder.resolve()
        try:
            self._sweep()
        except OSError as error:
            raise ValueError(f"left-over temporary files cannot be removed: {error}") from None

    async def get(self, name: str) -> bytes | None:
        return await asyncio.to_thread(self._get, name)

    async def create(self, name: str, content: bytes) -> bool:
        return await asyncio.to_thread(self._create, name, content)

    def place(self, name: str) -> str:
        return str(self._folder / name)

    def _get(self, name: str) -> bytes | None:
        try:
            content = (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None
        self._make_durable()  # the process that created it may have died before it did
        return content

    def _create(self, name: str, content: bytes) -> bool:
        temporary = self._folder / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # A rename would replace the file that another process creates meanwhile.
            os.link(temporary, self._folder / name)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise OSError(
                    error.errno, "the file system has no hard links; use another", str(self._folder)
                ) from None
            raise
        finally:
            temporary.unlink(missing_ok=True)
        self._make_durable()
        return True

    def _make_durable(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _sweep(self) -> None:
        before = time.time() - _LEFT_OVER_AGE
        for file in self._folder.iterdir():
            try:
                if _LEFT_OVER.fullmatch(file.name) and file.lstat().st_mtime < before:
                    file.unlink()
            except FileNotFoundError:  # another process removed it
                continue


_ENVIRONMENT: Final = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
"""The object stores, by the scheme of their URLs, and how their settings in the environment begin."""

_RETRY_TIME: Final = timedelta(seconds=10)
"""The library's own attempts. Beyond them the worker tries again, and says so."""

_STATUS: Final = re.compile(r"status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>(\w{1,64})</Code>")


class ObjectStore:
    """A bucket of S3, Google Cloud Storage or Azure (and what speaks like them), with what is in the environment."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in _ENVIRONMENT:
            raise ValueError(f"{parts.scheme}:// is none of {', '.join(f'{scheme}://' for scheme in _ENVIRONMENT)}")
        if parts.netloc != parts.hostname or parts.query or parts.fragment:
            raise ValueError(
                f"is no URL of the form {parts.scheme}://bucket/prefix; "
                f"credentials belong into the environment ({_ENVIRONMENT[parts.scheme]}...)"
            )
        try:
            import obstore
        except ImportError:
            raise ValueError("needs the package obstore: pip install 'pgbridge[objectstore]'") from None
        self._url = url.rstrip("/")
        self._variables = f"{_ENVIRONMENT[parts.scheme]}..."
        try:
            self._store = obstore.store.from_url(
                self._url,
                # No client_options: any would put those of the environment, such as AWS_ALLOW_HTTP, out of action.
                retry_config={"max_retries": 3, "retry_timeout": _RETRY_TIME},
            )
        except (obstore.exceptions.BaseError, ValueError):
            raise ValueError(
                f"{self._url} cannot be opened: what the environment says ({self._variables}) is incomplete or wrong"
            ) from None

    async def get(self, name: str) -> bytes | None:
        try:
            found = await self._store.get_async(name)
            return bytes(await found.bytes_async())
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001 - each is told without its text, which may hold credentials
            raise self._told("read", name, error) from None

    async def create(self, name: str, content: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError

        try:
            await self._store.put_async(
                name,
                content,
                mode="create",
                attributes={"Content-Type": "application/pdf"},
                use_multipart=False,
            )
        except AlreadyExistsError:
            return False
        except Exception as error:  # noqa: BLE001 - as above
            raise self._told("write", name, error) from None
        return True

    def place(self, name: str) -> str:
        return f"{self._url}/{name}"

    def _told(self, what: str, name: str, error: Exception) -> StoreError:
        text = str(error)
        said = [found[1] for found in (_STATUS.search(text), _CODE.search(text)) if found]
        match type(error).__name__:
            case "FileNotFoundError":
                why = "there is no such bucket, or it lies elsewhere"
            case "PermissionDeniedError":
                why = "these credentials may not; they need the rights to read, list and create objects"
            case "UnauthenticatedError":
                why = f"the credentials ({self._variables}) are wrong or have expired"
            case _ if "169.254.169.254" in text or "metadata.google.internal" in text:
                why = f"there are no credentials in the environment ({self._variables}), and the machine has none"
            case _ if "builder error" in text:
                why = f"a plain http:// endpoint needs {_ENVIRONMENT[urlsplit(self._url).scheme]}ALLOW_HTTP=true"
            case _ if said:
                why = "the object store has a problem"
            case _:
                why = f"no answer; check network and endpoint ({self._variables})"
        return StoreError(f"cannot {what} {self.place(name)}: {why}{f' ({chr(32).join(said)})' if said else ''}")
