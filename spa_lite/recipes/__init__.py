"""Shipped recipes (what the method does) and scales (how big it is): YAML files of what differs from the defaults."""
