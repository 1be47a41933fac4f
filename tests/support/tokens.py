"""Google's part in a login: a key of a service account, and a server that gives tokens for it, or refuses."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from tests.support.certificates import self_signed

Answer = tuple[int, dict[str, Any]]
"""HTTP status, and the JSON of the body."""

TOKEN: Final[Answer] = (200, {"access_token": "hunter2", "expires_in": 3600, "token_type": "Bearer"})
REFUSED: Final[Answer] = (400, {"error": "invalid_grant", "error_description": "Invalid JWT Signature."})


@asynccontextmanager
async def token_server(status: int, answer: dict[str, Any]) -> AsyncIterator[str]:
    """The URL of a server that answers every request for a token in this way."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        await reader.readexactly(int(head.partition("content-length: ")[2].partition("\r\n")[0]))
        body = json.dumps(answer).encode()
        writer.write(
            b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b"
            % (status, len(body), body)
        )
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/token"


def service_account(folder: Path, token_uri: str) -> str:
    """The JSON of a service account key, whose tokens come from `token_uri`."""
    _, key = self_signed(folder / "account")
    return json.dumps(
        {
            "type": "service_account",
            "client_email": "bridge@shop.iam.gserviceaccount.com",
            "private_key": key.read_text(),
            "token_uri": token_uri,
        }
    )
