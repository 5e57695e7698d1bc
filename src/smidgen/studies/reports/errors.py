"""What goes wrong in a report."""

from smidgen.common.errors import SmidgenError


class ReportError(SmidgenError):
    """A report that cannot be made: a package is missing, or a section's numbers do not fit together."""
