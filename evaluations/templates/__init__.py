"""The HTML templates of the report."""
