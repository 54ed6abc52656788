"""Tuned settings, one YAML file each, for `unlearn run --config`."""
