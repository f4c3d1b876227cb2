"""One file per command: `run(args)` does it and returns a plain dictionary, `show(result)` says
it in words.
"""
