"""The base of every model: frozen, strict about keys, and able to read secrets from files."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, SecretStr, model_validator


class Model(BaseModel):
    """Frozen, and an unknown key is an error: a typing mistake must never be a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _read_secret_files(cls, data: Any) -> Any:
        """Every secret `x` may be given as `x_file`, the path of a file that holds it."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for name, field in cls.model_fields.items():
            if field.annotation is not SecretStr or f"{name}_file" not in data:
                continue
            if name in data:
                raise ValueError(f"{name}_file: is given beside {name}; keep one of the two")
            path = data.pop(f"{name}_file")
            try:
                data[name] = Path(path).read_text(encoding="utf-8").rstrip("\n")
            except (OSError, TypeError) as error:
                said = error.strerror if isinstance(error, OSError) else "is no path"
                raise ValueError(f"{name}_file: the secret file {path!r} cannot be read: {said}") from None
        return data
