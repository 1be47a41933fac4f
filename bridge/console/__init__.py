"""The web console: the whole way at a glance, in a browser.

`server` runs it, `app` puts it together, `access` says who may what, and `pages` which pages there are, one file each.
A page is rendered by the server and works without JavaScript. Its live part is rendered again and sent whenever
`reader`, the one reader of the database's state in this process, has looked. There is no SQL here: what pages show
comes from the functions that the commands use.
"""
