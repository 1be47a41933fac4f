"""`channels.require_prefix`: what any role may send is known by its name."""

from pathlib import Path

import pytest

from bridge.errors import SettingsError
from bridge.settings import load

TEXT = """
name = "shop"
[postgres]
dsn = "postgresql://bridge@db/shop"
[channels]
listen = ["open_orders", "{channel}"]
require_prefix = "open_"
[sinks.events]
type = "nats"
url = "nats://broker"
[[routes]]
topic = "#"
sink = "events"
"""


def test_a_channel_without_the_required_prefix_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "bridge.toml"
    file.write_text(TEXT.format(channel="stock"))
    with pytest.raises(SettingsError) as refused:
        load(file, environ={})
    assert "channels.listen: 'stock' does not begin with channels.require_prefix, 'open_'" in str(refused.value)


def test_channels_with_the_required_prefix_are_listened_to(tmp_path: Path) -> None:
    file = tmp_path / "bridge.toml"
    file.write_text(TEXT.format(channel="open_stock"))
    channels = load(file, environ={}).channels
    assert channels is not None
    assert channels.listen == ["open_orders", "open_stock"]
