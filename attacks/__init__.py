"""Who tries to get the forgotten data back: signals, membership inference, extraction."""

if not __name__.startswith("unlearn."):
    raise ImportError("the folder attacks/ is installed as 'unlearn.attacks'; import that")
