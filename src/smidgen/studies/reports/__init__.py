"""Results as tables, JSON and one self-contained HTML page."""
