"""What is left, what was lost, and what follows: statistics, metrics, audit, report."""

if not __name__.startswith("unlearn."):
    raise ImportError("the folder evaluations/ is installed as 'unlearn.evaluations'; import that")
