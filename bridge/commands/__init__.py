"""What an operator does: one file a verb of `pgbridge`, loaded when the verb is called.

Each file reads from the work to the words: plain async functions first, and last the click command that calls them
and prints what they return. `dead` and `replay` share `republish`, which publishes events again.
"""
