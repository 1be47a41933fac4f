"""PostgreSQL as the daemons and commands see it: connections, the schema, status, pruning."""
