"""A stand-in for the arena site and a Python twin of the userscript, for `--demo` and for the tests.

`contract.py` holds the site's rules as pure functions, `arena.py` serves them as a web site, and `twin.py`
plays the browser tab with `bridge.user.js` in it and the person in front of it. Nothing here talks to the
real site.
"""
