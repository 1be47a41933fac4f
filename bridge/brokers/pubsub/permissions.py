"""What these credentials may do, as the service says it to them (TestIamPermissions).

Anybody may ask, and only for himself: what Pub/Sub's own service agent may do, which forwards what a worker does not
settle, nobody else is told. The emulator knows no permissions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bridge.brokers.pubsub.connection import Connection
from bridge.errors import PrivilegeError


@dataclass(frozen=True, slots=True)
class Need:
    """Something that a process must be able to do."""

    verb: str
    kind: Literal["topic", "subscription"]
    name: str
    """The full one."""
    permission: str
    role: str
    """The smallest of Google's that has it."""

    def __str__(self) -> str:
        return f"{self.verb} the {self.kind} {self._short}"

    @property
    def grant(self) -> str:
        """The command that gives it."""
        project = self.name.split("/")[1]
        return (
            f"gcloud pubsub {self.kind}s add-iam-policy-binding {self._short} --project={project} "
            f"--member=serviceAccount:... --role={self.role}"
        )

    @property
    def _short(self) -> str:
        return self.name.rpartition("/")[2]


def publish_to(topic: str) -> Need:
    """To publish to the topic of this full name."""
    return Need("publish to", "topic", topic, "pubsub.topics.publish", "roles/pubsub.publisher")


def consume(subscription: str) -> Need:
    """To pull from the subscription of this full name, and to settle what comes."""
    return Need("consume", "subscription", subscription, "pubsub.subscriptions.consume", "roles/pubsub.subscriber")


async def lacking(connection: Connection, needs: Sequence[Need]) -> list[Need]:
    """Those that these credentials do not have. Raises what `Connection.call` raises."""
    return [need for need in needs if not await connection.allowed(need.name, need.permission)]


async def require(connection: Connection, needs: Sequence[Need]) -> list[str]:
    """Whether these credentials have all of them. Returns what was found, in words.

    Raises PrivilegeError, which names what is lacking and the commands that grant it, and what `lacking` raises.
    """
    if lacks := await lacking(connection, needs):
        raise PrivilegeError(
            f"{connection.at('credentials')} does not permit these credentials to {' and to '.join(map(str, lacks))}. "
            f"Run: {'; '.join(need.grant for need in lacks)}"
        )
    if connection.emulated:
        return ["the emulator knows no permissions"]
    return [f"may {need}" for need in needs]
