"""That a person has paused a sink or a worker, as `bridge.pause` has it."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing new is taken until a person says so."""

    since: datetime
    who: str
    why: str
    """Empty where no reason was given."""

    @property
    def words(self) -> str:
        """For logs and `/health`."""
        return f"since {self.since:%Y-%m-%d %H:%M:%S} UTC, by {self.who}{f': {self.why}' if self.why else ''}"
