"""Pages and parts of pages, for jinja2 with autoescape."""
