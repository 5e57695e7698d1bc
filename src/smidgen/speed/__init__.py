"""Going faster: what lies below the lowest edit, computed once per example and kept; examples packed into rows."""
