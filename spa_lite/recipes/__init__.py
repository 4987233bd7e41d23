"""Shipped recipes (what the method does) and scales (how big it is), as YAML files of settings that differ from the defaults."""
