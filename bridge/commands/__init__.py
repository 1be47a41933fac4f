"""What an operator does: install and upgrade the schema, check, look, and mend.

Each module is one of these tasks as plain functions; `bridge.cli` gives them words and prints what they return.
"""
