"""What `pgbridge init` writes for a worker that ships with pgbridge, found through the group ``pgbridge.templates``."""

from typing import Final

SHIPPED: Final = {
    "invoices": """\
handler = "workers.invoices:render"
reply = "shop.invoice_rendered"              # a SQL function of yours: (event_id uuid, result jsonb)
options = { path = "/var/lib/pgbridge/invoices" }
""",
}
"""By the worker's name, the lines of its table."""
