"""What tests ask of AsyncAPI documents: AsyncAPI's own parser, and validators of what stands in them."""

import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, Final

import pytest
from jsonschema import Draft7Validator, FormatChecker

from tests.support.environment import ROOT

_MODULES: Final = ROOT / "build" / "npm" / "node_modules"

_RFC3339: Final = re.compile(
    r"\d{4}-(0[1-9]|1[0-2])-([0-2]\d|3[01])T([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d+)?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
)


def _is_date_time(text: object) -> bool:
    return not isinstance(text, str) or _RFC3339.fullmatch(text) is not None


def _is_date(text: object) -> bool:
    return not isinstance(text, str) or date.fromisoformat(text).isoformat() == text


def _is_uuid(text: object) -> bool:
    return not isinstance(text, str) or str(uuid.UUID(text)) == text


_FORMATS: Final = FormatChecker(formats=())
"""As RFC 3339 and RFC 9562 say, whatever is installed."""
for name, check in {"date-time": _is_date_time, "date": _is_date, "uuid": _is_uuid}.items():
    _FORMATS.checks(name, raises=ValueError)(check)


def parse(*texts: str) -> list[dict[str, Any]]:
    """What AsyncAPI's parser says of each document (`diagnostics`), and what Node.js reads in it (`read`). Skips where
    the parser is not installed."""
    if shutil.which("node") is None or not (_MODULES / "@asyncapi" / "parser").exists():
        if os.environ.get("CI") == "true":
            pytest.fail("CI must have AsyncAPI's parser: deploy/install-test-servers")
        pytest.skip("AsyncAPI's parser is not installed: deploy/install-test-servers")
    done = subprocess.run(
        ["node", str(Path(__file__).with_suffix(".js"))],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "NODE_PATH": str(_MODULES)},
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def faults(document: dict[str, Any], schema: dict[str, Any], value: object) -> Sequence[str]:
    """Why a value is not as a schema of the document says."""
    # References of the schema lead from the top of the document.
    whole = {"allOf": [schema], "components": document["components"]}
    Draft7Validator.check_schema(whole)
    validator = Draft7Validator(whole, format_checker=_FORMATS)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]
