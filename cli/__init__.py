"""The command line: parse, call, print."""

if not __name__.startswith("unlearn."):
    raise ImportError("the folder cli/ is installed as 'unlearn.cli'; import that")
